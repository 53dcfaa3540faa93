"""Names of what other packages bring: built in, registered, a path, or an entry point; and what is wrong with them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from moe_evo.cli.main import main
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.registry import METHODS, check_methods
from moe_evo.errors import ConfigError, ModelError
from moe_evo.gangs.ray_pool import work_of
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.models.families import FAMILIES, Family, family_of
from moe_evo.plugins import Registry, _registering_modules, import_modules, registering_modules
from moe_evo.searches.registry import SEARCHES, build_search, check_search
from moe_evo.tasks.answer_metrics import ANSWER_METRICS
from moe_evo.tasks.data import read_task
from moe_evo.tasks.kinds import KINDS

SPACE = SearchSpace.build(ModelShape("mixtral", (4, 4), (1, 1), (0, 1)), num_kept=2)

MODULE = """
from moe_evo.criteria.registry import CRITERIA
from moe_evo.models.families import FAMILIES
from moe_evo.searches.random_search import RandomSearch
from moe_evo.tasks.kinds import KINDS

class Climber(RandomSearch):
    pass

class Half:
    phase, population = "", None

    def __init__(self, space, config):
        pass

    def ask(self, n):
        return []

def short(text, example):
    return float(len(text) < 9)

criterion = CRITERIA["reap"]
kind = KINDS["perplexity"]
family = FAMILIES["olmoe"]
number = 3
"""
ENTRIES = """
[moe_evo.searches]
climber = brought:Climber
broken = brought:Missing
gone = nowhere_at_all:Search
number = brought:number
[moe_evo.metrics]
short = brought:short
[moe_evo.criteria]
brought_reap = brought:criterion
[moe_evo.tasks]
brought_text = brought:kind
[moe_evo.families]
brought_moe = brought:family
"""


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with a package that is installed."""
    (tmp_path / "brought.py").write_text(MODULE)
    info = tmp_path / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    registries: tuple[Registry, ...] = (SEARCHES, KINDS, ANSWER_METRICS, METHODS, FAMILIES)
    yield tmp_path
    for registry in registries:
        registry._loaded.clear()
    sys.modules.pop("brought", None)


def test_an_entry_point_is_a_name_like_any_other(brought: Path) -> None:
    check_search(SearchConfig(algorithm="climber"), SPACE)
    assert type(build_search(SPACE, SearchConfig(algorithm="climber"))).__name__ == "Climber"
    assert ANSWER_METRICS["short"]("a", None) == 1 and METHODS["brought_reap"].name == "reap"
    assert KINDS["brought_text"] is KINDS["perplexity"]
    assert family_of({"model_type": "brought_moe"}, "here") is FAMILIES["olmoe"]
    assert "climber" in SEARCHES.names() and "climber" not in list(SEARCHES)


