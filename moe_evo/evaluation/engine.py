"""Many genomes over one batch for the price of what they do not share.

Genomes are a tree over the model's MoE blocks: every distinct beginning is computed once, hidden states
branch where genomes differ, and a child of a recent genome starts where it differs from it. The last
block and the head see the tokens that are scored, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_evo.config import EvaluationConfig
from moe_evo.evaluation.packing import ALL, Packing, size_class
from moe_evo.evaluation.states import Prefix, StateCache
from moe_evo.genome import Genome, LayerGenome
from moe_evo.models.halves import Halves, Start
from moe_evo.models.layer import LayerPlan
from moe_evo.models.library import LIBRARY_ERRORS
from moe_evo.models.merged_cache import half_of_free_gib
from moe_evo.models.view import TOLERANCES, MoEModel, relative_difference
from moe_evo.tasks.base import ForwardBatch

_MOST_PLANS = 512  # a plan holds a router's rows
_MOST_STARTS = 64  # a start holds the masks of a batch

Emit = Callable[[int, Tensor], None]
"""Takes the number of a genome and its logits (M, V)."""


@dataclass(frozen=True, eq=False)
class _Node:
    """Genomes (by their numbers) that begin alike, and the residual stream (P, T, H) after that beginning.

    In front of the last block it has the scored tokens alone, (1, M, H).
    """

    prefix: Prefix
    members: Sequence[int]
    residual: Tensor


@dataclass(frozen=True, eq=False)
class _Branch:
    """The members of a node that have the next gene in common, too."""

    node: _Node
    gene: LayerGenome
    members: Sequence[int]

    @property
    def prefix(self) -> Prefix:
        return (*self.node.prefix, self.gene.digest)


class Engine:
    """Runs genomes through one model, with the states of recent ones in `states`."""

    def __init__(self, model: MoEModel, states: StateCache) -> None:
        self.model = model
        self.halves = Halves(model)
        self.states = states
        self._plans: dict[tuple[int, LayerGenome], LayerPlan | None] = {}
        self._starts: dict[ForwardBatch, Start] = {}

    def run(
        self,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        emit: Emit,
        *,
        copies: int = 1,
        keep: bool = True,
        packing: Packing = ALL,
    ) -> None:
        """Call `emit` once for every genome, in any order.

        copies: so many genomes have room in a layer together; packing: how many of them do go together.
        keep: the batch will come again, so its states are worth keeping.
        """
        genes = {(stage, gene) for genome in genomes for stage, gene in enumerate(genome.layers)}
        plans = [(stage, plan) for stage, gene in genes if (plan := self.plan(stage, gene)) is not None]
        with self.model.ready_for(plans):
            _Walk(self, batch, genomes, emit, copies, packing, keep).run()

    def plan(self, stage: int, gene: LayerGenome) -> LayerPlan | None:
        """What MoE block `stage` does for `gene`."""
        if (stage, gene) not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[stage, gene] = self.model.plan(gene, stage)
        return self._plans[stage, gene]

    def start(self, batch: ForwardBatch, *, keep: bool) -> Start:
        """The batch in front of the first layer, with the masks that go along."""
        start = self._starts.get(batch)
        if start is None:
            masks = self.model.attention_masks(batch.position_ids, batch.ends, batch.counts)
            start = self.halves.start(batch.input_ids, {"position_ids": batch.position_ids, "attention_mask": masks})
            size_bytes = sum(one.nbytes for one in (masks.values() if isinstance(masks, dict) else [masks]))
            if keep and _MOST_STARTS * size_bytes < self.states.budget_bytes and len(self._starts) < _MOST_STARTS:
                self._starts[batch] = start
        return start

    def forget(self) -> None:
        """Give back the memory of all that is kept."""
        self.states.clear()
        self._plans.clear()
        self._starts.clear()

    @torch.inference_mode()
    def reproduces_the_model(self) -> bool:
        """Whether the halves of the layers add up to the untouched model, on random tokens."""
        tokens = self.model.random_tokens()
        node = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        ones = torch.ones_like(tokens)
        whole = ForwardBatch(
            tokens, node, ones * tokens.shape[1], ones, ones.bool(), ones, ones.bool(), ones[..., None],
            np.zeros(len(tokens), dtype=np.int64), np.zeros((len(tokens), 1), dtype=np.int64),
        )  # fmt: skip
        expected = self.model.language_model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
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
    tried here.
    """
    if not config.share_layers or model.splits_examples:
        return None
    if states is None:
        gib = half_of_free_gib(model.device) / 2 if config.state_cache_gib is None else config.state_cache_gib
        device = torch.device("cpu") if config.state_device == "cpu" else model.device
        states = StateCache(min(model.ranks.gather(gib)), device)
    engine = Engine(model, states)
    return engine if all(model.ranks.gather(engine.reproduces_the_model())) else None


