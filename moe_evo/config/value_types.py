"""Checks whether a plain value, as YAML gives it, has the type of an option; and describes types in words."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_evo.config.check import is_usable
from moe_evo.shown import shown

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    types.NoneType: "null",
    list: "a list",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
    list[str]: "a list of names",
    dict: "names with values, as in '{NAME: VALUE}'",
    dict[str, int]: "names with whole numbers, as in '{NAME: 2}'",
    dict[str, str]: "names with names, as in '{NAME: NAME}'",
    dict[str, float]: "names with numbers, as in '{NAME: 2}'",
}


def expected(hint: Any) -> str:
    """A type in words."""
    if hint in _WORDS:
        return _WORDS[hint]
    if get_origin(hint) is Literal:
        choices = ", ".join(map(repr, get_args(hint)))
        return f"one of {choices}" if len(get_args(hint)) > 1 else choices
    if is_union(hint):
        return " or ".join(map(expected, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} values"
    return _WORDS[list] if get_origin(hint) is list else _WORDS[dict]


def element_types(hint: Any, container: type) -> list[Any]:
    """The types of a list's elements (or a dict's values); empty where `hint` is not of the type `container`."""
    if is_union(hint):
        return [one for part in get_args(hint) for one in element_types(part, container)]
    return [get_args(hint)[-1]] if get_origin(hint) is container else []


def is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type."""
    if is_union(hint):
        return any(fits(value, one) for one in get_args(hint))
    return misfit("", value, hint) is None


def misfit(option: str, value: Any, hint: Any) -> str | None:
    """What is wrong with a value's type, in one line; None where nothing is."""
    parts = _parts(value, hint)
    if parts is not None:
        complaints = (misfit(option, one, part) for one, part in parts)
        return next((one for one in complaints if one is not None), None)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _misfit_of_keys(option, value, get_type_hints(hint))
    if is_union(hint):
        is_right = any(fits(value, one) for one in get_args(hint))
    elif get_origin(hint) is Literal:
        is_right = value in get_args(hint)
    else:
        is_right = hint is Any or _is_plain(value, hint)
    return None if is_right else f"{option}: got {shown(str(value))}, expected {expected(hint)}"


def unknown_key(option: str, key: Any, known: Iterable[str]) -> str:
    near = get_close_matches(str(key), known, n=1)
    return f"{option}: got an unknown key {shown(key, 80)}" + (f"; did you mean {near[0]!r}?" if near else "")


def _parts(value: Any, hint: Any) -> Iterable[tuple[Any, Any]] | None:
    """The elements of a list or dict, each with the type that it should have; None for other values."""
    origin, of = get_origin(hint), get_args(hint)
    if origin is list and isinstance(value, list):
        return [(one, of[0]) for one in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(of):
        return list(zip(value, of, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return [*((key, of[0]) for key in value), *((one, of[1]) for one in value.values())]
    return None


def _misfit_of_keys(option: str, value: Mapping[str, Any], hints: Mapping[str, Any]) -> str | None:
    for key, one in value.items():
        if key not in hints:
            return unknown_key(option, key, hints)
        if complaint := misfit(f"{option}.{key}", one, hints[key]):
            return complaint
    return None


def _is_plain(value: Any, hint: Any) -> bool:
    if hint is types.NoneType:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return is_usable(value) and (hint is float or isinstance(value, int))
    if hint is str and isinstance(value, str) and "\x00" in value:
        return False
    return get_origin(hint) is None and isinstance(value, hint) and not isinstance(value, bool)
