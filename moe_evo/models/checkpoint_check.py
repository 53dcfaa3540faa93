"""Whether the weights of a checkpoint are those that its config.json describes; what is not is named with its sizes."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_evo.errors import ModelError

_FLOATS = ("F64", "F32", "F16", "BF16")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_BUFFER = re.compile(r"rotary_emb\.inv_freq$|(?:^|\.)(?:position_ids|masked_bias)$")  # of old releases; recomputed
_PREDICTION_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.eh_proj\.")
"""Only layers for multi-token prediction have it; stock transformers reads none of them."""
_PREDICTION = re.compile(r"(?:^|\.)mtp\.")


class Header(NamedTuple):
    """What a safetensors file tells of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def headers_of(files: Iterable[Path]) -> dict[str, Header]:
    """The tensors in some safetensors files by name; {} of files that cannot be read, which loading will refuse."""
    found: dict[str, Header] = {}
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            content = stream.read(size) if size < file.stat().st_size else b""
        try:
            told = json.loads(content)
            found |= {
                name: Header(one["dtype"], tuple(one["shape"])) for name, one in told.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def check_headers(where: str, headers: Mapping[str, Header], num_layers: int) -> None:
    """Raise ModelError for tensors that the model of a config with `num_layers` decoder layers cannot hold."""
    unread = _predictions(headers)
    for name, header in headers.items():
        if name in unread or _BUFFER.search(name):
            continue
        layer = _LAYER.search(name)
        if layer and int(layer[1]) >= num_layers:
            raise ModelError(
                f"{where}: holds {_told(name, header.shape)}, but config.json has {num_layers} num_hidden_layers; "
                "give the config.json of these weights"
            )
        if header.dtype not in _FLOATS:
            raise ModelError(
                f"{where}: {_told(name, header.shape)} is stored as {header.dtype}, expected bfloat16, float16 or "
                "float32; give a version of the checkpoint that is not quantised"
            )
    odd = next(_odd(headers), None)
    if odd is not None:
        raise ModelError(f"{where}: {odd}; download or save the checkpoint again")


def check_report(where: str, report: Mapping[str, Any], language_model: Any, headers: Mapping[str, Header]) -> None:
    """Raise ModelError unless what transformers read is all that the model has, and all that the checkpoint has."""
    for name, got, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{where}: {_told(name, got)} does not fit config.json, which expects {_sizes(expected)}; give the "
            "config.json of these weights"
        )
    lacking = sorted(report["missing_keys"])
    if lacking:
        shapes = {name: getattr(one, "ds_shape", one.shape) for name, one in language_model.state_dict().items()}
        raise ModelError(
            f"{where}: lacks {len(lacking)} weights, {_told(lacking[0], shapes.get(lacking[0]))} among them"
        )
    ignored = _predictions([*report["unexpected_keys"], *headers])
    unknown = sorted(name for name in report["unexpected_keys"] if name not in ignored and not _BUFFER.search(name))
    if unknown:
        shape = headers[unknown[0]].shape if unknown[0] in headers else None
        raise ModelError(
            f"{where}: holds {len(unknown)} weights that a model of this config.json has no place for, "
            f"{_told(unknown[0], shape)} among them; give the config.json of these weights"
        )


def _predictions(names: Iterable[str]) -> set[str]:
    """The names of the weights for multi-token prediction."""
    known = list(names)
    layers = {match[1] for name in known if (match := _PREDICTION_LAYER.search(name))}
    return {
        name
        for name in known
        if _PREDICTION.search(name) or ((match := _LAYER.search(name)) is not None and match[1] in layers)
    }


def _odd(headers: Mapping[str, Header]) -> Iterator[str]:
    """Experts that are unlike the others of their kind, in words: of another shape, or missing among them."""
    kinds: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for name in headers:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if ".experts." in name and len(numbers) == 2:
            kinds[re.sub(r"(?<=\.)\d+(?=\.)", "#", name)][int(numbers[0]), int(numbers[1])] = name
    for kind, of_kind in kinds.items():
        usual = Counter(headers[name].shape for name in of_kind.values()).most_common(1)[0][0]
        for name in of_kind.values():
            if headers[name].shape != usual:
                yield f"{_told(name, headers[name].shape)} is unlike other experts, which have {_sizes(usual)}"
        experts, layers = ({place[side] for place in of_kind} for side in (1, 0))
        for layer in sorted(layers):
            for expert in sorted(set(range(max(experts) + 1))):
                if (layer, expert) not in of_kind:
                    name = kind.replace("#", str(layer), 1).replace("#", str(expert), 1)
                    yield f"lacks {_told(name, usual)}, which other layers or experts have"


def _told(name: str, shape: Iterable[int] | None) -> str:
    return name if shape is None else f"{name} {_sizes(shape)}"


def _sizes(shape: Iterable[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
