"""What `moe-evo tasks check` tells of tasks: their splits, what is right how often, and what so many examples tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.table import Table

from moe_evo.records.resolution import DISAGREEMENT
from moe_evo.report.screen import screen
from moe_evo.report.table import plain_table, print_whole
from moe_evo.tasks.facts import SplitFacts

_MOST_PLACES = 6


@dataclass(frozen=True)
class CheckedSplit:
    """A split with its facts.

    margin, gain: see `moe_evo.records.resolution`; None where scores are no shares. chance: what guessing scores, None
    where that means nothing.
    """

    facts: SplitFacts
    margin: float | None
    gain: float | None
    chance: float | None


@dataclass(frozen=True)
class TaskCheck:
    """A task's splits by name. hash: of its data."""

    name: str
    kind: str
    metric: str
    search_metric: str
    hash: str
    splits: Mapping[str, CheckedSplit] = field(hash=False)


@dataclass(frozen=True)
class TasksCheck:
    """All tasks, and what the user should know of them."""

    tasks: tuple[TaskCheck, ...]
    warnings: tuple[str, ...]


def print_check_of_tasks(check: TasksCheck) -> None:
    """Print a table for each task, then the warnings."""
    console = screen()
    for task in check.tasks:
        print_whole(console, _table(task))
    if any(split.gain is not None for task in check.tasks for split in task.splits.values()):
        console.print(
            "scores to: half of the 95 % interval of a score, at most. gains from: the gain over another model that "
            "four of five comparisons on these examples tell from chance, if one of the two is right and one wrong on "
            f"{DISAGREEMENT:.0%} of them.",
            highlight=False,
            soft_wrap=True,
        )
    for line in check.warnings:
        console.print(line, highlight=False, soft_wrap=True)


def _table(task: TaskCheck) -> Table:
    searched = "" if task.search_metric == task.metric else f"; the search maximises {task.search_metric}"
    table = plain_table(f"{task.name} ({task.kind}, {task.metric}{searched})")
    table.add_column("", no_wrap=True)
    for heading in ("examples", "repeated", "dropped", "chance", "scores to", "gains from"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("right place", "most frequent answer"):
        table.add_column(heading, overflow="fold")
    for name, split in task.splits.items():
        facts = split.facts
        numbers = [str(one) for one in (facts.examples, facts.repeated, facts.dropped)]
        shares = [_number(split.chance), "" if split.margin is None else f"±{split.margin:.3f}", _number(split.gain)]
        table.add_row(name, *numbers, *shares, _places(facts), _answer(facts))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _places(facts: SplitFacts) -> str:
    shares = [f"{number / facts.examples:.0%}" for number in facts.labels[:_MOST_PLACES]]
    return " ".join([*shares, *["..."] * (len(facts.labels) > _MOST_PLACES)])


def _answer(facts: SplitFacts) -> str:
    return "" if facts.answer is None else f"{facts.answer[0][:40]!r} {facts.answer[1]:.0%}"
