"""The experiments are what they say: configs parse, the embedded data are whole, scripts do their part."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from moe_evo.commands.shared import base_model_name
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.file import config_parser, parse_config, read_config
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.sweep import SweepConfig
from moe_evo.config.task import SPLITS, TaskConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.source import ModelSource
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import check_tasks
from moe_evo.tasks.sources import embedded_task_names
from moe_evo.tracking.terminal import TerminalTracker

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CONFIGS = sorted(EXPERIMENTS.rglob("*.yaml"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / "embedded" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_experiment_parses_and_names_its_launch_line(path: Path) -> None:
    text = path.read_text("utf-8")
    config, command = (SweepConfig, "sweep") if "\nsweep:" in text else (RunConfig, "search")
    parse_config(config_parser(command, "", "", config), ["--config", str(path)], config)
    assert f"moe-evo {command} {path.relative_to(EXPERIMENTS.parent)}" in text


def test_the_experiments_on_embedded_tasks_find_their_data() -> None:
    for path in CONFIGS:
        if path.parent.name == "embedded":
            check_tasks(read_config(path).tasks)


def test_at_least_eight_embedded_tasks_with_enough_examples_in_each_split() -> None:
    names = embedded_task_names()
    assert len(names) >= 8
    for name in names:
        folder = EXPERIMENTS.parent / "moe_evo" / "data" / "tasks" / name
        sizes = [len((folder / f"{split}.jsonl").read_text("utf-8").splitlines()) for split in SPLITS]
        assert min(sizes) >= 200


def test_the_embedded_data_are_small_and_name_their_sources() -> None:
    data = EXPERIMENTS.parent / "moe_evo" / "data"
    sizes = {path: path.stat().st_size for path in data.rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if "fine" not in path.parts) < 15e6
    assert sum(sizes.values()) < 30e6
    notice = (data / "NOTICE").read_text("utf-8")
    assert all(name in notice for name in embedded_task_names())


@pytest.mark.parametrize(("folder", "experiment"), [("model", "embedded"), ("fine", "fine")])
def test_the_recorded_hash_is_that_of_the_shipped_weights(folder: str, experiment: str) -> None:
    weights = EXPERIMENTS.parent / "moe_evo" / "data" / folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert digest in (EXPERIMENTS / experiment / "README.md").read_text("utf-8")


def test_the_fine_model_is_a_qwen3_moe_in_float32_that_answers_as_its_readme_says() -> None:
    source = ModelSource(ModelConfig(path="embedded-fine"))
    assert (source.shape.family, source.shape.num_experts, source.shape.top_k) == ("qwen3_moe", (32,) * 6, (4,) * 6)
    data = check_tasks([TaskConfig(data="syll", num_search=0)])
    with TerminalTracker() as tracker:
        evaluator = load_evaluator(source, data, EvaluationConfig(threads=1), tracker)
    assert evaluator.model.dtype == torch.float32
    (outcome,) = evaluator.evaluate([None], "test")
    assert isinstance(outcome, Evaluation)
    assert base_model_name("embedded-fine", source.hash) == "moe_evo embedded Qwen3-MoE"
    table = (EXPERIMENTS / "fine" / "README.md").read_text("utf-8")
    assert f"| syll | {outcome.fitness:.3f} |" in table


def test_repairs_scale_kept_experts_and_take_in_the_dropped_ones_most_like_them() -> None:
    repairs = script("repairs")
    likeness = np.zeros((4, 4))
    likeness[0, 3], likeness[1, 2] = 0.9, 0.5
    pruning = Genome.from_kept([[0, 1], [1, 2]], 4, 1)
    made = repairs.Repairs(pruning, [likeness, likeness])
    assert made.size == 8 and made.genome(np.zeros(8)) == pruning
    layer = made.genome(np.array([1.0, 0, 0, 0, 0, 2.0, 0, 0])).layers[0]
    scale, share = np.exp(repairs.SCALE_STEP), 2 * repairs.SHARE_STEP
    np.testing.assert_allclose(layer.expert_merging, [[scale, 0, 0, 0], [0, 1, share, 0]], rtol=1e-6)
    assert np.array_equal(layer.router_mapping, pruning.layers[0].router_mapping)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_for_repairs_climbs_further_than_random_ones(seed: int) -> None:
    repairs, rng = script("repairs"), np.random.default_rng(seed)
    hidden = rng.standard_normal(16)
    asked: list[np.ndarray] = []

    def score(numbers: np.ndarray) -> np.ndarray:
        asked.append(numbers)
        return -((numbers - hidden) ** 2).mean(axis=1)

    start = float(score(np.zeros((1, 16)))[0])
    numbers, scores = repairs.searched(score, 16, start, 45, rng)
    assert numbers.shape == (46, 16) and [len(one) for one in asked[1:]] == [20, 10, 10, 5]
    assert scores.max() > score(rng.standard_normal((45, 16))).max() + 0.2
    assert score(numbers[:10].mean(axis=0, keepdims=True))[0] > start + 0.2, "the mean of the best is good, too"


def test_a_row_tells_what_each_way_adds_and_how_sure_that_is() -> None:
    script("repairs")
    repair = script("repair")
    added = {name: np.array([0.0, 0.5, 1.0, 0.5]) for name in (*repair.ARMS, *repair.CHOSEN)}
    cell = {"pruning": np.array([1.0, 0, 1, 0]), **added}
    assert repair.row("one", [cell]) == "| one | 0.500 |" + 6 * " +0.500 ± 0.204 |"
    assert repair.row("two", [cell, cell]).endswith(" +0.500 ± 0.000 |")
    better = cell | {"best repair": np.array([1.0, 1.0, 1.0, 1.0])}
    told = repair.difference("best repair", "free noise", [cell, better])
    assert told == "best repair less free noise: +0.250 ± 0.250 (standard error over 2 cells)"
