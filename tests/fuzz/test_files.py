"""Damaged files of every kind: each command that reads them works, or says what is wrong in one line."""

from __future__ import annotations

import json
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nonsense import TEXTS, VALUES, changed, damaged, inputs, one_of, refused

import moe_evo
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.observation_file import StoredObservations, load_observations, save_observations
from moe_evo.criteria.sums import LayerRatios, Observation
from moe_evo.errors import GenomeError, ModelError, MoeEvoError, ObservationError, TaskError
from moe_evo.genomes.file import genome_from_bytes, genome_from_kept_json, load_genome, load_metadata, save_genome
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import ModelShape
from moe_evo.models.experts.alignment_file import Alignment, load_alignment, save_alignment
from moe_evo.models.experts.eep_coefficients import load_eep_coefficients
from moe_evo.tasks.data import read_task

OLD_RUNS = Path(__file__).parent.parent / "data" / "old_runs"
MODEL = Path(moe_evo.__file__).parent / "data" / "model"
RESULT = json.loads((OLD_RUNS / "finished" / "result.json").read_text())
MODEL_CONFIG = json.loads((MODEL / "config.json").read_text())
SHAPE = ModelShape("mixtral", (8, 8), (2, 2), (0, 1))


def _dumped(value: Any) -> bytes:
    """JSON as a careless writer makes it, with NaN and halves of characters."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    shutil.copytree(OLD_RUNS / "finished", folder / "finished")
    return folder / "finished"


@inputs(120)
@given(content=changed(RESULT).map(_dumped) | damaged(_dumped(RESULT)))
def test_results(finished: Path, content: bytes) -> None:
    (finished / "result.json").write_bytes(content)
    shows = not refused("show", str(finished))
    assert refused("compare", str(finished), "--format", "csv") or shows, "one command takes what another refuses"


@inputs(12)
@given(content=changed(RESULT).map(_dumped))
def test_results_in_a_report(finished: Path, content: bytes) -> None:
    (finished / "result.json").write_bytes(content)
    refused("report", str(finished), "--overwrite")


_COLUMNS = {
    "candidates": ("number", "digest", "operator", "parents", "genome"),
    "outcomes": (
        "number",
        "split",
        "fitness",
        "tie_break",
        "standard_error",
        "num_examples",
        "metrics",
        "scores",
        "failure_kind",
        "failure_reason",
        "duration_s",
    ),
    "meta": ("key", "value"),
}
_CELLS = (
    None,
    b"",
    b"\x00" * 8,
    b"x\x9c",
    "[-1]",
    "[" * 1000,
    "{}",
    "null",
    "[9]",
    *TEXTS[:1],
    *TEXTS[5:],
    -1,
    2**62,
    1.5,
)


@inputs(60)
@given(table=one_of(list(_COLUMNS)), data=st.data(), cell=one_of(_CELLS))
def test_journals(folder: Path, table: str, data: st.DataObject, cell: object) -> None:
    column = data.draw(one_of(_COLUMNS[table]))
    run = folder / "unfinished"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(OLD_RUNS / "unfinished", run)
    database = sqlite3.connect(run / "journal.sqlite", isolation_level=None)
    database.execute("PRAGMA foreign_keys = OFF")
    with suppress(sqlite3.IntegrityError, sqlite3.OperationalError):  # a value that the schema itself refuses
        database.execute(
            f"UPDATE {table} SET {column} = ? WHERE rowid IN (SELECT rowid FROM {table} LIMIT 1)"
            if table != "meta"
            else f"UPDATE meta SET {column} = ? WHERE key = 'schema'",
            (cell,),
        )
    database.close()
    refused("show", str(run))
    refused("compare", str(run))


@inputs(20)
@given(content=damaged((OLD_RUNS / "unfinished" / "journal.sqlite").read_bytes()))
def test_journals_with_damaged_bytes(folder: Path, content: bytes) -> None:
    run = folder / "damaged"
    run.mkdir(exist_ok=True)
    shutil.copy(OLD_RUNS / "unfinished" / "config.yaml", run / "config.yaml")
    (run / "journal.sqlite").write_bytes(content)
    refused("show", str(run))


def _with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A safetensors file with another header."""
    size = struct.unpack("<Q", content[:8])[0]
    original = json.loads(content[8 : 8 + size])
    original["__metadata__"] = dict(sorted(original["__metadata__"].items()))  # in each file in another order
    header = _dumped(change(original))
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _genome_file(folder: Path) -> bytes:
    save_genome(folder / "g.safetensors", Genome.from_kept([[0, 1], [2, 3]], 8, 2), {"router": "exported"})
    return (folder / "g.safetensors").read_bytes()


