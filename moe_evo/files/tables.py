"""Files of rows: JSONL, JSON, CSV, TSV, Parquet and Arrow, each perhaps packed with gzip or zstd. One reader each.

Every reader gives (place, row), one row after the other: the place is `:12`, a line, or `, row 12`, counted from 1, and
the row is what stands there, with the names of its columns. A file of an unknown ending is read as JSONL.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from moe_evo.files.json_text import JsonError, json_of
from moe_evo.files.limits import MOST_UNPACKED_FILE
from moe_evo.files.packed import PACKED, PackedError, unpacked
from moe_evo.shown import shown

Rows = Iterator[tuple[str, Any]]

_LONGEST_CELL = 2**24  # characters
_ROWS_AT_ONCE = 1024


class TableError(ValueError):
    """A file of rows is damaged; the message is one line that begins with the place, or with ': '."""


def rows_of(name: str, content: bytes) -> Rows:
    """The rows of a file; name: by whose endings it is read. Raises TableError."""
    try:
        name, content = unpacked(name, content)
    except PackedError as error:
        raise TableError(f": is {error}") from error
    yield from _READERS.get(_ending(name), _jsonl)(content)


def is_table(name: str) -> bool:
    """Whether a file of this name holds rows by its ending, rather than plain text."""
    return _ending(without_packing(name)) in _READERS


def has_only_texts(name: str) -> bool:
    """Whether the cells of such a file are texts, also those that stand for numbers."""
    return _ending(without_packing(name)) in (".csv", ".tsv")


def without_packing(name: str) -> str:
    """The name without .gz or .zst."""
    return next((name[: -len(one)] for one in PACKED if name.lower().endswith(one)), name)


def without_endings(name: str) -> str:
    """The name without the endings that tell how a file is read."""
    bare = without_packing(name)
    return bare[: -len(_ending(bare))] if _ending(bare) in _READERS else name


def text_lines(content: bytes) -> Iterator[tuple[str, str]]:
    """(place, text without outer spaces) of each line that is not blank; raises TableError."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise TableError(f":{number}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
        if text:
            yield f":{number}", text


def _ending(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def _jsonl(content: bytes) -> Rows:
    for place, text in text_lines(content):
        try:
            yield place, json_of(text)
        except JsonError as error:
            raise TableError(f"{place}: {error}; expected one object a line") from error


def _json(content: bytes) -> Rows:
    """A list of objects; a file that begins otherwise has one object a line, as some write under this name."""
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl(content)
        return
    try:
        rows = json_of(content)
    except JsonError as error:
        raise TableError(f": {error}; expected a list of objects, or one object a line") from error
    for number, row in enumerate(rows, start=1):
        yield f", row {number}", row


def _csv(content: bytes) -> Rows:
    return _separated(content, ",")


def _tsv(content: bytes) -> Rows:
    return _separated(content, "\t")


def _separated(content: bytes, separator: str) -> Rows:
    """The first line names the columns; cells with separators, quotes or line ends stand in double quotes."""
    csv.field_size_limit(_LONGEST_CELL)
    lines = csv.reader(io.StringIO(_decoded(content), newline=""), delimiter=separator, strict=True)
    columns: list[str] | None = None
    while True:
        place = f":{lines.line_num + 1}"
        try:
            cells = next(lines, None)
        except csv.Error as error:
            raise TableError(f"{place}: {error}; expected cells separated by {separator!r}") from error
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if columns is None:
            columns = _columns(cells, place)
        elif len(cells) != len(columns):
            raise TableError(
                f"{place}: got {len(cells)} cells, expected {len(columns)}, one for each column of the first line; put "
                f"cells with {separator!r} into double quotes"
            )
        else:
            yield place, dict(zip(columns, cells, strict=True))


def _columns(cells: list[str], place: str) -> list[str]:
    names = [one.strip() for one in cells]
    wrong = next((one for one in names if not one or names.count(one) > 1), None)
    if wrong is not None:
        got = f"the column {shown(wrong, 80)} twice" if wrong else "a column without a name"
        raise TableError(f"{place}: got {got}, expected distinct names of columns in the first line")
    return names


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TableError(f":{line}: not UTF-8 at byte {error.start} of the file; save it as UTF-8") from error


def _parquet(content: bytes) -> Rows:
    import pyarrow  # whose import takes a while
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        size = sum(file.metadata.row_group(one).total_byte_size for one in range(file.num_row_groups))
        if size > MOST_UNPACKED_FILE:
            raise TableError(f": is too large: {size:,} bytes unpacked, at most {MOST_UNPACKED_FILE:,}; split the file")
        yield from rows_of_batches(file.iter_batches(_ROWS_AT_ONCE))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TableError(f": not Parquet, or damaged ({_reason(error)})") from error


def _arrow(content: bytes) -> Rows:
    """An IPC file, which is Feather's second version, or an IPC stream, as the library `datasets` writes."""
    import pyarrow  # whose import takes a while

    source = pyarrow.BufferReader(content)
    is_file = content.startswith(b"ARROW1")
    try:
        if is_file:
            file = pyarrow.ipc.open_file(source)
            yield from rows_of_batches(file.get_batch(number) for number in range(file.num_record_batches))
        else:
            yield from rows_of_batches(pyarrow.ipc.open_stream(source))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TableError(f": not Arrow, or damaged ({_reason(error)})") from error


def rows_of_batches(batches: Any) -> Rows:
    """The rows of Arrow's record batches or tables."""
    numbers = count(1)
    for batch in batches:
        batch.validate(full=True)  # what is damaged would end the process when it is read
        for row in batch.to_pylist():
            yield f", row {next(numbers)}", row


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


_READERS: dict[str, Callable[[bytes], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}

READ_BY_ENDING = ", ".join(_READERS)
"""The endings that are read, for messages."""
