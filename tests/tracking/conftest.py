"""One model, and one finished offline run, for all tests of W&B."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tracked_runs import CONFIG, Record, SomeFail, search
from wandb_stand_in import KEY

from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.runs import open_pool
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.terminal import TerminalTracker


@pytest.fixture(scope="session")
def evaluator() -> SomeFail:
    data = check_tasks(CONFIG.tasks)
    quiet = TerminalTracker(Console(file=io.StringIO()))
    return SomeFail(open_pool.load_evaluator(ModelSource(CONFIG.model), data, CONFIG.evaluation, quiet))


@pytest.fixture
def resident(evaluator: SomeFail, monkeypatch: pytest.MonkeyPatch) -> SomeFail:
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
    return evaluator


@pytest.fixture(scope="session")
def finished(evaluator: SomeFail, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted offline run, with a key in the environment."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
        patch.setenv("WANDB_API_KEY", KEY)
        search(folder)
    return RunFolder(folder)


@pytest.fixture(scope="session")
def record(finished: RunFolder) -> Record:
    return Record(finished.path)
