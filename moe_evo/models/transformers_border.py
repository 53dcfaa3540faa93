"""What is used of transformers beside its top level, the errors that it raises, and how to silence it.

Much of it is not public. So it is imported and looked up in this file only. Where a release has moved it, one line says
what was expected and what to do.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers as _library
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as _library_logging

from moe_evo.errors import ModelError, MoeEvoError
from moe_evo.shown import cut, line_of
from moe_evo.versions import ADVICE

transformers: Any = _library  # its own annotations are half complete
_chatter: Any = _library_logging

try:
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
    from transformers.utils.hub import cached_file
except ImportError as _error:
    raise ModelError(f"transformers {_library.__version__}: {_error}, which moe_evo uses; {ADVICE}") from _error

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "LIBRARY_ERRORS",
    "DistributedConfig",
    "ExpertsInterface",
    "HfDeepSpeedConfig",
    "attention_implementation",
    "cached_file",
    "eager_experts",
    "gated",
    "is_own_defect",
    "kept_in_float32",
    "one_line",
    "quiet",
    "tokenizer_errors",
    "transformers",
    "undivided_modules",
]

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    IndexError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)
"""What reading, building and running a model can raise for a checkpoint that is not as it should be."""


def is_own_defect(error: BaseException) -> bool:
    """Whether a defect of our own code raised the error, so that it tells nothing about library or model."""
    if not isinstance(error, TypeError | AttributeError | NameError | ArithmeticError | AssertionError):
        return False
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == __name__.partition(".")[0]


def attention_implementation(config: Any) -> str:
    """The library's name of how attention is computed: 'sdpa', 'eager', ..."""
    return str(_private(config, "_attn_implementation", "the name of the attention's implementation"))


def eager_experts(experts: torch.nn.Module) -> Any:
    """The experts' own forward as a function of (experts, hidden, index, weights), without the library's dispatch."""
    return _private(type(experts).forward, "__wrapped__", "the experts' own forward")


def gated(experts: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What enters the experts' second matrix: gate and up (..., 2 I), multiplied to (..., I)."""
    product: torch.Tensor = _private(experts, "_apply_gate", "the product of gate and up")(hidden)
    return product


def checkpoint_layers(model: Any, *, enable: bool) -> None:
    """Let every decoder layer be computed again in the backward pass, in training mode, instead of kept; or no more."""
    verb = "enable" if enable else "disable"
    # the older name is deprecated where the newer one is there
    switch = getattr(model, f"activation_checkpointing_{verb}", None)
    switch = switch or _private(model, f"gradient_checkpointing_{verb}", "the switch of checkpointing")
    switch(*([{"use_reentrant": False}] if enable else []))


def kept_in_float32(model: Any, dtype: torch.dtype) -> Sequence[str]:
    """Parts of the names of tensors that the library loads in float32 whatever dtype was asked for."""
    what = "the names of tensors that stay in float32"
    strict = _private(model, "_keep_in_fp32_modules_strict", what) or ()
    lenient = _private(model, "_keep_in_fp32_modules", what) or ()
    return [
        *(strict if dtype in (torch.float16, torch.bfloat16) else ()),
        *(lenient if dtype == torch.float16 else ()),
    ]


def undivided_modules(model: Any) -> frozenset[str]:
    """Class names of the modules that a device map never splits."""
    return frozenset(_private(model, "_no_split_modules", "the modules that a device map does not split") or ())


def _private(owner: Any, name: str, what: str) -> Any:
    """The private attribute `owner.name`; raises ModelError where the library has none."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        whose = getattr(owner, "__qualname__", type(owner).__name__)
        raise ModelError(
            f"transformers {_library.__version__}: {whose} has no {name}, where {what} was expected; {ADVICE}"
        ) from error


def _is_error(record: logging.LogRecord) -> bool:
    """Lets errors pass: DeepSpeed also warns of ordinary things, and on standard output."""
    return record.levelno >= logging.ERROR


logging.getLogger("DeepSpeed").addFilter(_is_error)  # where it is installed, transformers imports it by itself


def one_line(error: BaseException) -> str:
    """A library's error message, often a page long, as one line."""
    return cut(line_of(error), 300) or type(error).__name__


@contextmanager
def tokenizer_errors(kind: type[MoeEvoError], told: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into an error of this kind: `told`, with the reason behind it."""
    try:
        yield
    except MoeEvoError:
        raise
    except LIBRARY_ERRORS as error:
        raise kind(f"{told} ({one_line(error)})") from error
    except Exception as error:
        if type(error) is not Exception:  # which is what the tokenizers library itself raises
            raise
        raise kind(f"{told} ({one_line(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers logs errors only and shows no progress bars."""
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
