"""Load a model, or read its shape and its hash without loading it.

Whatever can be refused is refused from config.json, before weights are read. Weights come from
safetensors only: other formats can run code.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError, ModelError
from moe_evo.genomes.space import ModelShape
from moe_evo.models.experts.alignment import align_neurons
from moe_evo.models.experts.alignment_file import Alignment, load_alignment
from moe_evo.models.families import Family, family_of
from moe_evo.models.placement import (
    check_device,
    check_placement,
    drop_repeated_biases,
    input_device,
    placement_options,
    suit_device,
    weights_dtype,
)
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.models.self_check import self_check
from moe_evo.models.transformers_border import LIBRARY_ERRORS, cached_file, one_line, quiet, transformers
from moe_evo.models.variants.meo import MEO, check_experts
from moe_evo.models.variants.skipping import check_skipping
from moe_evo.models.view import MoEModel
from moe_evo.models.zero3 import load_zero3

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_BESIDE_TOKENIZER = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*")


def load_model(config: ModelConfig, ranks: Ranks = ALONE) -> MoEModel:
    """Read a checkpoint and put the view around it.

    ranks: the processes that hold the model together, where config.sharding divides it; each of them
    calls this. Raises ModelError (missing folder, unsupported family, no safetensors, failed self-check)
    or ConfigError (device, router, sharding) in one line.
    """
    source = checkpoint_source(config.path)
    family = read_family(config, source)
    transformers_config = read_transformers_config(config, source)
    check_skipping(config.dynamic_skipping, family.shape(transformers_config))
    check_experts(config.experts, family, transformers_config)
    if config.router == "eep":
        family.check_eep_router(transformers_config)
    device = resolve_device(config.device)
    check_placement(config, family, transformers_config, ranks)
    check_device(config, device, ranks)
    alignment = _alignment(config)
    options = placement_options(config, family, transformers_config, device, ranks)
    with quiet():
        if config.sharding == "zero3":
            dtype = weights_dtype(config, transformers_config)
            language_model = load_zero3(
                lambda: _language_model(config, source, options), config, transformers_config, dtype
            )
        else:
            language_model = _language_model(config, source, options)
        tokenizer = _tokenizer(config, source, transformers_config)
    suit_device(language_model, device)
    if config.experts == "meo":
        language_model.set_experts_implementation(MEO)
    if config.sharding == "tensor_parallel":
        drop_repeated_biases(language_model, family, ranks)
    moe = MoEModel(
        language_model,
        tokenizer,
        router_mode=config.router,
        merged_cache_gib=config.merged_cache_gib,
        device=input_device(language_model, device),
        ranks=ranks,
        splits_examples=config.sharding == "zero3" and ranks.size > 1,
        dynamic_skipping=config.dynamic_skipping,
    )
    if config.self_check:
        self_check(moe)
    if alignment is not None:
        align_neurons(moe, alignment.permutations)
    return moe


def load_tokenizer(config: ModelConfig) -> Any | None:
    """The tokenizer that `load_model` puts into the view, without the weights; None where a folder has none.

    Raises ModelError as `load_model` does.
    """
    source = checkpoint_source(config.path)
    read_family(config, source)
    transformers_config = read_transformers_config(config, source)
    with quiet():
        return _tokenizer(config, source, transformers_config)


def read_shape(config: ModelConfig) -> ModelShape:
    """The model's MoE layers from its config.json alone; raises ModelError."""
    source = checkpoint_source(config.path)
    return read_family(config, source).shape(read_transformers_config(config, source))


def renormalises(config: ModelConfig) -> bool:
    """Whether the router divides the chosen gate weights by their sum, from config.json alone."""
    source = checkpoint_source(config.path)
    return read_family(config, source).renormalises(read_transformers_config(config, source))


def model_hash(config: ModelConfig) -> str:
    """Identifies a model: 'owner/model@commit' for a Hugging Face name, else a sha256 of the folder.

    The hash covers config.json and the tokenizer's files whole, and a sample of every safetensors file (`_sample`).
    Further training changes it; an edit of a few rows of a large file may not. It includes the alignment, as the same
    merge is another one under another alignment.
    """
    stored, alignment = _stored_hash(config), _alignment(config)
    return stored if alignment is None else f"{stored}+aligned:{alignment.digest}"


def alignment_digest(config: ModelConfig) -> str | None:
    """Identifies the alignment; None for a model without one. Raises ModelError for a file of another model."""
    alignment = _alignment(config)
    return None if alignment is None else alignment.digest


def _alignment(config: ModelConfig) -> Alignment | None:
    return None if config.alignment is None else load_alignment(config.alignment, _stored_hash(config))


