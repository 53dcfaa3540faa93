"""Genomes on disk: safetensors with the space, the lineage and the outcome as JSON in the metadata.

The same bytes, compressed and without the extras, are what the journal keeps. Nothing here unpickles.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from moe_evo.errors import GenomeError
from moe_evo.files.json_text import JsonError, json_of
from moe_evo.files.limits import MOST_UNPACKED
from moe_evo.genomes.genome import Genome, LayerGenome, Matrix, PackedLayers
from moe_evo.genomes.population import EvaluationFailure, Individual, Outcome
from moe_evo.genomes.space import ModelShape, SearchSpace, check_fits
from moe_evo.genomes.stamped_file import FileKind
from moe_evo.shown import cut, shown

FILE = FileKind(
    "moe_evo.genome",
    version=1,
    holds="a genome",
    error=GenomeError,
    advice="give a genome file that moe_evo saved",
    again="use the moe_evo that wrote it",
)


STORED = FileKind(
    "moe_evo.stored_genome",
    version=1,
    holds="a genome",
    error=GenomeError,
    advice="give a genome that moe_evo stored",
    again="use the moe_evo that wrote it",
)
"""A genome as a journal has it: numbers of the kept experts, and the matrices only of layers that merge."""


_SIZES = ("num_experts", "num_kept", "top_k")
_MATRICES = ("expert_merging", "router_mapping")


def save_individual(
    path: str | os.PathLike[str], individual: Individual, space: SearchSpace, provenance: Mapping[str, Any]
) -> None:
    """Write an individual as one safetensors file, whole or not at all.

    provenance: whatever JSON can hold about where it comes from (config, model, versions).
    """
    candidate = individual.candidate
    content = _to_bytes(
        individual.genome,
        space=space.to_json(),
        lineage={
            "number": candidate.number,
            "operator": candidate.operator,
            "parents": list(candidate.parents),
        },
        outcome=outcome_to_json(individual.outcome),
        provenance=dict(provenance),
    )
    FILE.write(path, content)


def save_genome(path: str | os.PathLike[str], genome: Genome, provenance: Mapping[str, Any]) -> None:
    """As `save_individual`, for a genome that no search evaluated."""
    FILE.write(path, _to_bytes(genome, provenance=dict(provenance)))


def load_genome(path: str | os.PathLike[str]) -> Genome:
    """The genome in a genome file; raises GenomeError for anything else."""
    content = FILE.read(path)
    with _malformed_is_genome_error(str(path)):
        return _from_bytes(content, str(path))[0]


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What stands beside the genome: 'top_k', 'space', 'lineage', 'outcome' and 'provenance'."""
    content = FILE.read(path)
    with _malformed_is_genome_error(str(path)):
        return _from_bytes(content, str(path))[1]


def genome_to_bytes(genome: Genome) -> bytes:
    """A genome as a journal stores it, in few bytes."""
    packed = genome.packed
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "kept": packed.kept.astype(np.uint16),
        **{name: np.array(getattr(packed, name), dtype=np.uint16) for name in _SIZES},
    }
    if packed.merged:
        layers = genome.layers
        tensors |= {f"{index}.{name}": getattr(layers[index], name) for index in packed.merged for name in _MATRICES}
    return zlib.compress(STORED.to_bytes(tensors, {}), level=1)


def genome_from_bytes(content: bytes, digest: str | None = None) -> Genome:
    """The genome of `genome_to_bytes`, of this or an older version; raises GenomeError for anything else.

    digest: of the genome, where it is known.
    """
    where = "stored genome"
    with _malformed_is_genome_error(where):
        raw = unpacked(content)
        if STORED.made(raw):
            return Genome.of_packed(_packed(STORED.from_bytes(raw, where)[0], where), digest)
        return _from_bytes(raw, where)[0]  # as they were stored before


def _packed(tensors: Mapping[str, np.ndarray[Any, Any]], where: str) -> PackedLayers:
    num_experts, num_kept, top_k = (tuple(tensors[name].tolist()) for name in _SIZES)
    kept = tensors["kept"]
    if not num_experts or len(kept) != sum(num_kept) or (kept >= np.repeat(num_experts, num_kept)).any():
        raise GenomeError(f"{where}: its kept experts do not fit its layers; {STORED.advice}")
    compressed = {}
    for index in sorted({int(name.partition(".")[0]) for name in tensors if "." in name}):
        merging, mapping = (_matrix(tensors, f"{index}.{name}", where) for name in _MATRICES)
        compressed[index] = LayerGenome(merging, mapping, top_k[index]).compressed
    return PackedLayers.of_kept(num_experts, num_kept, top_k, kept, compressed)


