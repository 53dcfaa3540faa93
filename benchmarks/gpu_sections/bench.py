"""What every section of the GPU benchmark is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from gpu_sections.made_models import MadeModels


@dataclass
class Bench:
    """The machine, its models and what was measured of it before.

    folder: an empty one for files. matmul_flops: operations a second of a large matrix multiplication, once that
    is known.
    """

    device: torch.device
    models: MadeModels
    folder: Path
    matmul_flops: float | None = field(default=None)

    @property
    def is_small(self) -> bool:
        return self.models.is_small

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def names(self) -> tuple[str, str]:
        """The models that sections on speed take."""
        return ("olmoe", "qwen3")
