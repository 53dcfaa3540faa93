"""The border to transformers: its name as Any, the errors it raises, and silence while it works."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers as _library
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as _library_logging

transformers: Any = _library  # its own annotations are half complete
_chatter: Any = _library_logging

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    IndexError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""What reading, building and running a model can raise for a checkpoint that is not as it should be."""


def _is_error(record: logging.LogRecord) -> bool:
    """Lets errors pass: DeepSpeed also warns of ordinary things, and on standard output."""
    return record.levelno >= logging.ERROR


logging.getLogger("DeepSpeed").addFilter(_is_error)  # where it is installed, transformers imports it by itself


def one_line(error: BaseException) -> str:
    """A library's message, often a page, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter of transformers below errors, and no progress bars of it."""
    verbosity = _chatter.get_verbosity()
    had_progress_bar = _chatter.is_progress_bar_enabled()
    _chatter.set_verbosity_error()
    _chatter.disable_progress_bar()
    try:
        yield
    finally:
        _chatter.set_verbosity(verbosity)
        if had_progress_bar:
            _chatter.enable_progress_bar()
