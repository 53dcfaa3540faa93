"""Compares the winner of each run with that of the first run on the same test examples (paired tests)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_evo.genomes.population import Evaluation, ExampleScores
from moe_evo.records.paired import paired
from moe_evo.records.result import TaskFacts
from moe_evo.report.record import Record
from moe_evo.report.screen import screen
from moe_evo.report.table import plain_table, print_fitting
from moe_evo.report.verdict import TOLD, word_for


@dataclass(frozen=True)
class Pairing:
    """The winner of a run against that of the run `against`, on the same test examples.

    difference: its score minus the other's, mean over tasks, with its 95 % interval. won, lost: numbers of examples
    that only this winner, or only the other, got right; with them the p-value of the exact McNemar test. They are
    None where scores are not 0 or 1. verdict: in a word; see `word_for`. needed: about how many examples would tell a
    difference of `TOLD`. reason: why the two cannot be paired, in which case everything else is None.
    """

    run: str
    folder: str
    against: str
    reason: str | None = None
    num_examples: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    won: int | None = None
    lost: int | None = None
    p_value: float | None = None
    verdict: str | None = None
    needed: int | None = None


def pairings(records: Sequence[Record]) -> list[Pairing]:
    """Every other run against the first, in the given order; the bootstrap is seeded, so numbers are reproducible."""
    return [_pairing(one, records[0]) for one in records[1:]]


def _pairing(record: Record, first: Record) -> Pairing:
    between = Pairing(record.label, str(record.folder), first.label)
    own, others = _winner_scores(record), _winner_scores(first)
    if isinstance(others, str):
        return replace(between, reason=f"{first.label}: {others}")
    if isinstance(own, str):
        return replace(between, reason=own)
    reason = _other_examples(record, first)
    if reason is not None:
        return replace(between, reason=reason)
    found = paired(own, others)
    difference, mcnemar = found.difference, found.mcnemar
    return replace(
        between,
        num_examples=difference.num_examples,
        difference=difference.value,
        difference_low=difference.low,
        difference_high=difference.high,
        verdict=word_for(found),
        needed=found.examples_to_tell(TOLD),
        **({} if mcnemar is None else asdict(mcnemar)),
    )


def _winner_scores(record: Record) -> ExampleScores | str:
    """Scores of the winner's test examples by task, or in words why there are none."""
    if record.result is None or record.best is None:
        return "not finished"
    outcome = record.test.get(record.best)
    if outcome is None:
        return "no test scores of its winner in its journal"
    if not isinstance(outcome, Evaluation) or not outcome.scores:
        return "its winner could not be scored on the test split"
    return outcome.scores


def _other_examples(record: Record, first: Record) -> str | None:
    """In words how the test examples of two finished runs differ; None where they are the same."""
    own, others = _tasks_by_name(record), _tasks_by_name(first)
    if set(own) != set(others):
        return f"other tasks: {', '.join(sorted(own))}, not {', '.join(sorted(others))}"
    for name, task in own.items():
        other = others[name]
        if task.metric != other.metric:
            return f"another metric of task {name}: {task.metric}, not {other.metric}"
        if task.hash != other.hash:
            return f"other data of task {name}"
        sizes = task.examples["test"], other.examples["test"]
        if sizes[0] != sizes[1]:
            return f"other test examples of task {name}: {sizes[0]}, not {sizes[1]}"
        # in a file that is split by hash, the test split's share decides which examples it has
        shares = _test_share(record, name), _test_share(first, name)
        if abs(shares[0] - shares[1]) > 1e-9:
            return f"another test share of task {name}: {shares[0]:g}, not {shares[1]:g}"
    return None


def _tasks_by_name(record: Record) -> dict[str, TaskFacts]:
    """The tasks of a finished run."""
    assert record.result is not None
    return {task.name: task for task in record.result.tasks}


def _test_share(record: Record, name: str) -> float:
    configs = dict(zip(record.task_names, record.config.tasks, strict=True))
    return configs[name].split_shares[2]


def print_pairings(found: Sequence[Pairing], console: Console | None = None) -> None:
    """Print a table of the runs that can be paired, and a line for each reason why others cannot."""
    console = console or screen()
    pairs = [one for one in found if one.reason is None]
    if pairs:
        # printed by itself, because a table's title is wrapped to the width of the table
        console.print(f"\ntest score of the winner minus that of {pairs[0].against}, on the same examples",
                      style="table.title", highlight=False, markup=False, soft_wrap=True)  # fmt: skip
        print_fitting(console, _paired_table(pairs))
        needed = max((one.needed for one in pairs if one.verdict == "unclear" and one.needed), default=0)
        if needed > (pairs[0].num_examples or 0):
            told = f"unclear: no difference can be told; about {needed:,} examples would tell one of {TOLD:g}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
    runs_of: dict[str, list[str]] = {}
    for one in found:
        if one.reason is not None:
            runs_of.setdefault(one.reason, []).append(one.run)
    for reason, runs in runs_of.items():
        console.print(f"not paired with {found[0].against}: {', '.join(runs)} ({reason})",
                      highlight=False, markup=False, soft_wrap=True)  # fmt: skip


def _paired_table(pairs: Sequence[Pairing]) -> Table:
    table = plain_table()
    table.add_column("run", overflow="fold")
    for heading in ("difference [95 %]", "examples", "won", "lost", "McNemar p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for one in pairs:
        numbers = (one.difference, one.difference_low, one.difference_high)
        table.add_row(
            Text(one.run),
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*numbers),
            str(one.num_examples),
            *("" if count is None else str(count) for count in (one.won, one.lost)),
            _p_label(one.p_value),
            one.verdict,
        )
    return table


def _p_label(p_value: float | None) -> str:
    if p_value is None:
        return ""
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
