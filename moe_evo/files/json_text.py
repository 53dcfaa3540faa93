"""The one reader of JSON: what cannot be taken for plain data is refused, with the place and in one line.

Python's own reader takes NaN, texts that no file can hold, and numbers and depths that break what comes after it.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from moe_evo.errors import MoeEvoError
from moe_evo.files.limits import LARGEST, MOST_DEPTH
from moe_evo.shown import cut, shown

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """A text is no JSON that can be taken; the message is one line, with line and column where there are any."""


def json_of(text: str | bytes, *, takes_infinity: bool = False) -> Any:
    """The value that a JSON text holds; raises JsonError.

    Refused are NaN and infinity, whole numbers beyond 64 bits, halves of characters (lone surrogates), a key that
    stands twice in an object, and more than 100 lists and objects in each other. takes_infinity: whether Infinity and
    -Infinity are numbers here, as Python's own writer and reader take them.
    """
    text = _decoded(text)
    constant = _infinity if takes_infinity else _refused
    try:
        value = json.loads(
            text, parse_int=_whole, parse_float=_number, parse_constant=constant, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg} at {_place(error)}") from error
    except RecursionError as error:
        raise _too_deep() from error
    if text.count("[") + text.count("{") > MOST_DEPTH:
        _check_depth(value)
    if _HALF_CHARACTER.search(text):
        _check_characters(value)
    return value


def read_json(file: Path, error: type[MoeEvoError], advice: str = "", *, takes_infinity: bool = False) -> Any:
    """The value in a file; raises `error` where it cannot be read or is no JSON. advice: what to do then.

    takes_infinity: see `json_of`.
    """
    advice = advice and f"; {advice}"
    try:
        return json_of(file.read_bytes(), takes_infinity=takes_infinity)
    except OSError as reason:
        raise error(f"{file}: cannot be read ({reason.strerror}){advice}") from reason
    except JsonError as reason:
        raise error(f"{file}: is {reason}{advice}") from reason


def _decoded(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from error


def _place(error: json.JSONDecodeError) -> str:
    column = f"column {error.colno}"
    return column if "\n" not in error.doc else f"line {error.lineno}, {column}"


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > LARGEST:
        raise JsonError(f"not usable: got {cut(digits, 40)}, expected whole numbers of at most 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        _refused(cut(digits, 40))
    return value


def _refused(name: str) -> NoReturn:
    raise JsonError(f"not usable: got {name}, expected finite numbers")


def _infinity(name: str) -> float:
    return _refused(name) if name == "NaN" else float(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise JsonError(f"not usable: got the key {shown(twice, 80)} twice, expected each once")
    return found


def _check_depth(value: Any) -> None:
    """Raise JsonError where lists and objects lie too deep in each other; goes level by level."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, list | dict)]:
        depth += 1
        if depth > MOST_DEPTH:
            raise _too_deep()
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode("ascii")
        raise JsonError(f"not usable: got {half}, half of a character, expected whole characters") from error


def _too_deep() -> JsonError:
    return JsonError(f"not usable: got lists in lists deeper than {MOST_DEPTH}, expected fewer")
