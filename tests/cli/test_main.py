"""The command line as a user meets it: help, results, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import moe_evo as package
from moe_evo.cli.main import main
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.file import save_individual
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, Individual
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.tasks.sources import embedded_task_names

FAST = [
    "--tasks", '[{"data": "syll", "num_search": 12, "num_validation": 8, "num_test": 8}]',
    "--search.algorithm", "eep", "--search.evaluations", "6", "--selection.finalists", "2", "--evaluation.threads", "1",
]  # fmt: skip


def moe_evo(*argv: str) -> int:
    return main(argv)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert moe_evo("search", *FAST, "--folder", str(folder), "--json") == 0
    return folder


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from moe_evo.cli.main import main as m; "
        "m(['--help']); m(['search', '--help']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]
    assert not {"torch", "ray", "wandb", "transformers", "matplotlib", "scipy"} & set(modules.split())


def test_importing_the_package_imports_neither_torch_nor_ray_nor_wandb() -> None:
    program = "import sys, moe_evo; print({'torch', 'ray', 'wandb', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("command", ["search", "evaluate", "show", "export"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_evo(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"moe-evo {command}" in text
    if command == "search":
        for line in ("--search.num_kept", "Experts kept in every MoE layer", "--search.eep.sigma", "--resume"):
            assert line in text


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_evo("--version") == 0
    assert moe_evo() == 0
    assert "moe-evo export RUN --to DIR" in capsys.readouterr().out


def test_show_prints_table_kept_experts_and_what_to_do_next(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_evo("show", str(finished)) == 0
    text = capsys.readouterr().out
    for part in ("full model", "frequency pruning", "EEP prune", "keeps 4 of 8", "search.png", "moe-evo export"):
        assert part in text
    assert "examples 12 search, 8 validation, 8 test\n" in text and "--which soup" not in text


def test_show_json_is_the_result_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_evo("show", str(finished), "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "result.json").read_text())


@pytest.mark.parametrize("genome", ["full", "[[0,1],[2,3],[4,5],[6,7]]", "RUN", "FILE"])
def test_evaluate_takes_every_kind_of_genome(genome: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"RUN": str(finished), "FILE": str(finished / "best.safetensors")}.get(genome, genome)
    assert moe_evo("evaluate", str(finished), "--genome", named, "--split", "test", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["split"] == "test"
    assert scores["num_examples"] == 8
    if genome in ("RUN", "FILE"):
        rows = json.loads((finished / "result.json").read_text())["rows"]
        assert scores["fitness"] == rows[-1]["scores"]["test"]["fitness"]
        assert scores["metrics"] == rows[-1]["scores"]["test"]["metrics"]


def test_evaluate_prints_a_line_for_people(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_evo("evaluate", str(finished), "--genome", "full") == 0
    text = capsys.readouterr().out
    assert text.startswith("full: 0.")
    assert "8 validation examples, 8 experts a layer" in text
    assert "syll/accuracy" in text


def test_export_loads_with_stock_transformers_and_generates(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    assert moe_evo("export", str(finished), "--to", str(tmp_path / "small"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes_after"] < 0.7 * report["bytes_before"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "small").iterdir()}
    assert len(set(modes.values())) == 1, modes  # weights as readable as the config
    card = (tmp_path / "small" / "README.md").read_text()
    assert "syll: choice, accuracy, 12 / 8 / 8 examples" in card
    assert str(Path(package.__file__).parent) not in card
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert model.config.num_local_experts == 4
    tokens = model.generate(**tokenizer("word: table\nsyllables:", return_tensors="pt"), max_new_tokens=3)
    assert tokens.shape[1] > 3
    assert moe_evo("export", str(finished), "--to", str(tmp_path / "small")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert moe_evo("export", str(finished), "--to", str(tmp_path / "small"), "--overwrite") == 0


def test_resume_of_a_finished_run_shows_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_evo("search", "--resume", str(finished), "--json") == 0
    assert json.loads(capsys.readouterr().out)["search"]["evaluations"] == 6


def test_resume_takes_a_folder_whose_name_holds_an_equals_sign(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "keep=4")
    assert moe_evo("search", "--resume", str(run), "--json") == 0
    assert moe_evo("search", f"--resume={run}", "--json") == 0


def test_a_search_from_a_yaml_file_with_flags_on_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump({"tasks": ["city"], "search": {"num_kept": 2, "evaluations": 50}}))
    argv = ["search", str(config), *FAST, "--search.seed", "9", "--folder", str(tmp_path / "run"), "--json"]
    assert moe_evo(*argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["search"]["seed"], result["search"]["evaluations"]) == (9, 6)
    assert result["rows"][-1]["num_kept"] == [2, 2, 2, 2]
    assert result["tasks"][0]["name"] == "syll"


@pytest.fixture
def nan_model(tmp_path: Path) -> Path:
    """The embedded model with one weight that is not a number."""
    source = Path(package.__file__).parent / "data" / "model"
    folder = tmp_path / "nan"
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("self_check", "expected"), [("true", "self-check of mixtral"), ("false", "no fitness")])
def test_a_model_that_computes_nan_is_one_line(
    self_check: str, expected: str, nan_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["search", *FAST, "--model.path", str(nan_model), "--model.self_check", self_check]
    assert moe_evo(*argv, "--folder", str(tmp_path / "run")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("moe-evo: error: ")
    assert expected in last


@pytest.mark.parametrize("router", ["exported", "eep"])
def test_evaluate_takes_eep_coefficients(router: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    matrix = torch.eye(8)[[1, 3, 4, 6]]
    content = {"layers.[0-1]": matrix, "others": matrix + 0.1, "transfer.[0-1]": matrix, "others_transfer": matrix}
    torch.save(content, tmp_path / "syll_budget_4.pth")
    argv = ["evaluate", *FAST[:2], "--genome", str(tmp_path / "syll_budget_4.pth"), "--model.router", router, "--json"]
    assert moe_evo(*argv) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["num_kept"] == [4, 4, 4, 4]
    assert 0 <= scores["fitness"] <= 1


@pytest.mark.parametrize(("gib", "warned"), [("0.000001", True), ("1", False)])
def test_a_search_says_when_merged_layers_do_not_fit_in_memory(
    gib: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moe_evo("search", *FAST, "--model.merged_cache_gib", gib, "--folder", str(tmp_path / "run")) == 0
    assert ("do not fit in memory" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("argv", [["RUN"], ["--config", "RUN"], ["--genome", "RUN"], ["--genome=RUN"]])
def test_evaluate_of_a_run_scores_its_winner_with_its_own_model_and_tasks(
    argv: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moe_evo("evaluate", *(word.replace("RUN", str(finished)) for word in argv), "--split", "test", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["digest"] == json.loads((finished / "result.json").read_text())["rows"][-1]["digest"]
    assert scores["num_examples"] == 8


@pytest.mark.parametrize("genome", ["full", "[[0],[1],[2],[3]]", "RUN"])
def test_evaluate_takes_another_number_of_active_experts(
    genome: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", str(finished), "--genome", genome.replace("RUN", str(finished)), "--top_k", "1", "--json"]
    assert moe_evo(*argv) == 0
    assert json.loads(capsys.readouterr().out)["top_k"] == [1, 1, 1, 1]


def test_evaluate_tells_when_a_runs_data_have_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "task.jsonl"
    rows = [{"prompt": f"word: {n}\nsyllables:", "choices": [" one", " two"], "label": n % 2} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = str(tmp_path / "run")
    assert moe_evo("search", "--tasks", str(data), *FAST[2:], "--folder", run) == 0
    capsys.readouterr()
    assert moe_evo("evaluate", run) == 0
    assert "have changed" not in capsys.readouterr().err
    data.write_text(data.read_text().replace('" two"', '" three"'))
    assert moe_evo("evaluate", run) == 0
    assert "task task: the data have changed since" in capsys.readouterr().err


def test_options_of_the_last_task_may_be_given_as_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["search", "--tasks", "[city, syll]", "--tasks.num_search", "7", "--tasks.metric", "accuracy_norm"]
    with pytest.raises(SystemExit):
        moe_evo(*argv, "--print_config")
    tasks = yaml.safe_load(capsys.readouterr().out)["tasks"]
    assert [(task["data"], task["num_search"], task["metric"]) for task in tasks] == [
        ("city", 0, "default"),
        ("syll", 7, "accuracy_norm"),
    ]


def test_a_start_that_failed_does_not_bind_the_next_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    task = '[{"data": "syll", "num_search": 12, "num_validation": 8, "num_test": 8, "chat_template": CHAT}]'
    argv = ["search", *FAST[2:], "--folder", run, "--tasks"]
    assert moe_evo(*argv, task.replace("CHAT", "true")) == 2
    assert "chat template" in capsys.readouterr().err
    assert moe_evo(*argv, task.replace("CHAT", "false")) == 0


def test_what_router_mode_eep_merged_is_not_exported_and_not_recommended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert moe_evo("search", *FAST, "--model.router", "eep", "--folder", str(run)) == 0
    merged = LayerGenome(np.eye(4, 8) + 0.01, np.eye(4, 8) + 0.01, 2)
    exportable = replace(merged, router_mapping=np.eye(4, 8))  # what only merges has a stock router
    individual = Individual(Candidate(5, Genome((exportable,) * 4), "gaussian_mutation"), Evaluation(0.5))
    shape = ModelShape("mixtral", (8,) * 4, (2,) * 4, (0, 1, 2, 3))
    space = SearchSpace.build(shape, num_kept=4)
    save_individual(run / "best.safetensors", individual, space, {"router": "eep"})
    assert moe_evo("export", str(run), "--to", str(tmp_path / "merged")) == 0
    individual = replace(individual, candidate=replace(individual.candidate, genome=Genome((merged,) * 4)))
    save_individual(run / "best.safetensors", individual, space, {"router": "eep"})
    capsys.readouterr()
    assert moe_evo("show", str(run)) == 0
    assert "--which best_pruning" in capsys.readouterr().out
    monkeypatch.setattr("moe_evo.models.load.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert moe_evo("export", str(run), "--to", str(tmp_path / "x")) == 2
    assert "no stock architecture can hold" in capsys.readouterr().err


def test_export_below_a_file_is_refused_before_the_model_is_loaded(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("moe_evo.models.load.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert moe_evo("export", str(finished), "--to", str(tmp_path / "file" / "x")) == 2
    assert "file is not a folder" in capsys.readouterr().err


def test_numbers_are_never_cut_where_output_is_narrow(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert moe_evo("show", str(finished)) == 0
    assert "…" not in capsys.readouterr().out


def test_a_budget_that_only_prunes_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["search", *FAST, "--search.algorithm", "eep_release", "--folder", str(tmp_path / "run")]
    assert moe_evo(*argv) == 0
    assert "this budget only prunes" in capsys.readouterr().err


def test_the_help_names_the_embedded_tasks() -> None:
    text = " ".join((TaskConfig.__doc__ or "").split())
    assert f"({', '.join(embedded_task_names())})" in text


def test_a_genome_is_not_scored_under_the_other_router_mode(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", *FAST[:2], "--model.router", "eep", "--genome", str(finished)]
    assert moe_evo(*argv) == 2
    assert "was searched with model.router exported, got eep" in capsys.readouterr().err


def test_a_long_kept_list_may_stand_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    kept = json.dumps([[0, 1]] * 4, indent=60)
    assert len(kept) > 255
    assert moe_evo("evaluate", *FAST[:2], "--genome", kept, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_kept"] == [2, 2, 2, 2]


def test_export_refuses_a_base_model_that_changed_since_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(Path(package.__file__).parent / "data" / "model", tmp_path / "model")
    run = tmp_path / "run"
    assert moe_evo("search", *FAST, "--model.path", str(model), "--folder", str(run), "--json") == 0
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert moe_evo("export", str(run), "--to", str(tmp_path / "small")) == 2
    assert "is not the model that" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "small").exists()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_evo("search", "--search.num_kept", "9", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("moe-evo: error: search.num_kept")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert moe_evo("search", *FAST, "--folder", str(tmp_path / "locked" / "run")) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_output_to_a_closed_pipe_is_not_an_error(finished: Path) -> None:
    command = f"{sys.executable} -m moe_evo show {finished} --json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == '{"version"'
    assert done.stderr == ""
