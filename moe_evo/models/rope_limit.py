"""How long rows may be where a model's rotary embedding depends on the longest row of a batch.

Dynamic scaling and longrope choose their frequencies for a whole batch, by its longest row: beyond a length the scores
of a row would depend on what else is in its batch. Up to that length every row is what it is alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moe_evo.errors import ConfigError

_BY_BATCH = ("dynamic", "longrope")


def rope_limit(config: Any) -> int | None:
    """The most positions with which each row is what it is alone; None where any number is. config: of transformers."""
    rope = getattr(config, "rope_parameters", None) or {}
    of_kinds = [one for one in rope.values() if isinstance(one, Mapping)] or [rope]  # of kinds of layers, or of all
    limits = [
        int(one.get("original_max_position_embeddings") or config.max_position_embeddings)
        for one in of_kinds
        if one.get("rope_type") in _BY_BATCH
    ]
    limits += [int(config.max_position_embeddings)] if limits else []
    return min(limits, default=None)


def check_row_lengths(config: Any, max_lengths: Iterable[tuple[str, int]]) -> None:
    """Raise ConfigError where rows may be longer than `rope_limit`; max_lengths: (name, max_length) of tasks."""
    limit = rope_limit(config)
    for name, length in max_lengths:
        if limit is not None and length > limit:
            raise ConfigError(
                f"tasks ({name}).max_length: got {length}, expected at most {limit}, as the rotary embedding of this "
                "model (dynamic or longrope) is that of the longest row of a batch beyond it, so that scores would "
                "depend on the batch; set max_length"
            )
