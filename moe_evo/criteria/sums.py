"""Observations of a model's experts: sums, which add across batches, ranks, gangs and tasks.

Plain numpy values without torch, so that they can be sent, stored and scored in any process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from moe_evo.errors import ObservationError

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerSums:
    """Sums of one MoE layer. Every field is a float64 array, which is frozen here."""

    def __post_init__(self) -> None:
        for name in self.names():
            sums = np.array(getattr(self, name), dtype=np.float64)
            sums.setflags(write=False)
            object.__setattr__(self, name, sums)

    def __add__(self, other: Self) -> Self:
        for name in self.names():
            mine, theirs = getattr(self, name).shape, getattr(other, name).shape
            if mine != theirs:
                raise ObservationError(f"observations: {name} of shape {mine} and of {theirs}; add those of one model")
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in self.names()))

    def __mul__(self, times: float) -> Self:
        return type(self)(*(times * getattr(self, name) for name in self.names()))

    def __reduce__(self) -> tuple[Any, tuple[Sums, ...]]:
        return (type(self), tuple(getattr(self, name) for name in self.names()))  # frozen again when read

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


@dataclass(frozen=True, eq=False)
class LayerObservation(LayerSums):
    """Sums over A_j, the tokens that one MoE layer routes to its expert j; each (E,).

    tokens: #A_j. gates: of g_j, the weight that the model gives the expert's output. norms: of ||f_j||_2,
    the output before it is multiplied with g_j. gated_norms: of g_j ||f_j||_2. squared_norms: of ||f_j||_2^2.
    turned_norms: of g_j ||f_j||_2 (1 - cos(h, h + y)), with h the residual stream that all the routed experts
    of the token add y to.
    """

    tokens: Sums
    gates: Sums
    norms: Sums
    gated_norms: Sums
    squared_norms: Sums
    turned_norms: Sums


@dataclass(frozen=True, eq=False)
class LayerOutputs(LayerSums):
    """Sums over A_j, the tokens that one MoE layer routes to its expert j.

    tokens: (E,) #A_j. gates: (E,) of g_j. squared_norms: (E,) of ||f_j||_2^2, f_j the output before it is
    multiplied with g_j. outputs: (E, H) of f_j.
    """

    tokens: Sums
    gates: Sums
    squared_norms: Sums
    outputs: Sums


@dataclass(frozen=True, eq=False)
class LayerTrials(LayerSums):
    """How much one MoE layer's output changes if only some of its experts are left, for N choices S of those.

    num_tokens: () all tokens. errors: (N,) sum over them of ||y - y^S||_2^2, y the routed experts' output and y^S
    that with S alone.
    """

    num_tokens: Sums
    errors: Sums


@dataclass(frozen=True, eq=False)
class LayerRatios(LayerSums):
    """counts: (B,) tokens of one MoE layer whose second gate is b / B to (b + 1) / B of their first."""

    counts: Sums


@dataclass(frozen=True, eq=False)
class LayerRouters(LayerSums):
    """Lengths ||w_j||_2 of one MoE layer's router rows, each (E,): in the model, and in the one it was tuned from."""

    tuned: Sums
    base: Sums


@dataclass(frozen=True, eq=False)
class LayerLogits(LayerSums):
    """Of the logits z of one MoE layer's router over all T tokens.

    tokens: () T. products: (E, E) sum of z_i z_j.
    """

    tokens: Sums
    products: Sums


@dataclass(frozen=True, eq=False)
class LayerAllOutputs(LayerSums):
    """Of the outputs f_j of every expert of one MoE layer for all T tokens, routed to it or not.

    tokens: () T. outputs: (E, H) sum of f_j. cosines: (E, E) sum of cos(f_i, f_j); 0 where an output is zeros.
    """

    tokens: Sums
    outputs: Sums
    cosines: Sums


@dataclass(frozen=True, eq=False)
class LayerWeights(LayerSums):
    """Of the N weights of each expert of one MoE layer: gate, up and down together, without biases.

    absolute: (E,) ||W||_1. squared: (E,) ||W||_2^2. num_weights: () N.
    """

    absolute: Sums
    squared: Sums
    num_weights: Sums


KINDS: dict[str, type[LayerSums]] = {
    one.__name__: one
    for one in (
        LayerObservation,
        LayerOutputs,
        LayerTrials,
        LayerRatios,
        LayerRouters,
        LayerWeights,
        LayerLogits,
        LayerAllOutputs,
    )
}
"""The kinds of sums in a file of observations, by name."""

L = TypeVar("L", bound=LayerSums)


@dataclass(frozen=True, eq=False)
class Observation(Generic[L]):
    """One value for each MoE layer that was observed, in the model's order."""

    layers: tuple[L, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    def __add__(self, other: Observation[L]) -> Observation[L]:
        if len(self.layers) != len(other.layers):
            raise ObservationError(
                f"observations of {len(self.layers)} and of {len(other.layers)} MoE layers; add those of one model"
            )
        return Observation(tuple(map(add, self.layers, other.layers)))

    def __mul__(self, times: float) -> Observation[L]:
        return Observation(tuple(layer * times for layer in self.layers))


def together(observations: Iterable[Observation[L]]) -> Observation[L]:
    """The observation of all data together."""
    return reduce(add, observations)
