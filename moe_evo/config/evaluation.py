"""The config of evaluation: how genomes are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_evo.config.check import require, require_unset
from moe_evo.config.model import MOST_GIB

FitnessRule = Literal["mean", "worst"]
StateDevice = Literal["model", "cpu"]

_MOST_THREADS = 1024  # torch ends the whole process where the system refuses one


@dataclass(frozen=True)
class EvaluationConfig:
    """How genomes are scored.

    Args:
        fitness: Over several tasks: their 'mean' score or the 'worst' one.
        batch_tokens: Most tokens, padding included, in one forward pass.
        threads: Threads of torch on the CPU; default: one a core.
        share_layers: Compute layers that genomes have in common once, and start the children of recent
            genomes where they differ; false runs every genome from the first layer on.
        pack_tokens: Most tokens of several genomes that go through a layer together; or 'measured': the number that
            is measured to be fastest, at most batch_tokens. Default: 'measured' on a GPU; on the CPU one genome
            at a time, as the last bits of scores then do not depend on which genomes are evaluated together.
        state_cache_gib: Memory for the hidden states of recent genomes. Default: a quarter of what is free
            after loading.
        state_device: Where those states are kept: on the 'model' device, or in the memory of the 'cpu'.
        race: Stop the evaluation of an individual after a fifth or a half of the examples if it is worse than the
            sixth best with this confidence, such as 0.95. Default: all individuals are scored on all examples.
        examples: 'fixed': every candidate is scored on the whole search split. 'fresh': every ten candidates are scored
            on another sample of it, so that a search cannot learn the examples by heart; for large search splits.
        sample_size: Examples of each task in a sample of 'fresh'.
    """

    fitness: FitnessRule = "mean"
    batch_tokens: int = 8192
    threads: int | None = None
    share_layers: bool = True
    pack_tokens: int | Literal["measured"] | None = None
    state_cache_gib: float | None = None
    state_device: StateDevice = "model"
    race: float | None = None
    examples: Literal["fixed", "fresh"] = "fixed"
    sample_size: int = 100

    def __post_init__(self) -> None:
        cache = self.state_cache_gib
        require(cache is None or 0 <= cache <= MOST_GIB, "evaluation.state_cache_gib", cache, f"0 to {MOST_GIB:,}")
        require(self.batch_tokens >= 1, "evaluation.batch_tokens", self.batch_tokens, "1 or more")
        pack = self.pack_tokens
        require(
            pack in (None, "measured") or (isinstance(pack, int) and pack >= 1), "evaluation.pack_tokens", pack,
            "1 or more, or 'measured'",
        )  # fmt: skip
        threads = self.threads
        require(
            threads is None or 1 <= threads <= _MOST_THREADS, "evaluation.threads", threads, f"1 to {_MOST_THREADS:,}"
        )
        confidence = self.race
        require(confidence is None or 0.5 <= confidence < 1, "evaluation.race", confidence, "at least 0.5, below 1")
        require(
            confidence is None or self.fitness == "mean", "evaluation.race", confidence,
            "none, as evaluation.fitness is 'worst': which task is the worst shows at the end",
        )  # fmt: skip
        require(
            confidence is None or self.examples == "fixed", "evaluation.race", confidence,
            "none, as evaluation.examples is 'fresh': who is scored on other examples cannot be a rival",
        )  # fmt: skip
        require(self.sample_size >= 16, "evaluation.sample_size", self.sample_size, "16 or more")
        if self.examples == "fixed":
            require_unset(self, "evaluation", ["sample_size"], "as evaluation.examples is 'fixed'")
        if not self.share_layers:
            unread = ["state_cache_gib", "state_device"]
            require_unset(self, "evaluation", unread, "as evaluation.share_layers is false: no states are kept")

    @property
    def is_fresh(self) -> bool:
        """Whether candidates are scored on samples of the search split."""
        return self.examples == "fresh"


SPEED_ONLY = ("batch_tokens", "threads", "share_layers", "pack_tokens", "state_cache_gib", "state_device")
"""Options of `EvaluationConfig` that do not change what is computed."""
