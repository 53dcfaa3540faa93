"""`Traversal`: one batch through all layers, for many genomes whose first layers may be equal.

Genomes form a tree: a node is a beginning that some of them share. The tree is traversed depth first, so that the
states of few branches are in memory at a time. What comes of it, logits or keys and values, is its `Purpose`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from moe_evo.evaluation.engine.packing import Packing, size_class
from moe_evo.evaluation.engine.stages import Stages
from moe_evo.evaluation.engine.states import FirstGenes, State
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.forward.key_values import KeyValues, stacked_genomes
from moe_evo.models.forward.layer_halves import EmbeddedBatch
from moe_evo.tasks.base import ForwardBatch

Carried = TypeVar("Carried")
Result = TypeVar("Result")
Found = TypeVar("Found", covariant=True)


@dataclass(frozen=True, eq=False)
class Node(Generic[Carried]):
    """Genomes with the same first genes, at the input of the MoE block after those.

    members: their numbers. residual: the residual stream there, (P, T, H); where only scored tokens go on, these
    alone, (1, M, H). active: how many experts each of these tokens ran so far; None without dynamic routing.
    prefix_state: the state of the batch's shared prefix at the same place; None without one.
    carried: what the purpose takes along.
    """

    first_genes: FirstGenes
    members: Sequence[int]
    residual: Tensor
    active: Tensor | None
    prefix_state: State | None
    carried: Carried


@dataclass(frozen=True, eq=False)
class _Branch(Generic[Carried]):
    """The members of a node that have the next gene in common, too."""

    node: Node[Carried]
    gene: LayerGenome
    members: Sequence[int]

    @property
    def first_genes(self) -> FirstGenes:
        return (*self.node.first_genes, self.gene.digest)


class Purpose(Protocol[Carried, Found]):
    """What a traversal is for."""

    @property
    def num_blocks(self) -> int:
        """How many MoE blocks the traversal goes through."""

    def lengths(self, genes: FirstGenes) -> Sequence[int]:
        """The traversal starts after that many first genes, the last number; it needs the states after each of them."""

    @property
    def nothing(self) -> Carried:
        """What is carried before anything is read."""

    def carry(self, before: Carried, prefix_state: State | None, read: tuple[KeyValues, ...]) -> Carried:
        """Add what decoder layers read of the shared prefix and of the batch since the block before."""

    def attend(
        self, stage: int, hidden: Tensor, embedded: EmbeddedBatch, before: Sequence[KeyValues], copies: int
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        """`LayerHalves.attend` behind the keys and values `before`; returns also those of each copy, if wanted."""

    def result(self, node: Node[Carried]) -> Found:
        """What the members of a node at the end of the traversal get."""


class Traversal(Generic[Carried, Result]):
    """From the deepest states that are kept to the end.

    emit: takes the number of a genome and what `purpose` finds. The other options are those of `Engine.run`.
    """

    def __init__(
        self,
        stages: Stages,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        purpose: Purpose[Carried, Result],
        emit: Callable[[int, Result], None],
        *,
        copies: int,
        packing: Packing,
        keep: bool,
    ) -> None:
        self._stages, self._layer_halves, self._states = stages, stages.layer_halves, stages.states
        self._batch = batch
        self._layers = [genome.layers for genome in genomes]
        self._purpose = purpose
        self._emit = emit
        self._copies = copies
        self._packing = packing
        self._keep = keep
        self._embedded = stages.embed(batch, keep=keep)

    def run(self) -> None:
        """Call `emit` for every genome."""
        starts: dict[FirstGenes, list[int]] = {}
        kept: dict[FirstGenes, list[State]] = {}  # before anything is computed, for which others would have to go
        for number, layers in enumerate(self._layers):
            genes = tuple(gene.digest for gene in layers)
            lengths = self._purpose.lengths(genes)
            first_genes = genes[: lengths[-1]]
            starts.setdefault(first_genes, []).append(number)
            if first_genes not in kept:
                found = [self._states.get(self._batch, first_genes[:length]) for length in lengths]
                kept[first_genes] = [state for state in found if state is not None]
        for stage in sorted(set(map(len, starts))):
            beginnings = [first_genes for first_genes in starts if len(first_genes) == stage]
            for first in range(0, len(beginnings), self._copies):  # no more are on the device than go together
                some = beginnings[first : first + self._copies]
                self._descend(stage, [self._begin(one, starts[one], kept.pop(one)) for one in some])

    def _begin(self, first_genes: FirstGenes, members: Sequence[int], kept: Sequence[State]) -> Node[Carried]:
        genes = self._layers[members[0]]
        prefix_state, carried = None, self._purpose.nothing
        if not kept:
            assert not first_genes, "only the beginning of all genomes can be computed without states"
            prefix_state = self._prefix_state(())
            residual, (read,) = self._attend(0, self._embedded.hidden, [prefix_state])
            return self._arrive(first_genes, members, residual, None, prefix_state, carried, read)
        for length, state in enumerate(kept, start=len(first_genes) + 1 - len(kept)):
            prefix_state = self._prefix_state(genes[:length], prefix_state)
            state = state.to(self._stages.model.device)
            carried = self._purpose.carry(carried, prefix_state, state.read)
        return Node(first_genes, members, state.residual, state.active, prefix_state, carried)

    def _descend(self, stage: int, nodes: Iterable[Node[Carried]]) -> None:
        """From in front of MoE block `stage` to the end, as many branches at a time as fit."""
        if stage == self._purpose.num_blocks:
            return self._finish(nodes)
        by_top_k: dict[int, list[_Branch[Carried]]] = {}
        for branch in (branch for node in nodes for branch in self._branches(node, stage)):
            by_top_k.setdefault(branch.gene.top_k, []).append(branch)
        for branches in by_top_k.values():
            kind = self._kind(stage, branches)
            while branches:
                number = self._packing.together(kind, min(self._copies, len(branches)))
                self._descend(stage + 1, self._pass(stage, kind, branches[:number]))
                branches = branches[number:]

    def _finish(self, nodes: Iterable[Node[Carried]]) -> None:
        for node in nodes:
            found = self._purpose.result(node)
            for number in node.members:
                self._emit(number, found)

    def _attends(self, stage: int) -> bool:
        """Whether decoder layers with attention come behind MoE block `stage`."""
        return stage < self._layer_halves.num_stages - 1 or not self._layer_halves.ends_with_moe

    def _kind(self, stage: int, branches: Sequence[_Branch[Carried]]) -> Hashable:
        """Of a pass: its tokens a branch, whether another block comes behind, and whether any experts are merged."""
        plans = [self._stages.plan(stage, branch.gene) for branch in branches]
        merges = any(plan is not None and plan.expert_merging is not None for plan in plans)
        tokens = size_class(branches[0].node.residual[..., 0].numel())
        return (tokens, stage < self._layer_halves.num_stages - 1, merges)

    def _branches(self, node: Node[Carried], stage: int) -> Iterator[_Branch[Carried]]:
        members: dict[LayerGenome, list[int]] = {}
        for number in node.members:
            members.setdefault(self._layers[number][stage], []).append(number)
        return (_Branch(node, gene, some) for gene, some in members.items())

    def _pass(self, stage: int, kind: Hashable, branches: Sequence[_Branch[Carried]]) -> list[Node[Carried]]:
        """Branches through MoE block `stage` and the attention behind it."""
        plans = [self._stages.plan(stage, branch.gene) for branch in branches]
        prefix_states = [self._prefix_state_behind(branch) if self._attends(stage) else None for branch in branches]
        reads: list[tuple[KeyValues, ...]] = [() for _ in branches]
        with self._packing.timed(kind, len(branches)):
            residual = torch.cat([branch.node.residual for branch in branches])
            hidden = self._layer_halves.mix(stage, residual, plans, self._embedded)
            active = self._active(stage, branches)
            if self._attends(stage):
                hidden, reads = self._attend(stage + 1, hidden, prefix_states)
        return [
            self._arrive(branch.first_genes, branch.members, own, some, prefix_state, branch.node.carried, read)
            for branch, own, some, prefix_state, read in zip(
                branches, hidden.chunk(len(branches)), active, prefix_states, reads, strict=True
            )
        ]

    def _active(self, stage: int, branches: Sequence[_Branch[Carried]]) -> list[Tensor | None]:
        """For each branch how many experts its tokens have run, MoE block `stage` included, which has just run."""
        found = self._stages.model.layers[stage].num_active
        if found is None:
            return [None] * len(branches)
        residuals = [branch.node.residual for branch in branches]
        own = found.to(residuals[0].device).reshape(-1, *residuals[0].shape[1:-1]).chunk(len(branches))
        before = [branch.node.active for branch in branches]
        return [one if some is None else some + one for one, some in zip(own, before, strict=True)]

    def _attend(
        self, stage: int, hidden: Tensor, prefix_states: Sequence[State | None]
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        """As `Purpose.attend`, behind the shared prefix of each copy."""
        before = [prefix_state.read for prefix_state in prefix_states if prefix_state is not None]
        rows = len(self._embedded.hidden)
        return self._purpose.attend(stage, hidden, self._embedded, stacked_genomes(before, rows), len(prefix_states))

    def _prefix_state_behind(self, branch: _Branch[Carried]) -> State | None:
        """The state of the shared prefix behind the branch's gene."""
        return self._prefix_state(self._layers[branch.members[0]][: len(branch.first_genes)], branch.node.prefix_state)

    def _prefix_state(self, genes: Sequence[LayerGenome], before: State | None = None) -> State | None:
        return (
            self._stages.prefix_state(self._batch.shared_prefix, genes, before) if self._batch.shared_prefix else None
        )

    def _arrive(
        self,
        first_genes: FirstGenes,
        members: Sequence[int],
        residual: Tensor,
        active: Tensor | None,
        prefix_state: State | None,
        carried: Carried,
        read: tuple[KeyValues, ...],
    ) -> Node[Carried]:
        """A node that was computed; its state is kept. carried: before it. read: since the block before."""
        if (
            len(first_genes) == self._layer_halves.num_stages - self._layer_halves.ends_with_moe
        ):  # behind it no token sees another
            kept = self._batch.kept.to(residual.device)
            residual = residual[kept][None]
            active = None if active is None else active[kept.to(active.device)][None]
        if self._keep and len(first_genes) < self._layer_halves.num_stages:
            self._states.keep(self._batch, first_genes, State(residual, read, active))
        carried = self._purpose.carry(carried, prefix_state, read)
        return Node(first_genes, members, residual, active, prefix_state, carried)
