"""Observations on disk: what is read is what was written, and anything else is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_tasks as tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moe_evo.config.model import ModelConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria import observation_file
from moe_evo.criteria.observation_file import (
    StoredObservations,
    add_observations,
    load_observations,
    observed_names,
    save_observations,
)
from moe_evo.criteria.sums import KINDS, LayerObservation, LayerSums, Observation
from moe_evo.errors import ObservationError
from moe_evo.tasks.data import read_task


def made_observation(kind: type[LayerSums], seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    return Observation(tuple(kind(*rng.random((len(kind.names()), number))) for number in (4, 6)))


@pytest.fixture
def stored():
    answers = {f"{name}|été": made_observation(kind, seed) for seed, (name, kind) in enumerate(KINDS.items())}
    return StoredObservations("abc", answers)


@pytest.fixture
def path(tmp_path, stored):
    save_observations(tmp_path / "seen.safetensors", stored)
    return tmp_path / "seen.safetensors"


def test_a_file_holds_every_number_of_every_answer(path, stored):
    found = load_observations(path, "abc")
    assert found.model_hash == "abc"
    assert list(found.answers) == list(stored.answers)
    for key, observation in stored.answers.items():
        for one, other in zip(found.answers[key].layers, observation.layers, strict=True):
            assert type(one) is type(other)
            for name in one.names():
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert [file.name for file in path.parent.iterdir()] == ["seen.safetensors"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, stored):
    with pytest.raises(ObservationError, match=r"none/seen: cannot be written \(No such file or directory\)"):
        save_observations(tmp_path / "none" / "seen", stored)
    with pytest.raises(ObservationError, match=r"none/seen: cannot be written \(No such file or directory\)"):
        add_observations(tmp_path / "none" / "seen", stored)


def test_kinds_are_called_by_their_own_names():
    assert KINDS["LayerObservation"] is LayerObservation
    assert all(kind.__name__ == name for name, kind in KINDS.items())


def refusal(path, *arguments) -> str:
    with pytest.raises(ObservationError) as caught:
        load_observations(path, *arguments)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    return message


def test_another_version_is_refused(monkeypatch, path):
    monkeypatch.setattr(observation_file, "FILE", replace(observation_file.FILE, version=4, older=()))
    assert refusal(path).endswith(": observations of version 3, this moe_evo reads 4; observe again")


def test_the_version_before_is_read_but_for_what_had_another_name(path, stored):
    answers = json.loads(read_metadata(path)["answers"])
    former = [{**one, "kind": one["kind"].replace("LayerAllOutputs", "LayerAnswers")} for one in answers]
    metadata = {"format": "moe_evo.observations", "version": "2", "model_hash": "abc", "answers": json.dumps(former)}
    save_file(load_file(path), path, metadata)
    renamed = {one["key"] for one in answers if one["kind"] == "LayerAllOutputs"}
    assert renamed and list(load_observations(path, "abc").answers) == [
        key for key in stored.answers if key not in renamed
    ]


def read_metadata(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def test_another_model_is_refused(path):
    assert refusal(path, "xyz").endswith(": observations of the model abc, this one is xyz; observe again")


def test_what_is_no_file_of_observations_is_refused(path, tmp_path):
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none")
    other = tmp_path / "other.safetensors"
    save_file({"x": np.ones(2)}, other)
    assert "safetensors without observations" in refusal(other)
    other.write_bytes(path.read_bytes()[:-8])
    assert "not a safetensors file" in refusal(other)


def test_a_damaged_file_is_refused(path):
    tensors = load_file(path)
    answers = [{"key": "a", "kind": "LayerObservation", "num_layers": 2}]
    metadata = {"format": "moe_evo.observations", "version": "3", "model_hash": "abc", "answers": json.dumps(answers)}
    del tensors["0.1.norms"]
    save_file(tensors, path, metadata)
    assert "damaged (KeyError: '0.1.norms')" in refusal(path)
    save_file(tensors, path, metadata | {"answers": json.dumps([answers[0] | {"kind": "Nothing"}])})
    assert "damaged (KeyError: 'Nothing')" in refusal(path)
    save_file(tensors, path, metadata | {"answers": "[1"})
    assert "damaged (JsonError: " in refusal(path)


def test_the_name_of_a_tasks_observations_changes_with_its_prompts_and_not_with_what_a_search_maximises(tmp_path):
    data = tiny.write_splits(tmp_path / "t", [{"prompt": f"p{n}", "answers": "a"} for n in range(2)])
    configs = {
        "plain": {},
        "searched": {"search_metric": "log_likelihood"},
        "compared": {"metric": "f1"},
        "read": {"metric": "log_likelihood"},  # its scorer cuts prompts elsewhere
    }
    names = {
        name: observed_names(ModelConfig(), [read_task(TaskConfig(data=data, **options))])["t"]
        for name, options in configs.items()
    }
    assert names["plain"] == names["searched"] == names["compared"] != names["read"]


def test_what_tokens_do_without_changes_the_name_of_observations() -> None:
    data = [read_task(TaskConfig(data="syll", name="t"))]
    options: list[dict[str, float]] = [{}, {"dynamic_skipping": 0.5}, {"top_p": 0.5}, {"top_p": 0.6}]
    assert len({observed_names(ModelConfig(**one), data)["t"] for one in options}) == 4
