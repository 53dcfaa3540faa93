"""Files that are packed with gzip or zstd, by the end of their name."""

from __future__ import annotations

import zlib

from moe_evo.files.limits import MOST_UNPACKED_FILE

PACKED = (".gz", ".zst")
_CHUNK = 2**20


class PackedError(ValueError):
    """A packed file is damaged, or too large unpacked; the message is one line."""


def unpacked(name: str, content: bytes, most: int = MOST_UNPACKED_FILE) -> tuple[str, bytes]:
    """The name without .gz or .zst, and the bytes unpacked; other files as they are. Raises PackedError."""
    if name.lower().endswith(".gz"):
        return name[: -len(".gz")], _gunzipped(content, most)
    if name.lower().endswith(".zst"):
        return name[: -len(".zst")], _unpacked_zstd(content, most)
    return name, content


def _gunzipped(content: bytes, most: int) -> bytes:
    parts, size = [], 0
    while content:  # a gzip file may have several members, one after the other
        reader = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            part = reader.decompress(content, most - size + 1)
        except zlib.error as error:
            raise PackedError(f"not gzip, or damaged ({error})") from error
        parts.append(part)
        size += len(part)
        _check_size(size, most)
        if not reader.eof:
            raise PackedError("damaged: the gzip data end too early")
        content = reader.unused_data.lstrip(b"\0")  # a tape's padding
    return b"".join(parts)


def _unpacked_zstd(content: bytes, most: int) -> bytes:
    import pyarrow  # whose import takes a while

    parts, size = [], 0
    try:
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
            while part := stream.read(_CHUNK):
                parts.append(part)
                size += len(part)
                _check_size(size, most)
    except OSError as error:
        raise PackedError(f"not zstd, or damaged ({' '.join(str(error).split())})") from error
    return b"".join(parts)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise PackedError(f"too large: more than {most:,} bytes unpacked; split the file")
