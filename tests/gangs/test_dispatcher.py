"""Who is served next, what is tried again, what is given up: the dispatcher without Ray, clocks or waiting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_evo.criteria.questions import Routed
from moe_evo.gangs.dispatcher import Dispatcher, Job
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure

GENOMES = [
    Genome.from_kept([[first, second]], 12, 1) for first in range(12) for second in range(first + 1, 12)
]  # 66 of them


def job(number: int, work: str = "work", split: str = "search") -> Job:
    return Job(work, split, GENOMES[number])


def jobs(*numbers: int, **where: str) -> list[tuple[int, Job]]:
    return [(number, job(number, **where)) for number in numbers]


def score(one: Job) -> Evaluation:
    assert one.genome is not None
    return Evaluation(fitness=float(GENOMES.index(one.genome)))


def finish(dispatcher: Dispatcher, batch: tuple[Job, ...], *, each_s: float = 0.001) -> None:
    dispatcher.finish(batch, [score(one) for one in batch], each_s * len(batch))


def warm(*, max_batch: int = 16, max_attempts: int = 3, each_s: float = 0.001, runs: str = "a") -> Dispatcher:
    """A dispatcher that knows how long a job takes."""
    dispatcher = Dispatcher(max_batch, max_attempts)
    for run in runs:
        dispatcher.join(run)
    dispatcher.submit(runs[0], [(-1, job(65))])
    finish(dispatcher, dispatcher.take(1), each_s=each_s)
    dispatcher.answers(runs[0])
    return dispatcher


def test_answers_go_to_whoever_asked_under_the_number_that_they_gave() -> None:
    dispatcher = warm(runs="ab")
    dispatcher.submit("a", [(7, job(1)), (8, job(2))])
    dispatcher.submit("b", [(7, job(3))])
    while batch := dispatcher.take(1):
        finish(dispatcher, batch)
    assert sorted((number, one.fitness) for number, one in dispatcher.answers("a")) == [(7, 1.0), (8, 2.0)]
    assert [(number, one.fitness) for number, one in dispatcher.answers("b")] == [(7, 3.0)]
    assert dispatcher.answers("a") == []


def test_a_job_that_two_runs_want_is_done_once() -> None:
    dispatcher = warm(runs="ab")
    dispatcher.submit("a", [(0, job(1))])
    dispatcher.submit("b", [(5, job(1))])
    batch = dispatcher.take(1)
    assert batch == (job(1),)
    assert dispatcher.take(1) == ()
    finish(dispatcher, batch)
    dispatcher.submit("b", [(6, job(1))])  # and later it is known
    assert [number for number, _ in dispatcher.answers("a")] == [0]
    assert [number for number, _ in dispatcher.answers("b")] == [5, 6]
    assert dispatcher.evaluations == 2  # with the first one of `warm`


def test_equal_genomes_of_other_tasks_or_splits_are_other_jobs() -> None:
    dispatcher = warm()
    dispatcher.submit("a", [(0, job(1)), (1, job(1, work="other")), (2, job(1, split="test"))])
    assert [len(dispatcher.take(1)) for _ in range(4)] == [1, 1, 1, 0]


@pytest.mark.parametrize(("each_s", "size"), [(1.0, 1), (0.05, 4), (0.0001, 16)])
def test_a_batch_takes_about_as_long_as_is_worth_a_request(each_s: float, size: int) -> None:
    dispatcher = warm(each_s=each_s)
    dispatcher.submit("a", jobs(*range(40)))
    assert len(dispatcher.take(1)) == size


def test_towards_the_end_every_gang_gets_some() -> None:
    dispatcher = warm()
    dispatcher.submit("a", jobs(*range(16)))
    sizes = [len(dispatcher.take(4)) for _ in range(10)]
    assert sizes[:2] == [4, 3]
    assert sum(sizes) == 16
    assert max(sizes) == 4


def test_two_runs_take_turns_however_much_one_of_them_submits() -> None:
    dispatcher = warm(max_batch=1, runs="ab")
    dispatcher.submit("a", jobs(*range(40)))
    dispatcher.submit("b", jobs(*range(40, 50)))
    order = [dispatcher.take(1)[0] for _ in range(20)]
    taken = [GENOMES.index(one.genome) >= 40 for one in order if one.genome is not None]
    assert sum(taken) == 10
    assert 4 <= sum(taken[:10]) <= 6


def test_a_run_that_comes_later_neither_waits_for_the_others_nor_goes_before_them() -> None:
    dispatcher = warm(max_batch=1)
    dispatcher.submit("a", jobs(*range(30)))
    for _ in range(20):
        finish(dispatcher, dispatcher.take(1))
    dispatcher.join("b")
    dispatcher.submit("b", jobs(*range(40, 60)))
    taken = [GENOMES.index(dispatcher.take(1)[0].genome) >= 40 for _ in range(10)]  # type: ignore[arg-type]
    assert 4 <= sum(taken) <= 6


def test_a_run_that_was_idle_saves_up_no_turns() -> None:
    dispatcher = warm(max_batch=1, runs="ab")
    dispatcher.submit("a", jobs(*range(30)))
    for _ in range(20):
        finish(dispatcher, dispatcher.take(1))
    dispatcher.submit("b", jobs(*range(40, 60)))
    taken = [GENOMES.index(dispatcher.take(1)[0].genome) >= 40 for _ in range(10)]  # type: ignore[arg-type]
    assert 4 <= sum(taken) <= 6


def test_a_run_that_comes_while_all_jobs_are_under_way_does_not_go_before_the_others() -> None:
    dispatcher = warm(max_batch=1)
    dispatcher.submit("a", jobs(*range(20)))
    for _ in range(19):
        finish(dispatcher, dispatcher.take(1))
    under_way = dispatcher.take(1)
    dispatcher.join("b")
    dispatcher.submit("b", jobs(*range(40, 60)))
    finish(dispatcher, under_way)
    dispatcher.submit("a", jobs(*range(20, 40)))
    taken = [GENOMES.index(dispatcher.take(1)[0].genome) >= 40 for _ in range(10)]  # type: ignore[arg-type]
    assert 4 <= sum(taken) <= 6


def test_what_broke_a_gang_is_tried_again_alone_and_only_the_culprit_is_given_up() -> None:
    dispatcher = warm(max_attempts=3)
    dispatcher.submit("a", jobs(0, 1, 2, 3))
    batch = dispatcher.take(1)
    assert len(batch) == 4
    assert dispatcher.give_back(batch, "rank 0 died", blame=True) == []
    given_up: list[Job] = []
    while batch := dispatcher.take(1):
        assert len(batch) == 1
        if batch[0] == job(2):
            given_up += dispatcher.give_back(batch, "rank 0 died", blame=True)
        else:
            finish(dispatcher, batch)
    assert given_up == [job(2)]
    answers = dict(dispatcher.answers("a"))
    assert answers.pop(2) == EvaluationFailure("quarantined", "broke 3 gangs: rank 0 died")
    assert {number: one.fitness for number, one in answers.items()} == {0: 0.0, 1: 1.0, 3: 3.0}
    assert dispatcher.failures == 1


def test_a_failure_is_not_kept_for_others() -> None:
    dispatcher = warm(max_attempts=1)
    dispatcher.submit("a", jobs(0))
    dispatcher.give_back(dispatcher.take(1), "the node went away", blame=True)
    dispatcher.submit("a", [(9, job(0))])
    assert dispatcher.take(1) == (job(0),)


def test_nobody_is_blamed_for_a_gang_that_died_before_it_began() -> None:
    dispatcher = warm(max_attempts=1)
    dispatcher.submit("a", jobs(0, 1))
    batch = dispatcher.take(1)
    assert dispatcher.give_back(batch, "", blame=False) == []
    assert dispatcher.take(1) == batch  # together again, in the old order


def test_a_question_goes_alone() -> None:
    dispatcher = warm()
    dispatcher.submit("a", [(0, job(0)), (1, Job("work", question=Routed("task"))), (2, job(1))])
    assert [len(dispatcher.take(1)) for _ in range(3)] == [1, 1, 1]
    counts = [np.ones(3)]
    other = warm()
    other.submit("a", [(0, Job("work", question=Routed("task")))])
    other.finish(other.take(1), [counts], 1.0)
    assert other.answers("a") == [(0, counts)]


def test_how_long_a_question_took_says_nothing_of_evaluations() -> None:
    dispatcher = warm(each_s=0.02)
    question = Job("work", question=Routed("task"))
    dispatcher.submit("a", [(0, question)])
    before = dispatcher.batch_size
    dispatcher.finish(dispatcher.take(1), [np.ones(3)], 600.0)
    assert dispatcher.batch_size == before > 1
    assert question.name == "observing the experts (routed)" and job(0).name.startswith("genome ")


def test_what_a_run_leaves_behind_is_dropped_unless_another_wants_it() -> None:
    dispatcher = warm(runs="ab")
    dispatcher.submit("a", jobs(0, 1, 2))
    dispatcher.submit("b", [(9, job(1))])
    under_way = dispatcher.take(3)
    assert under_way == (job(0),)
    dispatcher.leave("a")
    assert dispatcher.take(1) == (job(1),)
    assert dispatcher.take(1) == ()
    finish(dispatcher, under_way)  # its result is kept, though nobody waits for it
    finish(dispatcher, (job(1),))
    assert [number for number, _ in dispatcher.answers("b")] == [9]


def test_a_gang_that_breaks_after_its_run_has_left_gives_back_to_nobody() -> None:
    dispatcher = warm()
    dispatcher.submit("a", jobs(0))
    batch = dispatcher.take(1)
    dispatcher.leave("a")
    assert dispatcher.give_back(batch, "rank 0 died", blame=True) == []
    assert (dispatcher.waiting, dispatcher.under_way) == (0, 0)


def test_slots_hold_a_batch_a_gang_and_some_in_reserve() -> None:
    dispatcher = warm(each_s=0.05)  # batches of 4
    assert [dispatcher.slots(gangs) for gangs in (1, 4, 8)] == [8, 20, 40]


STEPS = st.lists(
    st.tuples(st.sampled_from(["submit", "take", "finish", "break", "spare"]), st.integers(0, 30), st.booleans()),
    max_size=80,
)


@settings(deadline=None)
@given(STEPS)
def test_every_job_is_answered_exactly_once_to_everyone_whatever_breaks(steps: list[tuple[str, int, bool]]) -> None:
    dispatcher = Dispatcher(max_batch=4, max_attempts=2)
    dispatcher.join("a")
    dispatcher.join("b")
    under_way: list[tuple[Job, ...]] = []
    asked: dict[str, dict[int, int]] = {"a": {}, "b": {}}
    answered: dict[str, list[int]] = {"a": [], "b": []}

    def collect() -> None:
        for run in ("a", "b"):
            for number, answer in dispatcher.answers(run):
                answered[run].append(number)
                if isinstance(answer, Evaluation):
                    assert answer.fitness == asked[run][number]
                else:
                    assert answer.kind == "quarantined"  # type: ignore[union-attr]

    for kind, value, flag in steps:
        run = "b" if flag else "a"
        if kind == "submit":
            number = len(asked[run])
            asked[run][number] = value
            dispatcher.submit(run, [(number, job(value))])
        elif kind == "take" and (batch := dispatcher.take(2)):
            assert not {one.key for one in batch} & {one.key for taken in under_way for one in taken}
            under_way.append(batch)
        elif kind in ("finish", "break", "spare") and under_way:
            batch = under_way.pop(value % len(under_way))
            if kind == "finish":
                finish(dispatcher, batch)
            else:
                dispatcher.give_back(batch, "broken", blame=kind == "break")
        collect()
    for batch in under_way:
        finish(dispatcher, batch)
    while batch := dispatcher.take(2):
        finish(dispatcher, batch)
    collect()
    assert {run: sorted(numbers) for run, numbers in answered.items()} == {run: sorted(asked[run]) for run in asked}
    assert (dispatcher.waiting, dispatcher.under_way) == (0, 0)
