"""Observations on disk: what is read is what was written, and anything else is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_evo.criteria import observation_file
from moe_evo.criteria.observation import STATISTICS, LayerObservation, Observation
from moe_evo.criteria.observation_file import StoredObservations, load_observations, save_observations
from moe_evo.errors import ObservationError


def made_observation(seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    return Observation(tuple(LayerObservation(*rng.random((len(STATISTICS), number))) for number in (4, 6)))


@pytest.fixture
def stored():
    return StoredObservations({"maths": made_observation(0), "code/été": made_observation(1)}, "abc", "search")


@pytest.fixture
def path(tmp_path, stored):
    save_observations(tmp_path / "seen.safetensors", stored)
    return tmp_path / "seen.safetensors"


def test_a_file_holds_every_number_of_every_task(path, stored):
    found = load_observations(path, "abc")
    assert (found.model_hash, found.split) == ("abc", "search")
    assert list(found.of_tasks) == ["maths", "code/été"]
    for task, observation in stored.of_tasks.items():
        for one, other in zip(found.of_tasks[task].layers, observation.layers, strict=True):
            for name in STATISTICS:
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert [file.name for file in path.parent.iterdir()] == ["seen.safetensors"]


def refusal(path, *arguments) -> str:
    with pytest.raises(ObservationError) as caught:
        load_observations(path, *arguments)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    return message


def test_another_version_is_refused(monkeypatch, path, stored):
    monkeypatch.setattr(observation_file, "VERSION", 2)
    assert refusal(path).endswith(": observations of version 1, this moe_evo reads 2; observe again")


def test_another_model_is_refused(path):
    assert refusal(path, "xyz").endswith(": observations of the model abc, this one is xyz; observe again")


def test_what_is_no_file_of_observations_is_refused(path, tmp_path):
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none")
    other = tmp_path / "other.safetensors"
    save_file({"x": np.ones(2)}, other)
    assert "safetensors without observations" in refusal(other)
    other.write_bytes(path.read_bytes()[:-8])
    assert "not a safetensors file" in refusal(other)


def test_a_file_that_lacks_a_statistic_is_refused(path):
    tensors = load_file(path)
    del tensors["tasks.1.layers.0.norms"]
    metadata = {
        "format": "moe_evo.observations", "version": "1", "model_hash": "abc", "split": "search",
        "tasks": '["maths", "code"]', "num_layers": "[2, 2]",
    }  # fmt: skip
    save_file(tensors, path, metadata)
    assert "damaged (KeyError: 'tasks.1.layers.0.norms')" in refusal(path)
