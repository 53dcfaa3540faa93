"""The prunings among which a search that has learned something chooses: made around those with the best prospects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_evo.genomes.bounds import Numbers
from moe_evo.searches.beliefs import Beliefs
from moe_evo.searches.masks import MaskSpace
from moe_evo.searches.steps import Masks

_SHARES = (0.3, 0.3, 0.3, 0.05)  # of a pool: swaps, swaps by worth, crossings, the most worth; the rest is random
_MOST_BLIND = 4  # experts that a blind swap exchanges
_MOST_MOVES = 2  # experts that go from one layer to another
_HALT = 0.25  # probability that a swap by worth exchanges no further expert

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Different prunings (P, S, W), by what operator each was made, and of which known ones, as their places."""

    masks: Masks
    operators: Sequence[str]
    parents: Sequence[tuple[int, ...]]


def proposals(
    space: MaskSpace, beliefs: Beliefs, known: Masks, elites: Places, size: int, rng: np.random.Generator
) -> Pool:
    """Up to `size` prunings that are not among the known ones.

    known: (N, S, W). elites: places of those among them from which the others are made.
    """
    swaps, guided, crossings, drawn = (int(share * size) for share in _SHARES)
    made: list[tuple[str, Masks, list[Places]]] = []

    chosen = rng.choice(elites, swaps)
    swapped = space.swapped(known[chosen], rng.integers(1, _MOST_BLIND + 1, swaps), rng)
    made.append(("swap_mutation", _moved(space, swapped, rng), [chosen]))

    chosen = rng.choice(elites, guided)
    exchanged = np.minimum(rng.geometric(_HALT, guided), max(space.num_changes // 2, 1))
    worths = beliefs.worths(guided + drawn, rng).reshape(-1, *space.exists.shape)
    swapped = space.swapped(known[chosen], exchanged, rng, worths[:guided])
    made.append(("guided_mutation", _moved(space, swapped, rng, worths[:guided]), [chosen]))
    for some, even in zip(np.array_split(worths[guided:], 2), (True, False), strict=True):
        made.append(("most_worth", space.best(some, rng, even=even), []))

    pairs = [rng.choice(elites, crossings) for _ in range(2)]
    crossed = space.crossed(known[pairs[0]], known[pairs[1]], rng)
    made.append(("crossover", space.swapped(crossed, rng.integers(0, 3, crossings), rng), pairs))

    random = space.drawn(size - swaps - guided - crossings - drawn, rng)
    made.append(("random_pruning", random, []))
    return _different(made, known)


def _moved(space: MaskSpace, masks: Masks, rng: np.random.Generator, worths: Numbers | None = None) -> Masks:
    """The prunings with some numbers changed, where layer groups need not keep as many or have one top_k."""
    for steps in space.varying:
        added, removed = rng.integers(0, _MOST_MOVES + 1, (2, len(masks)))
        if steps.bounds.taken is not None:
            removed = added = np.minimum(added, min(steps.bounds.taken, steps.bounds.steps.sum() - steps.bounds.taken))
        masks = space.moved(masks, steps, added, removed, rng, worths)
    return masks


def _different(made: Sequence[tuple[str, Masks, list[Places]]], known: Masks) -> Pool:
    """All that was made, each once, without what is known."""
    masks = np.concatenate([one for _, one, _ in made])
    operators = [name for name, some, _ in made for _ in some]
    parents = [tuple(map(int, row)) for _, some, places in made for row in _rows(places, len(some))]
    packed = np.packbits(np.concatenate([known, masks]).reshape(len(known) + len(masks), -1), axis=1)
    _, first = np.unique(packed, axis=0, return_index=True)
    kept = np.sort(first[first >= len(known)]) - len(known)
    return Pool(masks[kept], [operators[one] for one in kept], [parents[one] for one in kept])


def _rows(places: list[Places], number: int) -> Numbers | list[tuple[()]]:
    return np.stack(places, axis=1) if places else [()] * number
