"""What one-shot methods ask of a loaded model; plain values that travel to whoever holds the model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

from moe_evo.config.model import ModelConfig
from moe_evo.genomes.genome import Genome


class Question(Protocol):
    """A frozen dataclass. needs_data: whether it is asked of each task, which `task` names, or only once.

    key: equal for equal questions.
    """

    needs_data: ClassVar[bool]

    @property
    def task(self) -> str: ...

    @property
    def key(self) -> str: ...


@dataclass(frozen=True)
class OfPrompts:
    """A question about the prompts of one task. A prompt counts once however many answers it has, and padding never.

    genome: what the model computes meanwhile, or None for the untouched model. layer: the only MoE layer to
    look at, or None for all. part: (i, n) for the i-th of n parts of the examples, or None for all.
    """

    needs_data: ClassVar[bool] = True

    task: str = ""
    split: str = "search"
    genome: Genome | None = None
    layer: int | None = None
    part: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        return _key(self, *(getattr(self, one.name) for one in fields(self)))


@dataclass(frozen=True)
class Routed(OfPrompts):
    """What the experts do with the tokens that the router sends them."""


@dataclass(frozen=True)
class Outputs(OfPrompts):
    """The summed outputs of the experts for their own tokens: (E, H) a layer, so a question of its own."""


@dataclass(frozen=True)
class GateRatios(OfPrompts):
    """How much smaller the second gate of a token is than its first."""


@dataclass(frozen=True)
class RouterLogits(OfPrompts):
    """How alike the router finds the experts, of layers that `genome` leaves as they are."""


@dataclass(frozen=True)
class AllOutputs(OfPrompts):
    """The outputs of all experts for every token, of layers that `genome` leaves as they are; computes all experts."""


@dataclass(frozen=True)
class Trials(OfPrompts):
    """How far a layer's answer moves when only some of its experts are left; computes all experts for every token.

    Routed anew by the model's own router, as if the others had never been there, and without dynamic skipping.
    num_kept, top_k: one number a MoE layer. num_kept: how many are left, in any choice; None is all but one, and
    trial j leaves out expert j. top_k: how many a token then uses; None is the model's. limit, seed: see `subsets`.
    """

    num_kept: tuple[int, ...] | None = None
    top_k: tuple[int, ...] | None = None
    limit: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Routers:
    """The lengths of the routers' rows, in the model and in the checkpoint that it was tuned from.

    Both are read from files. base_hash: tells the latter apart.
    """

    needs_data: ClassVar[bool] = False

    task: str = ""
    tuned: ModelConfig | None = None
    base: ModelConfig | None = None
    base_hash: str = ""

    @property
    def key(self) -> str:
        return _key(self, self.base_hash)


@dataclass(frozen=True)
class Weights:
    """What the experts are made of."""

    needs_data: ClassVar[bool] = False

    task: str = ""

    @property
    def key(self) -> str:
        return _key(self)


def _key(question: object, *parts: object) -> str:
    digests = (part.digest if isinstance(part, Genome) else "" if part is None else str(part) for part in parts)
    return "|".join([type(question).__name__, *digests])
