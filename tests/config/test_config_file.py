"""From words and files to a config: short ways to say lists, and true or false."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_evo.cli.main import main
from moe_evo.cli.parsers import PARSERS
from moe_evo.config.file import parse, parse_config, read_config
from moe_evo.config.parser import Word
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.sweep import SweepConfig
from moe_evo.errors import ConfigError
from moe_evo.genomes.population import Candidate
from moe_evo.genomes.space import ModelShape
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, Journal

PRUNE = ("--method", "reap", "--num_kept", "4", "--to", "x")
TO = ("--to", "x")


def run_config(*words: str) -> RunConfig:
    return parse_config(PARSERS["search"](), words, RunConfig)[1]


@pytest.mark.parametrize(
    ("value", "init"),
    [
        ("reap", ["reap"]),
        ("random,reap", ["random", "reap"]),
        ("[random, reap]", ["random", "reap"]),
        ("{random: 2, reap: 1}", {"random": 2.0, "reap": 1.0}),
    ],
)
def test_a_single_name_means_a_list_of_one(value: str, init: Any, tmp_path: Path) -> None:
    assert run_config("--search.init", value).search.init == init
    assert run_config(f"--search.init={value}").search.init == init
    if isinstance(init, list):
        assert run_config("--selection.baselines", value).selection.baselines == init
    else:
        (tmp_path / "c.yaml").write_text(f"search: {{init: {value}}}\n")
        assert read_config(tmp_path / "c.yaml").search.init == init


@pytest.mark.parametrize(
    ("words", "read", "expected"),
    [
        (["--search.algorithm", "eep", "--search.eep.sigma", "1e-3"], lambda config: config.search.eep.sigma, 0.001),
        (
            ["--search.algorithm", "eep", "--search.eep.mutation_margin=-0"],
            lambda config: config.search.eep.mutation_margin,
            0.0,
        ),
        (["--tasks.prefix=--x=y"], lambda config: config.tasks[-1].prefix, "--x=y"),
        (["--tasks+", "nli", "--tasks.num_search", "3"], lambda config: config.tasks[-1].num_search, 3),
        (["--search.warm_start", "3"], lambda config: config.search.warm_start, "3"),
        (["--search", "{seed: 4}"], lambda config: config.search.seed, 4),
        (["--search.init.reap", "2"], lambda config: config.search.init, {"reap": 2.0}),
        (["--search.seed", "3", "--config", "CONFIG"], lambda config: config.search.seed, 5),
        (["CONFIG", "--search.seed", "3"], lambda config: config.search.seed, 3),
    ],
)
def test_values_on_the_command_line(
    words: list[str], read: Callable[[RunConfig], Any], expected: Any, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("search: {seed: 5}\ntasks: syll\n")
    argv = ["--tasks", "syll", *(word.replace("CONFIG", str(tmp_path / "c.yaml")) for word in words)]
    if words[0] == "CONFIG":
        argv = argv[2:]
    assert read(run_config(*argv)) == expected


def test_every_option_that_help_lists_is_known_and_takes_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    for name, make in PARSERS.items():
        parser = make()
        parser.print_help()
        listed = set(re.findall(r"^  (?:-h, )?--([\w.-]+)", capsys.readouterr().out, re.MULTILINE))
        assert listed, name
        for option in listed:
            try:
                parser.check([Word(option, None)])
            except ConfigError as error:  # of another option, which is looked for once this one is known
                assert re.search(" is missing, expected |without --recover", str(error))


def test_a_single_value_in_a_file_means_a_list_of_one(tmp_path: Path) -> None:
    sections = {"search": {"init": "reap"}, "selection": {"baselines": "ean"}, "sweep": {"seeds": 3, "tasks": "nli"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(sections))
    config = parse_config(PARSERS["sweep"](), [str(tmp_path / "c.yaml")], SweepConfig)[1]
    assert (config.search.init, config.selection.baselines) == (["reap"], ["ean"])
    assert (config.sweep.seeds, config.sweep.tasks) == ([3], ["nli"])


@pytest.mark.parametrize(
    ("command", "words", "option"),
    [
        ("sweep", (), "no_tune"),
        ("plan", (), "calibrate"),
        ("prune", PRUNE, "progressive"),
        ("prune", PRUNE, "aligned"),
        ("prune", PRUNE, "overwrite"),
        ("compress", ("CHECKPOINT", "--method", "moe_pruner", *TO), "overwrite"),
        ("export", ("RUN", *TO), "overwrite"),
        ("report", ("RUN", "OTHER"), "overwrite"),
    ],
)
def test_every_flag_may_stand_alone_or_with_true_or_false(command: str, words: tuple[str, ...], option: str) -> None:
    name = f"--{option.replace('no_tune', 'no-tune')}"
    for value, expected in (((), True), (("true",), True), (("false",), False)):
        for argv in ([*words, name, *value], [name, *value, *words]):
            found = parse(PARSERS[command](), argv)
            assert getattr(found, option) is expected
            assert [getattr(found, one, None) for one in ("run", "checkpoint", "runs")] == [
                "RUN" if command == "export" else None,
                "CHECKPOINT" if command == "compress" else None,
                ["RUN", "OTHER"] if command == "report" else None,
            ]
    assert not getattr(parse(PARSERS[command](), words), option)


def test_true_or_false_of_a_config_may_stand_alone_too() -> None:
    config = run_config("--selection.soup", "--selection.random_search", "--model.self_check", "false")
    assert config.selection == SelectionConfig(soup=True, random_search=True) and not config.model.self_check
    with pytest.raises(ConfigError, match=r"^selection\.soup: got 'maybe', expected true or false$"):
        run_config("--selection.soup", "maybe")


@pytest.mark.parametrize(
    ("words", "is_json"),
    [(["--json"], True), (["--json", "true"], True), (["--json", "false"], False), ([], False)],
)
def test_the_flags_of_all_commands_are_like_the_others(
    words: list[str], is_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "criteria"]) == main(["criteria", *words, "--debug", "false"]) == 0
    first, _, second = capsys.readouterr().out.partition("\n" if is_json else "\nmethod ")
    assert first and second
    assert not is_json or json.loads(first) == json.loads(second)
    assert is_json == first.startswith("[")


def test_plan_ends_with_the_search_without_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--memory_gib", "80", "--search.seed", "3", "--calibrate", "false", "--search.evaluations", "40"]
    assert main(["plan", *words, "--model.self_check", "false"]) == 0
    expected = "moe-evo search --search.seed 3 --search.evaluations 40 --model.self_check false"
    assert expected in capsys.readouterr().out


def test_a_start_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    config = replace(RunConfig(), folder=str(tmp_path / "run"))
    folder = RunFolder(tmp_path / "run")
    genome = ModelShape("mixtral", (4,), (2,), (0,)).identity()

    def observe(journal: Journal) -> None:
        folder.observations.touch()

    def propose(journal: Journal) -> None:
        journal.propose(MAIN, [Candidate(0, genome, "random_pruning")])

    def start(begin: Callable[[Journal], None] = lambda journal: None) -> set[str]:
        with pytest.raises(ConfigError), folder.claim(config) as journal:
            begin(journal)
            raise ConfigError("something is wrong")
        return {one.name for one in folder.path.iterdir()} if folder.path.exists() else set()

    assert not start() and not folder.path.exists()
    folder.path.mkdir()
    assert not start() and folder.path.exists()
    run = {folder.config.name, folder.journal.name, "journal.lock"}
    assert start(observe) == {*run, folder.observations.name}
    assert start() == {*run, folder.observations.name}
    shutil.rmtree(folder.path)
    assert start(propose) == run
    folder.journal.unlink()
    assert start() == run, "an earlier start left a config to go on with"


def test_fields_and_splits_of_a_task_come_from_files_and_flags(tmp_path: Path) -> None:
    fields = {"prompt": "{{ question }}?", "choices": ["a", "b"], "label": "right"}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"tasks": [{"data": "quiz", "fields": fields, "splits": {"search": "train"}}]}))
    read = read_config(file).tasks[0]
    assert (read.fields, read.splits) == (fields, {"search": "train"})
    words = ["--tasks", "[quiz]", "--tasks.fields", json.dumps(fields), "--tasks.splits", "{search: train}"]
    assert run_config(*words).tasks == [read]
    for wrong in ({"prompt": 3}, {"prompt": [["a"]]}):
        with pytest.raises(ConfigError, match=r"tasks\.fields: got "):
            run_config(*words, "--tasks.fields", json.dumps(wrong))
