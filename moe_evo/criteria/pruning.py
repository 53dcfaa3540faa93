"""From the scores of any criterion to the pruning that keeps the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_evo.errors import ModelError
from moe_evo.genome import Genome
from moe_evo.space import SearchSpace

Scores = npt.NDArray[np.float64]


def pruning_by(scores: Sequence[Scores], space: SearchSpace) -> Genome:
    """The pruning of `space` that keeps the experts with the highest scores; the lower number wins a tie.

    scores: (E,) a MoE layer. Layers that share genes keep what has the highest sum of scores in all of
    them, and a group-limited router keeps the best of each of its groups. Raises ModelError for scores
    that are no numbers, as a model makes them whose outputs overflow.
    """
    for layer, of_layer in enumerate(scores):
        if not np.isfinite(of_layer).all():
            expert = int(np.flatnonzero(~np.isfinite(of_layer))[0])
            raise ModelError(
                f"MoE layer {layer}: expert {expert} scores {of_layer[expert]}, expected a finite number; "
                "load the model in bfloat16 or float32, or use other prompts"
            )
    kept: list[list[int]] = [[] for _ in scores]
    for group, layers in enumerate(space.layer_groups):
        experts = _best(np.sum([scores[layer] for layer in layers], axis=0), space, group)
        for layer in layers:
            kept[layer] = experts
    return Genome.from_kept(kept, space.shape.num_experts, space.top_k)


def _best(scores: Scores, space: SearchSpace, group: int) -> list[int]:
    """The best unused expert for each slot among those that the slot may keep."""
    kept: list[int] = []
    for slot in range(space.num_kept[space.layer_groups[group][0]]):
        free = [expert for expert in space.expert_group(group, slot) if expert not in kept]
        kept.append(max(free, key=lambda expert: (scores[expert], -expert)))
    return sorted(kept)
