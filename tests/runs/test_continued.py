"""What may change when a run goes on: a larger budget, and where its model lies; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from child_runs import content
from huggingface_hub import constants

import moe_evo
from moe_evo.cli.main import main
from moe_evo.commands.search import search
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig, SurrogateConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import RunError
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder, pinned, resumed_config
from moe_evo.records.journal import MAIN
from moe_evo.tracking.base import Trackers

EMBEDDED = Path(moe_evo.__file__).parent / "data" / "model"
COMMITS = ("0123456789" * 4, "fedcba9876" * 4)


def config(folder: Path, **changes: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(device="cpu", self_check=False),
        tasks=[TaskConfig(data="syll", num_search=8, num_validation=4, num_test=8)],
        search=SearchConfig(**{"algorithm": "random", "num_kept": 4, "evaluations": 6, **changes}),  # type: ignore[arg-type]
        evaluation=EvaluationConfig(threads=1),
        selection=SelectionConfig(finalists=2, baselines=[]),
        folder=str(folder),
    )


def at(one: RunConfig, **model: object) -> RunConfig:
    return replace(one, model=replace(one.model, **model))  # type: ignore[arg-type]


SEARCHES: dict[str, dict[str, object]] = {
    "random": {"algorithm": "random"},
    "eep": {"algorithm": "eep"},
    "surrogate": {"algorithm": "surrogate", "surrogate": SurrogateConfig(num_warmup=4, batch=2)},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_finished_run_goes_on_with_a_larger_budget(name: str, tmp_path: Path) -> None:
    small = config(tmp_path / "run", **SEARCHES[name])
    folder = search(small, Trackers())
    before, result = content(folder.path), folder.result.read_text()
    larger = replace(small, search=replace(small.search, evaluations=10))
    search(larger, Trackers())
    after = content(folder.path)
    assert set(before["candidates"]) < set(after["candidates"])
    assert after["outcomes"][: len(before["outcomes"])] == before["outcomes"], "nothing is done twice"
    with folder.open_journal() as journal:
        assert len(journal.told(MAIN)) == 10
    assert folder.read_result().search.evaluations == 10
    (kept,) = folder.path.glob("result-*.json")
    assert kept.read_text() == result, "the result of the smaller budget is kept"
    assert resumed_config(str(folder.path)).search.evaluations == 10


def test_a_random_search_with_a_raised_budget_is_the_one_that_began_with_it(tmp_path: Path) -> None:
    raised = search(config(tmp_path / "raised"), Trackers())
    search(config(tmp_path / "raised", evaluations=10), Trackers())
    whole = search(config(tmp_path / "whole", evaluations=10), Trackers())

    def found(folder: RunFolder) -> list[tuple[int, str, float]]:
        with folder.open_journal() as journal:
            individuals = journal.individuals(MAIN)
        return [(one.number, one.genome.digest, one.evaluation.fitness) for one in individuals]

    assert found(raised) == found(whole)


def test_a_smaller_budget_is_refused_in_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = search(config(tmp_path / "run"), Trackers())
    before = {file: file.read_bytes() for file in folder.path.iterdir()}
    assert main(["search", str(folder.config), "--folder", str(folder.path), "--search.evaluations", "5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "search.evaluations: got 5, expected 6 or more" in error
    assert {file: file.read_bytes() for file in folder.path.iterdir()} == before


def test_a_run_whose_larger_budget_was_interrupted_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = search(config(tmp_path / "run"), Trackers())
    larger = config(tmp_path / "run", evaluations=9)
    with monkeypatch.context() as patch:
        patch.setattr("moe_evo.commands.search.open_pool", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(larger, Trackers())
    with pytest.raises(RunError, match="not finished"):
        folder.read_result()
    search(larger, Trackers())
    assert folder.read_result().search.evaluations == 9


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_goes_on_where_its_model_was_moved_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(EMBEDDED, old)
    folder = search(at(config(tmp_path / "run"), path=str(old)), Trackers())
    old.rename(new)
    search(at(config(tmp_path / "run", evaluations=8), path=str(new)), Trackers())
    assert folder.read_result().search.evaluations == 8
    new.rename(old)  # and the commands of a finished run are told where it lies now
    where = ["--model.path", str(old)]
    assert main(["evaluate", str(folder.path), "--split", "test", *where]) == 0
    assert "is not the model" not in capsys.readouterr().err
    assert main(["export", str(folder.path), "--to", str(tmp_path / "a")]) == 2
    assert f"{new}: no such folder" in capsys.readouterr().err
    assert main(["export", str(folder.path), "--to", str(tmp_path / "a"), *where]) == 0
    assert (tmp_path / "a" / "config.json").is_file()


def test_another_model_at_the_new_path_is_refused(tmp_path: Path) -> None:
    search(config(tmp_path / "run"), Trackers())
    other = tmp_path / "other"
    shutil.copytree(EMBEDDED, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    with pytest.raises(RunError, match="model has changed since this run began"):
        search(at(config(tmp_path / "run"), path=str(other)), Trackers())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A cache of Hugging Face with two commits of owner/tiny; the function moves a branch to one of them."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    for number, commit in enumerate(COMMITS):
        shutil.copytree(EMBEDDED, repository / "snapshots" / commit)
        settings = json.loads((EMBEDDED / "config.json").read_text()) | {"rms_norm_eps": 1e-5 * (1 + number)}
        (repository / "snapshots" / commit / "config.json").write_text(json.dumps(settings))
    (repository / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def move(branch: str, commit: str) -> None:
        (repository / "refs" / branch).write_text(commit)

    return move


def test_a_run_stays_with_the_commit_that_its_branch_was_at(tmp_path: Path, hub: Callable[[str, str], None]) -> None:
    hub("main", COMMITS[0])
    one = at(config(tmp_path / "run"), path="owner/tiny")
    folder = search(one, Trackers())
    assert yaml.safe_load(folder.config.read_text())["model"]["revision"] == COMMITS[0]
    hub("main", COMMITS[1])
    assert ModelSource(one.model).hash == f"owner/tiny@{COMMITS[1]}", "the branch has moved"
    assert pinned(one).model.revision == COMMITS[0]
    search(replace(one, search=replace(one.search, evaluations=8)), Trackers())
    assert folder.read_result().model.hash == f"owner/tiny@{COMMITS[0]}"
    assert main(["evaluate", str(folder.path), "--split", "test"]) == 0
    hub("other", COMMITS[1])
    with pytest.raises(RunError, match="model has changed"):
        search(replace(at(one, revision="other"), search=replace(one.search, evaluations=8)), Trackers())


def test_a_source_stays_with_one_commit_while_its_branch_moves(hub: Callable[[str, str], None]) -> None:
    hub("main", COMMITS[0])
    source = ModelSource(ModelConfig(path="owner/tiny"))
    hub("main", COMMITS[1])
    assert source.config.revision == COMMITS[0]
    assert source.transformers_config.rms_norm_eps == 1e-5
