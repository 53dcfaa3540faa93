"""What a sweep shows while its runs are under way: how many evaluations all of them have made."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_evo.commands import sweep as sweep_module
from moe_evo.commands.sweep import _Progress
from moe_evo.config.run import RunConfig
from moe_evo.config.search import SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation
from moe_evo.records.journal import Journal
from moe_evo.records.sweep import SweepFolder
from moe_evo.tracking.base import Trackers


class Noted(Trackers):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[tuple[str, int, int]] = []
        self.steps: list[tuple[int, str]] = []

    def stage(
        self, title: str, total: int, done: int = 0, unit: str = "evaluation", pace_s: float | None = None
    ) -> None:
        self.stages.append((title, total, done))

    def advanced(self, number: int, note: str = "") -> None:
        self.steps.append((number, note))


def evaluate(folder: SweepFolder, name: str, first: int, last: int) -> None:
    """Write candidates and outcomes of these numbers into a run's journal, and one outcome of another split."""
    run = folder.run(name)
    run.path.mkdir(parents=True, exist_ok=True)
    genome = Genome.from_kept([[0]], 2, 1)
    with Journal(run.journal) as journal:
        journal.propose("search", [Candidate(n, genome, "random_pruning") for n in range(first, last)])
        journal.record([("search", n, "search", Evaluation(0.5)) for n in range(first, last)])
        journal.record([("search", first, "validation", Evaluation(0.5))])


def test_the_bar_counts_what_the_journals_of_all_runs_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_WATCH_INTERVAL_S", 0.0)
    folder, tracker = SweepFolder(tmp_path), Noted()
    runs = {name: RunConfig(search=SearchConfig(evaluations=10)) for name in ("a", "b", "c")}
    evaluate(folder, "b", 0, 4)  # before the sweep was killed
    missing = {name: runs[name] for name in ("a", "b")}
    progress = _Progress(folder, tracker, runs, missing)
    progress.begin()
    assert tracker.stages == [("all runs", 20, 4)]
    progress.watch()
    progress("a", "started")
    progress("b", "started")
    progress.watch()
    assert tracker.steps == []
    evaluate(folder, "a", 0, 3)
    evaluate(folder, "b", 4, 5)
    progress.watch()
    assert tracker.steps == [(4, "1 of 3 runs ended, 2 under way")]
    folder.run("a").result.write_text("{}")  # it found nothing new after three
    monkeypatch.setattr(_Progress, "_outcome", lambda self, name: "done")
    progress("a", "ended")
    monkeypatch.setattr(sweep_module, "_WATCH_INTERVAL_S", 1e9)
    progress.watch()
    assert len(tracker.steps) == 1
    progress.watch(is_last=True)
    assert tracker.steps[1:] == [(7, "2 of 3 runs ended, 1 under way")]


def test_the_pace_of_a_journal_is_told_without_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genome = Genome.from_kept([[0]], 2, 1)
    clock = [1000.0]
    monkeypatch.setattr("moe_evo.records.journal.time.time", lambda: clock[0])
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.propose("search", [Candidate(n, genome, "random_pruning") for n in range(9)])
        for number in range(9):
            clock[0] += 5000.0 if number == 4 else 20.0  # it was killed, and went on later
            journal.record([("search", number, "search" if number % 2 else f"search/9/{number}", Evaluation(0.5))])
            assert journal.num_told("search") == number + 1
            assert (journal.pace_s("search") is None) == (number < 4)
        assert journal.pace_s("search") == pytest.approx(20.0)
        assert journal.pace_s("random") is None
