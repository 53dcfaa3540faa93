"""cluster/slurm.sh, with stubs in place of Slurm and Ray: the command that it builds, resubmission, time limits."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from stub_programs import CLUSTER, StubPrograms

JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "32",
    "SLURM_GPUS_ON_NODE": "4",
}
SCONTROL = """
if sys.argv[1:3] == ["show", "hostnames"]:
    print("gpu01\\ngpu02")
"""
SRUN = """
folder = Path(sys.argv[sys.argv.index("--folder") + 1])
code = int(os.environ.get("STUB_CODE", "0"))
if os.environ.get("STUB_SLEEPS"):
    import time
    time.sleep(float(os.environ["STUB_SLEEPS"]))
if code == 0 and not os.environ.get("STUB_NO_RESULT"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text("{}")
sys.exit(code)
"""

Sbatch = Callable[..., CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> StubPrograms:
    stubs = StubPrograms(tmp_path / "bin")
    stubs.add("ray")
    stubs.add("scontrol", SCONTROL)
    stubs.add("srun", SRUN)
    return stubs


@pytest.fixture
def sbatch(programs: StubPrograms, tmp_path: Path) -> Sbatch:
    """The script as Slurm's batch step runs it, in the folder where sbatch was called."""
    (tmp_path / "search.yaml").write_text("tasks: [syll]\n")

    def run(*arguments: str, **environment: str) -> CompletedProcess[str]:
        return programs.run("slurm.sh", arguments, tmp_path, JOB | environment)

    return run


def the_srun(programs: StubPrograms) -> dict:
    (call,) = (call for call in programs.calls if call["program"] == "srun")
    return call


def test_one_symmetric_run_covers_all_nodes_of_the_job(sbatch: Sbatch, programs: StubPrograms, tmp_path: Path) -> None:
    done = sbatch("search.yaml", "--search.num_kept", "4", "--tasks", "[a b.jsonl]")
    assert done.returncode == 0, done.stderr
    assert the_srun(programs)["argv"] == [
        "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--no-kill",
        "ray", "symmetric-run", "--address", "gpu01:23456", "--min-nodes", "2", "--num-cpus=32", "--num-gpus=4", "--",
        "python", "-m", "moe_evo", "search", "search.yaml", "--cluster.address", "auto",
        "--folder", f"{tmp_path}/runs/search", "--search.num_kept", "4", "--tasks", "[a b.jsonl]",
    ]  # fmt: skip


def test_ray_reads_the_command_as_it_is_meant(sbatch: Sbatch, programs: StubPrograms) -> None:
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    sbatch("search.yaml")
    words = the_srun(programs)["argv"]
    ours = words[words.index("symmetric-run") + 1 : words.index("--")]
    assert curate_and_validate_ray_start_args(ours) == ["--num-cpus=32", "--num-gpus=4"]


@pytest.mark.parametrize(
    ("arguments", "environment", "folder"),
    [
        ([], {"MOE_EVO_RUNS": "/dev/shm/nowhere"}, None),
        (["--folder", "mine/run"], {}, "mine/run"),
        (["--folder=mine/run"], {}, "mine/run"),
        ([], {"MOE_EVO_RUNS": "elsewhere"}, "elsewhere/search"),
    ],
)
def test_the_run_folder_is_absolute(
    sbatch: Sbatch, programs: StubPrograms, tmp_path: Path, arguments: list[str], environment: dict[str, str],
    folder: str | None,
) -> None:  # fmt: skip
    sbatch("search.yaml", *arguments, **environment, **({} if folder else {"STUB_CODE": "3"}))
    words = the_srun(programs)["argv"]
    expected = str(tmp_path / folder) if folder else "/dev/shm/nowhere/search"
    assert words[words.index("--folder") + 1] == expected and words.count("--folder") == 1


def test_resubmission_is_the_same_command(sbatch: Sbatch, programs: StubPrograms) -> None:
    sbatch("search.yaml")
    sbatch("search.yaml")
    first, second = (call["argv"] for call in programs.calls if call["program"] == "srun")
    assert first == second


def test_every_job_has_a_token_of_its_own_that_no_command_line_shows(sbatch: Sbatch, programs: StubPrograms) -> None:
    outputs = "".join(done.stdout + done.stderr for done in (sbatch("search.yaml"), sbatch("search.yaml")))
    calls = [call for call in programs.calls if call["program"] == "srun"]
    tokens = [call["environment"]["RAY_AUTH_TOKEN"] for call in calls]
    assert [call["environment"]["RAY_AUTH_MODE"] for call in calls] == ["token", "token"]
    assert len(set(tokens)) == 2 and {len(token) for token in tokens} == {64}
    assert not any(token in outputs + " ".join(calls[0]["argv"] + calls[1]["argv"]) for token in tokens)


def test_a_token_file_of_ones_own_is_kept(sbatch: Sbatch, programs: StubPrograms) -> None:
    sbatch("search.yaml", RAY_AUTH_TOKEN_PATH="/home/me/.ray/auth_token")
    environment = the_srun(programs)["environment"]
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/home/me/.ray/auth_token" and "RAY_AUTH_TOKEN" not in environment


@pytest.mark.parametrize("code", [1, 2, 130])
def test_the_exit_code_is_that_of_the_search(sbatch: Sbatch, code: int) -> None:
    assert sbatch("search.yaml", STUB_CODE=str(code)).returncode == code


def test_a_ray_that_did_not_start_is_no_success(sbatch: Sbatch) -> None:
    done = sbatch("search.yaml", STUB_NO_RESULT="1")
    assert done.returncode == 1 and "Ray did not start" in done.stderr


def test_before_its_time_is_over_the_job_goes_back_into_the_queue(
    sbatch: Sbatch, programs: StubPrograms, tmp_path: Path
) -> None:
    environment = os.environ | JOB | {"PATH": f"{programs.folder}:/usr/bin:/bin", "STUB_SLEEPS": "3"}
    process = subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sh"), "search.yaml"], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not any(call["program"] == "srun" for call in programs.calls):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert ["requeue", "123456"] in [call["argv"] for call in programs.calls]
    assert "back into the queue" in output
    assert process.returncode == 0, "a step that still ends in time is not cut off"


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "words"),
    [
        ([], {}, 2, "usage: sbatch"),
        (["--help"], {}, 0, "usage: sbatch"),
        (["missing.yaml"], {}, 2, "missing.yaml: no such file"),
        (["search.yaml", "--folder"], {}, 2, "--folder: needs a value"),
        (["search.yaml", "--folder="], {}, 2, "--folder: got nothing"),
        (["search.yaml"], {"SLURM_JOB_ID": ""}, 2, "use: sbatch"),
    ],
)
def test_wrong_use_is_told(
    sbatch: Sbatch, arguments: list[str], environment: dict[str, str], code: int, words: str
) -> None:
    done = sbatch(*arguments, **environment)
    assert done.returncode == code and words in done.stderr


def test_slurm_reads_its_directives_before_the_first_command() -> None:
    lines = (CLUSTER / "slurm.sh").read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives and max(directives) < first_command
    given = {lines[number].split()[1].split("=")[0] for number in directives}
    assert given >= {"--exclusive", "--requeue", "--open-mode", "--signal", "--time", "--ntasks-per-node"}
