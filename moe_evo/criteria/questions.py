"""What one-shot methods ask about a loaded model: plain values that are sent to the process that holds it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

from moe_evo.config.model import ModelConfig
from moe_evo.genomes.genome import Genome


class Question(Protocol):
    """A frozen dataclass that says what is to be observed.

    needs_data: whether it is asked for each task, which `task` names, or only once. key: equal for equal questions.
    """

    needs_data: ClassVar[bool]

    @property
    def task(self) -> str: ...

    @property
    def key(self) -> str: ...


@dataclass(frozen=True)
class OfPrompts:
    """A question about the prompts of one task. A prompt counts once however many answers it has, and padding never.

    genome: what the model computes meanwhile; None is the untouched model. layer: the only MoE layer to observe;
    None is all. part: (i, n) for the i-th of n parts of the examples, or None for all.
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
    """Gates and norms of the experts on the tokens that the router sends them; see `LayerObservation`."""


@dataclass(frozen=True)
class Outputs(OfPrompts):
    """The summed outputs of the experts for their own tokens: (E, H) a layer, so a question of its own."""


@dataclass(frozen=True)
class GateRatios(OfPrompts):
    """The distribution of w_2 / w_1, a token's second gate over its first."""


@dataclass(frozen=True)
class RouterLogits(OfPrompts):
    """Products of the router's logits, of layers that `genome` leaves as they are."""


@dataclass(frozen=True)
class AllOutputs(OfPrompts):
    """The outputs of all experts for every token, of layers that `genome` leaves as they are; computes all experts."""


@dataclass(frozen=True)
class Trials(OfPrompts):
    """How much a layer's output changes when only some of its experts are left; computes all experts for every token.

    Tokens are routed again by the model's own router among the experts that are left, without dynamic routing.
    num_kept: experts left in each MoE layer, in every choice or a sample of them; None is all but one, and trial j
    leaves out expert j. top_k: experts a token then uses in each MoE layer; None is the model's. limit, seed:
    see `subsets`.
    """

    num_kept: tuple[int, ...] | None = None
    top_k: tuple[int, ...] | None = None
    limit: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Routers:
    """The lengths of the routers' rows, in the model and in the checkpoint that it was tuned from.

    Both are read from files. base_hash: of the latter.
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
class Answers:
    """What `genome`, or the untouched model, answers to the examples of a split; first: to so many of each task."""

    needs_data: ClassVar[bool] = False

    task: str = ""
    genome: Genome | None = None
    split: str = "search"
    first: int | None = None

    @property
    def key(self) -> str:
        return _key(self, self.genome, self.split, self.first)


@dataclass(frozen=True)
class Weights:
    """Sums over the experts' weights; see `LayerWeights`."""

    needs_data: ClassVar[bool] = False

    task: str = ""

    @property
    def key(self) -> str:
        return _key(self)


def _key(question: object, *parts: object) -> str:
    digests = (part.digest if isinstance(part, Genome) else "" if part is None else str(part) for part in parts)
    return "|".join([type(question).__name__, *digests])
