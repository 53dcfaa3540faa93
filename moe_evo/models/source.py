"""A model's files as they are now, described once: where they lie, family, config, tokenizer and hash.

Everything that can be refused is refused from here, before weights are read. What is asked for is read when it
is first asked for, and once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError, ModelError
from moe_evo.files.json_text import read_json
from moe_evo.genomes.space import ModelShape
from moe_evo.models.carve.formats import DENSE_TYPES, Layout, check_dense, target_config, target_type
from moe_evo.models.checkpoint_check import Header, check_headers, headers_of
from moe_evo.models.config_check import check_config
from moe_evo.models.experts.alignment_file import Alignment, load_alignment
from moe_evo.models.families import FAMILIES, Family, family_of
from moe_evo.models.location import location
from moe_evo.models.transformers_border import (
    LIBRARY_ERRORS,
    cached_file,
    one_line,
    quiet,
    tokenizer_errors,
    transformers,
)
from moe_evo.shown import shown

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_BESIDE_TOKENIZER = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*")


class ModelSource:
    """What `config.path` points to.

    config: names the commit of a Hugging Face name. location: a local folder, or such a name. family: as config.json
    tells. takes: what it may be, 'moe', 'dense' or 'any'. is_dense: whether it is a dense model, which is taken as an
    MoE of one expert that computes the same. needs_weights: False for a plan, which does with config.json. Raises
    ModelError where there is no checkpoint that moe_evo can load; so do the properties, for files that cannot be used.
    """

    def __init__(
        self, config: ModelConfig, takes: Literal["moe", "dense", "any"] = "moe", *, needs_weights: bool = True
    ) -> None:
        self.location = location(config.path)
        is_local = isinstance(self.location, Path)
        if is_local and config.revision is not None:
            raise ConfigError(
                f"model.revision: got {shown(config.revision)}, expected none, as {config.path} is a folder; leave it "
                "out, or add --model.revision null"
            )
        self._config_file = _config_file(config, self.location)
        # everything else comes from the same commit, whatever happens to a branch meanwhile
        self.config = config if is_local else replace(config, revision=self._config_file.parent.name)
        content = read_model_config(self._config_file)
        self.is_dense = takes == "dense" or (takes == "any" and content.get("model_type") in DENSE_TYPES)
        self.family = _family(content, self._config_file, self.location, is_dense=self.is_dense)
        if needs_weights:
            self.require_weights()

    def require_weights(self) -> None:
        """Raise ModelError where a folder has no weights that can be loaded."""
        if isinstance(self.location, Path) and not any(self.location.glob("*.safetensors")):
            pickled = any(self.location.glob("pytorch_model*.bin"))
            found = "holds pickled weights only, which can run code" if pickled else "has no weights"
            raise ModelError(f"{self.location}: {found}; moe_evo reads *.safetensors")

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one, as far as the names of files tell."""
        return not isinstance(self.location, Path) or any((self.location / one).is_file() for one in _TOKENIZER_FILES)

    @cached_property
    def transformers_config(self) -> Any:
        """What transformers makes of config.json; of a dense model the config of the MoE with one expert."""
        config = self.stored_config
        return target_config(config, _one_expert(config.intermediate_size)) if self.is_dense else config

    @cached_property
    def stored_config(self) -> Any:
        """What transformers makes of config.json."""
        try:
            with quiet():
                # a family's config and model are the library's own, also where the checkpoint brings code
                found = transformers.AutoConfig.from_pretrained(
                    self.location, revision=self.config.revision, trust_remote_code=False
                )
                check_config(found.to_dict(), str(self._config_file))  # with the defaults of what it leaves out
        except LIBRARY_ERRORS as error:
            raise _unusable(self.location, error) from error
        return found

    @cached_property
    def shape(self) -> ModelShape:
        """The model's MoE layers."""
        try:
            return self.family.shape(self.transformers_config)
        except LIBRARY_ERRORS as error:
            raise _unusable(self.location, error) from error

    def checked_headers(self) -> dict[str, Header]:
        """The tensors in a folder's files by name; {} for a Hugging Face name, whose files are not here yet.

        Raises ModelError where they cannot be those of the model that config.json describes.
        """
        if not isinstance(self.location, Path):
            return {}
        headers = headers_of(sorted(self.location.glob("*.safetensors")))
        check_headers(str(self.location), headers, self.transformers_config.num_hidden_layers)
        return headers

    @property
    def renormalises(self) -> bool:
        """Whether the router divides the chosen gate weights by their sum."""
        return self.family.renormalises(self.transformers_config)

    @cached_property
    def tokenizer(self) -> Any | None:
        """None where a folder has none."""
        if not self.has_tokenizer:
            return None
        with quiet(), tokenizer_errors(ModelError, f"{self.location}: the tokenizer cannot be loaded"):
            return transformers.AutoTokenizer.from_pretrained(
                self.location,
                config=self.stored_config,  # or the library reads config.json again, with the code beside it
                revision=self.config.revision,
                trust_remote_code=self.config.trust_remote_code,
            )

    @cached_property
    def alignment(self) -> Alignment | None:
        """The order of neurons that `config.alignment` names; raises ModelError for a file of another model."""
        return None if self.config.alignment is None else load_alignment(self.config.alignment, self._stored_hash)

    @property
    def alignment_digest(self) -> str | None:
        """Tells alignments apart; None for a model that is not aligned."""
        return None if self.alignment is None else self.alignment.digest

    @property
    def hash(self) -> str:
        """Tells models apart: 'owner/model@commit' for a Hugging Face name, else a sha256 of the folder.

        That covers config.json and the tokenizer's files whole, of generation_config.json what answers depend on (see
        `_own_end_tokens`), and a sample of every safetensors file (see `_sample`): other training changes it, an edit
        of a few rows of a large file may go unseen. An alignment is part of it, as the same merge means something else
        under another.
        """
        return self._stored_hash if self.alignment is None else f"{self._stored_hash}+aligned:{self.alignment.digest}"

    @cached_property
    def _stored_hash(self) -> str:
        """Of the model without any alignment."""
        if not isinstance(self.location, Path):
            return f"{self.location}@{self._config_file.parent.name}"
        content = hashlib.sha256()
        patterns = (*_TOKENIZER_FILES, *_BESIDE_TOKENIZER)
        beside = sorted(file for pattern in patterns for file in self.location.glob(pattern) if file.is_file())
        for file in (self._config_file, *beside):
            content.update(f"{file.name}:{file.stat().st_size}:".encode())
            content.update(file.read_bytes())
        content.update(_own_end_tokens(self.location, self._config_file))
        for file in sorted(self.location.glob("*.safetensors")):
            content.update(f"{file.name}:{file.stat().st_size}:".encode())
            for block in _sample(file):
                content.update(block)
        return content.hexdigest()


