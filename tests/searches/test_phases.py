"""What a search plans to do, as tables, plans and reports are told."""

from __future__ import annotations

import pytest

from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.searches.base import Phase, phase_starts
from moe_evo.searches.registry import SEARCHES, begins_from, planned_phases, search_parameters

PRUNES, PRUNES_MORE, MERGES = ("initial prunings", True), ("children of prunings", True), ("merging", False)


@pytest.mark.parametrize(
    ("config", "can_prune", "expected"),
    [
        (SearchConfig(algorithm="eep", evaluations=402), True, [(*PRUNES, 31), (*PRUNES_MORE, 170), (*MERGES, 201)]),
        (
            SearchConfig(evaluations=402, algorithm="eep_release"),
            True,
            [(*PRUNES, 31), (*PRUNES_MORE, 70), (*MERGES, 301)],
        ),
        (
            SearchConfig(algorithm="eep", evaluations=60, eep=EEPConfig(num_pruning=60)),
            True,
            [(*PRUNES, 31), (*PRUNES_MORE, 29), (*MERGES, 0)],
        ),
        (SearchConfig(algorithm="eep", evaluations=60), False, [(*MERGES, 60)]),
        (SearchConfig(evaluations=60, algorithm="random"), True, [("random prunings", True, 60)]),
    ],
)
def test_phases_are_told_in_order_with_what_they_make(config: SearchConfig, can_prune: bool, expected: list) -> None:
    phases = planned_phases(config, can_prune=can_prune)
    assert [(one.name, one.only_prunes, one.evaluations) for one in phases] == expected


def test_rows_of_the_final_table_are_named_by_the_phases() -> None:
    def titles(algorithm: str, *, can_prune: bool = True) -> list[str]:
        return [one.row_title(7) for one in planned_phases(SearchConfig(algorithm=algorithm), can_prune=can_prune)]

    assert titles("eep") == ["EEP prune", "EEP prune", "EEP prune + merge"]
    assert titles("eep", can_prune=False) == ["EEP merge"]
    assert titles("random") == ["random, best of 7"]


def test_a_search_that_tells_of_no_phases_has_one_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCHES._registered, "climber", lambda space, config: None)
    config = SearchConfig(algorithm="climber", evaluations=9)
    assert planned_phases(config, can_prune=True) == [Phase("climber", "climber", 9)]
    assert search_parameters(config) == {} and not begins_from("climber", "seeds")
    assert search_parameters(SearchConfig(algorithm="eep"))["eep"]["num_initial"] == 31 and begins_from("eep", "seeds")


def test_a_phase_starts_when_it_was_planned_or_with_the_first_candidate_of_its_own_operators() -> None:
    phases = [Phase("a", "", 4), Phase("b", "", 6), Phase("c", "", 10, own_operators=("gaussian_mutation",))]
    drawn = dict.fromkeys(range(20), "swap_mutation")
    assert phase_starts(phases, drawn) == [0, 4, 10]
    assert phase_starts(phases, drawn | {7: "gaussian_mutation", 8: "gaussian_mutation"}) == [0, 4, 7]
    assert phase_starts(phases, drawn | {1: "gaussian_mutation"}) == [0, 1, 1]
    assert phase_starts(phases, {}) == [0, 4, 10]
