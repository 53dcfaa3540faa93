"""A model's place: folders and Hugging Face names are told apart at once, without torch and without a network."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_evo.errors import ModelError
from moe_evo.models.location import is_hub_name, location

HEAVY = """
import sys
from moe_evo.cli.main import main
code = main(sys.argv[1:])
print(sorted({"torch", "transformers", "huggingface_hub"} & sys.modules.keys()))
sys.exit(code)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "checkpoints" / "olmoe").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path",
    ["checkpoints/olmoo", "chekpoints/olmoe", "./typo", "/typo", "~/typo-of-a-model", "typo", "a/b/c", "checkpoints/",
     "checkpoints/none/model", "file", "owner/", "owner/a model", "../owner/model"],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_looked_for_on_hugging_face(path: str, here: Path) -> None:
    if path == "checkpoints/":
        assert location(path) == Path("checkpoints")
        return
    with pytest.raises(ModelError, match=r"no such folder|is a file") as found:
        location(path)
    assert str(found.value).startswith(f"{path}: ")
    assert not is_hub_name(path)


@pytest.mark.parametrize(
    ("path", "meant"), [("checkpoints/olmoo", "checkpoints/olmoe"), ("chekpoints/olmoe", "checkpoints/olmoe")]
)
def test_a_mistyped_folder_is_told_with_the_one_that_is_probably_meant(path: str, meant: str, here: Path) -> None:
    with pytest.raises(ModelError, match=rf"did you mean {meant}\? Or give"):
        location(path)


@pytest.mark.parametrize("path", ["allenai/OLMoE-1B-7B-0125-Instruct", "Qwen/Qwen3-30B-A3B", "chekpoints/mixtral"])
def test_owner_and_model_are_a_name_on_hugging_face(path: str, here: Path) -> None:
    assert location(path) == path
    assert is_hub_name(path)


def test_the_embedded_models_and_folders_are_found(here: Path) -> None:
    assert (Path(location("embedded")) / "config.json").is_file()
    assert location("checkpoints/olmoe") == Path("checkpoints/olmoe")


@pytest.mark.parametrize(
    "words",
    [
        ["search", "--model.path", "./typo"],
        ["evaluate", "--model.path", "checkpoints/olmoo"],
        ["prune", "--model.path", "./typo", "--method", "reap", "--num_kept", "4", "--to", "out"],
        ["sweep", "--model.path", "./typo", "--sweep.seeds", "0,1"],
        ["compress", "./typo", "--method", "moe_pruner", "--to", "out"],
        ["recover", "checkpoints/olmoe", "--model.path", "./typo", "--to", "out"],
    ],
)
def test_a_missing_folder_is_one_line_before_torch_is_imported(words: list[str], here: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HEAVY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("moe-evo: error: ") and "no such folder" in line


def test_the_first_line_comes_before_the_slow_imports_and_not_for_help(here: Path) -> None:
    words = [sys.executable, "-m", "moe_evo", "search", "--tasks", "[nowhere.jsonl]"]
    started = time.monotonic()
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        first, first_s = process.stderr.readline(), time.monotonic() - started
        rest, all_s = process.stderr.read(), time.monotonic() - started
    assert first == "starting, importing torch and transformers ...\n"
    assert first_s < all_s / 2
    (line,) = rest.splitlines()
    assert line.startswith("moe-evo: error: task nowhere: ")
    for quick in (["--help"], ["--version"], ["search", "--help"], ["show", "--help"]):
        done = subprocess.run([sys.executable, "-m", "moe_evo", *quick], capture_output=True, text=True, check=True)
        assert done.stderr == ""
