"""Many genomes over one batch for the price of what they do not share.

Genomes are a tree over the model's MoE blocks: every distinct beginning is computed once, hidden states
branch where genomes differ, and a child of a recent genome starts where it differs from it. The last
block and the head see the tokens that are scored, and no others. What all rows of a task begin with, their
trunk, is read once a beginning: the task's batches are handed its keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_evo.config import EvaluationConfig
from moe_evo.evaluation.packing import ALL, Packing
from moe_evo.evaluation.stages import Stages
from moe_evo.evaluation.states import StateCache
from moe_evo.evaluation.walk import Walk
from moe_evo.genome import Genome
from moe_evo.models.library import LIBRARY_ERRORS
from moe_evo.models.merged_cache import half_of_free_gib
from moe_evo.models.past import KeyValues
from moe_evo.models.view import TOLERANCES, MoEModel, relative_difference
from moe_evo.tasks.base import ForwardBatch

_NUM_TRIED = 8  # tokens of the trunk with which it is tried whether attention takes one


class Engine:
    """Runs genomes through one model, with the states of recent ones in `states`.

    reads_trunks: whether batches may have trunks, and `read` may be called.
    """

    def __init__(self, model: MoEModel, states: StateCache, *, reads_trunks: bool = True) -> None:
        self.model = model
        self.states = states
        self.reads_trunks = reads_trunks and model.reads_trees and not model.is_spread
        self._stages = Stages(model, states)

    def run(
        self,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        emit: Callable[[int, Tensor], None],
        *,
        copies: int = 1,
        keep: bool = True,
        packing: Packing = ALL,
    ) -> None:
        """Call `emit` once for every genome, in any order, with its number and its logits (M, V).

        copies: so many genomes have room in a layer together; packing: how many of them do go together.
        keep: the batch will come again, so its states are worth keeping.
        """
        with self._stages.ready_for(genomes):
            Walk(self._stages, batch, genomes, emit, copies=copies, packing=packing, keep=keep).run()

    def read(
        self,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        *,
        copies: int = 1,
        keep: bool = True,
        packing: Packing = ALL,
    ) -> list[tuple[KeyValues, ...]]:
        """For each genome what its decoder layers read, (P, heads, C + T, size) each; options as for `run`."""
        found: dict[int, tuple[KeyValues, ...]] = {}
        with self._stages.ready_for(genomes):
            walk = Walk(
                self._stages, batch, genomes, found.__setitem__, copies=copies, packing=packing, keep=keep, reads=True
            )
            walk.run()
        return [found[number] for number in range(len(genomes))]

    def forget(self) -> None:
        """Give back the memory of all that is kept."""
        self._stages.forget()

    @torch.inference_mode()
    def reproduces_the_model(self, num_trunk: int = 0) -> bool:
        """Whether the halves of the layers add up to the untouched model: on random tokens, so many in a trunk."""
        tokens = self.model.random_tokens()
        tokens[:, :num_trunk] = tokens[:1, :num_trunk].clone()
        own = tokens[:, num_trunk:]
        node = torch.arange(own.shape[1], device=tokens.device).expand_as(own)
        ones = torch.ones_like(own)
        whole = ForwardBatch(
            own, node + num_trunk, ones * own.shape[1], ones, ones.bool(), ones, ones.bool(), ones[..., None],
            np.zeros(len(own), dtype=np.int64), np.zeros((len(own), 1), dtype=np.int64),
            trunk=tuple(tokens[0, :num_trunk].tolist()),
        )  # fmt: skip
        expected = self.model.language_model(input_ids=tokens, use_cache=False).logits[:, num_trunk:].flatten(0, 1)
        found: list[Tensor] = []
        try:
            self.run(whole, [self.model.shape.identity()], lambda _, logits: found.append(logits), keep=False)
        except LIBRARY_ERRORS:
            return False
        return relative_difference(found[0], expected) <= TOLERANCES[self.model.dtype]


def engine_for(model: MoEModel, config: EvaluationConfig, states: StateCache | None = None) -> Engine | None:
    """An engine, or None where genomes have to be run one after the other; the same on all ranks.

    states: kept by other engines of the model; by default as the config says.

    That is so where ranks run different examples (how many layers each has to run differs), where the config
    says so, and where the model's layers do not add up to the model when they are run in halves, which is
    tried here, as is whether they take trunks.
    """
    if not config.share_layers or model.splits_examples:
        return None
    trial = Engine(model, StateCache(0, model.device))  # leaves no states behind
    if not all(model.ranks.gather(trial.reproduces_the_model())):
        return None
    reads_trunks = trial.reads_trunks and trial.reproduces_the_model(_NUM_TRIED)
    if states is None:
        gib = half_of_free_gib(model.device) / 2 if config.state_cache_gib is None else config.state_cache_gib
        device = torch.device("cpu") if config.state_device == "cpu" else model.device
        states = StateCache(min(model.ranks.gather(gib)), device)
    return Engine(model, states, reads_trunks=all(model.ranks.gather(reads_trunks)))
