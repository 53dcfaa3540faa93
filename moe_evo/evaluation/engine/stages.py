"""`Stages`: what is computed once for one model and used by all genomes: layer plans, embedded batches, states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from moe_evo.evaluation.engine.states import State, StateCache
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.forward.key_values import PastKeyValues
from moe_evo.models.forward.layer_halves import EmbeddedBatch, LayerHalves
from moe_evo.models.layer import LayerPlan
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch

_MOST_PLANS = 512  # a plan holds a router's rows; plans of the genomes that run now are kept even beyond this
_MOST_EMBEDDED = 64  # embedded batches that are kept; each holds its attention masks

SharedPrefix = tuple[int, ...]
"""Token ids, see `ForwardBatch.shared_prefix`."""


class Stages:
    """One model in stages, with the caches that every `Traversal` of it uses.

    Stage i runs from MoE block i - 1 to the input of MoE block i (`LayerHalves`).
    """

    def __init__(self, model: MoEModel, states: StateCache) -> None:
        self.model = model
        self.layer_halves = LayerHalves(model)
        self.states = states
        self._plans: dict[tuple[int, LayerGenome], LayerPlan | None] = {}
        self._embedded: dict[ForwardBatch | SharedPrefix, EmbeddedBatch] = {}

    def ready_for(self, genomes: Iterable[Genome]) -> AbstractContextManager[None]:
        """A block within which the MoE layers may compute any of these genomes."""
        genes = {(stage, gene) for genome in genomes for stage, gene in enumerate(genome.layers)}
        if len(genes | self._plans.keys()) > _MOST_PLANS:
            self._plans = {key: plan for key, plan in self._plans.items() if key in genes}
        plans = [(stage, plan) for stage, gene in genes if (plan := self.plan(stage, gene)) is not None]
        return self.model.ready_for(plans)

    def plan(self, stage: int, gene: LayerGenome) -> LayerPlan | None:
        """How MoE block `stage` computes `gene`; None where it computes the untouched layer."""
        if (stage, gene) not in self._plans:
            self._plans[stage, gene] = self.model.plan(gene, stage)
        return self._plans[stage, gene]

    def embed(self, batch: ForwardBatch, *, keep: bool) -> EmbeddedBatch:
        """The batch as embeddings, with its attention masks; kept for the next genomes where `keep` says so."""
        if batch in self._embedded:
            return self._embedded[batch]
        return self._embed(batch, batch.input_ids, batch.position_ids, batch.ends, batch.counts, keep=keep)

    def prefix_state(self, tokens: SharedPrefix, genes: Sequence[LayerGenome], before: State | None = None) -> State:
        """The state of a shared prefix in front of MoE block `len(genes)`, computed or from the cache.

        genes: of the MoE blocks before. before: the prefix's state one block earlier; default: it is looked up or
        computed. May be called only within a block of `ready_for`.
        """
        first_genes = tuple(gene.digest for gene in genes)
        kept = self.states.get(tokens, first_genes)
        if kept is not None:
            return kept.to(self.model.device)
        embedded = self._embedded.get(tokens) or self._embed_prefix(tokens)
        hidden = embedded.hidden
        if genes:
            earlier = self.prefix_state(tokens, genes[:-1]) if before is None else before
            plan = self.plan(len(genes) - 1, genes[-1])
            hidden = self.layer_halves.mix(len(genes) - 1, earlier.residual, [plan], embedded)
        past_key_values = PastKeyValues()
        state = State(
            self.layer_halves.attend(len(genes), hidden, embedded, past_key_values), tuple(past_key_values.read)
        )
        self.states.keep(tokens, first_genes, state)
        return state

    def forget(self) -> None:
        """Free the memory of kept states, plans and embedded batches."""
        self.states.clear()
        self._plans.clear()
        self._embedded.clear()

    def _embed_prefix(self, tokens: SharedPrefix) -> EmbeddedBatch:
        input_ids = torch.tensor([tokens], device=self.model.device)
        places, ones = torch.arange(len(tokens), device=input_ids.device)[None], torch.ones_like(input_ids)
        return self._embed(tokens, input_ids, places, ones * len(tokens), ones, keep=True)

    def _embed(
        self,
        key: ForwardBatch | SharedPrefix,
        input_ids: Tensor,
        position_ids: Tensor,
        ends: Tensor,
        counts: Tensor,
        *,
        keep: bool,
    ) -> EmbeddedBatch:
        shared_prefix = key.shared_prefix if isinstance(key, ForwardBatch) else ()
        masks = self.model.attention_masks(position_ids, ends, counts, len(shared_prefix))
        embedded = self.layer_halves.embed(input_ids, {"position_ids": position_ids, "attention_mask": masks})
        size_bytes = sum(one.nbytes for one in (masks.values() if isinstance(masks, dict) else [masks]))
        if keep and _MOST_EMBEDDED * size_bytes < self.states.budget_bytes and len(self._embedded) < _MOST_EMBEDDED:
            self._embedded[key] = embedded
        return embedded
