"""Every error that moe_evo raises on purpose: one base class, few leaves, each also a builtin.

A message says where, what was got, what was expected and what to do, in one line; the command line
prints that line and exits with code 2. The errors found before a model is loaded are collected as `Problem`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from moe_evo.shown import line_of


class MoeEvoError(Exception):
    """Base of all errors that the user can correct; its message is one line, whatever is in a file that it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(line_of(message))


class ConfigError(MoeEvoError, ValueError):
    """A config file, a flag or a combination of them asks for something impossible."""


class GenomeError(MoeEvoError, ValueError):
    """A genome, or a file that should hold one, is not well formed or does not fit the model."""


class ModelError(MoeEvoError, ValueError):
    """A model cannot be loaded, is not a supported Mixture-of-Experts model, or misbehaves."""


class OutOfMemory(ModelError):
    """An evaluation needs more memory than the device has."""


class RowOutOfMemory(OutOfMemory):
    """A single row needs more memory than the device has, so that no smaller batch can help."""


class TaskError(MoeEvoError, ValueError):
    """Task data are missing, malformed or too few."""


class ObservationError(MoeEvoError, ValueError):
    """Observations of a model, or a file that should hold them, are not well formed or do not fit."""


class JournalError(MoeEvoError, RuntimeError):
    """The journal of a run cannot be read or written."""


class ClusterError(MoeEvoError, RuntimeError):
    """A Ray cluster cannot be reached, has no resources for a gang, or no gang of it can load the model."""


class RunError(MoeEvoError, RuntimeError):
    """A run folder cannot be used for what was asked."""


class ExportError(MoeEvoError, RuntimeError):
    """A checkpoint cannot be exported, or the export does not compute what was evaluated."""


@dataclass(frozen=True)
class Problem:
    """An error as a value, which is not raised yet.

    where: the option, file or task; got: what was found there; expected, advice: what was expected and what to do,
    '' where the message says none. error: what to raise.
    """

    where: str
    got: str
    expected: str
    advice: str
    error: MoeEvoError = field(compare=False, repr=False)

    @classmethod
    def of(cls, error: MoeEvoError) -> Problem:
        """The problem made of an error whose message reads `WHERE: got GOT, expected EXPECTED; ADVICE`."""
        where, _, rest = str(error).partition(": ")
        told, _, advice = rest.rpartition("; ") if "; " in rest else (rest, "", "")
        got, _, expected = told.removeprefix("got ").partition(", expected ")
        return cls(where, got, expected, advice, error)

    def __str__(self) -> str:
        return str(self.error)

    def to_plain(self) -> str:
        """The message, in one line."""
        return str(self)


class Problems:
    """Collects problems: `with problems.noted(): ...` adds an error raised in the block, and continues after it.

    Equal problems are added once.
    """

    def __init__(self) -> None:
        self._found: dict[str, Problem] = {}

    def noted(self) -> AbstractContextManager[None, bool]:
        """A context that adds the MoeEvoError that its block raises, and suppresses it."""
        return _Noted(self)

    def add(self, error: MoeEvoError) -> None:
        """Add an error."""
        problem = Problem.of(error)
        self._found.setdefault(str(problem), problem)

    @property
    def found(self) -> tuple[Problem, ...]:
        """All problems, in the order in which they were found."""
        return tuple(self._found.values())


class _Noted:
    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, MoeEvoError):
            return False
        self._problems.add(error)
        return True


def raise_first(problems: Sequence[Problem]) -> None:
    """Raise the first problem, if any; the message says how many more there are."""
    if len(problems) == 1:
        raise problems[0].error
    if problems:
        first = problems[0]
        raise type(first.error)(f"{first} (and {len(problems) - 1} more; moe-evo plan lists all)") from first.error