def test_a_path_is_a_name_too(brought: Path) -> None:
    check_search(SearchConfig(algorithm="brought:Climber"), SPACE)
    check_methods("--method", ["brought:criterion"])
    data = read_task(TaskConfig(data="arith", kind="generation", metric="brought:short"))
    assert data.metric == "brought:short"
    with pytest.raises(ModelError, match="family brought:family is not supported"):  # a checkpoint imports nothing
        family_of({"model_type": "brought:family", "num_experts": 4}, "here")


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (
            "eeep",
            r"got 'eeep', did you mean 'eep'\? expected one of eep, eep_release, .* or package.module:name",
        ),
        ("climbr", r"got 'climbr', did you mean 'climber'\? expected one of "),
        ("###", r"got '###', expected one of eep, "),
        ("broken", r"the search 'broken' cannot be imported from brought:Missing \(AttributeError: .*'Missing'\); "),
        (
            "gone",
            r"cannot be imported from nowhere_at_all:Search \(ModuleNotFoundError: No module named 'nowhere_a",
        ),
        ("number", r"'number' is no search: got 3, expected a class or function of \(space, config\)"),
        ("brought:Half", r"makes no search: Half has no tell, no restore, expected a moe_evo.searches.base.Search"),
    ],
)
def test_what_is_wrong_with_a_name_is_one_line(brought: Path, algorithm: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^search\.algorithm: .*{expected}") as caught:
        check_search(SearchConfig(algorithm=algorithm), SPACE)
    assert "\n" not in str(caught.value)


def test_a_search_that_begins_from_nothing_refuses_what_it_would_begin_from(brought: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.init: .* expected 'random' alone: climber begins from no genomes"):
        check_search(SearchConfig(algorithm="climber", init=["reap"]))
    with pytest.raises(ConfigError, match=r"search\.warm_start: .* climber begins from no prunings"):
        check_search(SearchConfig(algorithm="climber", warm_start="runs/x"))


def test_other_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"^search\.init: got 'randm', did you mean 'random'\? expected one"):
        check_methods("search.init", ["randm"], also=["random"])
    with pytest.raises(ConfigError, match=r"^--method: got 'reep', did you mean 'reap'\? .*\(see moe-evo criteria\)$"):
        check_methods("--method", ["reep"])
    with pytest.raises(ConfigError, match=r"kind: got 'chioce', did you mean 'choice'\? expected one of auto, "):
        read_task(TaskConfig(data="nli", kind="chioce"))
    with pytest.raises(ConfigError, match=r"metric: got 'exact', did you mean 'exact_match'\? expected one of "):
        read_task(TaskConfig(data="arith", kind="generation", metric="exact"))


def test_registering_gives_a_name_in_this_process() -> None:
    registry = Registry("thing", ["moe_evo.things"], {"one": 1}, lambda thing: None if thing else "got nothing")
    assert registry.register("two")(2) == 2
    assert dict(registry.items()) == {"one": 1, "two": 2} and registry["two"] == 2 and "two" in registry
    with pytest.raises(ConfigError, match="got the name 'one' of one that is built in"):
        registry.register("one")
    with pytest.raises(ConfigError, match="'none' is no thing: got nothing"):
        registry.register("none")(0)


def test_the_same_name_from_two_packages_must_be_told_apart(brought: Path) -> None:
    other = brought / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[moe_evo.searches]\nclimber = other:Climber\n")
    with pytest.raises(ConfigError, match=r"'climber' is in several packages, .*brought:Climber.*; give one of these"):
        SEARCHES.get("climber", "search.algorithm")


def test_a_family_must_be_one() -> None:
    with pytest.raises(ConfigError, match=r"'mine' is no family: got 3, expected a moe_evo.models.families.Family"):
        FAMILIES.register("mine")(3)
    assert isinstance(FAMILIES["mixtral"], Family)


CHECKING = """
import sys
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.registry import check_methods
from moe_evo.searches.registry import check_search
from moe_evo.tasks.data import read_task
check_search(SearchConfig())
read_task(TaskConfig(data="nli", kind="choice", metric="accuracy"))
check_methods("--method", ["reap"])
print(sorted({"torch", "ray", "transformers"} & sys.modules.keys()), end="")
"""


def test_checking_names_imports_neither_torch_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", CHECKING], capture_output=True, text=True, check=True)
    assert done.stdout == "[]"


@pytest.mark.parametrize(("words", "names"), [(["--help"], [*SEARCHES]), (["--tasks.help"], [*KINDS, *ANSWER_METRICS])])
def test_help_lists_the_names_that_are_built_in(
    words: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) if words != ["--help"] else nullcontext():
        main(["search", *words])
    printed = set(re.findall(r"\w+", capsys.readouterr().out))
    assert set(names) <= printed
    if words != ["--help"]:
        assert {name for kind in KINDS.values() for name in kind.metrics} <= printed


def test_a_broken_plug_in_is_one_line_and_exit_code_two(brought: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("search", "plan"):
        assert main([command, "--search.algorithm", "broken", "--folder", str(brought / "run")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("moe-evo: error: ") and "the search 'broken' cannot be imported from brought:Mi" in line
    assert not (brought / "run").exists()


def test_gangs_import_the_modules_that_register_something(brought: Path) -> None:
    (brought / "registering.py").write_text(
        "from moe_evo.tasks.answer_metrics import ANSWER_METRICS\n"
        "@ANSWER_METRICS.register('always')\n"
        "def always(text, example):\n    return 1.0\n"
    )
    try:
        import_modules(["registering"])
        assert "always" in ANSWER_METRICS and "registering" in registering_modules()
        assert work_of((), EvaluationConfig()).modules == registering_modules()
    finally:
        ANSWER_METRICS._registered.pop("always")
        _registering_modules.pop("registering")
    with pytest.raises(ConfigError, match="the module not_here, which registers a plug-in, cannot be imported here"):
        import_modules(["not_here"])
