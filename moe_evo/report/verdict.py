"""What the numbers of a table mean, in words, for terminal, page and notebook: verdicts are made here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_evo.records.paired import Paired
from moe_evo.records.result import Row, RunResult
from moe_evo.report.task_scores import interval_label, task_score

TOLD = 0.05
"""The difference of which a verdict says how many examples would tell it."""

Remark = tuple[str, str]
"""A word that names what is told, and a sentence."""


def compared(paired: Paired, own: str, other: str, examples: str = "test examples") -> str:
    """Whether one model is better than another, in a sentence. own, other: what they are called."""
    number, told = paired.difference.num_examples, interval_label(paired.difference)
    if paired.is_equal:
        return f"{own} and {other} have the same score on each of {number} {examples}"
    if not paired.sign:
        return f"no difference between {own} and {other} can be told with {number} {examples}: {told}; {needed(paired)}"
    word = "better" if paired.sign > 0 else "worse"
    return f"{own} is {word} than {other}: {told} on the same {number} {examples} (95 % interval)"


def word_for(paired: Paired) -> str:
    """The same as one word."""
    return "equal" if paired.is_equal else {1: "better", 0: "unclear", -1: "worse"}[paired.sign]


def needed(paired: Paired) -> str:
    """How many examples would tell a difference that these do not, or why these do not tell it."""
    number, now = paired.examples_to_tell(TOLD), paired.difference
    if paired.mcnemar is not None and now.low * now.high > 0:
        return f"only {paired.mcnemar.won + paired.mcnemar.lost} of them are answered differently"
    if number is None or number <= now.num_examples:
        return f"one of {TOLD:g} would probably have shown"
    return f"about {number:,} would tell one of {TOLD:g}"


def remarks(result: RunResult) -> list[Remark]:
    """What the final table of a run means: winner against full model, guessing, and luck."""
    found: list[Remark] = []
    if result.against_full is not None:
        several = " (mean over tasks)" if result.fitness != "mean" and len(result.tasks) > 1 else ""
        told = compared(result.against_full.overall, "the winner", "the full model")
        found.append(("verdict", told + several))
    found += [("chance", one) for one in _chance(result)]
    if (luck := luck_of(result)) is not None:
        found.append(("luck", luck))
    return found


def _chance(result: RunResult) -> list[str]:
    """The chance level of each task that has one, and the models that are no better than guessing."""
    levels = {task.name: task.chance for task in result.tasks if task.chance is not None}
    lines = [f"guessing scores {told}" for told in levels_in_words(levels)]
    for title, row in (("the full model", result.full), ("the winner", result.best)):
        if names := _guessed(result, row):
            lines.append(f"{title} is not told from guessing on {_listed(names)}")
    return lines


def levels_in_words(levels: Mapping[str, float]) -> list[str]:
    """What guessing scores on each task, in one line; none where nothing can be guessed."""
    by_level: dict[str, list[str]] = {}
    for name, level in levels.items():
        by_level.setdefault(f"{level:.3f}", []).append(name)
    told = ", ".join(f"{level} on {_listed(names)}" for level, names in by_level.items())
    return [told] if told else []


def _guessed(result: RunResult, row: Row) -> list[str]:
    """The tasks on whose test split a row's interval does not lie above what guessing scores."""
    cells = {task: task_score(row, "test", task, task.metric, num_tasks=len(result.tasks)) for task in result.tasks}
    return [
        task.name
        for task, cell in cells.items()
        if cell is not None and cell[1] is not None and task.chance is not None and cell[1] <= task.chance
    ]


def luck_of(result: RunResult) -> str | None:
    """How much of the winner's lead on the search split is gone on the test split (the winner's curse)."""
    if result.winners_curse is None or result.against_full is None:
        return None
    lost, test = result.winners_curse.search_test, result.against_full.overall.difference.value
    sign, (low, high) = (1, (lost.low, lost.high)) if lost.value >= 0 else (-1, (-lost.high, -lost.low))
    change = f"{'lower' if sign > 0 else 'higher'} by {sign * lost.value:.3f} [{low:.3f}, {high:.3f}]"
    leads = f"{test + lost.value:+.3f} on the search split, {test:+.3f} on the test split"
    return f"winner minus full model is {leads}: {change}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
