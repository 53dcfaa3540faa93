"""`require`, with which the sections of a config check their values, and checks of texts, names, paths and numbers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any

from moe_evo.errors import ConfigError
from moe_evo.files.limits import LARGEST
from moe_evo.shown import shown

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes that file systems allow
_LONGEST_SHOWN = 200


def require(condition: bool, option: str, got: object, expected: str) -> None:
    """Raise ConfigError unless `condition` holds; says which option, what was got and what was expected."""
    if not condition:
        raise ConfigError(f"{option}: got {shown(got)}, expected {expected}")


def require_path(option: str, path: str | None, *, is_stored: bool = True) -> None:
    """Raise ConfigError for a text that no path can be, whether or not there is such a file; None is none.

    is_stored: whether a file will name it, which can hold UTF-8 alone.
    """
    if path is None:
        return
    require("\x00" not in path, option, path, "a path without NUL")
    has_halves = any("\ud800" <= one <= "\udfff" for one in path)  # bytes that are no characters in this locale
    is_whole = _is_encodable(path) and not (is_stored and has_halves)
    require(is_whole, option, path, "a path of whole characters; set a locale such as C.UTF-8 if they are")
    names = os.fsencode(path).split(b"/")
    is_short = max(map(len, names)) <= _LONGEST_NAME and sum(map(len, names)) + len(names) <= _LONGEST_PATH
    require(is_short, option, path, f"a path, whose names have at most {_LONGEST_NAME} bytes")
    is_known = not path.startswith("~") or not os.path.expanduser(path).startswith("~")
    require(is_known, option, path, "a path; there is no user of that name")


def require_text(option: str, text: str) -> None:
    """Raise ConfigError for a text that cannot be written as UTF-8, or holds NUL."""
    is_whole = not any("\ud800" <= one <= "\udfff" for one in text)
    require(is_whole and "\x00" not in text, option, text, "text of whole characters, without NUL")


def require_name(option: str, name: str) -> None:
    """Raise ConfigError for a text that is no name for people."""
    require_text(option, name)
    is_name = len(name) <= _LONGEST_SHOWN and name.isprintable()
    require(is_name, option, name, f"a name of at most {_LONGEST_SHOWN} characters, all printable")


def require_once(option: str, names: Sequence[str]) -> None:
    """Raise ConfigError where a list has a name twice."""
    require(len(set(names)) == len(names), option, names, "each once")


def require_unset(values: object, section: str, options: Iterable[str], reason: str) -> None:
    """Raise ConfigError for the first option with another value than its default; reason: why nothing reads it."""
    kind: Any = type(values)
    for one in fields(kind):
        given = getattr(values, one.name)
        factory = one.default_factory
        default = one.default if factory is MISSING else factory()
        shown_default = "none" if default is None else f"its default, {default},"
        require(
            one.name not in options or given == default, f"{section}.{one.name}", given, f"{shown_default} {reason}"
        )


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def is_usable(number: int | float) -> bool:
    """Whether a number is finite, and within 64 bits where it is whole."""
    return abs(number) <= LARGEST if isinstance(number, int) else math.isfinite(number)


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True
