"""Whatever bytes or texts there are, the readers of JSON and YAML give plain data or say what is wrong."""

from __future__ import annotations

import gzip
import json
import math
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nonsense import damaged, inputs

from moe_evo.files.json_text import JsonError, json_of
from moe_evo.files.tables import TableError, rows_of
from moe_evo.files.yaml_text import YamlError, yaml_of

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_PLAIN = st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)
_YAML = st.text(alphabet="ab:-[]{}&*!<>|'\"#%@\n 01.~,?\\xu\x00", max_size=60)
_CONFIG = (
    b"model: {path: embedded, top_p: 0.5}\ntasks: [syll, &a {data: nli}]\nsearch: {num_kept: 4, eep: {sigma: 1}}\n"
)


def _assert_usable(value: Any) -> None:
    """Plain data that a process can compute with and write."""
    if isinstance(value, dict):
        for key, part in value.items():
            assert key is None or isinstance(key, str | int | float | bool)
            _assert_usable(part)
    elif isinstance(value, list):
        for part in value:
            _assert_usable(part)
    elif isinstance(value, float):
        assert math.isfinite(value)
    elif isinstance(value, int):
        assert abs(value) < 2**63
    elif isinstance(value, str):
        value.encode("utf-8")
    else:
        assert value is None


@inputs(300)
@given(_PLAIN)
def test_json_that_python_writes_comes_back_or_is_refused(value: Any) -> None:
    text = json.dumps(value)
    try:
        found = json_of(text)
    except JsonError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        _assert_usable(found)
        assert found == json.loads(text)


@inputs(300)
@given(damaged(json.dumps({"prompt": "a", "choices": ["b", "c"], "label": 0, "x": [1.5, {"y": None}]}).encode()))
def test_damaged_json_is_data_or_one_line(content: bytes) -> None:
    try:
        _assert_usable(json_of(content))
    except JsonError as error:
        assert "\n" not in str(error)


@inputs(400)
@given(_YAML | damaged(_CONFIG).map(lambda content: content.decode("utf-8", "replace")))
def test_any_text_is_yaml_or_one_line(text: str) -> None:
    try:
        _assert_usable(yaml_of(text))
    except YamlError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1000,
        "[" * 100_000,
        "[" * 101 + "]" * 101,
        '{"a":' * 1000,
        "9" * 5000,
        "1e999",
        "NaN",
        "-Infinity",
        '"\\ud800"',
        '{"a": 1, "a": 2}',
        "1" * 25,
        b"\xff",
        "",
    ],
)
def test_json_that_breaks_other_readers_is_refused(text: str | bytes) -> None:
    with pytest.raises(JsonError):
        json_of(text)


def test_only_infinity_is_taken_where_it_may_stand() -> None:
    text = '{"time_step_limit": [0.0, Infinity], "least": -Infinity}'
    assert json_of(text, takes_infinity=True) == json.loads(text)
    with pytest.raises(JsonError, match="got Infinity, expected finite numbers"):
        json_of(text)
    for refused in ("[NaN]", "[1e999]", "[inf]"):
        with pytest.raises(JsonError):
            json_of(refused, takes_infinity=True)


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        "&a [*a, *a]",
        "a: &a {b: [*a]}",
        _bomb(9),
        "[" * 1000,
        "{a: " * 500 + "}" * 500,
        "- " * 3000,
        "9" * 5000,
        "0x" + "f" * 400,
        ".nan",
        "-.inf",
        "a: 1\na: 2",
        'a: "\\0"',
        "!!python/name:os.system",
        "!!binary aGk=",
        "!!set {a}",
        "? [a]\n: b",
        "1" * 25,
        "!!bool x",
        "!!map [1]",
        "<<: &a {<<: *a}",
    ],
)
def test_yaml_that_breaks_other_readers_is_refused_at_once(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(YamlError):
        yaml_of(text)
    assert time.monotonic() - started < 5


def test_what_is_referred_to_twice_is_two_values() -> None:
    found = yaml_of("a: &x {b: [1]}\nc: *x\nd: {<<: *x, e: 2}")
    assert found == {"a": {"b": [1]}, "c": {"b": [1]}, "d": {"b": [1], "e": 2}}
    assert found["a"] is not found["c"] and found["a"]["b"] is not found["d"]["b"]


def test_a_date_is_a_text() -> None:
    assert yaml_of("2001-02-03") == "2001-02-03"


def _tables() -> dict[str, bytes]:
    """The same rows in every format, with all that Arrow holds and a task cannot read."""
    rows = [{"prompt": f"é {n}", "choices": ["a", "b"], "label": n, "x": {"y": [1.5, None]}} for n in range(5)]
    table, stream, file = pa.Table.from_pylist(rows), pa.BufferOutputStream(), pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    pyarrow.parquet.write_table(table, file)
    text = "\n".join(map(json.dumps, rows)).encode()
    return {
        "a.jsonl": text,
        "a.csv": 'prompt,label\n"a ""b""\n",0\né,1\n'.encode(),
        "a.arrow": stream.getvalue().to_pybytes(),
        "a.parquet": file.getvalue().to_pybytes(),
        "a.jsonl.gz": gzip.compress(text),
        "a.jsonl.zst": pa.Codec("zstd").compress(text, asbytes=True),
    }


@pytest.mark.parametrize(("name", "content"), _tables().items(), ids=_tables())
def test_damaged_tables_are_rows_or_one_line(name: str, content: bytes) -> None:
    @inputs(300)
    @given(damaged(content))
    def check(nonsense: bytes) -> None:
        try:
            for place, _ in rows_of(name, nonsense):
                assert place.startswith((":", ", row "))
        except TableError as error:
            assert str(error).startswith((":", ", row ")) and "\n" not in str(error) and len(str(error)) < 400

    check()
