"""One batch on its way through the layers, for many genomes.

The traversal is depth first: a branch is followed to its end before the next one begins, so that states of few
branches are in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_evo.evaluation.engine.packing import Packing, size_class
from moe_evo.evaluation.engine.stages import Stages
from moe_evo.evaluation.engine.states import FirstGenes, State
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.forward.key_values import KeyValues, PastKeyValues, beside_each_other, joined
from moe_evo.tasks.base import ForwardBatch


@dataclass(frozen=True, eq=False)
class _Node:
    """Genomes (by their numbers) that begin alike, and the residual stream (P, T, H) after that beginning.

    In front of the last block it has the scored tokens alone, (1, M, H). prefix_states: the state of the batch's shared
    prefix at the same place, and where `Traversal` tells what was read, before it those of all the way; empty without
    a shared prefix. read: what all decoder layers so far have read of the batch, where `Traversal` tells that.
    """

    first_genes: FirstGenes
    members: Sequence[int]
    residual: Tensor
    prefix_states: tuple[State, ...]
    read: tuple[KeyValues, ...]


@dataclass(frozen=True, eq=False)
class _Branch:
    """The members of a node that have the next gene in common, too."""

    node: _Node
    gene: LayerGenome
    members: Sequence[int]

    @property
    def first_genes(self) -> FirstGenes:
        return (*self.node.first_genes, self.gene.digest)


class Traversal:
    """From the deepest states that are kept to the end.

    emit: takes the number of a genome and its logits (M, V); with `reads`, what its decoder layers read
    (P, heads, C + T, size) each, for which the last MoE block is of no use. The other options are those
    of `Engine.run`.
    """

    def __init__(
        self,
        stages: Stages,
        batch: ForwardBatch,
        genomes: Sequence[Genome],
        emit: Callable[[int, Any], None],
        *,
        copies: int,
        packing: Packing,
        keep: bool,
        reads: bool = False,
    ) -> None:
        self._stages, self._layer_halves, self._states = stages, stages.layer_halves, stages.states
        self._batch = batch
        self._genomes = genomes
        self._emit = emit
        self._copies = copies
        self._packing = packing
        self._keep = keep
        self._reads = reads
        self._last = self._layer_halves.num_stages - 1
        self._start = stages.start(batch, keep=keep)

    def run(self) -> None:
        """Call `emit` for every genome."""
        starts: dict[FirstGenes, list[int]] = {}
        kept: dict[FirstGenes, list[State]] = {}  # before anything is computed, for which others would have to go
        for number, genome in enumerate(self._genomes):
            genes = tuple(gene.digest for gene in genome.layers)
            first_genes = genes[: (self._states.unbroken if self._reads else self._states.longest)(self._batch, genes)]
            starts.setdefault(first_genes, []).append(number)
            if first_genes not in kept:
                lengths = range(len(first_genes) + 1) if self._reads else [len(first_genes)]
                found = [self._states.get(self._batch, first_genes[:length]) for length in lengths]
                kept[first_genes] = [state for state in found if state is not None]
        for stage in sorted(set(map(len, starts))):
            beginnings = [first_genes for first_genes in starts if len(first_genes) == stage]
            for first in range(0, len(beginnings), self._copies):  # no more are on the device than go together
                some = beginnings[first : first + self._copies]
                self._descend(
                    stage,
                    [self._begin(first_genes, starts[first_genes], kept.pop(first_genes)) for first_genes in some],
                )

    def _begin(self, first_genes: FirstGenes, members: Sequence[int], kept: Sequence[State]) -> _Node:
        prefix_states: tuple[State, ...] = ()
        if self._batch.shared_prefix:
            genes = self._genomes[members[0]].layers
            for length in range(len(first_genes) + 1) if self._reads else [len(first_genes)]:
                before = prefix_states[-1] if prefix_states else None
                prefix_states = (
                    *prefix_states,
                    self._stages.prefix_state(self._batch.shared_prefix, genes[:length], before),
                )
        if kept:
            states = [state.to(self._stages.model.device) for state in kept]
            read = tuple(layer for state in states for layer in state.read)
            return _Node(first_genes, members, states[-1].residual, prefix_states, read)
        assert not first_genes, "only the beginning of all genomes can be computed without states"
        residual, (read,) = self._attend(0, self._start.hidden, [prefix_states])
        return self._kept(first_genes, members, residual, prefix_states, read)

    def _descend(self, stage: int, nodes: Iterable[_Node]) -> None:
        """From in front of MoE block `stage` to the end, as many branches at a time as fit."""
        if self._reads and stage == self._last and self._layer_halves.ends_with_moe:
            for node in nodes:
                read = self._joined(node.prefix_states, node.read)
                for number in node.members:
                    self._emit(number, read)
            return
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
        plans = [self._stages.plan(stage, branch.gene) for branch in branches]
        merges = any(plan is not None and plan.expert_merging is not None for plan in plans)
        return (size_class(branches[0].node.residual[..., 0].numel()), stage < self._last, merges)

    def _branches(self, node: _Node, stage: int) -> Iterator[_Branch]:
        members: dict[LayerGenome, list[int]] = {}
        for number in node.members:
            members.setdefault(self._genomes[number].layers[stage], []).append(number)
        return (_Branch(node, gene, some) for gene, some in members.items())

    def _pass(self, stage: int, kind: Hashable, branches: Sequence[_Branch]) -> None:
        plans = [self._stages.plan(stage, branch.gene) for branch in branches]
        attends = stage < self._last or not self._layer_halves.ends_with_moe
        prefix_states = [self._prefix_states(branch) if attends else () for branch in branches]
        reads: list[tuple[KeyValues, ...]] = [() for _ in branches]
        with self._packing.timed(kind, len(branches)):
            residual = torch.cat([branch.node.residual for branch in branches])
            hidden = self._layer_halves.mix(stage, residual, plans, self._start)
            if attends:
                hidden, reads = self._attend(stage + 1, hidden, prefix_states)
        arrived = zip(branches, hidden.chunk(len(branches)), prefix_states, reads, strict=True)
        if stage < self._last:
            return self._descend(stage + 1, [self._arrive(*one) for one in arrived])
        for branch, own, behind, read in arrived:
            found = self._joined(behind, (*branch.node.read, *read)) if self._reads else self._logits(own)
            for number in branch.members:
                self._emit(number, found)

    def _prefix_states(self, branch: _Branch) -> tuple[State, ...]:
        """As `_Node.prefix_states`, behind the branch's gene."""
        if not self._batch.shared_prefix:
            return ()
        before = branch.node.prefix_states
        genes = self._genomes[branch.members[0]].layers[: len(branch.first_genes)]
        state = self._stages.prefix_state(self._batch.shared_prefix, genes, before[-1])
        return (*before, state) if self._reads else (state,)

    def _attend(
        self, stage: int, hidden: Tensor, prefix_states: Sequence[tuple[State, ...]]
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        """`LayerHalves.attend` behind one chain of prefix states a copy; for each copy what was read, if wanted."""
        before = beside_each_other([chain[-1].read for chain in prefix_states if chain], rows=len(self._start.hidden))
        past_key_values = PastKeyValues(before) if before or self._reads else None
        hidden = self._layer_halves.attend(stage, hidden, self._start, past_key_values)
        if past_key_values is None or not self._reads:
            return hidden, [() for _ in prefix_states]
        num_copies = len(prefix_states)
        read = past_key_values.read
        layers = [zip(keys.chunk(num_copies), values.chunk(num_copies), strict=True) for keys, values in read]
        return hidden, list(zip(*layers, strict=True))

    def _arrive(
        self, branch: _Branch, residual: Tensor, prefix_states: tuple[State, ...], read: tuple[KeyValues, ...]
    ) -> _Node:
        """In front of the block after the branch's gene; read: since the block before."""
        return self._kept(branch.first_genes, branch.members, residual, prefix_states, read, branch.node.read)

    def _kept(
        self,
        first_genes: FirstGenes,
        members: Sequence[int],
        residual: Tensor,
        prefix_states: tuple[State, ...],
        read: tuple[KeyValues, ...],
        read_before: tuple[KeyValues, ...] = (),
    ) -> _Node:
        """A new node, whose state is kept."""
        if len(first_genes) == self._last and self._layer_halves.ends_with_moe:
            residual = self._scored(residual)
        if self._keep:
            self._states.keep(self._batch, first_genes, State(residual, read))
        return _Node(first_genes, members, residual, prefix_states, (*read_before, *read))

    def _scored(self, hidden: Tensor) -> Tensor:
        """(1, M, H) of (P, T, H)."""
        return hidden[self._batch.kept.to(hidden.device)][None]

    def _logits(self, hidden: Tensor) -> Tensor:
        """(M, V) of the end of all layers (P, T, H), or (1, M, H) where the last block is the end."""
        return self._layer_halves.finish(hidden[0] if self._layer_halves.ends_with_moe else self._scored(hidden)[0])

    def _joined(self, prefix_states: Sequence[State], read: tuple[KeyValues, ...]) -> tuple[KeyValues, ...]:
        """What all layers read of the shared prefix and of the batch behind it."""
        before = [layer for state in prefix_states for layer in state.read]
        return tuple(map(joined, before, read)) if before else read
