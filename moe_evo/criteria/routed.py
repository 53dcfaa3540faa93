"""Observe the experts on the tokens that the router sends them, on the prompts of a task.

Gates and indices are the model's own, and only routed tokens are computed, so it costs about one forward pass. Sums
add across batches, ranks and tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, reduce
from operator import add
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from moe_evo.criteria.questions import GateRatios, OfPrompts, Outputs, Routed
from moe_evo.criteria.sums import LayerObservation, LayerOutputs, LayerRatios, LayerSums, Observation
from moe_evo.genomes.genome import Genome
from moe_evo.models.experts.outputs import observed_experts, residual_streams
from moe_evo.models.view import MoEModel
from moe_evo.tasks.answered import Answered
from moe_evo.tasks.base import ForwardBatch
from moe_evo.tasks.rank_share import rank_share
from moe_evo.tasks.task import Task

T = TypeVar("T")


class Observed(Protocol):
    """A loaded model and tasks that it can be run on."""

    @property
    def model(self) -> MoEModel: ...

    @property
    def tasks(self) -> Sequence[Task]: ...

    @property
    def batch_tokens(self) -> int: ...

    def forward(self, batch: ForwardBatch) -> Tensor: ...

    def within_memory(self, compute: Callable[[], T]) -> T: ...

    def answered(self, genome: Genome | None, split: str, first: int | None = None) -> tuple[Answered, ...]: ...


L = TypeVar("L", bound=LayerSums)
NUM_RATIOS = 4096


def observe_routed(evaluator: Observed, question: Routed) -> Observation[LayerObservation]:
    """Gates and norms of all experts; all ranks of a gang call this together and get the same. Raises OutOfMemory."""
    return observe(evaluator, question, _Routed)


def observe_outputs(evaluator: Observed, question: Outputs) -> Observation[LayerOutputs]:
    """As `observe_routed`."""
    return observe(evaluator, question, _Outputs)


def observe_gate_ratios(evaluator: Observed, question: GateRatios) -> Observation[LayerRatios]:
    """As `observe_routed`."""
    return observe(evaluator, question, _GateRatios)


def counting(times: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Which of T tokens count, (T,) bool, and how often each of those does, (n,) float64; on the device of `seen`.

    Tokens are selected, not multiplied with 0: outputs of padding may be NaN. With a device map, layers lie on other
    devices than inputs.
    """
    placed = times.to(seen.device)
    counted = placed > 0
    return counted, placed[counted].double()


class Collector(Protocol[L]):
    """Adds up what it sees of every MoE layer. times: (T,), how often each token of the current batch counts."""

    times: Tensor

    def watching(self, moe: MoEModel, only: int | None) -> AbstractContextManager[object]: ...

    def layers(self) -> list[L]: ...


def observe(evaluator: Observed, question: OfPrompts, make: Callable[[MoEModel], Collector[L]]) -> Observation[L]:
    """Run the question's prompts with a collector, and add up the results of all ranks. Raises OutOfMemory."""
    return evaluator.within_memory(partial(_observed, evaluator, question, make))


def _observed(evaluator: Observed, question: OfPrompts, make: Callable[[MoEModel], Collector[L]]) -> Observation[L]:
    moe = evaluator.model
    collector = make(moe)
    with torch.inference_mode(), ExitStack() as stack:
        if question.genome is not None:
            stack.enter_context(moe.applied(question.genome))
        stack.enter_context(collector.watching(moe, question.layer))
        for batch, collector.times in prompts(evaluator, question.task, question.split, question.part):
            evaluator.forward(batch)
    layers = [reduce(add, of_ranks) for of_ranks in zip(*moe.example_ranks.gather(collector.layers()), strict=True)]
    return Observation(tuple(layers if question.layer is None else [layers[question.layer]]))


def prompts(
    evaluator: Observed, task_name: str, split: str, part: tuple[int, int] | None = None
) -> Iterator[tuple[ForwardBatch, Tensor]]:
    """This rank's batches of a task's prompts, on the model's device, and how often each of their tokens counts.

    The second is (T,) whole numbers, 0 for what does not count: padding, and batches that only keep this
    rank in step with the others. part: (i, n) for the i-th of n parts of the examples.
    """
    ranks = evaluator.model.example_ranks
    (task,) = (one for one in evaluator.tasks if one.name == task_name)
    make = partial(task.prompt_batches, split, batch_tokens=evaluator.batch_tokens, trees=evaluator.model.reads_trees)
    place, num_parts = part or (0, 1)
    share = rank_share(ranks.rank, ranks.size, task.numbers(split)[place::num_parts], make)
    for position, batch in enumerate(share.batches):
        placed = batch.to(evaluator.model.device)
        times = placed.counts if position < share.num_counted else torch.zeros_like(placed.counts)
        yield placed, times.reshape(-1)


