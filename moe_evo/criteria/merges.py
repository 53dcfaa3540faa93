"""One-shot merges: which experts of a layer become one, and with which weights, from what was observed of them.

The router of a merged layer keeps the row of each group's dominant expert. In the papers a token reaches the merged
expert through any member's logit. No stock checkpoint can hold that: its router has one row for each expert, and the
sum of several probabilities is not the probability of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_evo.criteria.grouping import Group, agglomerated, centroid_groups, dominant_groups, spectral_groups
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.pruning import pruning_globally
from moe_evo.criteria.questions import AllOutputs, Routed, RouterLogits
from moe_evo.criteria.scores import reap
from moe_evo.criteria.sums import LayerAllOutputs, LayerLogits, LayerObservation, LayerSums, Sums
from moe_evo.errors import ModelError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import SearchSpace

MSMOE_PAPER = "Li et al. 2024, arXiv 2310.01334; UNITES-Lab/MC-SMoE"


@dataclass(frozen=True)
class Merge:
    """A merge: the experts of a layer are put into `num_kept` groups, and each group becomes its weighted mean.

    questions: what must be observed of a layer; `votes` and `pairs` get the observations of one layer in this order.
    votes: (E,), how much an expert counts: in the choice of dominant experts and in the mean. pairs: (E, E),
    similarities or distances of any two experts, as `grouping` needs them. aligns: whether the paper permutes neurons
    before it merges (`alignment_of` does so by weights; REAM's code compares activations, too). is_uniform: all
    members weigh the same. A group-limited router's groups are merged each by itself.
    """

    name: str
    description: str
    source: str
    questions: tuple[Routed | RouterLogits | AllOutputs, ...]
    votes: Callable[..., Sums]
    pairs: Callable[..., Sums]
    grouping: Callable[[int, Sums, Sums], list[Group]]
    aligns: bool
    is_uniform: bool = False

    @property
    def title(self) -> str:
        return f"{self.name} merging"

    def genome(self, observer: Observer, space: SearchSpace) -> Genome:
        return self._genome(self._known(observer), space, space.num_kept)

    def global_genome(self, observer: Observer, space: SearchSpace) -> Genome:
        """Layers may keep different numbers of experts: those with the largest share of their votes are dominant.

        See `pruning_globally`, also for what it raises.
        """
        known = self._known(observer)
        leading = pruning_globally([self.votes(*answers) for answers in known], space)
        return self._genome(known, space, leading.num_kept)

    def progressive_genome(
        self, observer: Observer, space: SearchSpace, merged: Callable[[int, LayerGenome], None] = lambda *_: None
    ) -> Genome:
        """Layer after layer, each observed with the layers before it already merged.

        merged: called with each merged layer before the next is observed.
        """
        layers = list(space.shape.identity().layers)
        for layer in range(len(layers)):
            before = Genome(tuple(layers))
            asked = (replace(question, genome=before, layer=layer) for question in self.questions)
            answers = [observer.about(question).layers[0] for question in asked]
            layers[layer] = self._layer(answers, space, layer, space.num_kept[layer])
            merged(layer, layers[layer])
        return Genome(tuple(layers))

    def _known(self, observer: Observer) -> list[tuple[LayerSums, ...]]:
        """For each MoE layer the observations for all questions."""
        return list(zip(*(observer.about(question).layers for question in self.questions), strict=True))

    def _genome(self, known: Sequence[Sequence[LayerSums]], space: SearchSpace, num_kept: Sequence[int]) -> Genome:
        layers = zip(known, num_kept, strict=True)
        return Genome(
            tuple(self._layer(answers, space, layer, number) for layer, (answers, number) in enumerate(layers))
        )

    def _layer(self, answers: Sequence[LayerSums], space: SearchSpace, layer: int, num_kept: int) -> LayerGenome:
        for one in answers:
            _check_finite(one, layer)
        votes, pairs = self.votes(*answers), self.pairs(*answers)
        num_parts = space.shape.num_expert_groups
        size = len(votes) // num_parts
        groups = []
        for first in range(0, len(votes), size):
            part = slice(first, first + size)
            for group in self.grouping(num_kept // num_parts, votes[part], pairs[part, part]):
                members = tuple(first + member for member in group.members)
                groups.append(Group(first + group.dominant, members))
        return merged_layer(groups, np.ones_like(votes) if self.is_uniform else votes, space.top_k[layer])


def merged_layer(groups: Sequence[Group], weights: Sums, top_k: int) -> LayerGenome:
    """The layer in which each group is its weighted mean, with the router's row of its dominant expert.

    weights: (E,), none negative. A group whose weights are all zero keeps its dominant expert as it is.
    """
    merging, mapping = np.zeros((2, len(groups), len(weights)), dtype=np.float32)
    for slot, group in enumerate(groups):
        mapping[slot, group.dominant] = 1
        shares = weights[list(group.members)]
        if shares.any():
            merging[slot, group.members] = shares / shares.sum()
        else:
            merging[slot, group.dominant] = 1
    return LayerGenome(merging, mapping, top_k)


def usage(routed: LayerObservation, *_: Any) -> Sums:
    """#A_j"""
    return routed.tokens


def reap_saliency(routed: LayerObservation, *_: Any) -> Sums:
    """Mean over A_j of g_j ||f_j||_2"""
    return reap(routed)


def logit_likeness(_: Any, logits: LayerLogits) -> Sums:
    """(cos(z_i, z_j) + 1) / 2 of the router's logits over all tokens"""
    return (_logit_cosines(logits) + 1) / 2


def mean_output_distances(_: Any, layer: LayerAllOutputs) -> Sums:
    """||e_i - e_j||_2 of e_j, the mean of f_j over all tokens"""
    from scipy.spatial.distance import pdist, squareform

    distances: Sums = squareform(pdist(layer.outputs / max(float(layer.tokens), 1)))
    return distances


def gated_distances(_: Any, logits: LayerLogits, layer: LayerAllOutputs) -> Sums:
    """1 - (mean over all tokens of cos(f_i, f_j) + cos(z_i, z_j)) / 2"""
    return 1 - (layer.cosines / max(float(layer.tokens), 1) + _logit_cosines(logits)) / 2


def _logit_cosines(logits: LayerLogits) -> Sums:
    lengths = np.sqrt(np.diagonal(logits.products))
    scale = np.outer(lengths, lengths)
    cosines: Sums = np.divide(logits.products, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(cosines, -1, 1)


def _check_finite(answers: LayerSums, layer: int) -> None:
    for name in answers.names():
        if not np.isfinite(getattr(answers, name)).all():
            raise ModelError(
                f"MoE layer {layer}: its {name} sum up to numbers that are not finite; "
                "load the model in bfloat16 or float32, or use other prompts"
            )


MERGES: dict[str, Merge] = {
    one.name: one
    for one in (
        Merge(
            "m_smoe", "each expert into the most used one with the most similar router logits, by usage",
            MSMOE_PAPER, (Routed(), RouterLogits()), usage, logit_likeness, dominant_groups, aligns=True,
        ),
        Merge(
            "hc_smoe", "clusters of experts with similar mean outputs (average linkage), by usage",
            "Chen et al. 2025, arXiv 2410.08589; wazenmai/HC-SMoE",
            (Routed(), AllOutputs()), usage, mean_output_distances, agglomerated, aligns=False,
        ),
        Merge(
            "ream", "few large groups around the experts of the highest REAP score, by that score",
            "Jha et al. 2026, arXiv 2604.04356; SamsungSAILMontreal/ream",
            (Routed(), RouterLogits(), AllOutputs()), reap_saliency, gated_distances, centroid_groups, aligns=True,
        ),
        Merge(
            "uncurl", "spectral clusters of experts with similar router logits, by usage",
            "Sarkar et al. 2024, arXiv 2409.01483",
            (Routed(), RouterLogits()), usage, logit_likeness, spectral_groups, aligns=True,
        ),
        Merge(
            "average", "the groups of m_smoe, all members with equal weights",
            f"the averaging baseline of {MSMOE_PAPER} (merge-by-averaging.py)",
            (Routed(), RouterLogits()), usage, logit_likeness, dominant_groups, aligns=False, is_uniform=True,
        ),
    )
}  # fmt: skip
