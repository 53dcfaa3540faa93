"""`Observer`: nothing is asked twice, in this process or the next, and every answer is kept as it comes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from moe_evo.criteria.observation_file import load_observations
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.questions import GateRatios, Outputs, Question, Routed, Routers, Trials, Weights
from moe_evo.criteria.sums import LayerObservation, LayerWeights, Observation
from moe_evo.errors import ObservationError
from moe_evo.genomes.genome import Genome

TASKS = {"maths": "maths@1", "code": "code@2", "nli": "nli@3"}
NUMBERS = {"": 5.0, "maths": 1.0, "code": 10.0, "nli": 100.0}
PRUNING = Genome.from_kept([[0, 2]], 4, 1)


class Holder:
    """Who holds the model: answers in another order than it is asked, and fails after so many answers."""

    def __init__(self, fails_after: int = 1000):
        self.asked: list[Question] = []
        self.fails_after = fails_after

    def ask(self, questions):
        for question in reversed(questions):
            if len(self.asked) == self.fails_after:
                raise KeyboardInterrupt
            self.asked.append(question)
            kind = LayerObservation if question.needs_data else LayerWeights
            yield question, Observation((kind(*np.full((len(kind.names()), 4), NUMBERS[question.task])),))


def numbers(observation) -> set[float]:
    return {float(value) for layer in observation.layers for name in layer.names() for value in getattr(layer, name)}


def test_every_task_is_asked_once_and_answers_add_up():
    holder = Holder()
    observer = Observer(holder.ask, TASKS, "model")
    assert list(observer.about_tasks(Routed())) == list(TASKS)
    assert [numbers(one) for one in observer.about_tasks(Routed()).values()] == [{1.0}, {10.0}, {100.0}]
    assert numbers(observer.about(Routed())) == {111.0}
    assert sorted(question.task for question in holder.asked) == sorted(TASKS)


def test_a_question_that_is_not_about_data_is_asked_once_in_all():
    holder = Holder()
    observer = Observer(holder.ask, TASKS, "model")
    assert numbers(observer.about(Weights())) == numbers(observer.about(Weights())) == {5.0}
    assert [question.task for question in holder.asked] == [""]


def test_questions_that_differ_in_anything_have_keys_that_differ():
    routed = [
        Routed(), Routed("code"), Routed(split="test"), Routed(genome=PRUNING), Routed(layer=0), Routed(layer=1),
        Routed(part=(0, 2)), Routed(part=(1, 2)), Routed(genome=PRUNING, layer=0),
    ]  # fmt: skip
    trials = [
        Trials(), Trials(num_kept=(2,)), Trials(num_kept=(3,)), Trials(top_k=(2,)), Trials(limit=5), Trials(seed=1),
        Trials(num_kept=(2,), layer=0),
    ]  # fmt: skip
    others = [Outputs(), GateRatios(), Weights(), Routers(base_hash="a"), Routers(base_hash="b")]
    keys = [question.key for question in (*routed, *trials, *others)]
    assert len(set(keys)) == len(keys)
    assert Routed(genome=Genome.from_kept([[0, 2]], 4, 1)).key == Routed(genome=PRUNING).key


def test_another_observer_reads_what_the_first_has_stored(tmp_path):
    file = tmp_path / "seen.safetensors"
    first = Holder()
    expected = Observer(first.ask, TASKS, "model", file).about(Routed())
    second = Holder()
    observer = Observer(second.ask, TASKS, "model", file)
    assert numbers(observer.about(Routed())) == numbers(expected)
    assert second.asked == []
    observer.about(Routed(layer=0))
    assert [question.layer for question in second.asked] == [0, 0, 0]


def test_answers_are_added_to_a_file_that_knows_other_tasks(tmp_path):
    file = tmp_path / "seen.safetensors"
    Observer(Holder().ask, {"maths": "maths@1"}, "model", file).about(Routed())
    holder = Holder()
    assert numbers(Observer(holder.ask, TASKS, "model", file).about(Routed())) == {111.0}
    assert sorted(question.task for question in holder.asked) == ["code", "nli"]
    assert len(load_observations(file, "model").answers) == 3
    alone = Holder()
    assert numbers(Observer(alone.ask, {"code": "code@2"}, "model", file).about(Routed())) == {10.0}
    assert alone.asked == []


def test_a_task_whose_data_have_changed_is_observed_again(tmp_path):
    file = tmp_path / "seen.safetensors"
    Observer(Holder().ask, TASKS, "model", file).about(Routed())
    holder = Holder()
    Observer(holder.ask, TASKS | {"code": "code@changed"}, "model", file).about(Routed())
    assert [question.task for question in holder.asked] == ["code"]


def test_a_file_about_another_model_is_refused(tmp_path):
    file = tmp_path / "seen.safetensors"
    Observer(Holder().ask, TASKS, "model", file).about(Routed())
    with pytest.raises(ObservationError, match="observations of the model model, this one is other"):
        Observer(Holder().ask, TASKS, "other", file)


def test_an_interrupted_observation_goes_on_where_it_stood(tmp_path):
    file = tmp_path / "seen.safetensors"
    holder = Holder(fails_after=1)
    with pytest.raises(KeyboardInterrupt):
        Observer(holder.ask, TASKS, "model", file).about(Routed())
    (done,) = holder.asked
    assert len(load_observations(file, "model").answers) == 1
    again = Holder()
    assert numbers(Observer(again.ask, TASKS, "model", file).about(Routed())) == {111.0}
    assert sorted(question.task for question in again.asked) == sorted(set(TASKS) - {done.task})


def observe_together(file: Path, name: str, barrier) -> None:
    tasks = {f"{name}{number}": f"{name}@{number}" for number in range(12)}
    NUMBERS.update(dict.fromkeys(tasks, 2.0))
    observer = Observer(Holder().ask, tasks, "model", file)
    barrier.wait(60)
    assert numbers(observer.about(Routed())) == {24.0}


def test_processes_that_observe_into_one_file_lose_nothing_of_each_other(tmp_path):
    file = tmp_path / "seen.safetensors"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    both = [context.Process(target=observe_together, args=(file, name, barrier)) for name in ("a", "b")]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    assert [one.exitcode for one in both] == [0, 0]
    assert len(load_observations(file, "model").answers) == 24


def test_an_observer_knows_what_another_has_added_meanwhile(tmp_path):
    file = tmp_path / "seen.safetensors"
    holder = Holder()
    early = Observer(holder.ask, {"maths": "maths@1"}, "model", file)
    Observer(Holder().ask, {"maths": "maths@1"}, "model", file).about(Routed(layer=1))
    early.about(Routed())
    early.about(Routed(layer=1))
    assert [question.layer for question in holder.asked] == [None]


def test_a_file_that_became_one_of_another_model_is_not_overwritten(tmp_path):
    file = tmp_path / "seen.safetensors"
    early = Observer(Holder().ask, TASKS, "model", file)
    Observer(Holder().ask, TASKS, "other", file).about(Routed())
    with pytest.raises(ObservationError, match="observations of the model other, this one is model"):
        early.about(Routed())
    assert len(load_observations(file, "other").answers) == 3


def test_people_are_told_how_far_it_is():
    told: list[str] = []
    observer = Observer(Holder().ask, TASKS, "model", message=told.append)
    observer.about(Routed())
    assert told[0] == "observing the experts (routed)"
    assert [text.split(",")[0] for text in told[1:]] == ["observed nli (1 of 3", "observed code (2 of 3"]
    assert all(text.endswith(" s left)") for text in told[1:])
    told.clear()
    observer.about(Routed())
    assert told == []


def test_a_blend_says_how_many_times_each_task_counts():
    holder = Holder()
    observer = Observer(holder.ask, TASKS, "model", blend={"maths": 3.0, "code": 0.5})
    assert numbers(observer.about(Routed())) == {3.0 + 5.0 + 100.0}
    assert numbers(observer.about(Weights())) == {5.0}
    assert [numbers(one) for one in observer.about_tasks(Routed()).values()] == [{1.0}, {10.0}, {100.0}]
