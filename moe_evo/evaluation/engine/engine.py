"""Many genomes over one batch for the price of what they do not share.

Genomes are a tree over the model's MoE blocks: every distinct beginning is computed once, hidden states
branch where genomes differ, and a child of a recent genome starts where it differs from it. The last
block and the head see the tokens that are scored, and no others. What all rows of a task begin with, their
shared prefix, is read once a beginning: the task's batches are handed its keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moe_evo.evaluation.engine.packing import ALL, Packing
from moe_evo.evaluation.engine.stages import Stages
from moe_evo.evaluation.engine.states import StateCache
from moe_evo.evaluation.engine.traversal import Traversal
from moe_evo.genomes.genome import Genome
from moe_evo.models.forward.key_values import CacheNames, KeyValues
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch


class Engine:
    """Runs genomes through one model, with the states of recent ones in `states`.

    reads_shared_prefixes: whether batches may have shared prefixes, and `read` may be called. reads_prompts: whether
    the model goes on from what was read.
    """

    def __init__(
        self, model: MoEModel, states: StateCache, *, reads_shared_prefixes: bool = True, reads_prompts: bool = True
    ) -> None:
        self.model = model
        self.states = states
        self._stages = Stages(model, states)
        self.reads_shared_prefixes = reads_shared_prefixes and not self.why_no_shared_prefixes
        self.reads_prompts = reads_prompts and self.reads_shared_prefixes

    @property
    def why_no_shared_prefixes(self) -> str:
        """What of this model makes shared prefixes impossible, in words; '' where nothing does."""
        if not self.model.reads_trees:
            return "they need token trees"
        if self.model.is_spread:
            return "the weights lie on several devices"
        return "" if self.cache_names is not None else "the model hands its decoder layers no cache by name"

    @property
    def cache_names(self) -> CacheNames | None:
        """What the model calls a cache of keys and values; None where it takes none."""
        return self._stages.layer_halves.cache_names

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
            Traversal(self._stages, batch, genomes, emit, copies=copies, packing=packing, keep=keep).run()

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
            traversal = Traversal(
                self._stages, batch, genomes, found.__setitem__, copies=copies, packing=packing, keep=keep, reads=True
            )
            traversal.run()
        return [found[number] for number in range(len(genomes))]

    def forget(self) -> None:
        """Give back the memory of all that is kept."""
        self._stages.forget()
