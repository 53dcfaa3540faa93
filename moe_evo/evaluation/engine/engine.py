"""`Engine`: computes the logits of many genomes on one batch, and what they have in common only once.

Genomes form a tree over the model's MoE layers: genomes whose first layers are equal share the hidden states up to
the layer in which they differ. States of recent genomes are kept, so that a child starts where it differs from its
parent. The keys and values of a task's shared prefix are computed once for each node of the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_evo.evaluation.engine.packing import ALL, Packing
from moe_evo.evaluation.engine.reading import Reading
from moe_evo.evaluation.engine.scoring import Scored, Scoring
from moe_evo.evaluation.engine.stages import Stages
from moe_evo.evaluation.engine.states import StateCache
from moe_evo.evaluation.engine.traversal import Traversal
from moe_evo.genomes.genome import Genome
from moe_evo.models.forward.key_values import CacheNames, KeyValues
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch


class Engine:
    """Runs genomes through one model.

    states: the hidden states of recent genomes. reads_shared_prefixes: whether batches may have a shared prefix, and
    `read` may be called. reads_prompts: whether the model can generate from the keys and values that `read` returns.
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
        """Why this model cannot use shared prefixes, in words; '' where it can."""
        if not self.model.reads_trees:
            return "they need token trees"
        if self.model.is_spread:
            return "the weights lie on several devices"
        return "" if self.cache_names is not None else "the model hands its decoder layers no cache by name"

    @property
    def cache_names(self) -> CacheNames | None:
        """The model's own keywords for a cache of keys and values; None where it takes none by keyword."""
        return self._stages.layer_halves.cache_names

    def run(
        self,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        emit: Callable[[int, Scored], None],
        *,
        copies: int = 1,
        keep: bool = True,
        packing: Packing = ALL,
    ) -> None:
        """Call `emit(number, scored)` once for every genome, in any order.

        copies: the most genomes that fit into memory in one forward pass of a layer. packing: how many of those are
        passed together. keep: the batch will be used again, so its states are kept.
        """
        with self._stages.ready_for(genomes):
            purpose = Scoring(self._stages, batch)
            Traversal(self._stages, batch, genomes, purpose, emit, copies=copies, packing=packing, keep=keep).run()

    def read(
        self,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        *,
        copies: int = 1,
        keep: bool = True,
        packing: Packing = ALL,
    ) -> list[tuple[KeyValues, ...]]:
        """For each genome the keys and values of all its decoder layers, (P, heads, C + T, size) each.

        C: tokens of the shared prefix. The options are those of `run`.
        """
        found: dict[int, tuple[KeyValues, ...]] = {}
        with self._stages.ready_for(genomes):
            purpose, emit = Reading(self._stages, batch), found.__setitem__
            Traversal(self._stages, batch, genomes, purpose, emit, copies=copies, packing=packing, keep=keep).run()
        return [found[number] for number in range(len(genomes))]

    def forget(self) -> None:
        """Free the memory of kept states, plans and embedded batches."""
        self._stages.forget()
