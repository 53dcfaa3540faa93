"""Genome files: what is loaded is what was saved, and what is not a genome file says so in one line."""

import json
import pickle
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from moe_evo.errors import GenomeError
from moe_evo.genomes.file import (
    STORED,
    genome_from_bytes,
    genome_from_kept_json,
    genome_to_bytes,
    load_genome,
    load_metadata,
    outcome_to_json,
    save_genome,
    save_individual,
)
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.genomes.space import ModelShape, SearchSpace

SHAPE = ModelShape("mixtral", (4, 4), (2, 2), (0, 1))
SPACE = SearchSpace.build(SHAPE, num_kept=2)
RNG = np.random.default_rng(0)
MERGED = Genome(
    (
        LayerGenome(RNG.normal(size=(2, 4)), RNG.normal(size=(2, 4)), 2),
        LayerGenome.from_kept([1, 3], 4, 1),
    )
)
EVALUATION = Evaluation(0.75, -0.5, 0.03, 200, 1.25, {"arc/accuracy": 0.75})


def _individual(outcome=EVALUATION) -> Individual:
    return Individual(Candidate(17, MERGED, "row_crossover", (3, 9)), outcome)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "best.safetensors"
    save_individual(path, _individual(), SPACE, {"commit": "abc", "config": {"seed": 0}})
    return path


@pytest.mark.parametrize("outcome", [EVALUATION, EvaluationFailure("worker_died", "rank 1 gone", 2.0)])
def test_an_individual_comes_back_as_it_was_saved(tmp_path, outcome):
    save_individual(tmp_path / "one.safetensors", _individual(outcome), SPACE, {})
    loaded, metadata = load_genome(tmp_path / "one.safetensors"), load_metadata(tmp_path / "one.safetensors")
    assert loaded == MERGED and loaded.digest == MERGED.digest and loaded.top_k == (2, 1)
    assert metadata["lineage"] == {"number": 17, "operator": "row_crossover", "parents": [3, 9]}
    assert metadata["outcome"] == json.loads(json.dumps(outcome_to_json(outcome)))


def test_a_genome_file_is_plain_safetensors_with_its_space_and_provenance(file):
    tensors = load_file(file)
    assert sorted(tensors) == [
        f"layers.{layer}.{name}" for layer in (0, 1) for name in ("expert_merging", "router_mapping")
    ]
    np.testing.assert_array_equal(tensors["layers.0.router_mapping"], MERGED.layers[0].router_mapping)
    metadata = load_metadata(file)
    assert metadata["space"]["num_kept"] == [2, 2]
    assert metadata["lineage"] == {"number": 17, "operator": "row_crossover", "parents": [3, 9]}
    assert metadata["provenance"] == {"commit": "abc", "config": {"seed": 0}}


def test_a_failed_write_leaves_the_old_file_and_no_other(file, monkeypatch):
    def no_space(*_):
        raise OSError("no space left on device")

    before = file.read_bytes()
    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(GenomeError, match=r"cannot be written \(no space left on device\)"):
        save_individual(file, _individual(EvaluationFailure("x", "y")), SPACE, {})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_saving_replaces_an_older_file(file):
    save_individual(file, _individual(EvaluationFailure("x", "y")), SPACE, {})
    assert load_metadata(file)["outcome"] == {"type": "failure", "kind": "x", "reason": "y", "duration_s": 0.0}
    assert list(file.parent.iterdir()) == [file]


def test_every_truncation_is_a_genome_error(file):
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(GenomeError, match=r"best\.safetensors: "):
            load_genome(file)


def test_every_flipped_byte_is_an_error_or_another_genome_but_never_a_crash(file):
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            load_genome(file), load_metadata(file)
        except GenomeError as error:
            assert "\n" not in str(error) and str(file) in str(error)


