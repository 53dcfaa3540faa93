"""What no file should hold, and how it gets into one: a value of plain data or a byte replaced, removed or doubled."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from moe_evo.cli.main import main

MORE = int(os.environ.get("FUZZ", "1"))
"""How many times as many inputs as in the suite; `make fuzz` sets it, and draws other inputs each time."""

LONGEST_S = 30.0  # of computing for one command; one that waits is ended by the timeout of its test

NUMBERS = (0, -1, 1, 3, 2**31, 2**63 - 1, -(2**63), 10**30, 1.5, -0.5, 1e300, 1e-300)

TEXTS = (
    "",
    "x",
    "../../x",
    "~nobody/x",
    "x" * 300,
    "\x00",
    "\x1b[31mred",
    "=1+1",
    "[/x]",
    "NaN",
    "1e999",
    "１２",
    "\n",
)

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    {},
    [1],
    [None],
    {"a": 1},
    {"": None},
    [[[[[1]]]]],
    "[" * 1000,
    *NUMBERS,
    *TEXTS,
)


TRIED: Counter[str] = Counter()
"""Inputs tried so far by each test."""


def inputs(number: int) -> Callable[[Any], Any]:
    """Settings of a test that tries so many inputs, the same ones each time in the suite; each is counted."""

    def with_settings(test: Any) -> Any:
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*arguments: Any, **named: Any) -> None:
            TRIED[inner.__name__] += 1
            inner(*arguments, **named)

        test.hypothesis.inner_test = counted
        return settings(
            max_examples=number * MORE,
            derandomize=MORE == 1,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(test)

    return with_settings


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _places(part, (*path, key))


@st.composite
def changed(draw: st.DrawFn, original: Any) -> Any:
    """The plain data with one to three values replaced, removed, or, in a list, doubled."""
    data = copy.deepcopy(original)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        places = list(_places(data))
        if not places:
            return data
        *path, last = draw(st.sampled_from(places))
        parent = data
        for key in path:
            parent = parent[key]
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "double")))
        if how == "remove":
            del parent[last]
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        else:
            parent[last] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return data


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """The bytes with some of them changed, or without their end."""
    content = bytearray(original)
    if draw(st.booleans()):
        return bytes(content[: draw(st.integers(0, len(content) - 1))])
    for _ in range(draw(st.sampled_from((1, 2, 10)))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


def refused(*argv: str) -> bool:
    """Whether the command refuses its input, in one harmless line and with exit code 2; else it must succeed."""
    out, err, started = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    last = (err.getvalue().splitlines() or [""])[-1]
    assert code in (0, 2), f"exit code {code}: {last}"
    assert time.process_time() - started < LONGEST_S, f"took {time.process_time() - started:.0f} s"
    assert "\x1b" not in out.getvalue() + err.getvalue(), "an escape sequence reaches the terminal"
    assert "unexpected" not in last or code == 0, last
    if code == 2:
        assert last.startswith("moe-evo: error: ") and len(last) < 2100, last
    return code == 2


def one_of(values: Sequence[Any]) -> Any:
    return st.sampled_from(list(values))
