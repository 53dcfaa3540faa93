"""What is told of a run before it starts, against brute force and against runs that really start."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import moe_evo
from moe_evo.commands.plan import plan, require_no_problems
from moe_evo.commands.search import search as search_command
from moe_evo.config.cluster import ClusterConfig, PlacementStrategy
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ClusterError, ConfigError, ModelError, Problem
from moe_evo.gangs.capacity import ClusterCapacity, NodeCapacity, gangs_that_fit
from moe_evo.plain import plain
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, RANDOM, REFERENCE
from moe_evo.report.plan import print_plan
from moe_evo.report.planned import CheckpointPlan
from moe_evo.runs.workload import estimate
from moe_evo.tracking.base import Trackers
from moe_evo.tracking.terminal import TerminalTracker

GPU = {"GPU": 1.0}


def small(folder: Path, **search: Any) -> RunConfig:
    """A run of seconds."""
    task = TaskConfig(data="syll", num_search=4, num_validation=4, num_test=4)
    return RunConfig(
        tasks=[task],
        search=SearchConfig(**{"evaluations": 6, **search}),
        model=ModelConfig(device="cpu"),
        evaluation=EvaluationConfig(threads=1),
        folder=str(folder / "run"),
    )


def node(gpus: float, *, free: float | None = None, **labels: str) -> NodeCapacity:
    available = gpus if free is None else free
    return NodeCapacity("n", {"GPU": gpus}, {"GPU": available}, labels)


def most_gangs(slots: Sequence[int], size: int, strategy: PlacementStrategy) -> int:
    """Brute force: try every way to place one gang, then the rest."""
    best = 0
    for places in itertools.combinations_with_replacement(range(len(slots)), size):
        counts = [places.count(number) for number in range(len(slots))]
        on_one, apart = max(counts) == size, max(counts) == 1
        allowed = {"STRICT_PACK": on_one, "STRICT_SPREAD": apart}.get(strategy, True)
        left = [have - used for have, used in zip(slots, counts, strict=True)]
        if allowed and min(left) >= 0:
            best = max(best, 1 + most_gangs(left, size, strategy))
    return best


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    size=st.integers(1, 3),
    strategy=st.sampled_from(["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]),
)
def test_as_many_gangs_fit_as_brute_force_places(slots: list[int], size: int, strategy: PlacementStrategy) -> None:
    nodes = [node(number) for number in slots]
    assert gangs_that_fit(nodes, GPU, size, strategy, {}) == most_gangs(slots, size, strategy)


def test_a_rank_needs_all_of_its_resources_on_one_node() -> None:
    both = NodeCapacity("a", {}, {"GPU": 4, "CPU": 3}, {})
    assert gangs_that_fit([both], {"GPU": 1, "CPU": 1}, 1, "PACK", {}) == 3
    assert gangs_that_fit([both], {"GPU": 0.5}, 1, "PACK", {}) == 8
    assert gangs_that_fit([both], {"GPU": 1, "TPU": 1}, 1, "PACK", {}) == 0
    assert gangs_that_fit([NodeCapacity("b", {}, {"GPU": 0.3}, {})], {"GPU": 0.1}, 1, "PACK", {}) == 3


@pytest.mark.parametrize(
    ("want", "gangs"), [("h100", 2), ("!h100", 5), ("in(a100, h100)", 3), ("!in(a100,h100)", 4), ("l4", 0)]
)
def test_labels_choose_nodes_as_ray_does(want: str, gangs: int) -> None:
    nodes = [node(2, kind="h100"), node(1, kind="a100"), node(4)]
    assert gangs_that_fit(nodes, GPU, 1, "PACK", {"kind": want}) == gangs


def test_what_is_busy_counts_in_the_whole_cluster_only() -> None:
    nodes = [node(8, free=3)]
    assert gangs_that_fit(nodes, GPU, 2, "STRICT_PACK", {}) == 1
    assert gangs_that_fit(nodes, GPU, 2, "STRICT_PACK", {}, of="total") == 4


def test_time_follows_evaluations_examples_and_gangs() -> None:
    counts, examples = {"search": 90, "validation": 10, "test": 4}, {"search": 100, "validation": 200, "test": 500}
    told = estimate(counts, examples, 10.0, 2)
    assert told.evaluations_per_h == 720
    assert told.hours["search"] == pytest.approx(90 * 10 / 2 / 3600)
    assert told.hours["test"] == pytest.approx(4 * 50 / 2 / 3600)
    assert told.total_h == pytest.approx((900 + 200 + 200) / 2 / 3600)


@pytest.mark.parametrize(
    "config",
    [
        {"evaluations": 6},
        {"evaluations": 6, "algorithm": "random"},
        {"evaluations": 6, "algorithm": "eep"},
        {"evaluations": 6, "algorithm": "eep", "eep": EEPConfig(num_initial=3, num_pruning=6)},
        {"evaluations": 4, "algorithm": "eep", "num_kept": 8},
        {"evaluations": 6, "init": ["reap"]},
        {"evaluations": 6, "algorithm": "surrogate", "num_kept": {"mean": 4, "min": 2, "max": 8}},
        {"evaluations": 6, "algorithm": "random", "objectives": ["quality", "active"]},
    ],
)
def test_a_run_makes_no_more_evaluations_than_told(config: dict[str, Any], tmp_path: Path) -> None:
    run = replace(small(tmp_path, **config), selection=SelectionConfig(random_search=True, finalists=3, soup=True))
    told = plan(run)
    assert told.problems == ()
    with TerminalTracker(Console(file=io.StringIO())) as tracker:
        search_command(run, tracker)
    with RunFolder(tmp_path / "run").open_journal() as journal:
        made = {
            split: sum(len(journal.outcomes(name, split)) for name in (MAIN, RANDOM, REFERENCE))
            for split in told.search.evaluations
        }
    for split, number in made.items():
        assert number <= told.search.evaluations[split] <= number + 10


def test_the_embedded_model_is_told_and_the_plan_is_json(tmp_path: Path) -> None:
    told = plan(small(tmp_path))
    assert told.model.parameters == 3_019_904
    assert told.checkpoint == CheckpointPlan(1_739_904, 4 * 1_739_904, "transformers")
    chosen = [mode for mode in told.memory.modes if mode.chosen]
    assert [mode.sharding for mode in chosen] == ["single"]
    assert chosen[0].device_bytes == 4 * 3_019_904
    assert told.tasks[0].examples == {"search": 4, "validation": 4, "test": 4}
    assert json.loads(json.dumps(plain(told))) == plain(told)


def test_a_budget_that_layers_share_is_told_as_a_range_with_its_loader(tmp_path: Path) -> None:
    told = plan(small(tmp_path, algorithm="surrogate", num_kept={"mean": 4, "min": 2, "max": 8}))
    assert (told.search.num_kept, told.search.num_kept_range) == ((4, 4, 4, 4), (2, 8))
    assert told.search.log10_prunings > plan(small(tmp_path)).search.log10_prunings
    assert told.checkpoint == CheckpointPlan(1_739_904, 4 * 1_739_904, "moe_evo")
    console = Console(file=io.StringIO(), width=200)
    print_plan(told, "next", console)
    text = console.file.getvalue()
    assert "search      surrogate, keeps 2 to 8 a layer, 4 on average, prunings only; " in text
    assert "(loads with moe_evo.load_pruned; transformers and vLLM hold one number of experts and one top_k" in text


def test_several_objectives_are_told_with_the_sizes_of_the_front(tmp_path: Path) -> None:
    objectives = ["quality", "parameters", "active"]
    told = plan(small(tmp_path, algorithm="surrogate", objectives=objectives, num_kept={"min": 2, "max": 8}))
    assert (told.search.num_kept_range, told.search.top_k_range) == ((2, 8), (1, 2))
    assert told.checkpoint == CheckpointPlan(1_099_904, 4 * 1_099_904, "moe_evo", 3_019_904)
    one = plan(small(tmp_path, algorithm="surrogate", num_kept={"mean": 5, "min": 2, "max": 8}))
    assert told.search.evaluations["test"] == one.search.evaluations["test"] + 6
    console = Console(file=io.StringIO(), width=200)
    print_plan(told, "next", console)
    text = console.file.getvalue()
    assert "surrogate, keeps 2 to 8 a layer, prunings only" in text
    assert "objectives  quality, parameters, active; top_k 1 to 2 a layer; the result is a front" in text
    assert "export      1.10 M parameters, 4.2 MiB at the least and 3.02 M parameters at the most (loads with" in text


def test_nothing_is_written(tmp_path: Path) -> None:
    plan(small(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_methods_that_cannot_be_asked_are_problems(tmp_path: Path) -> None:
    config = replace(small(tmp_path), selection=SelectionConfig(baselines=["reap", "router_norm"]))
    config = replace(
        config,
        search=replace(config.search, init=["luck"]),
        model=replace(config.model, dynamic_skipping=[0.5], alignment="nowhere"),
    )
    skipping, alignment, baseline, seed = map(str, plan(config).problems)
    assert alignment.startswith("nowhere: cannot be read (No such file or directory)")
    assert skipping == "model.dynamic_skipping: got 1 thresholds, the model has 4 MoE layers"
    assert baseline.startswith("selection.baselines: router_norm compares with the checkpoint before fine-tuning")
    assert seed.startswith("search.init: got 'luck', expected one of ")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    config = RunConfig(
        model=ModelConfig(device="cuda:99", router="eep"),
        tasks=[
            TaskConfig(data="nowhere"),
            TaskConfig(data="syll", metric="exact_match"),
            TaskConfig(data="nli"),
            TaskConfig(data="nli"),
        ],
        search=SearchConfig(num_kept=9, num_layer_groups=7),
        folder=str(tmp_path),
    )
    told = plan(config)
    problems = told.problems
    expected = [
        "task nowhere", "tasks (syll).metric", "'nli' twice", "search.num_kept", "search.num_layer_groups",
        "model.device", "holds other files",
    ]  # fmt: skip
    assert [part in str(line) for part, line in zip(expected, problems, strict=True)] == [True] * len(expected)
    with pytest.raises(ConfigError, match=r"cannot start: task nowhere.* \(and 6 more\)"):
        require_no_problems(told)


def test_an_unknown_model_leaves_tasks_and_folder_checked(tmp_path: Path) -> None:
    told = plan(replace(small(tmp_path), model=ModelConfig(path=str(tmp_path / "none"))))
    assert (told.model, told.search, told.memory, told.checkpoint) == (None, None, None, None)
    assert len(told.problems) == 1 and "no such folder" in str(told.problems[0])
    assert len(told.tasks) == 1


def test_config_json_is_all_that_a_plan_reads_of_a_model(tmp_path: Path) -> None:
    embedded = Path(moe_evo.__file__).parent / "data" / "model"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(embedded / "config.json", bare)
    config = small(tmp_path)
    whole = plan(config)
    told = plan(replace(config, model=replace(config.model, path=str(bare))))
    assert told.problems == ()
    assert replace(told.model, path="") == replace(whole.model, path="") and told.memory is not None
    assert (told.search, told.checkpoint) == (whole.search, whole.checkpoint)
    lacking = [note for note in told.notes if "this plan does without, a search does not" in note]
    assert len(lacking) == 2 and "has no weights" in lacking[0] and "tokenizer" in lacking[1]
    with pytest.raises(ModelError, match=r"has no weights; moe_evo reads \*\.safetensors \(and 1 more"):
        search_command(replace(config, model=replace(config.model, path=str(bare))), Trackers())
    shutil.copy(embedded / "tokenizer.json", bare)
    told = plan(replace(config, model=replace(config.model, path=str(bare))))
    assert len([note for note in told.notes if "this plan does without" in note]) == 1


def test_a_folder_is_told_as_free_held_by_another_run_or_resumed(tmp_path: Path) -> None:
    config = small(tmp_path)
    with TerminalTracker(Console(file=io.StringIO())) as tracker:
        search_command(config, tracker)
    assert "finished" in plan(config).notes[0]
    other = replace(config, search=SearchConfig(evaluations=6, seed=7))
    assert "another config (search.seed: 0 -> 7)" in str(plan(other).problems[0])
    more, fewer = (replace(config, search=SearchConfig(evaluations=number)) for number in (7, 5))
    assert "goes on where it stands" in plan(more).notes[0]
    assert "search.evaluations: got 5, expected 6 or more" in str(plan(fewer).problems[0])
    (tmp_path / "run" / "result.json").unlink()
    assert "goes on where it stands" in plan(config).notes[0]
    shutil.rmtree(tmp_path / "run")
    assert plan(config).notes == ()


def test_weights_that_do_not_fit_are_a_problem_with_what_would_fit(tmp_path: Path) -> None:
    config = small(tmp_path)
    sharded = replace(
        config,
        model=ModelConfig(sharding="tensor_parallel", offload="none"),
        cluster=ClusterConfig(address="auto", gang_size=2),
    )
    by_mode = {(mode.sharding, mode.offload): mode for mode in plan(sharded, memory_gib=1.0).memory.modes}
    chosen = by_mode["tensor_parallel", "none"]
    assert chosen.chosen and chosen.fits
    assert chosen.device_bytes < 0.6 * by_mode["single", "none"].device_bytes
    assert chosen.merged_bytes * 2 == by_mode["single", "none"].merged_bytes
    too_small = plan(sharded, memory_gib=0.004).problems
    assert len(too_small) == 1 and "tensor_parallel needs" in str(too_small[0])
    tight = plan(sharded, memory_gib=0.02)
    assert tight.problems == () and "evaluation.batch_tokens" in tight.notes[0]
    assert plan(sharded).memory.device_bytes is None


def test_experts_that_a_gang_cannot_share_are_a_problem(tmp_path: Path) -> None:
    config = replace(
        small(tmp_path),
        model=ModelConfig(sharding="tensor_parallel"),
        cluster=ClusterConfig(address="auto", gang_size=7),
    )
    told = plan(config)
    assert any("7 ranks" in str(line) for line in told.problems)
    assert next(mode for mode in told.memory.modes if mode.chosen).refusal


@pytest.mark.parametrize(
    ("nodes", "grows", "problem", "note"),
    [
        ((node(8),), False, None, None),
        ((node(1), node(1)), False, "no gang of 2 x (GPU 1), STRICT_PACK", None),
        ((node(1), node(1)), True, None, "waits for larger ones"),
        ((node(8, free=1),), False, None, "all of it is busy; 4 gangs"),
    ],
)
def test_a_cluster_without_room_is_told(
    nodes: tuple[NodeCapacity, ...], grows: bool, problem: str | None, note: str | None, tmp_path: Path
) -> None:
    config = replace(
        small(tmp_path),
        model=ModelConfig(sharding="tensor_parallel"),
        cluster=ClusterConfig(address="auto", gang_size=2, strategy="STRICT_PACK"),
    )
    told = plan(config, capacity=ClusterCapacity(nodes, GPU, can_grow=grows))
    for lines, part in ((told.problems, problem), (told.notes, note)):
        assert len(lines) == (part is not None)
        assert part is None or part in str(lines[0])


def test_a_device_map_is_one_process_on_a_cluster(tmp_path: Path) -> None:
    config = replace(
        small(tmp_path),
        model=ModelConfig(sharding="device_map"),
        cluster=ClusterConfig(address="auto", gang_size=4, num_gangs=3),
    )
    told = plan(config, capacity=ClusterCapacity((node(8),), {"GPU": 4.0}))
    assert told.cluster.gangs == told.cluster.gangs_whole == 2
    assert "asks for 3, 2 fit now" in told.notes[0]


def test_speed_is_measured_only_where_nothing_is_wrong(tmp_path: Path) -> None:
    config = replace(
        small(tmp_path),
        model=ModelConfig(sharding="tensor_parallel"),
        cluster=ClusterConfig(address="auto", gang_size=2),
    )
    capacity = ClusterCapacity((node(8),), GPU)
    told = plan(config, capacity=capacity, calibrate=lambda: 2.0)
    assert told.estimate.gangs == 4
    assert told.estimate.evaluations_per_h == 7200

    def fails() -> float:
        raise ClusterError("gang 0: lost")

    assert plan(config, capacity=capacity, calibrate=fails).problems == (Problem.of(ClusterError("gang 0: lost")),)
    wrong = replace(config, tasks=[TaskConfig(data="nowhere")])
    assert plan(wrong, capacity=capacity, calibrate=pytest.fail).estimate is None


def test_torch_and_ray_are_not_imported_before_a_model_is_looked_at() -> None:
    code = (
        "import sys, moe_evo.commands.plan, moe_evo.report.plan; sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
