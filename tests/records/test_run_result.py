"""What result.json tells where a run does not end as it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_evo.cli.main import main
from moe_evo.commands.search import search
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import EvaluationFailure, Outcome
from moe_evo.records.folder import RunFolder
from moe_evo.report.terminal import print_run
from moe_evo.runs import open_pool
from moe_evo.tracking.terminal import TerminalTracker


class FailingOnTest:
    """An evaluator for which every smaller model has logits that are NaN on the test split."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def __getattr__(self, name: str) -> object:
        return getattr(self._evaluator, name)

    def evaluate(self, genomes: list[Genome], split: str, **more: Any) -> list[Outcome]:
        outcomes = self._evaluator.evaluate(genomes, split, **more)
        failure = EvaluationFailure("non_finite", "logits are NaN")
        return [
            failure if split == "test" and not genome.layers[0].is_identity else outcome
            for genome, outcome in zip(genomes, outcomes, strict=True)
        ]


@pytest.mark.parametrize("option", [{"experts": "meo"}, {"dynamic_skipping": 0.5}, {"top_p": 0.5}])
def test_a_run_that_no_checkpoint_can_hold_is_not_told_to_export(
    option: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(
        model=ModelConfig(self_check=False, **option),
        tasks=[TaskConfig(data="syll", num_search=8, num_validation=8, num_test=8)],
        search=SearchConfig(num_kept=4, evaluations=3),
        selection=SelectionConfig(finalists=1, baselines=[]),
        folder=str(tmp_path / "run"),
    )
    with TerminalTracker() as tracker:
        folder = search(config, tracker)
    result = folder.read_result()
    assert {name: getattr(result, name) for name in option} == option
    print_run(folder, result)
    told = capsys.readouterr().out
    assert "moe-evo export" not in told
    assert main(["export", str(folder.path), "--to", str(tmp_path / "small")]) != 0
    assert f"model.{next(iter(option))}" in capsys.readouterr().err and not (tmp_path / "small").exists()
    assert main(["report", str(folder.path)]) == 0
    page = (folder.path / "report.html").read_text()
    assert "moe-evo export" not in page
    assert result.best.test is not None
    active = result.best.test.active_experts
    if "experts" in option:
        assert active is None and "active" not in told and "active experts a token" not in page
    else:
        assert active is not None and 1 < active < 2 and f"  4    {active:.2f} " in told
        assert "active experts a token, mean over layers" in page


def test_a_winner_without_a_test_score_still_ends_with_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = open_pool.load_evaluator
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *parts: FailingOnTest(load(*parts)))
    config = RunConfig(
        model=ModelConfig(self_check=False),
        tasks=[TaskConfig(data="syll", num_search=8, num_validation=8, num_test=8)],
        search=SearchConfig(num_kept=4, evaluations=3),
        selection=SelectionConfig(finalists=1, baselines=[]),
        folder=str(tmp_path / "run"),
    )
    with TerminalTracker() as tracker:
        folder = search(config, tracker)
    result = folder.read_result()
    assert result.winners_curse is None and result.best.test is None
    print_run(RunFolder(tmp_path / "run"), result)
    assert not any(line.startswith("luck") for line in capsys.readouterr().out.splitlines())
