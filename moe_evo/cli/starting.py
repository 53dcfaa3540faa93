"""What a command does in its first second, before anything slow is imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_evo.config.run import ScoringConfig


def start(config: ScoringConfig) -> None:
    """Refuse a model folder that is not there before anything slow is imported, then say what the wait is for."""
    from moe_evo.models.location import location

    location(config.model.path)
    tell_imports()


def tell_imports() -> None:
    """Say what the wait is for, where torch is not imported yet."""
    if "torch" not in sys.modules:
        print("starting, importing torch and transformers ...", file=sys.stderr, flush=True)
