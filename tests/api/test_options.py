"""From keyword arguments to a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_evo.api.options import config_of
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.config.sweep import GridConfig, SweepConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError


def run_config(**options: Any) -> RunConfig:
    config, model, tasks = (options.pop(name, None) for name in ("config", "model", "tasks"))
    return config_of(RunConfig, config, model, tasks, options)


def test_nothing_given_is_the_default() -> None:
    assert run_config() == RunConfig()


def test_keywords_are_the_last_parts_of_flags_or_sections_or_whole_names() -> None:
    wanted = replace(RunConfig(), search=SearchConfig(num_kept=6, seed=3))
    assert run_config(num_kept=6, seed=3) == wanted
    assert run_config(search={"num_kept": 6, "seed": 3}) == wanted
    assert run_config(search={"num_kept": 6}, seed=3) == wanted
    assert run_config(**{"search.num_kept": 6, "search.seed": 3}) == wanted
    assert run_config(search=SearchConfig(num_kept=6, seed=3)) == wanted
    assert (
        run_config(algorithm="eep", sigma=0.1).search.eep
        == run_config(search={"algorithm": "eep", "eep": {"sigma": 0.1}}).search.eep
        == EEPConfig(sigma=0.1)
    )


def test_models_and_tasks_are_given_in_short_or_in_full(tmp_path: Path) -> None:
    assert run_config(model=tmp_path).model == ModelConfig(path=str(tmp_path))
    assert run_config(model={"dtype": "float32"}).model == ModelConfig(dtype="float32")
    assert run_config(model="some", dtype="float32").model == ModelConfig(path="some", dtype="float32")
    task = TaskConfig(data="nli", num_search=8)
    assert run_config(tasks="nli").tasks == [TaskConfig(data="nli")]
    assert run_config(tasks=[{"data": "nli", "num_search": 8}, tmp_path]).tasks == [
        task,
        TaskConfig(data=str(tmp_path)),
    ]
    assert run_config(tasks=task).tasks == [task]


def test_a_config_is_changed_by_what_else_is_given(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({"search": {"num_kept": 6}, "tasks": ["nli"], "selection": {"finalists": 2}}))
    wanted = replace(RunConfig(), search=SearchConfig(num_kept=6, seed=1), tasks=[TaskConfig(data="nli")])
    wanted = replace(wanted, selection=replace(wanted.selection, finalists=2))
    assert run_config(config=file, seed=1) == run_config(config=str(file), search={"seed": 1}) == wanted
    assert run_config(config=replace(wanted, search=SearchConfig(num_kept=6)), seed=1) == wanted
    assert config_of(ScoringConfig, wanted, None, None, {}).tasks == wanted.tasks
    data = {"search": {"num_kept": 6}, "tasks": ["nli"], "selection": {"finalists": 2}}
    assert run_config(config=data, seed=1) == wanted and data["search"] == {"num_kept": 6}
    nested = {"search": {"algorithm": "eep", "eep": {"sigma": 0.1}}}
    assert run_config(config=nested, num_initial=5).search.eep == EEPConfig(sigma=0.1, num_initial=5)
    assert nested == {"search": {"algorithm": "eep", "eep": {"sigma": 0.1}}}


def test_one_thing_where_a_list_is_expected_and_numbers_of_numpy_are_taken() -> None:
    assert run_config(init="reap", baselines="reap").search.init == ["reap"]
    assert run_config(num_kept=np.int64(3), evaluations=np.array(7)).search.num_kept == 3
    swept = config_of(SweepConfig, None, None, None, {"sweep": {"num_kept": (2, 4), "seeds": range(2)}})
    assert swept.sweep == GridConfig(num_kept=[2, 4], seeds=[0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kep": 4}, "num_kep: no such option; did you mean num_kept"),
        ({"search": {"sed": 4}}, "search.sed: no such option; did you mean search.seed"),
        ({"config": {"serch": {}}}, "serch: no such option; did you mean"),
        ({"xyzzy": 4}, "xyzzy: no such option; expected one of model, tasks"),
        ({"num_search": 4}, "num_search: no such option; give it with its task, as in tasks="),
        ({"tasks": [{"data": "nli", "num_serch": 4}]}, r"tasks\[0\]\.num_serch: no such option; did you mean "),
        ({"tasks": [{"name": "x"}]}, r"tasks \(x\).data: got ''"),
        ({"tasks": [{"data": "nli", "num_search": "x"}]}, r"tasks\[0\]\.num_search: got 'x', expected a whole number"),
        ({"tasks": 5}, "tasks: got 5, expected a task or a list of tasks: a file, "),
        ({"tasks": ["nli", 5]}, r"tasks\[1\]: got 5, expected a file, "),
        ({"config": {"tasks": None}}, "tasks: got None, expected a task or a list"),
        ({"num_kept": "four"}, "search.num_kept: got 'four', expected a whole number or a list of whole numbers"),
        ({"num_kept": 0}, "search.num_kept: got 0, expected 1 or more"),
        ({"num_kept": 4, "search": {"num_kept": 5}}, "search.num_kept: got it twice"),
        ({"num_kept": 4, "search": SearchConfig()}, "search.num_kept: got it beside a whole search"),
        ({"search": {"eep": EEPConfig()}, "sigma": 0.1}, "search.eep.sigma: got it beside a whole search.eep"),
        ({"search": 7}, "search: got 7, expected names with values"),
        ({"seed": True}, "search.seed: got True, expected a whole number"),
    ],
)
def test_wrong_keywords_are_one_line_with_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run_config(**options)
    assert "\n" not in str(caught.value)


def test_a_name_that_two_sections_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_kept: may be one of search.num_kept, sweep.num_kept; .* sweep=\{"):
        config_of(SweepConfig, None, None, None, {"num_kept": [2, 4]})
