"""Samples of a split: which examples have which name."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moe_evo.tasks.examples import Example
from moe_evo.tasks.samples import Sample, scoring_of, without_number


def examples(labels: list[int | None]) -> list[Example]:
    return [Example(f"file:{number}", f"prompt {number}", label=label) for number, label in enumerate(labels)]


UNEVEN = examples([0] * 60 + [1] * 30 + [2] * 10)


def test_a_name_is_read_back_and_a_whole_split_is_no_sample() -> None:
    sample = Sample("search", 75, 12)
    assert str(sample) == "search/75/12" and Sample.read("search/75/12") == sample
    assert Sample.read("search") is None and Sample.read("search_reported") is None
    assert [scoring_of(one) for one in ("search/75/12", "test")] == ["search", "test"]
    assert [without_number(one) for one in ("search/75/12", "search/75/3", "test")] == ["search/75"] * 2 + ["test"]


@pytest.mark.parametrize("size", [10, 30, 100])
def test_samples_have_nothing_in_common_until_the_split_is_used_up(size: int) -> None:
    number = 100 // size
    for first in (0, number, 7 * number):
        drawn = [one for place in range(number) for one in Sample("search", size, first + place).of(UNEVEN)]
        assert len(drawn) == len(set(drawn)) == number * size


def test_every_example_comes_about_equally_often() -> None:
    counts = Counter(one for number in range(300) for one in Sample("search", 30, number).of(UNEVEN))
    assert set(counts) == set(range(100)) and max(counts.values()) - min(counts.values()) < 40


def test_a_sample_has_the_labels_of_the_split_in_their_shares() -> None:
    for number in range(40):
        labels = Counter(UNEVEN[one].label for one in Sample("search", 20, number).of(UNEVEN))
        assert abs(labels[0] - 12) <= 1 and abs(labels[1] - 6) <= 1 and abs(labels[2] - 2) <= 1


def test_the_next_round_divides_the_split_in_another_way() -> None:
    first, later = (Sample("search", 50, number).of(UNEVEN) for number in (0, 2))
    assert first != later and len(set(first) & set(later)) < 50


def test_a_task_with_fewer_examples_is_used_whole_and_labels_need_not_be() -> None:
    assert Sample("search", 200, 3).of(UNEVEN) == list(range(100))
    found = Sample("search", 20, 0).of(examples([None] * 100))
    assert len(found) == 20 and found == sorted(found)


def test_samples_are_no_runs_of_neighbours() -> None:
    """Data files are often sorted."""
    found = np.array(Sample("search", 50, 0).of(examples([None] * 1000)))
    assert np.diff(found).max() < 150 and found.max() - found.min() > 700
