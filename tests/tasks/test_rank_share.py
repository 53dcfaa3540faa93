"""How examples are divided among ranks: each counts once, and all ranks run equally many batches."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tasks as tiny

from moe_evo.tasks.rank_share import RankShare, rank_share
from moe_evo.tasks.task import Task

ROWS = [{"prompt": "one " * (1 + n % 4), "choices": [" yes", " no no"], "label": 0} for n in range(11)]


@pytest.fixture
def task(tmp_path) -> Task:
    return tiny.make_task(tmp_path / "choice", ROWS, tiny.tiny_tokenizer(), batch_tokens=16)


def shares(task: Task, size: int, indices: list[int] | None = None) -> list[RankShare]:
    numbers = task.numbers("search", indices)
    return [rank_share(rank, size, numbers, lambda chosen: task.batches("search", chosen)) for rank in range(size)]


def counted(share: RankShare) -> list[int]:
    return sorted({int(one) for batch in share.batches[: share.num_counted] for one in batch.examples})


@pytest.mark.parametrize("size", [1, 2, 3, 4, 13])
def test_every_example_counts_on_one_rank_and_all_run_equally_many_batches(task: Task, size: int) -> None:
    divided = shares(task, size)
    assert [counted(share) for share in divided] == [list(range(11))[rank::size] for rank in range(size)]
    assert len({len(share.batches) for share in divided}) == 1


def test_positions_among_the_chosen_examples_decide_not_their_numbers(task: Task) -> None:
    assert [counted(share) for share in shares(task, 2, [8, 2, 6, 4, 2])] == [[2, 6], [4, 8]]


def test_a_rank_without_examples_runs_those_of_another_and_counts_none(task: Task) -> None:
    first, second = shares(task, 2, [5])
    assert (first.num_counted, second.num_counted) == (len(first.batches), 0)
    assert len(second.batches) == len(first.batches)
    assert {int(one) for batch in second.batches for one in batch.examples} == {5}


def test_one_rank_runs_the_whole_task(task: Task) -> None:
    (share,) = shares(task, 1)
    for got, expected in zip(share.batches, task.batches("search"), strict=True):
        np.testing.assert_array_equal(got.input_ids, expected.input_ids)


def test_batches_may_be_asked_to_be_smaller_but_not_larger(task: Task) -> None:
    usual, same, smaller = (task.batches("search", batch_tokens=most) for most in (None, 1000, 8))
    assert [len(batch.examples) for batch in same] == [len(batch.examples) for batch in usual]
    assert all(len(batch.examples) == 1 or batch.input_ids.numel() <= 8 for batch in smaller)
    assert len(smaller) > len(usual)
    prompts = task.prompt_batches("search", [1, 2, 3], batch_tokens=1)
    assert sorted(int(one) for batch in prompts for one in batch.examples) == [1, 2, 3] and len(prompts) == 3