def _observations(folder: Path) -> bytes:
    layers = (LayerRatios(np.arange(3.0)), LayerRatios(np.arange(3.0)))
    save_observations(folder / "o.safetensors", StoredObservations("model", {"key": Observation(layers)}))
    return (folder / "o.safetensors").read_bytes()


def _alignment(folder: Path) -> bytes:
    orders = tuple(np.tile(np.arange(4, dtype=np.int32), (2, 1)) for _ in range(2))
    save_alignment(folder / "a.safetensors", Alignment("model", orders))
    return (folder / "a.safetensors").read_bytes()


_STAMPED: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], object], type[MoeEvoError]]] = {
    "genome": (_genome_file, load_genome, GenomeError),
    "metadata": (_genome_file, load_metadata, GenomeError),
    "observations": (_observations, lambda path: load_observations(path, "model"), ObservationError),
    "alignment": (_alignment, lambda path: load_alignment(path, "model"), ModelError),
}


@pytest.mark.parametrize("kind", list(_STAMPED))
@inputs(150)
@given(data=st.data())
def test_files_of_tensors(folder: Path, kind: str, data: st.DataObject) -> None:
    write, read, error = _STAMPED[kind]
    original = write(folder)
    if data.draw(st.booleans()):
        content = data.draw(damaged(original))
    else:
        content = _with_header(original, lambda header: data.draw(changed(header)))
    (folder / "damaged.safetensors").write_bytes(content)
    try:
        read(folder / "damaged.safetensors")
    except error as found:
        assert "\n" not in str(found) and str(folder) in str(found)


@pytest.mark.parametrize("kind", list(_STAMPED))
@inputs(60)
@given(data=st.data())
def test_json_within_files_of_tensors(folder: Path, kind: str, data: st.DataObject) -> None:
    write, read, error = _STAMPED[kind]

    def change(header: dict[str, Any]) -> dict[str, Any]:
        told = header["__metadata__"]
        name = data.draw(one_of(sorted(told)))
        try:
            inner = json.loads(told[name])
        except ValueError:
            inner = told[name]
        new = data.draw(changed({"inner": inner}) | one_of(VALUES).map(lambda value: {"inner": value}))
        told[name] = json.dumps(new.get("inner"))
        return header

    (folder / "damaged.safetensors").write_bytes(_with_header(write(folder), change))
    try:
        read(folder / "damaged.safetensors")
    except error as found:
        assert "\n" not in str(found)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "BOOL", "I64", "F16", "U8", "F4"])
@pytest.mark.parametrize("kind", list(_STAMPED))
def test_numbers_of_other_types_are_refused(folder: Path, kind: str, dtype: str) -> None:
    write, read, error = _STAMPED[kind]
    size = {"BF16": 2, "F16": 2, "I64": 8}.get(dtype, 1)

    def change(header: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(one for one in header if one != "__metadata__"):
            first, last = header[name]["data_offsets"]
            header[name] = {"dtype": dtype, "shape": [(last - first) // size], "data_offsets": [first, last]}
        return header

    (folder / "typed.safetensors").write_bytes(_with_header(write(folder), change))
    with pytest.raises(error) as found:
        read(folder / "typed.safetensors")
    assert "\n" not in str(found.value)


def _coefficients(folder: Path, **changes: Any) -> Path:
    eye = torch.eye(8)[:4]
    torch.save({"layers.[0-1]": eye, "transfer.[0-1]": eye, **changes}, folder / "c.pth")
    return folder / "c.pth"


@inputs(100)
@given(data=st.data())
def test_coefficients(folder: Path, data: st.DataObject) -> None:
    (folder / "d.pth").write_bytes(data.draw(damaged(_coefficients(folder).read_bytes())))
    try:
        load_eep_coefficients(folder / "d.pth", SHAPE)
    except GenomeError as error:
        assert "\n" not in str(error) and "d.pth" in str(error)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(8).to_sparse(),
        torch.empty(4, 8, device="meta"),
        torch.eye(8).int(),
        torch.eye(8).to(torch.complex64),
        torch.empty(1).expand(10**6, 10**6),
        torch.full((4, 8), torch.nan),
        torch.ones(8),
        torch.empty(0, 8),
    ],
)
def test_tensors_that_are_no_matrix_are_refused(folder: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(GenomeError, match=r"c\.pth"):
        load_eep_coefficients(_coefficients(folder, **{"layers.[0-1]": tensor}), SHAPE)


def test_a_parameter_is_a_matrix(folder: Path) -> None:
    eye = torch.nn.Parameter(torch.eye(8)[:4])
    assert load_eep_coefficients(_coefficients(folder, **{"layers.[0-1]": eye}), SHAPE).num_kept == (4, 4)


@inputs(20)
@given(content=changed(MODEL_CONFIG).map(_dumped) | damaged(_dumped(MODEL_CONFIG)))
def test_configs_of_models(folder: Path, content: bytes) -> None:
    model = folder / "model"
    if not model.exists():
        shutil.copytree(MODEL, model)
    (model / "config.json").write_bytes(content)
    refused("plan", "--model.path", str(model))


_BROKEN_MODELS: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 0},
    {"hidden_size": float("inf")},
    {"rope_theta": float("inf")},
    {"rms_norm_eps": {"__float__": "Infinity"}},
    {"num_hidden_layers": {"__float__": "Infinity"}},
    {"pad_token_id": float("-inf")},
    {"attention_dropout": float("nan")},
    {"num_key_value_heads": 0},
    {"num_key_value_heads": 3},
    {"pad_token_id": 10**6},
    {"pad_token_id": "x"},
    {"dtype": "float64", "torch_dtype": "float64"},
    {"dtype": "int8"},
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": 10**15},
    {"num_hidden_layers": 0},
    {"num_experts_per_tok": 9},
    {"num_experts_per_tok": 0},
    {"num_local_experts": 0},
    {"n_group": "two"},
    {"hidden_size": -1},
    {"vocab_size": 0},
    {"hidden_size": 1.5},
    {"num_local_experts": True},
    {"head_dim": 0},
    {"num_local_experts": 10**9},
)


