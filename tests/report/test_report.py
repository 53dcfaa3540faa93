"""Tables and pictures of a run."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.records.result import ModelFacts, Row, RunResult, Score, SearchFacts, TaskFacts
from moe_evo.report.figure import kept_figure, search_figure
from moe_evo.report.table import expert_weights, experts_label, final_table, kept_picture
from moe_evo.report.task_scores import task_score, unit_of
from moe_evo.tasks.kinds import KINDS, Kind

PRUNING = Genome.from_kept([[0, 2], [1, 3]], 4, 2)
MERGED = Genome((LayerGenome([[1, 0.5, 0, 0], [0, 0, -2, 0]], np.eye(2, 4), 1), PRUNING.layers[1]))


def printed(thing: object) -> str:
    output = io.StringIO()
    Console(file=output, width=100).print(thing)
    return output.getvalue()


def test_expert_weights_are_one_for_kept_experts_and_nan_where_a_layer_has_none() -> None:
    mixed = Genome((MERGED.layers[0], LayerGenome.from_kept([1], 2, 1)))
    expected = [[1, 0.5, 1, 0], [0, 1, np.nan, np.nan]]
    np.testing.assert_array_equal(expert_weights(mixed), expected)


def test_the_picture_of_kept_experts_has_a_line_a_layer_with_decoder_layer_numbers() -> None:
    text = printed(kept_picture(MERGED, (1, 2)))
    assert "1   │██▒▒██  │ keeps 2 of 4, top-1" in text
    assert "2   │  ██  ██│ keeps 2 of 4, top-2" in text


def test_experts_label_tells_the_range_where_layers_differ() -> None:
    assert experts_label((4, 4)) == "4"
    assert experts_label((2, 4)) == "3.0 (2-4)"


def test_the_final_table_fits_eighty_columns_and_shows_a_failed_score() -> None:
    score = Score(0.5, 0.4, 0.6)
    splits = dict.fromkeys(("search", "validation", "test"), score)
    rows = (
        Row("full", "full model", 0, 0, "full", (), "", True, (8, 8), (2, 2), ((0,), (0,)), {"test": score}),
        Row("best", "EEP prune + merge", 402, 7, "x", (), "", False, (4, 4), (2, 2), ((0,), (0,)), splits),
    )
    result = RunResult(
        model=ModelFacts("embedded", "", "mixtral", (8, 8), (2, 2), (0, 1)),
        tasks=(TaskFacts("nli", "choice", "accuracy", "", {}),),
        search=SearchFacts("eep", 0, 402),
        rows=rows,
    )
    text = printed(final_table(result))
    assert max(map(len, text.splitlines())) <= 80
    assert "mean over nli (accuracy); higher is better" in text
    assert "EEP prune + merge        4    402" in text
    assert "0.500 [0.400, 0.600]" in text
    assert "failed" in text


def test_figures_are_drawn_for_prunings_merges_failures_and_random(tmp_path: Path) -> None:
    outcomes = [Evaluation(0.5), EvaluationFailure("non_finite", "NaN"), Evaluation(0.6)]
    genomes = [PRUNING, PRUNING, MERGED]
    individuals = [
        Individual(Candidate(n, genome, "x"), outcome)
        for n, (genome, outcome) in enumerate(zip(genomes, outcomes, strict=True))
    ]
    search_figure(tmp_path / "a.png", individuals, individuals[:1], 0.7, MERGED)
    search_figure(tmp_path / "b.png", individuals[1:2], [], 0.7, PRUNING)
    kept_figure(tmp_path / "c.png", PRUNING)
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_of_a_plug_in_has_an_interval_where_it_is_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS._registered, "own", Kind({"loss": "in nats"}, lambda *_: None, "some:Scorer"))
    score = Score(0.5, 0.4, 0.6, metrics={"t/loss": 0.4, "t/right": 0.4, "t/active_experts": 1.0})
    row = Row("full", "full model", 0, 0, "full", (), "", True, (8,), (2,), ((0,),), {"test": score})
    told = {}
    for kind in ("own", "not installed"):
        task = TaskFacts("t", kind, "loss", "", {"test": 50})
        for metric in ("loss", "right"):
            cell = task_score(row, "test", task, metric, num_tasks=2)
            assert cell is not None and cell[0] == 0.4
            told[kind, metric] = (unit_of(task, metric), cell[1] is not None)
        assert task_score(row, "test", task, "active_experts", num_tasks=2) == (1.0, None, None)
        assert unit_of(task, "active_experts") == "a token, mean over layers"
    assert told == {
        ("own", "loss"): ("in nats", False),
        ("own", "right"): ("", True),
        ("not installed", "loss"): ("", False),
        ("not installed", "right"): ("", False),
    }