def genome_from_kept_json(text_or_path: str | os.PathLike[str], shape: ModelShape) -> Genome:
    """The pruning that a JSON list names, e.g. '[[0, 3], [1, 2]]': the kept experts of each MoE layer.

    text_or_path: the list itself, or a file that holds it. The model's own top_k is kept.
    """
    text, where = str(text_or_path), "kept experts"
    if not text.lstrip().startswith("["):
        where = text
        text = FILE.read(text_or_path).decode("utf-8", errors="replace")
    expected = "a JSON list with one list of expert numbers a MoE layer, such as [[0, 3], [1, 2]]"
    try:
        kept = json_of(text)
    except JsonError as error:
        raise GenomeError(f"{where}: {error}, expected {expected}") from error
    if not isinstance(kept, list) or not all(_is_int_list(layer) for layer in kept):
        raise GenomeError(f"{where}: got {_shortened(text)}, expected {expected}")
    if len(kept) != shape.num_layers:
        raise GenomeError(f"{where}: got {len(kept)} lists, the model has {shape.num_layers} MoE layers")
    try:
        genome = Genome.from_kept(kept, shape.num_experts, shape.top_k)
        check_fits(genome, shape)
    except GenomeError as error:
        raise GenomeError(f"{where}: {error}") from error
    return genome


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data, told apart by its 'type'."""
    if isinstance(outcome, EvaluationFailure):
        return {"type": "failure", **asdict(outcome)}
    names = ("fitness", "tie_break", "standard_error", "num_examples", "duration_s")
    numbers = {name: getattr(outcome, name) for name in names}
    return {"type": "evaluation", **numbers, "metrics": dict(outcome.metrics)}


def _to_bytes(genome: Genome, **extras: Mapping[str, Any]) -> bytes:
    tensors: dict[str, Matrix] = {}
    for index, layer in enumerate(genome.layers):
        tensors[f"layers.{index}.expert_merging"] = layer.expert_merging
        tensors[f"layers.{index}.router_mapping"] = layer.router_mapping
    texts = {name: json.dumps(extra) for name, extra in extras.items()}
    return FILE.to_bytes(tensors, {"top_k": json.dumps(genome.top_k), **texts})


def _from_bytes(content: bytes, where: str) -> tuple[Genome, dict[str, Any]]:
    tensors, metadata = FILE.from_bytes(content, where)
    known = {key: json_of(text) for key, text in metadata.items()}
    top_k = known["top_k"]
    if not _is_int_list(top_k):
        raise GenomeError(f"{where}: top_k: got {shown(top_k, 80)}, expected a list of whole numbers; {FILE.advice}")
    for key in ("space", "lineage", "outcome", "provenance"):
        if not isinstance(known.get(key, {}), dict):
            raise GenomeError(f"{where}: {key}: got {shown(known[key], 80)}, expected an object; {FILE.advice}")
    if len(tensors) != 2 * len(top_k):
        raise GenomeError(f"{where}: holds {len(tensors)} matrices, expected {2 * len(top_k)}; {FILE.advice}")
    layers = tuple(
        LayerGenome(
            _matrix(tensors, f"layers.{index}.expert_merging", where),
            _matrix(tensors, f"layers.{index}.router_mapping", where),
            active,
        )
        for index, active in enumerate(top_k)
    )
    return Genome(layers), known


def _matrix(tensors: Mapping[str, np.ndarray[Any, Any]], name: str, where: str) -> Matrix:
    if name not in tensors:
        raise GenomeError(f"{where}: lacks the matrix {name}; {FILE.advice}")
    matrix = tensors[name]
    if matrix.dtype != np.float32:
        raise GenomeError(f"{where}: {name} is {matrix.dtype}, expected float32; {FILE.advice}")
    return matrix


@contextmanager
def _malformed_is_genome_error(where: str) -> Iterator[None]:
    """Turn the errors that damaged or foreign bytes cause in parsers into a GenomeError."""
    try:
        yield
    except GenomeError as error:
        message = str(error)
        raise error if message.startswith(where) else GenomeError(f"{where}: {message}") from error
    except zlib.error as error:
        raise GenomeError(f"{where}: not a genome file ({error}); {FILE.advice}") from error
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise GenomeError(f"{where}: damaged metadata ({reason}); {FILE.advice}") from error


def unpacked(content: bytes) -> bytes:
    """What zlib packed; raises zlib.error for anything else, and for more bytes than anything of ours has."""
    packed = zlib.decompressobj()
    found = packed.decompress(content, MOST_UNPACKED)
    if packed.unconsumed_tail:
        raise zlib.error(f"more than {MOST_UNPACKED:,} bytes in {len(content):,}")
    if not packed.eof or packed.unused_data:
        raise zlib.error("incomplete or with something behind it")
    return found


def _is_int_list(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _shortened(text: str) -> str:
    return cut(" ".join(text.split()), 60)
