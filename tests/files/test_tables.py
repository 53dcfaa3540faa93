"""Every format of rows gives the same rows, packed or not; what is damaged gets one line with its place."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from moe_evo.files.packed import PackedError, unpacked
from moe_evo.files.tables import TableError, has_only_texts, is_table, rows_of, without_endings

ROWS = [
    {"prompt": 'Is "it", so?', "right": "yes"},
    {"prompt": "Two\nlines, é", "right": "no"},
    {"prompt": "\ttabs", "right": " 3"},
]


def jsonl(path: Path) -> None:
    path.write_text("\n".join(map(json.dumps, ROWS)), "utf-8")


def separated(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "right"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


def json_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), "utf-8-sig")


def feather(path: Path) -> None:
    pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), path, chunksize=2)


WRITERS: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": jsonl,
    "rows.ndjson": jsonl,
    "lines.json": jsonl,
    "rows.json": json_list,
    "rows.CSV": separated,
    "rows.tsv": separated,
    "rows.parquet": parquet,
    "rows.arrow": arrow_stream,
    "rows.feather": feather,
}


def packings(content: bytes) -> dict[str, bytes]:
    return {
        "": content,
        ".gz": gzip.compress(content[:20]) + gzip.compress(content[20:]),  # as files that were put together
        ".zst": pa.Codec("zstd").compress(content, asbytes=True),
    }


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_in_their_order(tmp_path: Path, name: str, packing: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    found = list(rows_of(name + packing, packings(path.read_bytes())[packing]))
    assert [row for _, row in found] == ROWS
    assert len({place for place, _ in found}) == 3
    assert is_table(name + packing) and without_endings(name + packing) == name.partition(".")[0]
    assert has_only_texts(name + packing) == (name in ("rows.CSV", "rows.tsv"))


def test_places_are_lines_of_texts_and_rows_of_tables(tmp_path: Path) -> None:
    places = {}
    for name in ("rows.jsonl", "rows.json", "rows.CSV", "rows.parquet", "rows.feather"):
        WRITERS[name](tmp_path / name)
        places[name] = [place for place, _ in rows_of(name, (tmp_path / name).read_bytes())]
    assert places["rows.jsonl"] == [":1", ":2", ":3"]
    assert places["rows.CSV"] == [":2", ":3", ":5"], "a cell of the second row has two lines"
    assert places["rows.json"] == places["rows.parquet"] == places["rows.feather"] == [f", row {n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"a": 1}\n{', ":2: not JSON"),
        ("a.json", b'[{"a": 1}, {]', ": not JSON: "),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3: got 3 cells, expected 2"),
        ("a.csv", b'a,b\n1,"2', ":2: unexpected end of data"),
        ("a.csv", b"a,a\n", ":1: got the column 'a' twice"),
        ("a.csv", b"a,\n", ":1: got a column without a name"),
        ("a.tsv", b"a\tb\n1,2\n", ":2: got 1 cells, expected 2"),
        ("a.csv", b"a\n1\n\xe9\n", ":3: not UTF-8 at byte 4"),
        ("a.parquet", b"PAR1 nothing PAR1", ": not Parquet, or damaged"),
        ("a.parquet", b"", ": not Parquet, or damaged"),
        ("a.arrow", b"ARROW1 nothing", ": not Arrow, or damaged"),
        ("a.feather", b"nothing", ": not Arrow, or damaged"),
        ("a.jsonl.gz", b"nothing", ": is not gzip, or damaged"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 50, mtime=0)[:-9], ": is damaged: the gzip data end too early"),
        ("a.jsonl.zst", b"nothing", ": is not zstd, or damaged"),
        ("a.jsonl.zst", pa.Codec("zstd").compress(b"{}" * 50, asbytes=True)[:-3], ": is not zstd, or damaged"),
    ],
)
def test_what_is_damaged_is_told_in_one_line_with_its_place(name: str, content: bytes, told: str) -> None:
    with pytest.raises(TableError) as caught:
        list(rows_of(name, content))
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_file_that_would_fill_the_memory_is_refused_before_it_does(packing: str) -> None:
    content = packings(b"0" * 3_000_000)[packing]
    assert len(content) < 10_000
    assert unpacked(f"a{packing}", content, most=3_000_000) == ("a", b"0" * 3_000_000)
    with pytest.raises(PackedError, match="too large: more than 2,999,999 bytes unpacked"):
        unpacked(f"a{packing}", content, most=2_999_999)


def test_a_file_of_another_ending_is_jsonl() -> None:
    assert list(rows_of("my.task", b'{"a": 1}\n')) == [(":1", {"a": 1})]
    assert not is_table("my.task") and without_endings("my.task") == "my.task"
