"""What is wrong with a run: one list, which `plan` shows and `search` raises the first of, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe_evo.commands.plan import plan
from moe_evo.commands.search import search
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ClusterError, ConfigError, GenomeError, MoeEvoError, Problem, Problems, RunError, raise_first
from moe_evo.plain import plain
from moe_evo.records.folder import with_absolute_paths
from moe_evo.runs import open_pool
from moe_evo.tracking.base import Trackers

TASK = TaskConfig(data="syll", num_search=4, num_validation=4, num_test=4)
GOOD = RunConfig(
    tasks=[TASK],
    model=ModelConfig(device="cpu", self_check=False),
    search=SearchConfig(evaluations=2),
    selection=SelectionConfig(finalists=1, baselines=[]),
)

Change = Callable[[RunConfig, Path], RunConfig]


def searching(**changes: object) -> Change:
    return lambda config, _: replace(config, search=replace(config.search, **changes))  # type: ignore[arg-type]


def model(**changes: object) -> Change:
    return lambda config, _: replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]


def foreign(config: RunConfig, folder: Path) -> RunConfig:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("precious")
    return config


def unwritable(config: RunConfig, folder: Path) -> RunConfig:
    (folder / "file").write_text("")
    return replace(config, folder=str(folder / "file" / "run"))


def begun_with_more(config: RunConfig, folder: Path) -> RunConfig:
    search(config, Trackers())
    return replace(config, search=replace(config.search, evaluations=1))


def begun_otherwise(config: RunConfig, folder: Path) -> RunConfig:
    search(config, Trackers())
    return replace(config, search=replace(config.search, seed=9))


def changed_data(config: RunConfig, folder: Path) -> RunConfig:
    lines = [f'{{"prompt": "{n}", "choices": [" a", " b"], "label": 0}}\n' for n in range(30)]
    (folder / "task.jsonl").write_text("".join(lines))
    config = replace(config, tasks=[TaskConfig(data=str(folder / "task.jsonl"))])
    search(config, Trackers())
    (folder / "task.jsonl").write_text("".join(lines).replace('"label": 0', '"label": 1'))
    return config


def unfinished_warm_start(config: RunConfig, folder: Path) -> RunConfig:
    search(replace(config, search=replace(config.search, num_kept=6), folder=str(folder / "wide")), Trackers())
    (folder / "wide" / "result.json").unlink()
    return replace(config, search=replace(config.search, warm_start=str(folder / "wide")))


WRONG: dict[str, tuple[Change, str]] = {
    "no such data": (lambda config, _: replace(config, tasks=[TaskConfig(data="nowhere")]), "task nowhere"),
    "an answer that is too long": (
        lambda config, _: replace(config, tasks=[replace(TASK, max_length=2)]),
        "max_length",
    ),
    "no such model": (model(path="./nowhere"), "no such folder"),
    "no such device": (model(device="cuda:99"), "model.device"),
    "no such alignment": (model(alignment="nowhere"), "nowhere: cannot be read"),
    "too many thresholds": (model(dynamic_skipping=[0.5]), "model.dynamic_skipping: got 1 thresholds"),
    "more experts than there are": (searching(num_kept=9), "search.num_kept: got 9"),
    "no such method": (searching(init=["luck"]), "search.init: got 'luck'"),
    "a merge of layers that share genes": (
        searching(algorithm="eep", init=["hc_smoe"], num_layer_groups=2),
        "search.init: hc_smoe gives each layer experts of its own",
    ),
    "a folder with something else": (foreign, "holds other files and no run"),
    "a folder that cannot be": (unwritable, "cannot be written"),
    "a folder with a run of a larger budget": (begun_with_more, "search.evaluations: got 1, expected 2 or more"),
    "a folder with another run": (begun_otherwise, "another config (search.seed: 0 -> 9)"),
    "other data than it began with": (changed_data, "has changed since this run began"),
    "no such warm start": (searching(warm_start="nowhere"), "not the folder of a run"),
    "a warm start that is not finished": (unfinished_warm_start, "is not finished"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_plan_lists_what_search_raises(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = WRONG[wrong]
    config = with_absolute_paths(change(replace(GOOD, folder=str(tmp_path / "run")), tmp_path))
    problems = plan(config).problems
    assert len(problems) == 1 and message in str(problems[0])
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(type(problems[0].error)) as caught:
        search(config, Trackers())
    assert str(Problem.of(caught.value)) == str(problems[0])


def test_a_good_run_has_no_problems_and_writes_nothing(tmp_path: Path) -> None:
    assert plan(replace(GOOD, folder=str(tmp_path / "run"))).problems == ()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_several_is_raised_with_the_number_of_the_others(tmp_path: Path) -> None:
    config = replace(GOOD, folder=str(tmp_path / "run"), tasks=[TaskConfig(data="nowhere")])
    config = replace(config, search=SearchConfig(num_kept=9), model=ModelConfig(device="cuda:99"))
    told = plan(config)
    problems = told.problems
    assert plain(told)["problems"] == [str(one) for one in problems]
    assert [one.where for one in problems] == ["task nowhere", "search.num_kept", "model.device"]
    with pytest.raises(type(problems[0].error), match=r"^task nowhere: .* \(and 2 more; moe-evo plan lists all\)$"):
        search(config, Trackers())


def test_a_problem_is_taken_apart_as_its_message_says() -> None:
    whole = Problem.of(ConfigError("search.top_k: got 9, expected 1 to 8; lower it"))
    assert (whole.where, whole.got, whole.expected, whole.advice) == ("search.top_k", "9", "1 to 8", "lower it")
    short = Problem.of(RunError("runs/x: is a sweep"))
    assert (short.where, short.got, short.expected, short.advice) == ("runs/x", "is a sweep", "", "")
    assert str(whole) == whole.to_plain() == str(whole.error)


def test_each_problem_is_written_down_once_and_defects_are_not() -> None:
    problems = Problems()
    for _ in range(2):
        with problems.noted():
            raise GenomeError("a: b")
    with pytest.raises(ZeroDivisionError), problems.noted():
        _ = 1 // 0
    assert [str(one) for one in problems.found] == ["a: b"]


def test_nothing_is_raised_of_no_problems_and_the_very_error_of_one() -> None:
    raise_first([])
    error: MoeEvoError = ClusterError("gang 0: lost")
    with pytest.raises(ClusterError) as caught:
        raise_first([Problem.of(error)])
    assert caught.value is error
