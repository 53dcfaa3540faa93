"""NAEE (Lu et al. 2024, arXiv 2402.14800): each layer keeps the experts whose choice changes its output least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_evo.criteria.observer import Observer
from moe_evo.criteria.pruning import checked, chosen_progressively
from moe_evo.criteria.questions import Trials
from moe_evo.criteria.subsets import subsets
from moe_evo.criteria.sums import LayerRatios, LayerTrials, Observation
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import SearchSpace


@dataclass(frozen=True)
class Naee:
    """The argmin over choices S of L(S) = sum over tokens of ||y - y^S||_2^2, y^S routed over S as if exported.

    All choices are tried where there are at most `limit`, else `limit` random ones. The paper adds up Frobenius norms
    batch by batch, which would make the choice depend on how tokens are batched; squares do not, and for a
    single batch the argmin is the same. Layers that share genes keep what has the least sum of losses.
    """

    name: str
    limit: int = 1000
    seed: int = 0

    source = "Lu et al. 2024, arXiv 2402.14800; Lucky-Lance/Expert_Sparsity"

    @property
    def title(self) -> str:
        return f"{self.name} pruning"

    @property
    def description(self) -> str:
        return f"the choice of experts, of at most {self.limit}, that moves the layer's output least"

    def genome(self, observer: Observer, space: SearchSpace) -> Genome:
        layers = observer.about(self._question(space)).layers
        return chosen_progressively(
            lambda pruned, group: self._best(space, group, [layers[layer] for layer in space.layer_groups[group]]),
            space,
        )

    def progressive_genome(self, observer: Observer, space: SearchSpace) -> Genome:
        """Layer after layer, each tried with the layers before it already pruned."""
        question = self._question(space)

        def choose(pruned: Genome, group: int) -> list[int]:
            answers: list[Observation[LayerTrials]] = [
                observer.about(replace(question, genome=pruned, layer=layer)) for layer in space.layer_groups[group]
            ]
            return self._best(space, group, [answer.layers[0] for answer in answers])

        return chosen_progressively(choose, space)

    def _question(self, space: SearchSpace) -> Trials:
        return Trials(num_kept=space.num_kept, top_k=space.top_k, limit=self.limit, seed=self.seed)

    def _best(self, space: SearchSpace, group: int, layers: Sequence[LayerTrials]) -> list[int]:
        """The experts that the layers of a group keep; the first choice wins a tie."""
        numbers = space.layer_groups[group]
        loss = np.sum([checked(one.errors, number) for one, number in zip(layers, numbers, strict=True)], axis=0)
        num_experts, num_kept = space.shape.num_experts[numbers[0]], space.num_kept[numbers[0]]
        choices = subsets(num_experts, num_kept, space.shape.num_expert_groups, self.limit, self.seed)
        return [int(expert) for expert in np.flatnonzero(choices[int(np.argmin(loss))])]


def median_gate_ratio(layer: LayerRatios) -> float:
    """Median over tokens of w_2 / w_1, the second gate over the first; between two bins' edges linear.

    The threshold of NAEE's dynamic skipping: a token whose ratio is below it does without its second expert.
    """
    counts = layer.counts
    if not counts.any():
        return 0.0
    below = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.flatnonzero(np.diff(below) > 0)
    half = below[-1] / 2
    place = int(filled[np.searchsorted(below[filled + 1], half)])
    return float((place + (half - below[place]) / counts[place]) / len(counts))
