"""What a model's experts do on the prompts of its tasks, as sums from which one-shot criteria are made.

The gates and indices are the model's own and only routed tokens are computed, so observing costs about
one forward pass. Sums add across batches, ranks and tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial, reduce
from operator import add

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_evo.criteria.frequency import Observed
from moe_evo.errors import ObservationError
from moe_evo.models.observation import observed_experts
from moe_evo.tasks.share import share_of
from moe_evo.tasks.task import Task

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerObservation:
    """Sums over A_j, the tokens that one MoE layer routes to its expert j; each (E,) float64.

    tokens: #A_j. gates: of g_j, the weight that the model gives the expert's answer. norms: of ||f_j||_2,
    the answer before it is weighed. gated_norms: of g_j ||f_j||_2. squared_norms: of ||f_j||_2^2.
    """

    tokens: Sums
    gates: Sums
    norms: Sums
    gated_norms: Sums
    squared_norms: Sums

    def __post_init__(self) -> None:
        for name in STATISTICS:
            sums = np.array(getattr(self, name), dtype=np.float64)
            if sums.ndim != 1 or sums.shape != np.shape(self.tokens):
                raise ObservationError(f"{name}: got shape {sums.shape}, expected (num_experts,) as all statistics")
            sums.setflags(write=False)
            object.__setattr__(self, name, sums)

    def __add__(self, other: LayerObservation) -> LayerObservation:
        if self.num_experts != other.num_experts:
            raise ObservationError(
                f"observations of {self.num_experts} and of {other.num_experts} experts; add those of one model"
            )
        return LayerObservation(*(getattr(self, name) + getattr(other, name) for name in STATISTICS))

    def __reduce__(self) -> tuple[object, tuple[Sums, ...]]:
        return (LayerObservation, tuple(getattr(self, name) for name in STATISTICS))  # frozen again when read

    @property
    def num_experts(self) -> int:
        return len(self.tokens)


STATISTICS = tuple(field.name for field in fields(LayerObservation))


@dataclass(frozen=True, eq=False)
class Observation:
    """One `LayerObservation` for each MoE layer, in the model's order."""

    layers: tuple[LayerObservation, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    def __add__(self, other: Observation) -> Observation:
        if len(self.layers) != len(other.layers):
            raise ObservationError(
                f"observations of {len(self.layers)} and of {len(other.layers)} MoE layers; add those of one model"
            )
        return Observation(tuple(map(add, self.layers, other.layers)))

    @property
    def num_experts(self) -> tuple[int, ...]:
        return tuple(layer.num_experts for layer in self.layers)


def observe(evaluator: Observed, split: str = "search") -> dict[str, Observation]:
    """What experts do on each task's prompts, by the task's name; `together` adds them up.

    A prompt counts once however many answers it has, and padding never. All ranks of a gang call this
    together and all get the same. Raises OutOfMemory.
    """
    return {
        task.name: evaluator.within_memory(partial(_observed_task, evaluator, task, split)) for task in evaluator.tasks
    }


def together(observations: Sequence[Observation]) -> Observation:
    """The observation of all data together."""
    return reduce(add, observations)


class _Collector:
    """The sums of one task's batches, (statistics, E) a layer, and how often each token of the current one counts."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self.layers = [np.zeros((len(STATISTICS), number)) for number in num_experts]
        self.times = torch.zeros(0)

    def see(self, layer: int, index: Tensor, gates: Tensor, outputs: Tensor) -> None:
        """index, gates: (T, k); outputs: (T, k, H); times: (T,) whole numbers, 0 for what does not count."""
        precision = torch.promote_types(outputs.dtype, torch.float32)
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=precision)
        counted = self.times > 0  # a choice, not a factor: what padding answers may be no number
        experts = index[counted].reshape(-1).cpu()
        times, gate, norm = (
            values[counted].cpu().double().reshape(-1)
            for values in (self.times[:, None].expand_as(index), gates, norms)
        )
        sums = self.layers[layer]
        for row, values in enumerate((torch.ones_like(gate), gate, norm, gate * norm, norm.square())):
            sums[row] += torch.bincount(experts, times * values, minlength=sums.shape[1]).numpy()


def _observed_task(evaluator: Observed, task: Task, split: str) -> Observation:
    ranks = evaluator.model.share
    collector = _Collector(evaluator.model.shape.num_experts)
    make = partial(task.prompt_batches, split, batch_tokens=evaluator.batch_tokens, trees=evaluator.model.reads_trees)
    share = share_of(ranks.rank, ranks.size, task.numbers(split), make)
    with torch.inference_mode(), observed_experts(evaluator.model, collector.see):
        for position, batch in enumerate(share.batches):
            placed = batch.to(evaluator.model.device)
            times = placed.counts if position < share.num_counted else torch.zeros_like(placed.counts)
            collector.times = times.reshape(-1)
            evaluator.forward(placed)
    of_ranks = ranks.gather(collector.layers)
    return Observation(tuple(LayerObservation(*np.sum(layer, axis=0)) for layer in zip(*of_ranks, strict=True)))
