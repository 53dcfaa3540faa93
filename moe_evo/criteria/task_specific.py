"""Task-specific expert pruning (Chen et al. 2022, arXiv 2206.00277): experts are dropped one by one during the tasks.

The paper fine-tunes the model meanwhile and keeps one expert; here the model stays as it is and K are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_evo.criteria.observer import Observer
from moe_evo.criteria.questions import Routed
from moe_evo.criteria.sums import LayerObservation, Observation, Sums
from moe_evo.errors import ConfigError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import SearchSpace

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TaskSpecific:
    """Drops experts of low proficiency after each of `num_windows` parts of the tasks' examples.

    Proficiency is a moving average, a_j <- 0.9 a_j + 0.1 frequency, that begins with the first window's
    frequency, the share of its tokens among the experts that are left. Expert j is dropped where a_j < 0.1 / alive,
    never so that fewer than K are left, and after the last window the K most proficient stay, as in
    UNITES-Lab/MC-SMoE. The logits of dropped experts are -inf in later windows. All windows are one pass.
    """

    num_windows: int = 10
    decay: float = 0.9
    threshold: float = 0.1

    name = "task_specific"
    title = "task_specific pruning"
    source = "Chen et al. 2022, arXiv 2206.00277"

    @property
    def description(self) -> str:
        return f"experts that few tokens still go to are dropped for good after each of {self.num_windows} windows"

    def check(self, space: SearchSpace) -> None:
        """Raise ConfigError for a router that chooses among groups of experts, which must stay equal."""
        if space.shape.num_expert_groups > 1:
            raise ConfigError(
                f"{self.name}: drops experts one by one, but {space.shape.family} chooses groups of experts, which "
                "must stay equal; use another method"
            )

    def genome(self, observer: Observer, space: SearchSpace) -> Genome:
        self.check(space)
        shape = space.shape
        num_kept = [space.num_kept[numbers[0]] for numbers in space.layer_groups]
        alive = [np.ones(shape.num_experts[numbers[0]], dtype=bool) for numbers in space.layer_groups]
        proficiency: list[Sums] = []
        for window in range(self.num_windows):
            now = _genome(alive, space)
            seen: Observation[LayerObservation] = observer.about(Routed(genome=now, part=(window, self.num_windows)))
            frequency = [_share(np.sum([seen.layers[layer].tokens for layer in run], 0)) for run in space.layer_groups]
            if not frequency[0].any():  # fewer examples than windows
                continue
            proficiency = [
                self.decay * old + (1 - self.decay) * new
                for old, new in zip(proficiency or frequency, frequency, strict=True)
            ]
            alive = [
                _left(some, one, number, self.threshold / some.sum())
                for some, one, number in zip(alive, proficiency, num_kept, strict=True)
            ]
        alive = [_left(*one, least=np.inf) for one in zip(alive, proficiency, num_kept, strict=True)]
        return _genome(alive, space)


def _left(alive: Mask, proficiency: Sums, num_kept: int, least: float) -> Mask:
    """(E,) which experts are left: all with at least `least`, or the `num_kept` most proficient if too few have it."""
    scores = np.where(alive, proficiency, -np.inf)
    enough: Mask = scores >= least
    if enough.sum() < num_kept:
        enough[:] = False
        enough[np.argsort(-scores, kind="stable")[:num_kept]] = True
    return enough


def _share(tokens: Sums) -> Sums:
    return tokens / max(float(tokens.sum()), 1.0)


def _genome(alive: Sequence[Mask], space: SearchSpace) -> Genome:
    layers = list(space.shape.identity().layers)
    for some, numbers in zip(alive, space.layer_groups, strict=True):
        for layer in numbers:
            layers[layer] = LayerGenome.from_kept(np.flatnonzero(some), len(some), space.top_k[layer])
    return Genome(tuple(layers))
