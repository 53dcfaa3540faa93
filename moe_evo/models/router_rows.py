"""The router rows of a checkpoint, read from its safetensors files without loading the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from moe_evo.errors import ModelError
from moe_evo.files.json_text import json_of
from moe_evo.models.source import ModelSource
from moe_evo.models.transformers_border import LIBRARY_ERRORS, cached_file, one_line, quiet

# of every family in its own checkpoints, and as transformers names it; not a shared expert's gate
_ROUTER = re.compile(r"(?:^|\.)layers\.(\d+)\.\w+\.(?:gate|router)(?:\.layer)?\.weight$")


def router_lengths(source: ModelSource) -> list[npt.NDArray[np.float64]]:
    """||w_j||_2 of the rows of each MoE layer's router, (E,) each; raises ModelError where a router is missing."""
    shape, path = source.shape, source.config.path
    found: dict[int, npt.NDArray[np.float64]] = {}
    try:
        for file in _files(source):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    if match := _ROUTER.search(name):
                        rows: torch.Tensor = tensors.get_tensor(name)
                        found[int(match[1])] = torch.linalg.vector_norm(rows.double(), dim=-1).numpy()
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{path}: its router weights cannot be read ({one_line(error)})") from error
    lengths = []
    for position, num_experts in zip(shape.decoder_layers, shape.num_experts, strict=True):
        if position not in found or found[position].shape != (num_experts,):
            raise ModelError(
                f"{path}: has no router of {num_experts} experts in decoder layer {position}; give the "
                "checkpoint as its family saves it"
            )
        lengths.append(found[position])
    return lengths


def check_comparable(tuned: ModelSource, base: ModelSource) -> None:
    """Raise ModelError unless both have the same routers; reads router weights only."""
    own, other = ([len(one) for one in router_lengths(source)] for source in (tuned, base))
    if own != other:
        raise ModelError(
            f"{base.config.path}: has {len(other)} MoE layers with {_summary(other)} experts, the model has {len(own)} "
            f"with {_summary(own)}; give the checkpoint that it was tuned from"
        )


def _files(source: ModelSource) -> list[Path]:
    """All safetensors files of a folder, or of a Hugging Face name."""
    location, revision = source.location, source.config.revision
    if isinstance(location, Path):
        return sorted(location.glob("*.safetensors"))
    names = ["model.safetensors"]
    with quiet():
        options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        index = cached_file(location, "model.safetensors.index.json", **options)
        if index is not None:
            weights: dict[str, str] = json_of(Path(index).read_bytes())["weight_map"]
            names = sorted({file for name, file in weights.items() if _ROUTER.search(name)})
        return [Path(str(cached_file(location, name, revision=revision))) for name in names]


def _summary(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else str(list(numbers))
