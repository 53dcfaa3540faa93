"""Progress: a bar on a terminal, plain lines elsewhere, the same facts on both."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from moe_evo.evaluation.pool import GangStatus, PoolEvent, PoolNews, PoolStatus
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.tracking import terminal
from moe_evo.tracking.terminal import TerminalTracker

BEST = Individual(Candidate(3, Genome.from_kept([[0]], 2, 1), "random_pruning"), Evaluation(0.75))
FAILED = Individual(BEST.candidate, EvaluationFailure("non_finite", "NaN"))


def text_of(*, is_terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=120, force_interactive=is_terminal)
    with TerminalTracker(console) as tracker:
        tracker.message("loading [embedded]")
        tracker.stage("search", 3, done=1)
        tracker.evaluated(BEST, BEST, "pruning")
        tracker.evaluated(FAILED, BEST, "pruning")
    return output.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_count_rate_time_left_best_phase_and_failures(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_PLAIN_INTERVAL_S", 0.0)
    text = text_of(is_terminal=is_terminal)
    for part in ("loading [embedded]", "search", "3/3", "/s", "pruning", "best 0.7500 (#3)", "1 failed"):
        assert part in text


def test_plain_lines_hold_no_control_codes_and_say_what_was_done_before() -> None:
    text = text_of(is_terminal=False)
    assert "\x1b" not in text
    assert "search: 3 evaluations, 1 done before" in text
    assert "0 s left" in text


def test_plain_lines_come_at_intervals_not_at_every_evaluation() -> None:
    output = io.StringIO()
    with TerminalTracker(Console(file=output, width=120)) as tracker:
        tracker.stage("search", 500)
        for _ in range(500):
            tracker.evaluated(BEST, BEST, "pruning")
    assert len(output.getvalue().splitlines()) < 10
    assert "500/500" in output.getvalue()


GANGS = PoolStatus(
    gangs=(
        GangStatus(0, "busy", "10.0.0.7", (41,), evaluations=12, evaluations_per_s=3.25, restarts=2),
        GangStatus(1, "loading", "10.0.0.8", (42,), progress="1.5 GiB a rank after 3 s"),
    ),
    waiting=5,
    restarts=2,
    runs=3,
)
BROKEN = PoolEvent(0.0, 1, "broken", "rank 0 died")


def told_of_gangs(news: PoolNews, *, is_terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=160, force_interactive=is_terminal)
    with TerminalTracker(console) as tracker:
        tracker.stage("search", 3)
        tracker.pool(news)
        tracker.evaluated(BEST, BEST, "pruning")
    return output.getvalue()


def test_a_terminal_shows_every_gang_below_the_bar() -> None:
    text = told_of_gangs(PoolNews(GANGS, (BROKEN,)), is_terminal=True)
    for part in ("gang 1 broken: rank 0 died", "10.0.0.7", "busy", "3.2/s", "loading 1.5 GiB a rank after 3 s"):
        assert part in text


def test_plain_lines_tell_events_and_the_gangs_in_a_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PLAIN_INTERVAL_S", 0.0)
    text = told_of_gangs(PoolNews(GANGS, (BROKEN,)), is_terminal=False)
    assert "gang 1 broken: rank 0 died\n" in text
    assert "gangs: 1 busy, 1 loading, queue 5, 2 restarts, shared by 3 runs" in text


def test_plain_lines_say_how_far_gangs_have_loaded_while_none_serves() -> None:
    text = told_of_gangs(PoolNews(PoolStatus(gangs=GANGS.gangs[1:])), is_terminal=False)
    assert "gangs: 1 loading, queue 0 (1.5 GiB a rank after 3 s)" in text


def at(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tracker's clock show these seconds, one after the other, and then the last one."""
    left = list(seconds)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: left.pop(0) if len(left) > 1 else left[0])


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_resumed_stage_tells_the_time_left_at_once_from_the_pace_before(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_PLAIN_INTERVAL_S", 0.0)
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=160, force_interactive=is_terminal)
    with TerminalTracker(console) as tracker:
        tracker.stage("search", 200, done=120, pace_s=30.0)
    assert "40 min left" in output.getvalue()  # 80 evaluations of 30 s
    assert is_terminal or output.getvalue() == "search: 200 evaluations, 120 done before, 40 min left\n"


def test_the_pace_before_counts_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PLAIN_INTERVAL_S", -1.0)
    output = io.StringIO()
    tracker = TerminalTracker(Console(file=output, width=160))
    at([0.0], monkeypatch)
    tracker.stage("search", 300, done=100, pace_s=1.0)
    at([2.0], monkeypatch)  # now an evaluation takes 2 s
    tracker.advanced(1)
    at([200.0], monkeypatch)
    tracker.advanced(99)
    first, later = output.getvalue().splitlines()[1:]
    assert "101/300" in first and "4 min left" in first  # 199 of (5 + 2) / 6 s each
    assert "200/300" in later and "3 min left" in later  # 100 of (5 + 200) / 105 s each


def test_slow_evaluations_have_a_rate_and_a_time_left_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=160, force_interactive=True)
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with TerminalTracker(console) as tracker:
        tracker.stage("search", 10)
        for _ in range(3):
            clock[0] += 120.0
            tracker.advanced(1)
    text = output.getvalue()
    assert "120 s each" in text and "14 min left" in text
