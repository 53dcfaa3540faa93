"""One batch on its way through the layers, for many genomes.

The walk is depth first: a branch is followed to its end before the next one begins, so that states of few
branches are in memory together. What it is for, logits or what the layers read, is up to its `Errand`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from moe_evo.evaluation.engine.packing import Packing, size_class
from moe_evo.evaluation.engine.stages import Stages
from moe_evo.evaluation.engine.states import Prefix, State
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.forward.key_values import KeyValues, beside_each_other
from moe_evo.models.forward.layer_halves import Start
from moe_evo.tasks.base import ForwardBatch

Carried = TypeVar("Carried")
Result = TypeVar("Result")
Found = TypeVar("Found", covariant=True)


@dataclass(frozen=True, eq=False)
class Node(Generic[Carried]):
    """Genomes (by their numbers) that begin alike, at the place after that beginning.

    residual: the residual stream there, (P, T, H); where only scored tokens go on, these alone, (1, M, H). trunk: the
    state of the batch's trunk at the same place; None without a trunk. carried: what the errand takes along.
    """

    prefix: Prefix
    members: Sequence[int]
    residual: Tensor
    trunk: State | None
    carried: Carried


@dataclass(frozen=True, eq=False)
class _Branch(Generic[Carried]):
    """The members of a node that have the next gene in common, too."""

    node: Node[Carried]
    gene: LayerGenome
    members: Sequence[int]

    @property
    def prefix(self) -> Prefix:
        return (*self.node.prefix, self.gene.digest)


class Errand(Protocol[Carried, Found]):
    """What a walk is for."""

    @property
    def num_blocks(self) -> int:
        """How many MoE blocks the walk goes through."""

    def lengths(self, genes: Prefix) -> Sequence[int]:
        """The walk starts after that many first genes, the last number; it needs the states after each of them."""

    @property
    def nothing(self) -> Carried:
        """What is carried before anything is read."""

    def carry(self, before: Carried, trunk: State | None, read: tuple[KeyValues, ...]) -> Carried:
        """Add what decoder layers read of the trunk and of the batch since the block before."""

    def attend(
        self, stage: int, hidden: Tensor, start: Start, before: Sequence[KeyValues], copies: int
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        """`Halves.attend` behind what was read `before`, and for each copy what is read now, where that is wanted."""

    def result(self, node: Node[Carried]) -> Found:
        """What the members of a node at the end of the walk get."""


class Walk(Generic[Carried, Result]):
    """From the deepest states that are kept to the end.

    emit: takes the number of a genome and what `errand` finds. The other options are those of `Engine.run`.
    """

    def __init__(
        self,
        stages: Stages,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        errand: Errand[Carried, Result],
        emit: Callable[[int, Result], None],
        *,
        copies: int,
        packing: Packing,
        keep: bool,
    ) -> None:
        self._stages, self._halves, self._states = stages, stages.halves, stages.states
        self._batch = batch
        self._genomes = genomes
        self._errand = errand
        self._emit = emit
        self._copies = copies
        self._packing = packing
        self._keep = keep
        self._start = stages.start(batch, keep=keep)

    def run(self) -> None:
        """Call `emit` for every genome."""
        starts: dict[Prefix, list[int]] = {}
        kept: dict[Prefix, list[State]] = {}  # before anything is computed, for which others would have to go
        for number, genome in enumerate(self._genomes):
            genes = tuple(gene.digest for gene in genome.layers)
            lengths = self._errand.lengths(genes)
            prefix = genes[: lengths[-1]]
            starts.setdefault(prefix, []).append(number)
            if prefix not in kept:
                found = [self._states.get(self._batch, prefix[:length]) for length in lengths]
                kept[prefix] = [state for state in found if state is not None]
        for stage in sorted(set(map(len, starts))):
            prefixes = [prefix for prefix in starts if len(prefix) == stage]
            for first in range(0, len(prefixes), self._copies):  # no more are on the device than go together
                some = prefixes[first : first + self._copies]
                self._descend(stage, [self._begin(prefix, starts[prefix], kept.pop(prefix)) for prefix in some])

    def _begin(self, prefix: Prefix, members: Sequence[int], kept: Sequence[State]) -> Node[Carried]:
        genes = self._genomes[members[0]].layers
        trunk, carried = None, self._errand.nothing
        if not kept:
            assert not prefix, "only the beginning of all genomes can be computed without states"
            trunk = self._trunk(())
            residual, (read,) = self._attend(0, self._start.hidden, [trunk])
            return self._arrive(prefix, members, residual, trunk, carried, read)
        for length, state in enumerate(kept, start=len(prefix) + 1 - len(kept)):
            trunk = self._trunk(genes[:length], trunk)
            state = state.to(self._stages.model.device)
            carried = self._errand.carry(carried, trunk, state.read)
        return Node(prefix, members, state.residual, trunk, carried)

    def _descend(self, stage: int, nodes: Iterable[Node[Carried]]) -> None:
        """From in front of MoE block `stage` to the end, as many branches at a time as fit."""
        if stage == self._errand.num_blocks:
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
            found = self._errand.result(node)
            for number in node.members:
                self._emit(number, found)

    def _attends(self, stage: int) -> bool:
        """Whether decoder layers with attention come behind MoE block `stage`."""
        return stage < self._halves.num_stages - 1 or not self._halves.ends_with_moe

    def _kind(self, stage: int, branches: Sequence[_Branch[Carried]]) -> Hashable:
        """Of a pass: its tokens a branch, whether another block comes behind, and whether any experts are merged."""
        plans = [self._stages.plan(stage, branch.gene) for branch in branches]
        merges = any(plan is not None and plan.expert_merging is not None for plan in plans)
        tokens = size_class(branches[0].node.residual[..., 0].numel())
        return (tokens, stage < self._halves.num_stages - 1, merges)

    def _branches(self, node: Node[Carried], stage: int) -> Iterator[_Branch[Carried]]:
        members: dict[LayerGenome, list[int]] = {}
        for number in node.members:
            members.setdefault(self._genomes[number].layers[stage], []).append(number)
        return (_Branch(node, gene, some) for gene, some in members.items())

    def _pass(self, stage: int, kind: Hashable, branches: Sequence[_Branch[Carried]]) -> list[Node[Carried]]:
        """Branches through MoE block `stage` and the attention behind it."""
        plans = [self._stages.plan(stage, branch.gene) for branch in branches]
        trunks = [self._trunk_behind(branch) if self._attends(stage) else None for branch in branches]
        reads: list[tuple[KeyValues, ...]] = [() for _ in branches]
        with self._packing.timed(kind, len(branches)):
            residual = torch.cat([branch.node.residual for branch in branches])
            hidden = self._halves.mix(stage, residual, plans, self._start)
            if self._attends(stage):
                hidden, reads = self._attend(stage + 1, hidden, trunks)
        return [
            self._arrive(branch.prefix, branch.members, own, trunk, branch.node.carried, read)
            for branch, own, trunk, read in zip(branches, hidden.chunk(len(branches)), trunks, reads, strict=True)
        ]

    def _attend(
        self, stage: int, hidden: Tensor, trunks: Sequence[State | None]
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        """As `Errand.attend`, behind the trunk of each copy."""
        before = [trunk.read for trunk in trunks if trunk is not None]
        rows = len(self._start.hidden)
        return self._errand.attend(stage, hidden, self._start, beside_each_other(before, rows), len(trunks))

    def _trunk_behind(self, branch: _Branch[Carried]) -> State | None:
        """The state of the trunk behind the branch's gene."""
        return self._trunk(self._genomes[branch.members[0]].layers[: len(branch.prefix)], branch.node.trunk)

    def _trunk(self, genes: Sequence[LayerGenome], before: State | None = None) -> State | None:
        return self._stages.trunk(self._batch.trunk, genes, before) if self._batch.trunk else None

    def _arrive(
        self,
        prefix: Prefix,
        members: Sequence[int],
        residual: Tensor,
        trunk: State | None,
        carried: Carried,
        read: tuple[KeyValues, ...],
    ) -> Node[Carried]:
        """A node that was computed; its state is kept. carried: before it. read: since the block before."""
        if len(prefix) == self._halves.num_stages - self._halves.ends_with_moe:  # behind it no token sees another
            residual = residual[self._batch.kept.to(residual.device)][None]
        if self._keep and len(prefix) < self._halves.num_stages:
            self._states.keep(self._batch, prefix, State(residual, read))
        return Node(prefix, members, residual, trunk, self._errand.carry(carried, trunk, read))
