"""A run of 20,000 evaluations of a model with 48 layers of 128 experts goes on in little memory and time."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_evo.genomes.file import genome_to_bytes
from moe_evo.genomes.genome import Genome, LayerGenome, PackedLayers
from moe_evo.genomes.population import Evaluation
from moe_evo.records.journal import MAIN, Journal

NUM_EVALUATIONS, NUM_EXAMPLES = 20_000, 200
LAYERS, EXPERTS, KEPT = 48, 128, 64


def drawn(rng: np.random.Generator) -> Genome:
    kept = np.sort(rng.random((LAYERS, EXPERTS)).argpartition(KEPT, axis=1)[:, :KEPT], axis=1)
    sizes = ((number,) * LAYERS for number in (EXPERTS, KEPT, 8))
    return Genome.of_packed(PackedLayers.of_kept(*sizes, kept.ravel(), {}))


@pytest.fixture(scope="module")
def journal_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal as a search of prunings leaves it, but for the digests: they take longer than all the rest."""
    path = tmp_path_factory.mktemp("large") / "journal.sqlite"
    rng = np.random.default_rng(0)
    scores = {"task": rng.random(NUM_EXAMPLES)}
    with Journal(path) as journal:
        rows = (
            (MAIN, number, f"{number:032x}", "random_pruning", "[]", genome_to_bytes(drawn(rng)))
            for number in range(NUM_EVALUATIONS)
        )
        with journal._write() as database:
            database.executemany("INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?)", rows)
        fitness = rng.random(NUM_EVALUATIONS)
        journal.record(
            [
                (MAIN, number, "search", Evaluation(float(fitness[number]), num_examples=NUM_EXAMPLES, scores=scores))
                for number in range(NUM_EVALUATIONS)
            ]
        )
    return path


RESUME = """
import json, sys, time
from types import SimpleNamespace
from pathlib import Path
from moe_evo.config.search import SearchConfig
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.records.journal import MAIN, Journal
from moe_evo.runs.loop import Run
from moe_evo.searches.registry import build_search
from moe_evo.tracking.base import Trackers

shape = ModelShape("qwen3_moe", num_experts=(128,) * 48, top_k=(8,) * 48, decoder_layers=tuple(range(48)))
config = SearchConfig(algorithm=sys.argv[2], num_kept=64, evaluations=int(sys.argv[3]))
space = SearchSpace.build(shape, num_kept=64)
pool = SimpleNamespace(free_slots=4, listener=None)
started = time.process_time()
with Journal(Path(sys.argv[1])) as journal:
    run = Run(journal, pool, Trackers())
    search = build_search(space, config)
    population = run.evolve(MAIN, "search", search, config.evaluations)
    asked = search.ask(1)
most_kib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # ru_maxrss is the parent's, too
best = population.best
print(json.dumps({
    "evaluations": len(population), "best": best.evaluation.fitness, "kept": len(best.genome.kept[0]),
    "asked": asked[0].number, "cpu_s": time.process_time() - started, "mib": most_kib / 1024,
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the most memory")
def test_a_large_run_goes_on_in_ten_seconds_and_half_a_gibibyte(journal_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(journal_file), "random", str(NUM_EVALUATIONS)],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)
    assert (told["evaluations"], told["asked"], told["kept"]) == (NUM_EVALUATIONS, NUM_EVALUATIONS, KEPT)
    assert told["cpu_s"] < 10, told
    assert told["mib"] < 500, told


def test_a_pruning_travels_as_the_list_of_its_kept_experts() -> None:
    genome = drawn(np.random.default_rng(0))
    assert len(pickle.dumps(genome)) < 20_000
    digest = genome.digest
    travelled = pickle.dumps(genome)
    assert len(travelled) < 20_000 and pickle.loads(travelled).__dict__["digest"] == digest
    dense = Genome(LayerGenome(np.eye(EXPERTS)[list(kept)], np.eye(EXPERTS)[list(kept)], 8) for kept in genome.kept)
    assert dense == genome and len(pickle.dumps(dense)) < 20_000


def test_a_merge_is_kept_compressed_and_comes_back_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    merging = np.where(rng.random((KEPT, EXPERTS)) < 0.02, rng.normal(size=(KEPT, EXPERTS)), 0).astype(np.float32)
    layers = [LayerGenome(merging, np.eye(EXPERTS, dtype=np.float32)[:KEPT], 8), *drawn(rng).layers[1:]]
    genome = Genome(layers)
    assert not genome.is_pruning and len(pickle.dumps(genome)) < 20_000
    loaded = pickle.loads(pickle.dumps(genome))
    np.testing.assert_array_equal(loaded.layers[0].expert_merging, merging)
    assert [one.digest for one in loaded.layers] == [one.digest for one in layers]
    assert loaded.layers[0].kept == genome.kept[0] == layers[0].kept