@pytest.mark.parametrize("changes", _BROKEN_MODELS, ids=str)
def test_models_that_nobody_can_build_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(MODEL, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(MODEL_CONFIG | changes))
    assert refused("plan", "--model.path", str(tmp_path / "m"))


@inputs(20)
@given(content=damaged((MODEL / "tokenizer.json").read_bytes()))
def test_tokenizers(folder: Path, content: bytes) -> None:
    model = folder / "tokenized"
    if not model.exists():
        shutil.copytree(MODEL, model)
    (model / "tokenizer.json").write_bytes(content)
    from moe_evo.config.model import ModelConfig
    from moe_evo.models.source import ModelSource

    try:
        assert ModelSource(ModelConfig(path=str(model))).tokenizer is not None
    except ModelError as error:
        assert "\n" not in str(error) and str(model) in str(error)


_ROWS = [{"prompt": f"p{n}", "choices": ["a", "b"], "label": 0, "answers": ["a"]} for n in range(30)]


@inputs(200)
@given(rows=changed(_ROWS), kind=one_of(["auto", "choice", "generation", "perplexity", "distillation"]))
def test_rows_of_tasks(folder: Path, rows: Any, kind: str) -> None:
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join(map(_dumped, rows)))
    try:
        data = read_task(TaskConfig(data=str(file), kind=kind))
    except TaskError as error:
        assert "\n" not in str(error)
    else:
        for example in (one for split in data.splits.values() for one in split):
            assert all(isinstance(one, str) and one.strip() for one in (*example.choices, *example.answers))
            "".join((example.prompt, example.text, *example.choices, *example.answers)).encode("utf-8")


@inputs(60)
@given(content=damaged(b"\n".join(map(_dumped, _ROWS[:8]))))
def test_rows_with_damaged_bytes(folder: Path, content: bytes) -> None:
    (folder / "rows.jsonl").write_bytes(content)
    try:
        read_task(TaskConfig(data=str(folder / "rows.jsonl")))
    except MoeEvoError as error:
        assert "\n" not in str(error)


@inputs(150)
@given(kept=changed([[0, 1], [2, 3]]) | one_of(VALUES))
def test_lists_of_kept_experts(folder: Path, kept: Any) -> None:
    (folder / "kept.json").write_bytes(_dumped(kept))
    try:
        genome = genome_from_kept_json(folder / "kept.json", SHAPE)
    except GenomeError as error:
        assert "\n" not in str(error)
    else:
        assert [list(layer) for layer in genome.kept] == [sorted(layer) for layer in kept]


def test_a_bomb_of_zeros_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_evo.genomes.file.MOST_UNPACKED", 2**20)
    with pytest.raises(GenomeError, match="more than 1,048,576 bytes in 2"):
        genome_from_bytes(zlib.compress(bytes(2**21)))
