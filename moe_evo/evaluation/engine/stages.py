"""The stages of one model, and what is kept of them: plans, beginnings of batches, shared prefixes and states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from moe_evo.evaluation.engine.states import State, StateCache
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.forward.key_values import PastKeyValues
from moe_evo.models.forward.layer_halves import LayerHalves, Start
from moe_evo.models.layer import LayerPlan
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch

_MOST_PLANS = 512  # a plan holds a router's rows; those of the genomes at work are kept, however many
_MOST_STARTS = 64  # a start holds the masks of a batch

SharedPrefix = tuple[int, ...]
"""The tokens of one, see `ForwardBatch.shared_prefix`."""


class Stages:
    """What all traversals of one model share."""

    def __init__(self, model: MoEModel, states: StateCache) -> None:
        self.model = model
        self.layer_halves = LayerHalves(model)
        self.states = states
        self._plans: dict[tuple[int, LayerGenome], LayerPlan | None] = {}
        self._starts: dict[ForwardBatch | SharedPrefix, Start] = {}

    def ready_for(self, genomes: Iterable[Genome]) -> AbstractContextManager[None]:
        """Let the MoE blocks follow any of these genomes."""
        genes = {(stage, gene) for genome in genomes for stage, gene in enumerate(genome.layers)}
        if len(genes | self._plans.keys()) > _MOST_PLANS:
            self._plans = {key: plan for key, plan in self._plans.items() if key in genes}
        plans = [(stage, plan) for stage, gene in genes if (plan := self.plan(stage, gene)) is not None]
        return self.model.ready_for(plans)

    def plan(self, stage: int, gene: LayerGenome) -> LayerPlan | None:
        """What MoE block `stage` does for `gene`."""
        if (stage, gene) not in self._plans:
            self._plans[stage, gene] = self.model.plan(gene, stage)
        return self._plans[stage, gene]

    def start(self, batch: ForwardBatch, *, keep: bool) -> Start:
        """The batch in front of the first layer, with the masks that go along."""
        if batch in self._starts:
            return self._starts[batch]
        return self._started(batch, batch.input_ids, batch.position_ids, batch.ends, batch.counts, keep=keep)

    def prefix_state(self, tokens: SharedPrefix, genes: Sequence[LayerGenome], before: State | None = None) -> State:
        """The state of a shared prefix in front of the MoE block after these genes, with keys and values on the way.

        before: its state one block earlier, where that is at hand. Only in a block of `ready_for`.
        """
        first_genes = tuple(gene.digest for gene in genes)
        kept = self.states.get(tokens, first_genes)
        if kept is not None:
            return kept.to(self.model.device)
        start = self._starts.get(tokens) or self._prefix_start(tokens)
        hidden = start.hidden
        if genes:
            earlier = self.prefix_state(tokens, genes[:-1]) if before is None else before
            plan = self.plan(len(genes) - 1, genes[-1])
            hidden = self.layer_halves.mix(len(genes) - 1, earlier.residual, [plan], start)
        past_key_values = PastKeyValues()
        state = State(self.layer_halves.attend(len(genes), hidden, start, past_key_values), tuple(past_key_values.read))
        self.states.keep(tokens, first_genes, state)
        return state

    def forget(self) -> None:
        """Give back the memory of all that is kept."""
        self.states.clear()
        self._plans.clear()
        self._starts.clear()

    def _prefix_start(self, tokens: SharedPrefix) -> Start:
        input_ids = torch.tensor([tokens], device=self.model.device)
        places, ones = torch.arange(len(tokens), device=input_ids.device)[None], torch.ones_like(input_ids)
        return self._started(tokens, input_ids, places, ones * len(tokens), ones, keep=True)

    def _started(
        self,
        key: ForwardBatch | SharedPrefix,
        input_ids: Tensor,
        position_ids: Tensor,
        ends: Tensor,
        counts: Tensor,
        *,
        keep: bool,
    ) -> Start:
        shared_prefix = key.shared_prefix if isinstance(key, ForwardBatch) else ()
        masks = self.model.attention_masks(position_ids, ends, counts, len(shared_prefix))
        start = self.layer_halves.start(input_ids, {"position_ids": position_ids, "attention_mask": masks})
        size_bytes = sum(one.nbytes for one in (masks.values() if isinstance(masks, dict) else [masks]))
        if keep and _MOST_STARTS * size_bytes < self.states.budget_bytes and len(self._starts) < _MOST_STARTS:
            self._starts[key] = start
        return start
