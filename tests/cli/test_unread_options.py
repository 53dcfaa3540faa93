"""An option that nothing reads, as others stand, is refused by its name; and so are numbers that nothing can be."""

from __future__ import annotations

from pathlib import Path

import pytest

import moe_evo
from moe_evo.cli.main import main

FOLDER = str(Path(moe_evo.__file__).parent / "data" / "model")
TASK = "[{data: syll, %s}]"

UNREAD = [
    ("model.revision", ["--model.revision", "main"]),
    ("model.revision", ["--model.path", FOLDER, "--model.revision", "main"]),
    ("model.trust_remote_code", ["--model.trust_remote_code"]),
    ("model.offload", ["--model.offload", "cpu"]),
    ("model.offload_folder", ["--model.offload_folder", "x"]),
    ("model.max_memory", ["--model.max_memory", "{0: 1GiB}"]),
    ("evaluation.sample_size", ["--evaluation.sample_size", "200"]),
    ("evaluation.state_cache_gib", ["--evaluation.share_layers", "false", "--evaluation.state_cache_gib", "1"]),
    ("evaluation.state_device", ["--evaluation.share_layers", "false", "--evaluation.state_device", "cpu"]),
    ("cluster.num_gangs", ["--cluster.num_gangs", "2"]),
    ("cluster.service", ["--cluster.service", "shared"]),
    ("tasks (syll).split_shares", ["--tasks", TASK % "split_shares: [0.2, 0.2, 0.6]"]),
    ("search.eep", ["--search.algorithm", "random", "--search.eep.sigma", "0.1"]),
    ("search.surrogate", ["--search.algorithm", "eep", "--search.surrogate.pool", "100"]),
    ("search.init", ["--search.algorithm", "random", "--search.init", "reap"]),
    ("search.warm_start", ["--search.algorithm", "random", "--search.warm_start", "x"]),
    ("--recover.steps", ["--recover.steps", "5"]),
    ("--recover.steps", ["--recover", "false", "--recover.steps", "5"]),
    ("--recover", ["--recover={steps: 5}"]),
    ("recover.rank", ["--recover", "--recover.rank", "4"]),
    ("recover.rank", ["--recover", "--recover.rank", "4", "--recover.methods", "router"]),
    ("recover.ridge", ["--recover", "--recover.ridge", "0.1", "--recover.methods", "logits"]),
    ("recover.label_weight", ["--recover", "--recover.label_weight", "0.5"]),
    ("recover.block_tokens", ["--recover", "--recover.block_tokens", "99", "--recover.methods", "logits"]),
    ("recover.zero_stage", ["--recover", "--recover.zero_stage", "2"]),
    ("recover.train", ["--recover", "--recover.train", "experts", "--recover.methods", "router"]),
    *(
        (f"recover.{option}", ["--recover", "--recover.methods", "closed_form", f"--recover.{option}", value])
        for option, value in (("steps", "4"), ("learning_rate", "0.1"), ("batch_size", "4"), ("checks", "4"),
                              ("patience", "4"), ("gradient_checkpointing", "true"))
    ),
]  # fmt: skip

IMPOSSIBLE = [
    ("evaluation.threads", ["--evaluation.threads", "100000"]),
    ("--memory_gib", ["--memory_gib", "1e300"]),
    ("model.max_memory", ["--model.sharding", "device_map", "--model.max_memory", "{gpu: 1GiB}"]),
    ("model.max_memory", ["--model.sharding", "device_map", "--model.max_memory", "{-1: 1GiB}"]),
    ("model.max_memory", ["--model.sharding", "device_map", "--model.max_memory", f"{{0: {'9' * 20}TiB}}"]),
    ("cluster.address", ["--cluster.address", ""]),
    *((f"cluster.{option}", ["--cluster.address", "local", f"--cluster.{option}", "1e300"])
      for option in ("deadline_s", "load_timeout_s", "idle_release_s")),
    ("cluster.service", ["--cluster.address", "local", "--cluster.service", "a\x1b[31m"]),
    ("tracking.tags", ["--tracking.tags", r'["\e[31m"]']),
    ("tracking.tags", ["--tracking.tags", "[a, a]"]),
    ("tracking.group", ["--tracking.group", "a\nb"]),
    ("tracking.project", ["--tracking.project", "\x1b[31m"]),
    ("search.init", ["--search.init", "reap,reap"]),
    ("selection.baselines", ["--selection.baselines", "reap,reap"]),
    ("search.surrogate.priors", ["--search.algorithm", "surrogate", "--search.surrogate.priors", "[reap, reap]"]),
    ("recover.train", ["--recover", "--recover.train", "experts,experts"]),
    ("recover.learning_rate", ["--recover", "--recover.learning_rate", "1e30"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words"), UNREAD + IMPOSSIBLE, ids=str)
def test_it_is_refused_in_one_line_that_names_it(
    name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    told = capsys.readouterr().err.replace("this run cannot start: ", "").splitlines()[-1]
    assert told.startswith(f"moe-evo: error: {name}: got ") and ", expected " in told


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "--method", "reap", "--num_kept", "4", "--to", ""],
        ["prune", "--method", "reap", "--num_kept", "4", "--to", "x", "--observations", ""],
        ["evaluate", "--samples", ""],
        ["evaluate", "--genome", ""],
        ["evaluate", "--baseline", ""],
        ["show", ""],
        ["compare", ""],
    ],
    ids=str,
)
def test_an_empty_word_is_no_path_and_no_genome(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("moe-evo: error: ")


def test_a_file_may_have_a_section_of_recovery_that_a_search_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("recover: {steps: 5}\n")
    assert main(["plan", str(tmp_path / "both.yaml")]) == 0