class _Walk:
    """One batch on its way through the layers, for all genomes; see `Engine.run`."""

    def __init__(
        self,
        engine: Engine,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        emit: Emit,
        copies: int,
        packing: Packing,
        keep: bool,
    ) -> None:
        self._engine, self._halves, self._states = engine, engine.halves, engine.states
        self._batch = batch
        self._genomes = genomes
        self._emit = emit
        self._copies = copies
        self._packing = packing
        self._keep = keep
        self._last = self._halves.num_stages - 1
        self._start = engine.start(batch, keep=keep)

    def run(self) -> None:
        """From the deepest states that are kept to the logits."""
        starts: dict[Prefix, list[int]] = {}
        for number, genome in enumerate(self._genomes):
            genes = tuple(gene.digest for gene in genome.layers)
            starts.setdefault(genes[: self._states.longest(self._batch, genes)], []).append(number)
        nodes = [_Node(prefix, members, self._state(prefix)) for prefix, members in starts.items()]
        for stage in sorted({len(node.prefix) for node in nodes}):
            self._descend(stage, [node for node in nodes if len(node.prefix) == stage])

    def _state(self, prefix: Prefix) -> Tensor:
        kept = self._states.get(self._batch, prefix)
        if kept is not None:
            return kept.to(self._engine.model.device)
        assert not prefix, "only the beginning of all genomes can be computed without them"
        return self._arrived(prefix, self._halves.attend(0, self._start.hidden, self._start))

    def _arrived(self, prefix: Prefix, residual: Tensor) -> Tensor:
        """The state in front of the block after `prefix`, which is kept."""
        if len(prefix) == self._last and self._halves.ends_with_moe:
            residual = self._scored(residual)
        if self._keep:
            self._states.keep(self._batch, prefix, residual)
        return residual

    def _scored(self, hidden: Tensor) -> Tensor:
        """(1, M, H) of (P, T, H)."""
        return hidden[self._batch.kept][None]

    def _descend(self, stage: int, nodes: Iterable[_Node]) -> None:
        """From in front of MoE block `stage` to the logits, as many branches at a time as fit."""
        by_top_k: dict[int, list[_Branch]] = {}
        for branch in (branch for node in nodes for branch in self._branches(node, stage)):
            by_top_k.setdefault(branch.gene.top_k, []).append(branch)
        for branches in by_top_k.values():
            kind = self._kind(stage, branches)
            while branches:
                number = self._packing.together(kind, min(self._copies, len(branches)))
                self._pass(stage, kind, branches[:number])
                branches = branches[number:]

    def _kind(self, stage: int, branches: Sequence[_Branch]) -> Hashable:
        """Of a pass: its tokens a branch, whether attention comes behind the experts, and whether any are merged."""
        plans = [self._engine.plan(stage, branch.gene) for branch in branches]
        merges = any(plan is not None and plan.expert_merging is not None for plan in plans)
        return (size_class(branches[0].node.residual[..., 0].numel()), stage < self._last, merges)

    def _branches(self, node: _Node, stage: int) -> Iterator[_Branch]:
        members: dict[LayerGenome, list[int]] = {}
        for number in node.members:
            members.setdefault(self._genomes[number].layers[stage], []).append(number)
        return (_Branch(node, gene, some) for gene, some in members.items())

    def _pass(self, stage: int, kind: Hashable, branches: Sequence[_Branch]) -> None:
        plans = [self._engine.plan(stage, branch.gene) for branch in branches]
        with self._packing.timed(kind, len(branches)):
            residual = torch.cat([branch.node.residual for branch in branches])
            hidden = self._halves.mix(stage, residual, plans, self._start)
            if stage < self._last or not self._halves.ends_with_moe:
                hidden = self._halves.attend(stage + 1, hidden, self._start)
        of_branches = zip(branches, hidden.chunk(len(branches)), strict=True)
        if stage < self._last:
            nodes = [_Node(one.prefix, one.members, self._arrived(one.prefix, own)) for one, own in of_branches]
            return self._descend(stage + 1, nodes)
        for branch, own in of_branches:
            logits = self._halves.finish(own[0] if self._halves.ends_with_moe else self._scored(own)[0])
            for number in branch.members:
                self._emit(number, logits)
