"""Converts frozen dataclasses to plain data, as JSON and YAML hold it, and back.

Data of other versions can be read: an unknown key is ignored, and a missing one takes its default. A dataclass
whose plain data should look different has methods `to_plain` and `from_plain`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moe_evo.shown import shown

Plain = dict[str, Any]
"""A JSON object."""

Value = TypeVar("Value")


class PlainError(ValueError):
    """Plain data do not fit the type to be made of them; the message says where, what was got and expected."""


def plain(value: object) -> Any:
    """The value as plain data: dataclasses as dicts, sequences as lists, paths as text, everything else unchanged."""
    own = getattr(value, "to_plain", None)
    if own is not None:
        return own()
    if is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def plain_fields(value: Any) -> Plain:
    """A dataclass as plain data field by field, without use of its own `to_plain`."""
    return {one.name: plain(getattr(value, one.name)) for one in fields(value)}


def value_of(kind: type[Value], data: object, where: str = "") -> Value:
    """The value of type `kind` that `data` describe; raises PlainError, or what the type's own checks raise.

    where: name of the data for the error message, such as that of an option.
    """
    made: Value = _made(kind, data, where)
    return made


def _made(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any or kind is object:
        return data
    if origin in (Union, types.UnionType):
        return _one_of(get_args(kind), data, where)
    if origin is Literal:
        return _checked(data in get_args(kind), kind, data, where)
    if origin in (list, tuple, Sequence):
        return _sequence(kind, data, where)
    if origin in (dict, Mapping):
        key_kind, value_kind = get_args(kind)
        _checked(isinstance(data, Mapping), kind, data, where)
        return {_key(key_kind, key, where): _made(value_kind, one, _in(where, key)) for key, one in data.items()}
    if is_dataclass(kind):
        return _dataclass(kind, data, where)
    if kind is Path:
        return Path(_checked(isinstance(data, str | Path), kind, data, where))
    if kind is float:  # as YAML and JSON write whole numbers
        return float(_checked(_is_number(data), kind, data, where))
    if kind is int:
        return _checked(_is_number(data) and isinstance(data, int), kind, data, where)
    is_right = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    return _checked(is_right, kind, data, where)


def _is_number(data: Any) -> bool:
    """Whether data are a number, finite, and within 64 bits where it is whole."""
    if isinstance(data, bool) or not isinstance(data, int | float):
        return False
    return abs(data) < 2**63 if isinstance(data, int) else math.isfinite(data)


def _key(kind: Any, key: Any, where: str) -> Any:
    """A key of a dict; JSON writes those that are numbers as text."""
    is_number = isinstance(key, str) and key.isdigit() and int in get_args(kind)
    return int(key) if is_number else _made(kind, key, where)


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    if isinstance(data, kind):
        return data
    own = getattr(kind, "from_plain", None)
    return fields_of(kind, data, where) if own is None else own(data, where)


def fields_of(kind: type[Value], data: object, where: str = "") -> Value:
    """The dataclass whose fields are in `data`, without use of its own `from_plain`; raises as `value_of`."""
    if not isinstance(data, Mapping):
        raise PlainError(f"{where or 'it'}: got {_short(data)}, expected names with values")
    given = {}
    hashable: Any = kind
    for one, hint in _fields(hashable):
        if one.name in data:
            given[one.name] = _made(hint, data[one.name], _in(where, one.name))
        elif one.default is MISSING and one.default_factory is MISSING:
            raise PlainError(f"{_in(where, one.name)}: is missing")
    return kind(**given)


def _sequence(kind: Any, data: Any, where: str) -> Any:
    _checked(isinstance(data, (list, tuple)), kind, data, where)
    parts = get_args(kind)
    if get_origin(kind) is tuple and Ellipsis not in parts:
        _checked(len(data) == len(parts), kind, data, where)
        made = [_made(part, one, f"{where}[{n}]") for n, (part, one) in enumerate(zip(parts, data, strict=True))]
    else:
        made = [_made(parts[0], one, f"{where}[{n}]") for n, one in enumerate(data)]
    return made if get_origin(kind) is list else tuple(made)


def _one_of(kinds: Sequence[Any], data: Any, where: str) -> Any:
    """The value as the first of several types that fits."""
    if data is None and type(None) in kinds:
        return None
    kinds = [one for one in kinds if one is not type(None)]
    errors = []
    for kind in kinds:
        try:
            return _made(kind, data, where)
        except PlainError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise PlainError(f"{where}: got {_short(data)}, expected {' or '.join(map(_name, kinds))}")


def field_types(kind: type) -> dict[str, object]:
    """The types of a dataclass's fields by their names."""
    return {one.name: hint for one, hint in _fields(kind)}


@cache
def _fields(kind: Hashable) -> list[tuple[Field[Any], Any]]:
    """The fields that a dataclass's constructor takes, each with its type."""
    dataclass: Any = kind
    hints = get_type_hints(dataclass)
    return [(one, hints[one.name]) for one in fields(dataclass) if one.init]


def _checked(is_right: bool, kind: Any, data: Any, where: str) -> Any:
    if not is_right:
        raise PlainError(f"{where or 'it'}: got {_short(data)}, expected {_name(kind)}")
    return data


_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "names"}


def _name(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (list, tuple, Sequence):
        return f"a list of {_PLURALS.get(get_args(kind)[0]) or _name(get_args(kind)[0])}"
    if get_origin(kind) in (dict, Mapping) or is_dataclass(kind):
        return "names with values"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return words.get(kind, str(kind))


def _short(data: object) -> str:
    return shown(data, 80)


def _in(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
