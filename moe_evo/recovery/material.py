"""`Material`: everything of the full model that a pruned one learns from."""

from __future__ import annotations

from dataclasses import dataclass

from moe_evo.recovery.blocks import BlockTargets
from moe_evo.recovery.lessons import Lessons


@dataclass(frozen=True)
class Material:
    """lessons: what is learned. validation: by which weights are chosen. blocks: only for methods that need them."""

    lessons: Lessons
    validation: Lessons
    blocks: BlockTargets | None = None
