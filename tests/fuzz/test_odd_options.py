"""Every option of every section: whatever a file gives it, the value is of its type and finite, or is refused."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nonsense import VALUES, inputs, one_of, refused

from moe_evo.config.file import config_parser, parse_config
from moe_evo.config.recover import RecoveryConfig
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.sweep import SweepConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError

_LINES = (
    ".nan", "0x" + "f" * 400, "!!binary aGk=", "&a [*a]", "2001-01-01", "1:30", "'true'", "'3'", "'1e5'", "1_0",
    "- - 1",
)  # fmt: skip


def _options(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind)
    for one in fields(kind):  # type: ignore[arg-type]
        yield f"{prefix}{one.name}", hints[one.name]
        if is_dataclass(hints[one.name]):
            yield from _options(hints[one.name], f"{prefix}{one.name}.")


OPTIONS: dict[str, tuple[type[ScoringConfig], Any]] = {
    **{name: (SweepConfig, hint) for name, hint in _options(SweepConfig)},
    **{name: (RecoveryConfig, hint) for name, hint in _options(RecoveryConfig) if name.startswith("recover")},
    **{name: (RunConfig, hint) for name, hint in _options(TaskConfig, "tasks.")},
}


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, and finite."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in of)
    if origin is Literal:
        return type(value) in map(type, of) and value in of
    if origin in (list, tuple):
        if not isinstance(value, origin):
            return False
        of = of if origin is tuple else (of[0],) * len(value)
        return len(value) == len(of) and all(_is(one, part) for one, part in zip(value, of, strict=True))
    if origin is dict:
        return isinstance(value, dict) and all(_is(key, of[0]) and _is(one, of[1]) for key, one in value.items())
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    return isinstance(value, hint) and not (hint is str and "\x00" in value)


def _file(folder: Path, name: str, text: str) -> Path:
    """A YAML file in which the option has the value that the text says."""
    *sections, last = name.split(".")
    inner = f"{{data: syll, {last}: {text}}}" if last != "data" else f"{{data: {text}}}"
    content = f"[{inner}]" if sections == ["tasks"] else f"{{{last}: {text}}}" if sections else f"{{{name}: {text}}}"
    for section in reversed(sections):
        content = f"{{{section}: {content}}}"
    (folder / "config.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    return folder / "config.yaml"


def _read(name: str, file: Path) -> tuple[Any, Any]:
    """The value that the option has, and its type."""
    kind, hint = OPTIONS[name]
    value: Any = parse_config(config_parser("sweep", "", "", kind), [str(file)], kind)[1]
    for part in name.split("."):
        value = getattr(value[-1] if isinstance(value, list) else value, part)
    return value, hint


def _flow(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("...\n").strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


@inputs(300)
@given(name=one_of(list(OPTIONS)), text=one_of([*map(_flow, VALUES), *_LINES]))
def test_an_option_has_a_value_of_its_type_or_refuses_it(folder: Path, name: str, text: str) -> None:
    try:
        value, hint = _read(name, _file(folder, name, text))
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return
    assert _is(value, hint), f"{name}: {text} became {value!r}"
    given_value = yaml.safe_load(text)
    if isinstance(given_value, bool):
        assert value is given_value, f"{name}: {text} became {value!r}"


@pytest.mark.parametrize("name", list(OPTIONS))
def test_no_option_but_one_that_may_be_absent_takes_null(folder: Path, name: str) -> None:
    hint = OPTIONS[name][1]
    if is_dataclass(hint) or type(None) in get_args(hint):
        return
    with pytest.raises(ConfigError) as refusal:
        _read(name, _file(folder, name, "null"))
    assert "\n" not in str(refusal.value)


_NUMBERS = [name for name, (_, hint) in OPTIONS.items() if {int, float} & {hint, *get_args(hint)}]


@pytest.mark.parametrize("name", _NUMBERS)
def test_no_number_is_a_truth_a_text_or_beyond_64_bits(folder: Path, name: str) -> None:
    hint = OPTIONS[name][1]
    texts = ["true", "'3'", "'x'", ".nan", ".inf", "-.inf", "1e999", "1" * 25, "0x" + "f" * 100]
    for text in texts if str not in get_args(hint) else texts[:1] + texts[3:]:
        with pytest.raises(ConfigError):
            _read(name, _file(folder, name, text))


@inputs(15)
@given(name=one_of(list(OPTIONS)), text=one_of([*map(_flow, VALUES), *_LINES]))
def test_plans_with_any_value(folder: Path, name: str, text: str) -> None:
    if OPTIONS[name][0] is not RecoveryConfig and not name.startswith("sweep"):
        refused("plan", str(_file(folder, name, text)))


_WORDS = (
    "search", "--config", "--folder", "--tasks", "--search.seed", "--json", "x", "=", "--", "[" * 200, "\x00",
    "~nobody/x", "x" * 300, "-1", "--model.path=", "{", "\udcff", "\x1b[31m",
)  # fmt: skip


@pytest.mark.parametrize("command", ["show", "compare", "report", "export", "recover", "evaluate", "plan"])
@inputs(40)
@given(words=st.lists(one_of(_WORDS), min_size=1, max_size=4))
def test_any_words(command: str, words: list[str]) -> None:
    refused(command, *words, "--nowhere")


def test_there_are_options_of_every_section() -> None:
    sections = "model tasks evaluation cluster search sweep selection tracking recover folder"
    assert len(OPTIONS) > 100 and {name.partition(".")[0] for name in OPTIONS} == set(sections.split())
