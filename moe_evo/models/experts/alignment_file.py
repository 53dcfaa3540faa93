"""Alignments on disk: one safetensors file with the permutations of every MoE layer, and of which model they are."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from moe_evo.errors import ModelError
from moe_evo.genomes.stamped_file import FileKind
from moe_evo.models.experts.alignment import Permutations, check_permutations
from moe_evo.shown import line_of

FILE = FileKind(
    "moe_evo.alignment",
    version=1,
    holds="an alignment",
    error=ModelError,
    advice="give model.alignment a file alignment.safetensors that moe-evo prune wrote",
    again="align again",
)


@dataclass(frozen=True, eq=False)
class Alignment:
    """model_hash: of the model as it is stored, see `moe_evo.models.load.model_hash`."""

    model_hash: str
    permutations: Permutations

    @property
    def digest(self) -> str:
        """Equal for equal permutations."""
        content = hashlib.sha256()
        for orders in self.permutations:
            content.update(f"{orders.shape}:".encode())
            content.update(orders.astype("<i4").tobytes())
        return content.hexdigest()[:32]


def save_alignment(path: str | os.PathLike[str], alignment: Alignment) -> None:
    """Write one file, whole or not at all."""
    tensors = {f"layers.{number}": orders for number, orders in enumerate(alignment.permutations)}
    FILE.write(path, FILE.to_bytes(tensors, {"model_hash": alignment.model_hash}))


def load_alignment(path: str | os.PathLike[str], model_hash: str) -> Alignment:
    """What `save_alignment` wrote; raises ModelError for anything else, or for another model than `model_hash`."""
    tensors, metadata = FILE.load(path)
    try:
        if not tensors:
            raise ValueError("no layers")
        permutations = tuple(tensors[f"layers.{number}"] for number in range(len(tensors)))
        check_permutations(permutations)
        found = Alignment(metadata["model_hash"], permutations)
    except (KeyError, TypeError, ValueError) as error:
        reason = line_of(f"{type(error).__name__}: {error}")
        raise ModelError(f"{path}: damaged ({reason}); {FILE.advice}") from error
    if found.model_hash != model_hash:
        raise ModelError(f"{path}: alignment of the model {found.model_hash}, this one is {model_hash}; align again")
    return found
