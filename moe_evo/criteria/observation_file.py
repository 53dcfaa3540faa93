"""Observations on disk: one safetensors file with every task's sums, and what they are of in the metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from moe_evo.criteria.observation import STATISTICS, LayerObservation, Observation
from moe_evo.errors import ObservationError

FORMAT = "moe_evo.observations"
VERSION = 1
_ADVICE = "give a file of observations that moe_evo saved"


@dataclass(frozen=True, eq=False)
class StoredObservations:
    """of_tasks: by the task's name. model_hash: as `moe_evo.models.loading.model_hash` tells models apart."""

    of_tasks: Mapping[str, Observation]
    model_hash: str
    split: str


def save_observations(path: str | os.PathLike[str], stored: StoredObservations) -> None:
    """Write one file, whole or not at all."""
    tensors = {
        f"tasks.{number}.layers.{index}.{name}": getattr(layer, name)
        for number, observation in enumerate(stored.of_tasks.values())
        for index, layer in enumerate(observation.layers)
        for name in STATISTICS
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model_hash": stored.model_hash,
        "split": stored.split,
        "tasks": json.dumps(list(stored.of_tasks)),
        "num_layers": json.dumps([len(observation.layers) for observation in stored.of_tasks.values()]),
    }
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(save_tensors(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def load_observations(path: str | os.PathLike[str], model_hash: str | None = None) -> StoredObservations:
    """What `save_observations` wrote; raises ObservationError for anything else, or for another model.

    model_hash: of the model that they must be of, or None where any will do.
    """
    try:
        content = Path(path).read_bytes()
        tensors = load_tensors(content)
    except OSError as error:
        raise ObservationError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ObservationError(f"{path}: not a safetensors file ({reason}); {_ADVICE}") from error
    header_size = int.from_bytes(content[:8], "little")  # the layout of safetensors: size, header, data
    metadata: dict[str, str] = json.loads(content[8 : 8 + header_size]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ObservationError(f"{path}: safetensors without observations of moe_evo; {_ADVICE}")
    if metadata.get("version") != str(VERSION):
        raise ObservationError(
            f"{path}: observations of version {metadata.get('version')}, this moe_evo reads {VERSION}; observe again"
        )
    try:
        of_tasks = {
            str(task): Observation(
                tuple(
                    LayerObservation(*(tensors[f"tasks.{number}.layers.{index}.{name}"] for name in STATISTICS))
                    for index in range(num_layers)
                )
            )
            for number, (task, num_layers) in enumerate(
                zip(json.loads(metadata["tasks"]), json.loads(metadata["num_layers"]), strict=True)
            )
        }
        stored = StoredObservations(of_tasks, metadata["model_hash"], metadata["split"])
    except (KeyError, TypeError, ValueError) as error:
        raise ObservationError(f"{path}: damaged ({type(error).__name__}: {error}); {_ADVICE}") from error
    if model_hash is not None and stored.model_hash != model_hash:
        raise ObservationError(
            f"{path}: observations of the model {stored.model_hash}, this one is {model_hash}; observe again"
        )
    return stored
