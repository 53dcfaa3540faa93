"""`FileKind`: safetensors files of ours, with their kind and version in the metadata, written whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from moe_evo.errors import MoeEvoError
from moe_evo.files.json_text import json_of
from moe_evo.files.write import open_no_link, write_whole
from moe_evo.shown import line_of

Tensors = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    format, version: its stamp. older: versions that are read as well. holds: what is in it, in words. error: what is
    raised for another file. advice: what to do then; again: what to do about another version.
    """

    format: str
    version: int
    holds: str
    error: type[MoeEvoError]
    advice: str
    again: str
    older: tuple[int, ...] = ()

    def to_bytes(self, tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
        return save_tensors(dict(tensors), {"format": self.format, "version": str(self.version), **metadata})

    def made(self, content: bytes) -> bool:
        """Whether bytes are safetensors of this kind, of whatever version."""
        return f'"{self.format}"'.encode() in content[: 8 + int.from_bytes(content[:8], "little")]

    def from_bytes(self, content: bytes, where: str) -> tuple[Tensors, dict[str, str]]:
        """What `to_bytes` got; raises `error` for bytes of any other kind."""
        header_size = int.from_bytes(content[:8], "little")  # the layout of safetensors: size, header, data
        try:
            tensors = load_tensors(content)
            metadata: dict[str, str] = json_of(content[8 : 8 + header_size]).get("__metadata__") or {}
        except SafetensorError as error:
            raise self.error(f"{where}: not a safetensors file ({line_of(error)}); {self.advice}") from error
        except KeyError as error:  # a type of numbers that numpy has not, such as bfloat16
            raise self.error(f"{where}: holds numbers of the type {error}; {self.advice}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise self.error(f"{where}: damaged ({line_of(error)}); {self.advice}") from error
        if metadata.pop("format", None) != self.format:
            raise self.error(f"{where}: safetensors without {self.holds} of moe_evo; {self.advice}")
        found = metadata.pop("version", None)
        if found not in [str(one) for one in (self.version, *self.older)]:
            raise self.error(
                f"{where}: {self.holds} of version {found}, this moe_evo reads {self.version}; {self.again}"
            )
        return tensors, metadata

    def load(self, path: str | os.PathLike[str]) -> tuple[Tensors, dict[str, str]]:
        """What `to_bytes` got; raises `error` for a file of any other kind, or that cannot be read."""
        return self.from_bytes(self.read(path), str(path))

    def write(self, path: str | os.PathLike[str], content: bytes) -> None:
        """Write a file on disk for good, or leave what was there and raise `error`."""
        try:
            write_whole(Path(path), content)
        except OSError as error:
            raise self._unwritable(path, error) from error

    @contextmanager
    def locked(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Only one process at a time is in such a block for the same file; the others wait.

        The lock is a hidden file beside it, which is never deleted: after a deletion two processes could hold locks on
        two different files of that name. Raises `error` where the file cannot be locked.
        """
        target = Path(path)
        try:
            lock = os.fdopen(open_no_link(target.with_name(f".{target.name}.lock")), "r+b")
        except OSError as error:
            raise self._unwritable(path, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise self._unwritable(path, error) from error
            yield

    def _unwritable(self, path: str | os.PathLike[str], error: OSError) -> MoeEvoError:
        return self.error(f"{path}: cannot be written ({error.strerror or error}); make room or give another path")

    def read(self, path: str | os.PathLike[str]) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise self.error(f"{path}: cannot be read ({error.strerror}); check the path") from error
