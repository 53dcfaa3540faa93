"""Random sequences for a tiny model to read."""

from __future__ import annotations

import numpy as np

from moe_evo.recovery.lessons import Reading


def readings(number: int = 7, *, seed: int = 0) -> list[Reading]:
    """Of a vocabulary of 96 tokens, some with right answers."""
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(2, 12, size=number).tolist():
        tokens = tuple(rng.integers(3, 96, size=length).tolist())
        start = int(rng.integers(0, length))
        labels = tuple(rng.integers(3, 96, size=length - start).tolist()) if start % 2 else ()
        found.append(Reading(tokens, start, labels))
    return found