class _Routed:
    """Sums (statistics, E) a layer."""

    def __init__(self, moe: MoEModel) -> None:
        self._sums = [np.zeros((len(LayerObservation.names()), number)) for number in moe.shape.num_experts]
        self._scaling = moe.family.residual_scaling(moe.language_model.config)
        self._streams: dict[int, Tensor] = {}
        self.times = torch.zeros(0)

    @contextmanager
    def watching(self, moe: MoEModel, only: int | None) -> Iterator[None]:
        with residual_streams(moe, only) as self._streams, observed_experts(moe, self._see, only):
            yield

    def layers(self) -> list[LayerObservation]:
        return [LayerObservation(*sums) for sums in self._sums]

    def _see(self, layer: int, index: Tensor, gates: Tensor, outputs: Tensor) -> None:
        """index, gates: (T, k); outputs: (T, k, H)."""
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        norms = torch.linalg.vector_norm(wide, dim=-1)
        added = torch.bmm(gates.to(wide.dtype)[:, None], wide)[:, 0] * self._scaling
        turns = turn(self._streams.pop(layer).to(wide.dtype), added)  # each is needed once, and large
        counted, times = counting(self.times, index)
        experts = index[counted].reshape(-1).cpu()
        times = times.cpu().repeat_interleave(index.shape[1])
        gate, norm, turned = (
            values[counted].cpu().double().reshape(-1) for values in (gates, norms, turns[:, None].expand_as(index))
        )
        gated = gate * norm
        sums = self._sums[layer]
        for row, values in enumerate((torch.ones_like(gate), gate, norm, gated, norm.square(), gated * turned)):
            sums[row] += torch.bincount(experts, times * values, minlength=sums.shape[1]).numpy()


def turn(before: Tensor, added: Tensor) -> Tensor:
    """1 - cos(before, before + added), (T,) for (T, H): half the squared distance of their unit vectors.

    Small turns keep their digits, and none is negative.
    """
    return (normalize(before + added, dim=-1) - normalize(before, dim=-1)).square().sum(dim=-1) / 2


class _Outputs:
    """Sums a layer: (E, 3) of 1, g_j and ||f_j||^2, and (E, H) of f_j."""

    def __init__(self, moe: MoEModel) -> None:
        hidden_size = moe.language_model.config.hidden_size
        zeros = partial(torch.zeros, dtype=torch.float64, device=moe.device)
        self._sums = [(zeros((number, 3)), zeros((number, hidden_size))) for number in moe.shape.num_experts]
        self.times = torch.zeros(0)

    def watching(self, moe: MoEModel, only: int | None) -> AbstractContextManager[object]:
        return observed_experts(moe, self._see, only)

    def layers(self) -> list[LayerOutputs]:
        found = []
        for numbers, outputs in self._sums:
            tokens, gates, squared_norms = numbers.T.cpu().numpy()
            found.append(LayerOutputs(tokens, gates, squared_norms, outputs.cpu().numpy()))
        return found

    def _see(self, layer: int, index: Tensor, gates: Tensor, outputs: Tensor) -> None:
        counted, times = counting(self.times, index)
        numbers, sums = self._sums[layer]
        experts = index[counted].reshape(-1).to(sums.device)
        answers = outputs[counted].reshape(-1, outputs.shape[-1]).to(sums)
        gate = gates[counted].reshape(-1).to(sums)
        times = times.repeat_interleave(index.shape[1]).to(sums)
        values = torch.stack([torch.ones_like(gate), gate, answers.square().sum(dim=-1)], dim=-1)
        numbers.index_add_(0, experts, values * times[:, None])
        sums.index_add_(0, experts, answers * times[:, None])


class _GateRatios:
    """Counts (B,) a layer."""

    def __init__(self, moe: MoEModel) -> None:
        self._counts = [np.zeros(NUM_RATIOS) for _ in moe.shape.num_experts]
        self.times = torch.zeros(0)

    def watching(self, moe: MoEModel, only: int | None) -> AbstractContextManager[object]:
        return observed_experts(moe, self._see, only)

    def layers(self) -> list[LayerRatios]:
        return [LayerRatios(counts) for counts in self._counts]

    def _see(self, layer: int, index: Tensor, gates: Tensor, outputs: Tensor) -> None:
        counted, times = counting(self.times, gates)
        first, second = gates[counted].double().topk(2, dim=-1).values.unbind(dim=-1)
        ratios = (second / first).nan_to_num(nan=0.0)  # of two gates that are 0
        bins = (ratios * NUM_RATIOS).long().clamp(max=NUM_RATIOS - 1).cpu()
        self._counts[layer] += torch.bincount(bins, times.cpu(), minlength=NUM_RATIOS).numpy()
