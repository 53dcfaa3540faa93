"""From the columns of a row to the fields that a task reads, as `TaskConfig.fields` says: by name or Jinja template.

Templates run in Jinja's sandbox: they see the row's columns by name, and all of it as `row`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_evo.config.task import Column, is_template
from moe_evo.errors import ConfigError, TaskError
from moe_evo.shown import shown

if TYPE_CHECKING:  # which is imported where there is a template
    from jinja2.sandbox import SandboxedEnvironment

_TEXTS = ("prompt", "text", "system")
_EXPRESSION = re.compile(r"\s*\{\{-?(?P<inside>((?!\{\{|\}\}|\{%|%\}).)*?)-?\}\}\s*", re.DOTALL)

Reader = Callable[[Mapping[str, Any], str], Any]
"""From a row and its place to a value; raises TaskError."""


class FieldMapping:
    """Makes rows with the fields that tasks read of rows with any columns.

    fields: as in `TaskConfig`; without any, rows are taken as they are. option: for error messages.

    >>> mapping = FieldMapping({"prompt": "Q: {{ question }}", "choices": ["a", "b"], "label": "{{ right - 1 }}"}, "")
    >>> mapping({"question": "Is it?", "a": "yes", "b": "no", "right": 2}, "data.csv:2")
    {'prompt': 'Q: Is it?', 'choices': ['yes', 'no'], 'label': 1}
    """

    def __init__(self, fields: Mapping[str, Column], option: str) -> None:
        self.fields = fields
        self._readers = {name: _reader(name, column, f"{option}.{name}") for name, column in fields.items()}

    def __call__(self, row: Any, where: str) -> Any:
        if not self._readers or not isinstance(row, Mapping):
            return row
        return {name: read(row, where) for name, read in self._readers.items()}

    def explained(self, error: TaskError, where: str) -> TaskError:
        """An error about a field, with the columns that the field is made of."""
        field = str(error).removeprefix(f"{where}: ").partition(":")[0]
        if field not in self.fields:
            return error
        return TaskError(f"{error} ({field} is made of {shown(self.fields[field], 80)})")


def _reader(field: str, column: Column, option: str) -> Reader:
    if not isinstance(column, str):
        parts = [_reader(field, one, option) for one in column]
        return lambda row, where: [read(row, where) for read in parts]
    if not is_template(column):
        return lambda row, where: _cell(row, column, field, where)
    return _template(field, column, option)


def _cell(row: Mapping[str, Any], column: str, field: str, where: str) -> Any:
    """The value of a column, or of a part of it: choices.text is the part `text` of the column `choices`."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise TaskError(f"{where}: {field}: no column {shown(column, 80)}; got the columns {shown(list(row))}")
        value = value[part]
    return value


def _template(field: str, source: str, option: str) -> Reader:
    """Of a field of text what the template writes; of another one, where it is a single expression, its value."""
    from jinja2 import TemplateError

    environment = _environment()
    alone = None if field in _TEXTS else _EXPRESSION.fullmatch(source)
    try:
        write: Callable[[Mapping[str, Any]], Any] = (
            environment.from_string(source).render
            if alone is None
            else environment.compile_expression(alone["inside"], undefined_to_none=False)
        )
    except TemplateError as error:
        raise ConfigError(f"{option}: got {shown(source)}, which is no Jinja template ({_reason(error)})") from error

    def read(row: Mapping[str, Any], where: str) -> Any:
        try:
            return _plain(field, write({"row": row, **row}))
        except (TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TaskError(
                f"{where}: {field}: the template {shown(source, 80)} fails ({_reason(error)}); got the columns "
                f"{shown(list(row))}"
            ) from error

    return read


def _plain(field: str, value: Any) -> Any:
    """What a template gave; an undefined name raises, and numbers among choices and answers become texts."""
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        str(value)  # which raises, as the environment's names have to be defined
    if field in ("choices", "answers"):
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [_text(one) for one in value]
        return _text(value)
    return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _environment() -> SandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
