"""Budgets and objectives that do not go together are one clear line and exit code 2, before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_evo.cli.main import main

SURROGATE = ["search", "--search.algorithm", "surrogate"]
CASES = {
    "a budget without bounds": (
        [*SURROGATE, "--search.num_kept", "{mean: 4}"],
        "search.num_kept: got {'mean': 4}, expected numbers as in {mean: 4, min: 2, max: 8}",
    ),
    "a budget out of its bounds": (
        [*SURROGATE, "--search.num_kept", "{mean: 2, min: 3, max: 8}"],
        "search.num_kept: got {'mean': 2, 'min': 3, 'max': 8}, expected 1 <= min <= mean <= max",
    ),
    "a budget above E": (
        [*SURROGATE, "--search.num_kept", "{mean: 4, min: 2, max: 9}"],
        "search.num_kept.max: got 9, MoE layer 0 has 8 experts; give 1 to 8",
    ),
    "a budget below top_k": (
        [*SURROGATE, "--search.num_kept", "{mean: 4, min: 1, max: 8}"],
        "search.num_kept.min: got 1 with top_k 2 in MoE layer 0",
    ),
    "a budget for EEP": (
        ["search", "--search.algorithm", "eep", "--search.num_kept", "{mean: 4, min: 2, max: 8}"],
        "expected a number or a list: eep moves no experts between layers; use one of search.algorithm random",
    ),
    "a budget for the released EEP": (
        ["search", "--search.algorithm", "eep_release", "--search.num_kept", "{mean: 4, min: 2, max: 8}"],
        "eep_release moves no experts between layers; use one of search.algorithm random, search.algorithm surrogate",
    ),
    "a budget for unequal layer groups": (
        [
            "search",
            "--search.algorithm",
            "random",
            "--search.num_kept",
            "{mean: 4, min: 2, max: 8}",
            "--search.num_layer_groups",
            "3",
        ],
        "search.num_layer_groups: got 3 for 4 MoE layers, expected groups of equal size",
    ),
    "an unknown objective": (
        ["search", "--search.objectives", "[quality,speed]"],
        "search.objectives: got ['quality', 'speed'], expected some of quality, tasks, parameters, active",
    ),
    "active experts under top-p routing": (
        [*SURROGATE, "--search.objectives", "[quality,active]", "--model.top_p", "0.5"],
        "model.top_p: got 0.5, expected none, as experts active a token are an objective",
    ),
    "active experts under skipping": (
        [*SURROGATE, "--search.objectives", "[quality,active]", "--model.dynamic_skipping", "0.5"],
        "model.dynamic_skipping: got 0.5, expected none, as experts active a token are an objective",
    ),
    "an objective twice": (
        ["search", "--search.objectives", "[quality,quality]"],
        "search.objectives: got ['quality', 'quality'], expected each objective once",
    ),
    "objectives without quality": (
        ["search", "--search.objectives", "active"],
        "search.objectives: got ['active'], expected 'quality' or 'tasks' among them",
    ),
    "objectives for EEP": (
        ["search", "--search.algorithm", "eep", "--search.objectives", "[quality,active]"],
        "search.objectives: got ['quality', 'active'], expected [quality]: eep has one objective; use one of",
    ),
    "parameters as an objective with one K": (
        [*SURROGATE, "--search.objectives", "[quality,parameters]", "--search.num_kept", "4"],
        "search.num_kept: got 4, expected bounds such as {min: 2, max: 8}, as 'parameters' is an objective",
    ),
    "parameters as an objective with a mean": (
        [
            *SURROGATE,
            "--search.objectives",
            "[quality,parameters]",
            "--search.num_kept",
            "{mean: 4, min: 2, max: 8}",
        ],
        "expected numbers as in {min: 2, max: 8}, as 'parameters' is an objective",
    ),
    "active as an objective with one active expert": (
        [*SURROGATE, "--search.objectives", "[quality,active]", "--search.top_k", "1"],
        "search.objectives: got 'active', but top_k is 1 in every layer; leave it out",
    ),
    "tasks as objectives with one task": (
        [*SURROGATE, "--search.objectives", "tasks"],
        "search.objectives: got ['tasks'], expected 'quality', as there is one task; give two or more tasks",
    ),
    "tasks as objectives on fresh examples": (
        [
            *SURROGATE,
            "--search.objectives",
            "tasks",
            "--tasks",
            "[syll,nli]",
            "--evaluation.examples",
            "fresh",
        ],
        "evaluation.examples: got 'fresh', expected 'fixed', as each task is an objective",
    ),
    "more tasks than objectives": (
        [*SURROGATE, "--search.objectives", "tasks", "--tasks", "[syll,nli,city,arith,infl,gloss,langid]"],
        "search.objectives: got ['tasks'], expected at most 6 objectives with one for each of the 7 tasks",
    ),
    "a race with objectives": (
        [*SURROGATE, "--search.objectives", "[quality,active]", "--evaluation.race", "0.95"],
        "evaluation.race: got 0.95, expected none, as search.objectives has several",
    ),
}
"""Words of the command line, and a part of the message."""


@pytest.mark.parametrize("case", CASES)
def test_they_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("moe_evo.models.load.load_model", refuse)
    monkeypatch.chdir(tmp_path)
    argv, expected = CASES[case]
    code, err = main(argv), capsys.readouterr().err
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("moe-evo: error: "), err
    assert expected in err and not list(tmp_path.iterdir())
