"""cluster/submit.sh, with a stub in place of `ray`: what it calls, what it uploads, what it never shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from stub_programs import StubPrograms

TOKEN = "5ec2e7" * 8
KEY = 'hf_it\'s: "secret" {#}'

RAY = """
words = sys.argv[1:]
state = os.environ.get("STUB_STATE", "succeeded")
if words[:2] == ["job", "list"]:
    sys.exit(os.environ.get("STUB_REFUSAL") or 0)
if words[:2] == ["job", "submit"]:
    sys.exit(int(os.environ.get("STUB_SUBMIT", "0")))
if state == "unknown":
    sys.exit("no such job")
print(f"Job '{words[-1]}' {state}")
"""

Submit = Callable[..., CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> StubPrograms:
    stubs = StubPrograms(tmp_path / "bin")
    stubs.add("ray", RAY)
    return stubs


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "keep 4.yaml").write_text("tasks: [data/mine.jsonl]\n")
    (folder / "search.yaml").write_text("tasks: [data/mine.jsonl]\n")
    (folder / "data").mkdir()
    (folder / "data" / "mine.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def submit(programs: StubPrograms, project: Path) -> Submit:
    def run(*arguments: str, **environment: str) -> CompletedProcess[str]:
        return programs.run("submit.sh", arguments, project, environment)

    return run


def submission(programs: StubPrograms) -> dict:
    return next(call for call in programs.calls if call["argv"][1] == "submit")


def submitted(programs: StubPrograms) -> list[str]:
    words: list[str] = submission(programs)["argv"]
    return words


def test_the_whole_command_is_what_ray_expects(submit: Submit, programs: StubPrograms, project: Path) -> None:
    done = submit("search.yaml", "--submission-id", "mine", "--search.num_kept", "4", "--tasks", "[a b.jsonl]")
    assert done.returncode == 0, done.stderr
    words = submitted(programs)
    runtime_env = words[words.index("--runtime-env") + 1]
    assert words == [
        "job", "submit", "--address", "http://127.0.0.1:8265", "--submission-id", "mine",
        "--working-dir", str(project), "--runtime-env", runtime_env, "--",
        "python", "-m", "moe_evo", "search", "search.yaml", "--cluster.address", "auto",
        "--folder", f"{project}/runs/search", "--search.num_kept", "4", "--tasks", "[a b.jsonl]",
    ]  # fmt: skip
    assert [call["argv"][:2] for call in programs.calls] == [["job", one] for one in ("list", "submit", "status")]
    assert not Path(runtime_env).parent.exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "folder"),
    [
        (["search.yaml"], {}, "{project}/runs/search"),
        (["search.yaml"], {"MOE_EVO_RUNS": "/shared/runs"}, "/shared/runs/search"),
        (["search.yaml"], {"MOE_EVO_RUNS": "elsewhere"}, "{project}/elsewhere/search"),
        (["search.yaml", "--folder", "out/a b"], {"MOE_EVO_RUNS": "/shared"}, "{project}/out/a b"),
        (["--folder=/shared/x", "search.yaml"], {}, "/shared/x"),
        (["configs/keep 4.yaml"], {}, "{project}/runs/keep 4"),
    ],
)
def test_the_run_folder_is_absolute(
    submit: Submit, programs: StubPrograms, project: Path, arguments: list[str], environment: dict[str, str],
    folder: str,
) -> None:  # fmt: skip
    assert submit(*arguments, **environment).returncode == 0
    words = submitted(programs)
    assert words[words.index("--folder") + 1] == folder.format(project=project)
    assert words.count("--folder") == 1


def test_address_python_and_no_wait_are_passed_on(submit: Submit, programs: StubPrograms) -> None:
    done = submit("search.yaml", "--no-wait", "--python=/venv/bin/python", RAY_API_SERVER_ADDRESS="http://head:8265")
    assert done.returncode == 0
    words = submitted(programs)
    assert words[words.index("--address") + 1] == "http://head:8265"
    assert words.index("--no-wait") < words.index("--")
    assert words[words.index("--") + 1 :][:3] == ["/venv/bin/python", "-m", "moe_evo"]
    assert [call["argv"][1] for call in programs.calls] == ["list", "submit"], "nobody waits or asks for the state"


def test_an_address_flag_wins_over_the_environment(submit: Submit, programs: StubPrograms) -> None:
    submit("search.yaml", "--address", "http://other:1", RAY_API_SERVER_ADDRESS="http://head:8265")
    words = submitted(programs)
    assert words[words.index("--address") + 1] == "http://other:1"


def test_two_submissions_have_two_names_and_one_folder(submit: Submit, programs: StubPrograms) -> None:
    submit("search.yaml")
    submit("search.yaml")
    first, second = (call["argv"] for call in programs.calls if call["argv"][1] == "submit")
    name = first.index("--submission-id") + 1
    assert first[name] != second[name] and first[name].startswith("moe-evo-search-")
    assert first[first.index("--folder") + 1] == second[second.index("--folder") + 1]


def test_flags_after_two_dashes_are_not_read_here(submit: Submit, programs: StubPrograms) -> None:
    submit("search.yaml", "--", "--python", "x", "--help")
    assert submitted(programs)[-3:] == ["--python", "x", "--help"]


def test_the_token_stays_in_the_environment(submit: Submit, programs: StubPrograms) -> None:
    done = submit("search.yaml", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    for call in programs.calls:
        assert call["environment"]["RAY_AUTH_TOKEN"] == TOKEN
        assert TOKEN not in " ".join(call["argv"]) and TOKEN not in call.get("runtime_env", "")
    assert TOKEN not in done.stdout + done.stderr


def test_a_passed_secret_lies_in_a_private_file_and_nowhere_else(submit: Submit, programs: StubPrograms) -> None:
    done = submit(
        "search.yaml", "--pass-env", "HF_TOKEN", "--pass-env=OTHER", HF_TOKEN=KEY, OTHER="", WANDB_API_KEY="w"
    )
    assert done.returncode == 0, done.stderr
    call = submission(programs)
    assert yaml.safe_load(call["runtime_env"])["env_vars"] == {"HF_TOKEN": KEY, "OTHER": ""}
    assert call["modes"] == ["0o600", "0o700"]
    assert all(KEY not in word for one in programs.calls for word in one["argv"])
    assert KEY not in done.stdout + done.stderr


def test_no_secret_is_passed_unasked(submit: Submit, programs: StubPrograms) -> None:
    submit("search.yaml", HF_TOKEN=KEY, WANDB_API_KEY="w")
    assert "env_vars" not in yaml.safe_load(submission(programs)["runtime_env"])


def test_config_only_uploads_one_file(submit: Submit, programs: StubPrograms, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.yml"
    elsewhere.write_text("tasks: [syll]\n")
    assert submit(str(elsewhere), "--config-only").returncode == 0
    assert submission(programs)["uploaded"] == ["elsewhere.yml"]
    words = submitted(programs)
    assert words[words.index("search") + 1] == "elsewhere.yml"


def test_a_config_below_another_working_dir_is_named_from_there(
    submit: Submit, programs: StubPrograms, project: Path
) -> None:
    submit("configs/keep 4.yaml", "--working-dir", "configs")
    words = submitted(programs)
    assert words[words.index("--working-dir") + 1] == str(project / "configs")
    assert words[words.index("search") + 1] == "keep 4.yaml"


def test_checkpoints_and_caches_are_not_uploaded_but_data_and_package_are(
    submit: Submit, programs: StubPrograms, project: Path
) -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    submit("search.yaml")
    is_left_out = _get_excludes(project, yaml.safe_load(submission(programs)["runtime_env"])["excludes"])
    stays = [
        ".git/config", ".venv/bin/python", ".env", "runs/a/journal.sqlite", "model/model-00001.safetensors",
        "moe_evo/__pycache__/a.pyc", ".ruff_cache/x", "wandb/run", "a.gguf", "build/lib/x.py", "pytorch_model.bin",
        "other/moe_evo/data/model.safetensors",
    ]  # fmt: skip
    goes = [
        "search.yaml",
        "data/mine.jsonl",
        "moe_evo/cli/main.py",
        "moe_evo/runs/loop.py",
        "moe_evo/data/model/model.safetensors",
        "few.jsonl",
    ]

    def is_uploaded(path: str) -> bool:
        parts = Path(path).parts
        return not any(is_left_out(project.joinpath(*parts[: end + 1])) for end in range(len(parts)))

    assert [path for path in stays if is_uploaded(path)] == []
    assert [path for path in goes if not is_uploaded(path)] == []


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {}, "usage: cluster/submit.sh CONFIG.yaml"),
        (["missing.yaml"], {}, "missing.yaml: no such file"),
        (["--search.num_kept", "4", "search.yaml"], {}, "give CONFIG.yaml first"),
        (["search.yaml", "--folder"], {}, "--folder: needs a value"),
        (["search.yaml", "--folder="], {}, "--folder: got nothing"),
        (["search.yaml", "--pass-env", "HF_TOKEN"], {}, "HF_TOKEN is not set"),
        (["search.yaml", "--pass-env", "A=b"], {}, "expected the name of a variable"),
        (["search.yaml", "--pass-env", "RAY_AUTH_TOKEN"], {"RAY_AUTH_TOKEN": TOKEN}, "belongs to Ray"),
        (["search.yaml", "--pass-env", "KEY"], {"KEY": "a\nb"}, "line breaks"),
        (["search.yaml", "--working-dir", "nowhere"], {}, "nowhere is no folder"),
        (["search.yaml", "--working-dir", "data"], {}, "lies outside of"),
        (["search.yaml", "--working-dir", "."], {"HOME": "{project}"}, "would upload all of"),
        (["search.yaml", "--working-dir", ".", "--config-only"], {}, "expected one of the two"),
    ],
)
def test_wrong_input_is_told_before_anything_is_submitted(
    submit: Submit, programs: StubPrograms, project: Path, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    done = submit(*arguments, **{key: value.format(project=project) for key, value in environment.items()})
    assert done.returncode == 2 and words in done.stderr
    assert programs.calls == []


def test_a_missing_ray_is_told(tmp_path: Path, project: Path) -> None:
    done = StubPrograms(tmp_path / "empty").run("submit.sh", ["search.yaml"], project)
    assert done.returncode == 2 and "no ray on the PATH" in done.stderr


def test_help_is_not_an_error(submit: Submit) -> None:
    done = submit("--help")
    assert done.returncode == 0 and "--pass-env NAME" in done.stdout


@pytest.mark.parametrize(
    ("state", "ray_says", "code", "words"),
    [
        ("succeeded", 0, 0, "done; the result is in"),
        ("failed\nStatus message: Job entrypoint command failed with exit code 2, last", 1, 2, "wrong input"),
        ("failed\nStatus message: Job entrypoint command failed with exit code 130, last", 1, 130, "goes on"),
        ("failed\nStatus message: Job entrypoint command failed with exit code 1, last", 1, 1, "the whole log"),
        ("failed\nStatus message: Job entrypoint command failed with exit code -15, last", 1, 143, "goes on"),
        (
            "failed\nStatus message: Job entrypoint command failed with exit code 127, last", 1, 127,
            "nothing was started, as the cluster's nodes cannot run python; give",
        ),
        ("was stopped", 0, 130, "stopped; every finished evaluation is kept"),
        ("succeeded", 1, 2, "exists already"),
        ("unknown", 1, 1, "no exit code"),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_search(submit: Submit, state: str, ray_says: int, code: int, words: str) -> None:
    done = submit("search.yaml", STUB_STATE=state, STUB_SUBMIT=str(ray_says))
    assert done.returncode == code, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert code != 127 or "kept" not in done.stderr


def test_a_cluster_that_does_not_answer_is_one_line_and_nothing_is_submitted(
    submit: Submit, programs: StubPrograms
) -> None:
    refusal = "Traceback (most recent call last):\n  File ...\nConnectionError: Failed to connect to Ray\n"
    done = submit("search.yaml", "--address", "http://head:1", STUB_REFUSAL=refusal)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("submit.sh: error: no Ray cluster takes jobs at http://head:1 (ConnectionError: Failed to ")
    assert "`ray start --head`" in line and "--address" in line
    assert [call["argv"] for call in programs.calls] == [["job", "list", "--address", "http://head:1"]]
