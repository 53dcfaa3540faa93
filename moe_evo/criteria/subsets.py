"""Choices of experts to try in a layer: all choices of `num_kept` experts, or a random sample of them."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

from moe_evo.errors import ModelError
from moe_evo.genomes.space import ModelShape


def subsets(
    num_experts: int, num_kept: int, num_groups: int = 1, limit: int = 1000, seed: int = 0
) -> npt.NDArray[np.bool_]:
    """(N, E) different choices of `num_kept` experts, True for the kept; equal for equal arguments.

    num_groups: consecutive groups that each keep the same number, where `num_kept` divides by it. limit: the most
    choices; where there are more, a random sample of so many.
    """
    groups = num_groups if num_kept % num_groups == 0 else 1
    size, each = num_experts // groups, num_kept // groups
    if math.comb(size, each) ** groups <= limit:
        of_group = [_one_hot(size, chosen) for chosen in combinations(range(size), each)]
        return np.array([np.concatenate(parts) for parts in product(of_group, repeat=groups)])
    rng = np.random.default_rng([seed, num_experts, num_kept, groups])
    found: dict[bytes, npt.NDArray[np.bool_]] = {}
    while len(found) < limit:
        one = np.concatenate([_one_hot(size, rng.permutation(size)[:each].tolist()) for _ in range(groups)])
        found[one.tobytes()] = one
    return np.array(list(found.values()))


def all_but_one(num_experts: int) -> npt.NDArray[np.bool_]:
    """(E, E): choice j keeps all experts but j."""
    return ~np.eye(num_experts, dtype=np.bool_)


def check_spares_one(shape: ModelShape) -> None:
    """Raise ModelError where some token could not be routed without one expert."""
    for number, top_k in zip(shape.num_experts, shape.top_k, strict=True):
        of_group = number // shape.num_expert_groups
        if of_group <= shape.min_kept_per_group or of_group * shape.top_k_groups <= top_k:
            raise ModelError(
                f"{shape.family} model: uses {top_k} of {number} experts in {shape.num_expert_groups} groups and "
                "can spare none of them; use a method that leaves none out"
            )


def _one_hot(size: int, chosen: tuple[int, ...] | list[int]) -> npt.NDArray[np.bool_]:
    mask = np.zeros(size, dtype=np.bool_)
    mask[list(chosen)] = True
    return mask
