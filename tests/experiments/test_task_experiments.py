"""The experiments on data of one's own, each run as it stands on tiny data and the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_evo.cli.main import main
from moe_evo.config.model import ModelConfig
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.records.result import RunResult

TASKS = Path(__file__).parents[2] / "experiments" / "tasks"
QWEN_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def arc(folder: Path) -> Path:
    """A folder in the columns of ARC; letters are digits in some rows."""
    folder.mkdir()
    for split, first in (("train", 0), ("validation", 30), ("test", 60)):
        rows = []
        for n in range(first, first + 30):
            label = ["1", "2", "3", "4"] if n % 5 == 0 else ["A", "B", "C", "D"]
            choices = {"text": [f"{n + k}" for k in range(4)], "label": label}
            rows.append({"id": f"{n}", "question": f"What is {n} + 1?", "choices": choices, "answerKey": label[1]})
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def chats(file: Path) -> Path:
    rows = [
        {"messages": [
            {"role": "user", "content": f"Remember {n}."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "What was it?"},
            {"role": "assistant", "content": f"It was {n}."},
        ]}
        for n in range(60)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def model(folder: Path) -> Path:
    """The embedded model with a chat template that thinks."""
    shutil.copytree(ModelSource(ModelConfig()).location, folder)
    (folder / "chat_template.jinja").write_text(QWEN_LIKE)
    return folder


def words(experiment: str, folder: Path, data: Path) -> list[str]:
    """The experiment, on these data and in this process."""
    here = ["--model.dtype", "float32", "--model.sharding", "single", "--evaluation.threads", "1"]
    return [str(TASKS / experiment), "--model.path", str(model(folder / "model")), "--tasks.data", str(data), *here]


def previewed(capsys: pytest.CaptureFixture[str], given: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["tasks", "preview", *given, "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)
    return dict(task)


def searched(given: list[str], folder: Path) -> RunResult:
    short = ["--search.evaluations", "4", "--selection.finalists", "1", "--selection.baselines", "[]"]
    assert main(["search", *given, *short, "--search.num_kept", "4", "--folder", str(folder)]) == 0
    return RunFolder.existing(str(folder)).read_result()


def test_a_folder_of_parquet_in_the_columns_of_arc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words("dataset_folder.yaml", tmp_path, arc(tmp_path / "arc"))
    task = previewed(capsys, given)
    assert (task["kind"], task["num_examples"]) == ("choice", 30)
    first = task["examples"][0]
    assert first["text"] == "Question: What is 0 + 1?\nAnswer: " and first["right"] == ["1"]
    assert ["".join(row["scored"]) for row in first["rows"]] == [" 0", " 1", " 2", " 3"]
    (facts,) = searched(given, tmp_path / "run").tasks
    assert (facts.metric, facts.search_metric) == ("accuracy_norm", "probability_norm")
    assert facts.examples == {"search": 30, "validation": 30, "test": 30}


def test_chats_with_a_model_that_would_think(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words("chats.yaml", tmp_path, chats(tmp_path / "chats.jsonl"))
    task = previewed(capsys, given)
    first = task["examples"][0]
    assert task["kind"] == "generation" and task["notes"] == []
    assert first["text"].startswith("<|im_start|>user\nRemember ") and first["right"][0].startswith("It was ")
    assert first["text"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "".join(first["rows"][0]["read"]).endswith(first["text"])
    result = searched([*given, "--tasks.num_search", "8"], tmp_path / "run")
    assert (result.tasks[0].metric, result.tasks[0].search_metric) == ("f1", "log_likelihood")
    untold = [*given[:1], "--tasks.chat_template_kwargs", "{}", *given[1:]]
    (note,) = previewed(capsys, untold)["notes"]
    assert "is left out by chat_template_kwargs enable_thinking: false" in note