def _stored_hash(config: ModelConfig) -> str:
    """Of the model without any alignment."""
    source = checkpoint_source(config.path)
    config_file = _config_file(config, source)
    if not isinstance(source, Path):
        return f"{source}@{config_file.parent.name}"
    content = hashlib.sha256()
    patterns = (*_TOKENIZER_FILES, *_BESIDE_TOKENIZER)
    whole = [config_file, *sorted(file for pattern in patterns for file in source.glob(pattern) if file.is_file())]
    for file in whole:
        content.update(f"{file.name}:{file.stat().st_size}:".encode())
        content.update(file.read_bytes())
    for file in sorted(source.glob("*.safetensors")):
        content.update(f"{file.name}:{file.stat().st_size}:".encode())
        for block in _sample(file):
            content.update(block)
    return content.hexdigest()


def _sample(file: Path) -> Iterator[bytes]:
    """The first MiB, which holds names and shapes, and up to 1,024 blocks of 4 KiB spread evenly.

    The weights of another model differ nearly everywhere, so they differ here, too; reading all of 90 GB would take
    minutes. Files above 5 MiB have gaps between the blocks: an edit within a gap is not noticed.
    """
    with file.open("rb") as stream:
        yield stream.read(2**20)
        for start in np.linspace(0, max(file.stat().st_size - 4096, 0), 1024, dtype=np.int64):
            stream.seek(int(start))
            yield stream.read(4096)


def resolve_device(name: str) -> torch.device:
    """'auto' is a GPU where there is one. Raises ConfigError for a device that is not here or is 'meta'."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ConfigError(f"model.device: got {name!r}, which is not available here; use 'auto'") from error
    if device.type == "meta":
        raise ConfigError(f"model.device: got {name!r}, which holds no numbers to compute with; use 'auto'")
    return device


def checkpoint_source(path: str) -> Path | str:
    """Where `model.path` points: a local folder, or else a Hugging Face name; raises ModelError for neither."""
    if path == "embedded":
        path = str(importlib.resources.files("moe_evo") / "data" / "model")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    is_local = folder.exists() or folder.is_absolute() or path.startswith((".", "~"))
    if is_local or folder.parent.is_dir() or path.count("/") != 1:
        raise ModelError(f"{path}: no such folder; give a checkpoint folder or a Hugging Face name owner/model")
    return path


def _config_file(config: ModelConfig, source: Path | str) -> Path:
    if isinstance(source, Path):
        file = source / "config.json"
        if not file.is_file():
            raise ModelError(f"{source}: has no config.json; give the folder of a transformers checkpoint")
        return file
    try:
        with quiet():
            return Path(str(cached_file(source, "config.json", revision=config.revision)))
    except LIBRARY_ERRORS as error:
        raise ModelError(
            f"{source}: no such folder, and not found on Hugging Face either ({one_line(error)})"
        ) from error


def read_family(config: ModelConfig, source: Path | str) -> Family:
    """The family that config.json tells; raises ModelError where moe_evo cannot load it, or has no weights to."""
    file = _config_file(config, source)
    try:
        raw_config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: is not JSON ({one_line(error)})") from error
    if not isinstance(raw_config, dict):
        raise ModelError(f"{file}: holds {type(raw_config).__name__}, expected an object")
    family = family_of(raw_config, str(source))
    if isinstance(source, Path) and not any(source.glob("*.safetensors")):
        pickled = any(source.glob("pytorch_model*.bin"))
        found = "holds pickled weights only, which can run code" if pickled else "has no weights"
        raise ModelError(f"{source}: {found}; moe_evo reads *.safetensors")
    return family


def read_transformers_config(config: ModelConfig, source: Path | str) -> Any:
    """What transformers makes of config.json; raises ModelError where it refuses."""
    try:
        with quiet():
            # a family's config and model are the library's own, also where the checkpoint brings code
            return transformers.AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{source}: config.json cannot be used ({one_line(error)})") from error


def _language_model(config: ModelConfig, source: Path | str, options: Mapping[str, Any]) -> Any:
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        language_model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{source}: cannot be loaded ({one_line(error)})") from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ModelError(f"{source}: lacks {len(lacking)} weights, {lacking[0]} among them")
    return language_model


def _tokenizer(config: ModelConfig, source: Path | str, transformers_config: Any) -> Any | None:
    if isinstance(source, Path) and not any((source / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            source,
            config=transformers_config,  # or the library reads config.json again, with the code beside it
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{source}: the tokenizer cannot be loaded ({one_line(error)})") from error
