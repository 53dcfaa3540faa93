"""Observations on disk: one safetensors file with the sums of each question; its metadata names question and model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_evo.config.model import ModelConfig
from moe_evo.criteria.sums import KINDS, Observation
from moe_evo.errors import ObservationError
from moe_evo.files.json_text import json_of
from moe_evo.genomes.stamped_file import FileKind, Tensors
from moe_evo.plain import PlainError, value_of
from moe_evo.shown import line_of
from moe_evo.tasks import kinds
from moe_evo.tasks.data import TaskData

FILE = FileKind(
    "moe_evo.observations",
    version=3,
    holds="observations",
    error=ObservationError,
    advice="give a file of observations that moe_evo saved",
    again="observe again",
    older=(2,),
)
_FORMER_KINDS = ("LayerAnswers",)  # of version 2, which had another name for LayerAllOutputs: observed again


@dataclass(frozen=True, eq=False)
class StoredObservations:
    """What one file holds.

    answers: observations by `Question.key`. model_hash: of the model, see `moe_evo.models.load.model_hash`.
    """

    model_hash: str
    answers: Mapping[str, Observation[Any]] = field(default_factory=dict)


def save_observations(path: str | os.PathLike[str], stored: StoredObservations) -> None:
    """Write one file, whole or not at all; raises ObservationError where that cannot be."""
    tensors = {
        f"{number}.{index}.{name}": getattr(layer, name)
        for number, observation in enumerate(stored.answers.values())
        for index, layer in enumerate(observation.layers)
        for name in layer.names()
    }
    answers = [
        {"key": key, "kind": type(observation.layers[0]).__name__, "num_layers": len(observation.layers)}
        for key, observation in stored.answers.items()
    ]
    FILE.write(path, FILE.to_bytes(tensors, {"model_hash": stored.model_hash, "answers": json.dumps(answers)}))


def add_observations(path: str | os.PathLike[str], more: StoredObservations) -> StoredObservations:
    """Add `more` to the file, safely beside other processes that do; returns all that it holds then.

    Raises ObservationError where the file holds something else, or cannot be written.
    """
    with FILE.locked(path):
        known = load_observations(path, more.model_hash).answers if os.path.exists(path) else {}
        stored = StoredObservations(more.model_hash, {**known, **more.answers})
        save_observations(path, stored)
    return stored


def load_observations(path: str | os.PathLike[str], model_hash: str | None = None) -> StoredObservations:
    """What `save_observations` wrote; raises ObservationError for anything else, or for another model.

    model_hash: of the expected model; None accepts any.
    """
    tensors, metadata = FILE.load(path)
    try:
        told = value_of(tuple[_Answer, ...], json_of(metadata["answers"]), "answers")
        answers = {
            one.key: _observation(tensors, number, one)
            for number, one in enumerate(told)
            if one.kind not in _FORMER_KINDS
        }
        stored = StoredObservations(metadata["model_hash"], answers)
    except (KeyError, TypeError, ValueError) as error:
        reason = line_of(f"{type(error).__name__}: {error}")
        raise ObservationError(f"{path}: damaged ({reason}); {FILE.advice}") from error
    if model_hash is not None and stored.model_hash != model_hash:
        raise ObservationError(
            f"{path}: observations of the model {stored.model_hash}, this one is {model_hash}; observe again"
        )
    return stored


@dataclass(frozen=True)
class _Answer:
    """What the metadata tell of one observation."""

    key: str
    kind: str
    num_layers: int

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise PlainError(f"answers: got {self.num_layers} layers, expected 1 or more")


def _observation(tensors: Tensors, number: int, told: _Answer) -> Observation[Any]:
    """The observation of this number; raises KeyError or ValueError where it is not whole."""
    kind = KINDS[told.kind]
    layers = []
    for index in range(told.num_layers):
        found = {name: tensors[f"{number}.{index}.{name}"] for name in kind.names()}
        for name, sums in found.items():
            if sums.dtype != np.float64 or not np.isfinite(sums).all():
                raise ValueError(f"{name} of layer {index} is {sums.dtype}, expected finite float64")
        layers.append(kind(*found.values()))
    return Observation(tuple(layers))


_PROMPT_OPTIONS = (
    "split_shares", "num_search", "num_validation", "num_test", "prefix", "chat_template", "max_length",
    "max_new_tokens",
)  # fmt: skip
"""Options of a task that change its prompts."""


def observed_names(model: ModelConfig, data: Sequence[TaskData]) -> dict[str, str]:
    """By task the name under which its observations are kept; it changes with whatever changes observations."""
    names = {}
    for one in data:
        prompts = [one.hash, one.kind, *(getattr(one.config, option) for option in _PROMPT_OPTIONS)]
        if one.metric in kinds.KINDS[one.kind].scorers:  # its scorer may cut prompts elsewhere
            prompts.append(one.metric)
        routing = model.dynamic_skipping if model.top_p is None else {"top_p": model.top_p}
        told = json.dumps([*prompts, model.dtype, model.experts, routing])
        names[one.name] = f"{one.name}@{hashlib.sha256(told.encode()).hexdigest()[:32]}"
    return names