GENOME_METADATA = {"format": "moe_evo.genome", "version": "1", "top_k": "[1]"}
ONE_HOT = np.eye(3, dtype=np.float32)
MATRICES = {"layers.0.expert_merging": ONE_HOT, "layers.0.router_mapping": ONE_HOT}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"just text, no tensors at all", "not a safetensors file"),
        (pickle.dumps({"layers.0.expert_merging": [1.0]}), "not a safetensors file"),
        (save(MATRICES), "without a genome of moe_evo"),
        (save(MATRICES, {"format": "pt"}), "without a genome of moe_evo"),
        (save(MATRICES, GENOME_METADATA | {"version": "2"}), "version 2, this moe_evo reads 1"),
        (save(MATRICES, GENOME_METADATA | {"top_k": "[1, 1]"}), "holds 2 matrices, expected 4"),
        (save(MATRICES, GENOME_METADATA | {"top_k": "[4]"}), "top_k: got 4"),
        (save(MATRICES, GENOME_METADATA | {"top_k": "7"}), "top_k: got 7, expected a list of whole numbers"),
        (save(MATRICES, GENOME_METADATA | {"top_k": "{"}), "damaged metadata"),
        (save(MATRICES, {"format": "moe_evo.genome", "version": "1"}), "damaged metadata"),
        (save({"a": ONE_HOT, "b": ONE_HOT}, GENOME_METADATA), "lacks the matrix layers.0.expert_merging"),
        (save({name: ONE_HOT.astype(np.int8) for name in MATRICES}, GENOME_METADATA), "is int8"),
        (save({name: ONE_HOT * np.nan for name in MATRICES}, GENOME_METADATA), "NaN or infinity"),
        (save({name: ONE_HOT[0] for name in MATRICES}, GENOME_METADATA), "expected \\(num_kept"),
    ],
)
def test_what_is_not_a_genome_file_is_an_error_in_one_line_with_the_path(tmp_path, content, message):
    path = tmp_path / "wrong.bin"
    path.write_bytes(content)
    with pytest.raises(GenomeError, match=message) as caught:
        load_genome(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_genome_without_lineage_is_a_genome(tmp_path):
    save_file(MATRICES, tmp_path / "bare.safetensors", GENOME_METADATA)
    assert load_genome(tmp_path / "bare.safetensors").kept == ((0, 1, 2),)
    assert load_metadata(tmp_path / "bare.safetensors") == {"top_k": [1]}


@pytest.mark.parametrize("load", [load_genome, load_metadata])
def test_a_file_that_is_not_there_is_an_error_that_says_so(load, tmp_path):
    with pytest.raises(GenomeError, match=r"none\.safetensors: cannot be read .*check the path"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(GenomeError, match="cannot be read"):
        load(tmp_path)


def test_bytes_of_a_genome_give_the_same_genome():
    assert genome_from_bytes(genome_to_bytes(MERGED)) == MERGED


def test_a_genome_that_an_older_version_stored_is_read(tmp_path):
    pruning = Genome.from_kept([[0, 2], [1, 3]], 4, 1)
    for genome in (MERGED, pruning):
        save_genome(tmp_path / "old.safetensors", genome, {})
        stored = zlib.compress((tmp_path / "old.safetensors").read_bytes())  # what a journal had
        assert genome_from_bytes(stored) == genome


def test_the_digest_of_a_stored_genome_may_be_given():
    pruning = Genome.from_kept([[0, 2], [1, 3]], 4, 1)
    assert genome_from_bytes(genome_to_bytes(pruning), pruning.digest) == pruning
    assert genome_from_bytes(genome_to_bytes(pruning), "of its row").digest == "of its row"


def test_stored_kept_experts_that_do_not_fit_are_an_error():
    sizes = {name: np.array(numbers, dtype=np.uint16) for name, numbers in SIZES.items()}
    for kept in ([0, 4], [0], [0, 1, 2]):
        content = STORED.to_bytes({**sizes, "kept": np.array(kept, dtype=np.uint16)}, {})
        with pytest.raises(GenomeError, match="stored genome: its kept experts do not fit its layers"):
            genome_from_bytes(zlib.compress(content))


SIZES = {"num_experts": [4], "num_kept": [2], "top_k": [1]}


def test_bytes_of_prunings_are_small():
    mixtral = Genome.from_kept([[0, 2, 5, 7]] * 32, 8, 2)
    assert len(genome_to_bytes(mixtral)) < 2_000
    rng = np.random.default_rng(0)
    large = Genome.from_kept([rng.permutation(128)[:64] for _ in range(48)], 128, 8)
    assert len(genome_to_bytes(large)) < 5_000
    assert genome_from_bytes(genome_to_bytes(large)) == large


@pytest.mark.parametrize("content", [b"", b"text", zlib.compress(b"text"), genome_to_bytes(MERGED)[:-9]])
def test_bytes_that_are_no_genome_are_an_error(content):
    with pytest.raises(GenomeError, match="stored genome"):
        genome_from_bytes(content)


@pytest.mark.parametrize("outcome", [EVALUATION, EvaluationFailure("timeout", "600 s", 600.0)])
def test_outcomes_are_plain_data_with_their_type(outcome):
    plain = json.loads(json.dumps(outcome_to_json(outcome)))
    made = {"evaluation": Evaluation, "failure": EvaluationFailure}[plain.pop("type")](**plain)
    assert made == outcome


def test_a_kept_list_is_read_from_text_or_from_a_file(tmp_path):
    expected = Genome.from_kept([[0, 3], [1, 2]], 4, 2)
    assert genome_from_kept_json(" [[3, 0], [1, 2]]\n", SHAPE) == expected
    (tmp_path / "kept.json").write_text("[[0, 3],\n [1, 2]]")
    assert genome_from_kept_json(tmp_path / "kept.json", SHAPE) == expected
    assert genome_from_kept_json(str(tmp_path / "kept.json"), SHAPE) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0, 3], [1, 2]", "not JSON"),
        ("[0, 3]", r"got \[0, 3\], expected a JSON list with one list"),
        ("[[0, true], [1, 2]]", "expected a JSON list"),
        ("[[0, 1.0], [1, 2]]", "expected a JSON list"),
        ("[[0, 3]]", "got 1 lists, the model has 2 MoE layers"),
        ("[[0, 3], [1, 4]]", "experts 0 to 3"),
        ("[[0, 3], [1, 1]]", "at most once"),
        ("[[0, 3], [1]]", "top_k: got 2 with 1"),
        ("[[0, 3], []]", "expected experts"),
        ("no-such-file.json", "no-such-file.json: cannot be read"),
    ],
)
def test_a_wrong_kept_list_is_an_error_that_says_what_is_wrong(text, message):
    with pytest.raises(GenomeError, match=message) as caught:
        genome_from_kept_json(text, SHAPE)
    assert "\n" not in str(caught.value)


def test_a_kept_list_must_fit_the_groups_of_the_router():
    limited = ModelShape("deepseek_v3", (4,), (1,), (0,), num_expert_groups=2)
    assert genome_from_kept_json("[[0, 3]]", limited).kept == ((0, 3),)
    with pytest.raises(GenomeError, match="1 experts in each of the router's 2 groups"):
        genome_from_kept_json("[[0, 1]]", limited)
