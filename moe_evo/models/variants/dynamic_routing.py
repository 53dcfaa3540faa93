"""Dynamic routing: a token runs fewer of the experts that it was routed to, by one of two rules.

It holds for the untouched model and for every genome alike, behind the family's own router. No stock architecture
computes it. Here it is only emulated, with weights of 0: no time is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError
from moe_evo.genomes.space import ModelShape
from moe_evo.models.families import Family
from moe_evo.models.routing import RouterOutput


class DynamicRouting(Protocol):
    """A rule by which a token does without some of its experts."""

    option: ClassVar[str]

    def check(self, family: Family, shape: ModelShape) -> None:
        """Raise ConfigError where the rule means nothing for a model."""

    def active(self, layer: int, output: RouterOutput) -> Tensor:
        """Which of its experts each token runs, (T, top_k) bool; one at least. layer: number of the MoE layer."""


@dataclass(frozen=True)
class Skipping:
    """NAEE (arXiv 2402.14800): of two experts the second is skipped where its weight is small.

    thresholds: beta, the share of the first weight below which the second is small; one number, or one a MoE layer. Any
    other number of experts a token is left alone, as a genome may choose it.
    """

    thresholds: float | Sequence[float]

    option: ClassVar[str] = "model.dynamic_skipping"

    def check(self, family: Family, shape: ModelShape) -> None:
        """Raise ConfigError where there is no second expert to skip, or not one threshold a layer."""
        if set(shape.top_k) != {2}:
            raise ConfigError(
                f"{self.option}: skips the second of two experts, but this {shape.family} model uses "
                f"{shape.top_k[0]} a token; use a model of two, or none"
            )
        if not isinstance(self.thresholds, int | float) and len(self.thresholds) != shape.num_layers:
            raise ConfigError(
                f"{self.option}: got {len(self.thresholds)} thresholds, the model has {shape.num_layers} MoE layers"
            )

    def active(self, layer: int, output: RouterOutput) -> Tensor:
        _, weights, _ = output
        active = torch.ones_like(weights, dtype=torch.bool)
        if weights.shape[1] != 2:
            return active
        threshold = self.thresholds if isinstance(self.thresholds, int | float) else self.thresholds[layer]
        second, place = weights.min(dim=-1, keepdim=True)
        return active.scatter(1, place, second >= threshold * weights.max(dim=-1, keepdim=True).values)


@dataclass(frozen=True)
class TopP:
    """Top-p routing (Huang et al. 2024, arXiv 2403.07652, eq. 4), among the top_k experts that the router chose.

    A token runs its most probable experts, as few as have probabilities with a sum of p at least; all, where that sum
    is not reached. Probabilities are the softmax over the logits of all kept experts, whatever the router makes of
    them: with groups of experts or a softmax behind the choice, too.
    """

    p: float

    option: ClassVar[str] = "model.top_p"

    def check(self, family: Family, shape: ModelShape) -> None:
        """Raise ConfigError where a router has no probabilities."""
        if family.scoring == "sigmoid":
            raise ConfigError(
                f"{self.option}: got {self.p:g}, but this {family.model_type} model scores every expert by itself "
                "with a sigmoid, so there are no probabilities to sum; leave it out"
            )

    def active(self, layer: int, output: RouterOutput) -> Tensor:
        logits, weights, index = output
        if self.p == 1:  # only all experts have the sum 1, but rounding can reach it before
            return torch.ones_like(weights, dtype=torch.bool)
        chosen = logits.float().softmax(dim=-1).gather(1, index)
        ordered, places = chosen.sort(dim=-1, descending=True, stable=True)  # not all routers sort what they choose
        before = ordered.cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        return torch.zeros_like(weights, dtype=torch.bool).scatter(1, places, before < self.p)


def dynamic_routing_of(config: ModelConfig) -> DynamicRouting | None:
    """The rule that the config asks for; it allows one at most."""
    if config.top_p is not None:
        return TopP(config.top_p)
    return None if config.dynamic_skipping is None else Skipping(config.dynamic_skipping)


def active_weights(weights: Tensor, active: Tensor, *, renormalises: bool) -> Tensor:
    """Weights (T, top_k) that are 0 where `active` (T, top_k) is False.

    renormalises: those that are left then get the sum that all had, as the router's own weights have a fixed sum.
    Weights of tokens that run all their experts are left as they are, bit for bit.
    """
    left = weights.float() * active
    if renormalises:
        share = left.sum(dim=-1, keepdim=True)
        safe = torch.where(share == 0, 1.0, share)  # weights of mapped probabilities can be 0 or negative
        left = left / safe * weights.float().sum(dim=-1, keepdim=True)
    return torch.where(active.all(dim=-1, keepdim=True), weights, left.to(weights.dtype))
