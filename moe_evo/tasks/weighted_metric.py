"""Several metrics as one, with weights that add up to 1: `0.7 f1 + 0.3 rouge_l`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from moe_evo.errors import ConfigError
from moe_evo.shown import shown

_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s+(\S+)")

Scores = npt.NDArray[np.float64]
Parts = tuple[tuple[float, str], ...]


def parts_of(metric: str) -> Parts:
    """The metrics that one is made of, each with its weight; itself where it is one."""
    if not any(map(str.isspace, metric)):
        return ((1.0, metric),)
    found = [_PART.fullmatch(part.strip()) for part in canonical(metric).split(" + ")]
    return tuple((float(one[1]), one[2]) for one in found if one is not None)


def checked_parts(metric: str, option: str) -> Parts:
    """As `parts_of`; raises ConfigError for a text that is neither one metric nor weights with metrics."""
    parts = parts_of(metric)
    names = [name for _, name in parts]
    is_whole = len(parts) == canonical(metric).count(" + ") + 1 and len(set(names)) == len(names)
    if not is_whole or any(weight <= 0 for weight, _ in parts) or not math.isclose(sum(one for one, _ in parts), 1):
        raise ConfigError(
            f"{option}: got {shown(metric)}, expected one metric, or different ones with weights that add up to 1, "
            "as in '0.7 f1 + 0.3 rouge_l'"
        )
    return parts


def canonical(metric: str) -> str:
    """A checked metric with single spaces."""
    return " ".join(metric.split())


def with_weighted(found: Mapping[str, Scores], metric: str) -> dict[str, Scores]:
    """The metrics of N examples, name -> (N,), and among them this one, which may be made of others."""
    parts = parts_of(metric)
    if len(parts) == 1:
        return dict(found)
    return {**found, metric: np.sum([weight * found[name] for weight, name in parts], axis=0)}
