"""From the scores of any criterion to a pruning: the best of each layer, of all layers, or layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from moe_evo.errors import ConfigError, ModelError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import SearchSpace

Scores = npt.NDArray[np.float64]


def pruning_by(scores: Sequence[Scores], space: SearchSpace) -> Genome:
    """The pruning of `space` that keeps the experts with the highest scores; the lower number wins a tie.

    scores: (E,) a MoE layer. Layers that share genes keep what has the highest sum of scores in all of
    them, and a group-limited router keeps the best of each of its groups. Raises ModelError for NaN scores, which
    overflowing outputs of a model cause.
    """
    return pruning_progressively(lambda pruned, layer: scores[layer], space)


def pruning_progressively(scores: Callable[[Genome, int], Scores], space: SearchSpace) -> Genome:
    """As `pruning_by`, with scores that may depend on what the layers before keep.

    scores: called with a genome whose layers before this one are pruned and the number of a MoE layer; returns (E,).
    """

    def choose(pruned: Genome, group: int) -> list[int]:
        numbers = space.layer_groups[group]
        return _best(np.sum([checked(scores(pruned, layer), layer) for layer in numbers], axis=0), space, group)

    return chosen_progressively(choose, space)


def chosen_progressively(choose: Callable[[Genome, int], Iterable[int]], space: SearchSpace) -> Genome:
    """Prune layer group after layer group, each with the layers before it already pruned.

    choose: called with a genome whose layers before this group are pruned and the group's number; returns what is kept.
    """
    layers = list(space.shape.identity().layers)
    for group, numbers in enumerate(space.layer_groups):
        experts = sorted(choose(Genome(tuple(layers)), group))
        for layer in numbers:
            layers[layer] = LayerGenome.from_kept(experts, space.shape.num_experts[layer], space.top_k[layer])
    return Genome(tuple(layers))


def pruning_globally(scores: Sequence[Scores], space: SearchSpace) -> Genome:
    """Keep the experts with the largest scores of the whole model, as many in all as `space` keeps.

    scores: (E,) a MoE layer. Each layer's are divided by the sum of their absolute values, so that layers can be
    compared. Every layer keeps at least as many as a token uses. Raises ConfigError for a group-limited router.
    """
    check_global(space)
    shape = space.shape
    shares = [checked(one, layer) / max(np.abs(one).sum(), 1e-300) for layer, one in enumerate(scores)]
    orders = [np.argsort(-one, kind="stable") for one in shares]
    fewest = [max(top_k, shape.min_kept_per_group) for top_k in space.top_k]
    kept = [list(order[:least]) for order, least in zip(orders, fewest, strict=True)]
    left = sum(space.num_kept) - sum(fewest)
    rest = [
        (-shares[layer][expert], layer, expert)
        for layer, (order, least) in enumerate(zip(orders, fewest, strict=True))
        for expert in order[least:]
    ]
    for _, layer, expert in sorted(rest)[:left]:
        kept[layer].append(expert)
    return Genome.from_kept(kept, shape.num_experts, space.top_k)


def check_global(space: SearchSpace) -> None:
    """Raise ConfigError where layers cannot keep different numbers of any experts."""
    if space.shape.num_expert_groups > 1:
        raise ConfigError(
            f"--allocation: got 'global', but {space.shape.family} chooses groups of experts, which must stay equal; "
            "use 'uniform'"
        )


def checked(scores: Scores, layer: int) -> Scores:
    if np.isfinite(scores).all():
        return scores
    expert = int(np.flatnonzero(~np.isfinite(scores))[0])
    raise ModelError(
        f"MoE layer {layer}: expert {expert} scores {scores[expert]}, expected a finite number; "
        "load the model in bfloat16 or float32, or use other prompts"
    )


def _best(scores: Scores, space: SearchSpace, group: int) -> list[int]:
    """The best unused expert for each slot among those that the slot may keep."""
    kept: list[int] = []
    for slot in range(space.num_kept[space.layer_groups[group][0]]):
        free = [expert for expert in space.expert_group(group, slot) if expert not in kept]
        kept.append(max(free, key=lambda expert: (scores[expert], -expert)))
    return sorted(kept)