def _config_file(config: ModelConfig, where: Path | str) -> Path:
    if isinstance(where, Path):
        file = where / "config.json"
        if not file.is_file():
            raise ModelError(f"{where}: has no config.json; give the folder of a transformers checkpoint")
        return file
    try:
        with quiet():
            return Path(str(cached_file(where, "config.json", revision=config.revision)))
    except LIBRARY_ERRORS as error:
        raise ModelError(
            f"{where}: no such folder, and not found on Hugging Face either ({one_line(error)})"
        ) from error


def read_model_config(file: Path) -> dict[str, Any]:
    """The object in config.json; raises ModelError where there is none.

    Some models have bounds of infinity there, such as time_step_limit, which the library reads.
    """
    return _json_object(file, takes_infinity=True)


def _json_object(file: Path, *, takes_infinity: bool = False) -> dict[str, Any]:
    """The object in a JSON file; raises ModelError where there is none."""
    found = read_json(file, ModelError, takes_infinity=takes_infinity)
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds {type(found).__name__}, expected an object")
    return found


def _own_end_tokens(folder: Path, config_file: Path) -> bytes:
    """The tokens that end an answer, as generation_config.json says; b"" where config.json says the same.

    Nothing else in that file has an effect on greedy answers, so that an edit of it makes no other model.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return b""
    told, known = _json_object(file).get("eos_token_id"), read_model_config(config_file).get("eos_token_id")
    return b"" if told == known else json.dumps({"eos_token_id": told}).encode()


def _family(config: dict[str, Any], config_file: Path, where: Path | str, *, is_dense: bool) -> Family:
    """The family that config.json tells; raises ModelError where moe_evo cannot load it."""
    if is_dense:
        family = FAMILIES[target_type(check_dense(config, str(where)), _one_expert(width=1))]
    else:
        family = family_of(config, str(where))
    check_config(config, str(config_file))
    return family


def _one_expert(width: int) -> Layout:
    return Layout(num_experts=1, top_k=1, width=width)


def _unusable(location: Path | str, error: BaseException) -> ModelError:
    if isinstance(error, ModelError):
        return error
    return ModelError(f"{location}: config.json cannot be used ({one_line(error)})")


def _sample(file: Path) -> Iterator[bytes]:
    """The first MiB, where names and shapes stand, and up to 1,024 blocks of 4 KiB spread evenly.

    Other weights differ nearly everywhere, so they differ here; reading all of 90 GB would take minutes.
    Above 5 MiB there are gaps between the blocks, and what is edited in a gap alone is not seen.
    """
    with file.open("rb") as stream:
        yield stream.read(2**20)
        for start in np.linspace(0, max(file.stat().st_size - 4096, 0), 1024, dtype=np.int64):
            stream.seek(int(start))
            yield stream.read(4096)
