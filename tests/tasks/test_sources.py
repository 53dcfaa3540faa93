"""Files, folders and datasets of any format as a task's data: which split takes what, and what is told of mistakes."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError, TaskError
from moe_evo.tasks.data import read_task
from moe_evo.tasks.sources import task_name

Rows = Sequence[Mapping[str, Any]]

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the extra `datasets` is not installed"
)
QUESTIONS = [
    {"question": f"Is {n} even?", "a": "yes", "b": "no", "right": n % 2, "words": ["yes", "no"], "key": "AB"[n % 2]}
    for n in range(60)
]
FIELDS = {"prompt": "question", "choices": ["a", "b"], "label": "right"}


def write_csv(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "words"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def config(path: object, **options: Any) -> TaskConfig:
    return TaskConfig(data=str(path), **{"fields": FIELDS, **options})


def examples(read: TaskConfig) -> list[tuple[str, tuple[str, ...], int | None]]:
    """Of all splits, in one order."""
    return sorted((one.prompt, one.choices, one.label) for part in read_task(read).splits.values() for one in part)


def test_columns_become_the_same_examples_from_csv_and_parquet_and_jsonl(tmp_path: Path) -> None:
    expected = sorted((row["question"], ("yes", "no"), row["right"]) for row in QUESTIONS)
    jsonl = tmp_path / "q.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for path in (write_csv(tmp_path / "q.csv", QUESTIONS), write_parquet(tmp_path / "q.parquet", QUESTIONS), jsonl):
        assert examples(config(path)) == expected
    parquet = tmp_path / "q.parquet"
    for fields in (
        {"prompt": "{{ question }}", "choices": "words", "label": "key"},
        {"prompt": "question", "choices": "{{ [a, b] }}", "label": "{{ a if right == 0 else b }}"},
        {"prompt": "question", "choices": ["{{ a }}", "{{row['b']}}"], "label": "{{ right + 1 - 1 }}"},
        {"prompt": "{% if question %}{{ question }}{% endif %}", "choices": "words", "label": "{{ words[right] }}"},
    ):
        assert examples(config(parquet, fields=fields)) == expected


def test_parts_of_columns_are_named_with_points(tmp_path: Path) -> None:
    rows = [{"q": f"{n}?", "answers": {"text": [f"a{n}"], "start": [n]}} for n in range(40)]
    path = write_parquet(tmp_path / "squad.parquet", rows)
    data = read_task(config(path, fields={"prompt": "Say {{ q }}", "answers": "answers.text"}))
    assert data.kind == "generation"
    found = {one.prompt: one.answers for part in data.splits.values() for one in part}
    assert found == {f"Say {n}?": (f"a{n}",) for n in range(40)}


def test_letters_that_stand_in_a_column_of_their_own_are_looked_up(tmp_path: Path) -> None:
    """The form of ARC, whose letters are digits in some rows."""
    names = (["A", "B"], ["1", "2"])
    rows = [
        {"q": f"{n}?", "choices": {"text": ["yes", "no"], "label": names[n // 2 % 2]}, "key": names[n // 2 % 2][n % 2]}
        for n in range(40)
    ]
    path = write_parquet(tmp_path / "arc.parquet", rows)
    fields = {"prompt": "q", "choices": "choices.text", "label": "{{ choices.label.index(key) }}"}
    assert all(int(prompt[:-1]) % 2 == label for prompt, _, label in examples(config(path, fields=fields)))
    with pytest.raises(TaskError, match=r"row 3: label: got '1', .* \(label is made of 'key'\)"):
        read_task(config(path, fields={**fields, "label": "key"}))


def test_numbers_that_a_template_gives_are_texts_among_answers(tmp_path: Path) -> None:
    rows = [{"x": n, "y": 2 * n} for n in range(40)]
    path = write_parquet(tmp_path / "sums.parquet", rows)
    data = read_task(config(path, fields={"prompt": "{{ x }} + {{ x }} =", "answers": "{{ y }}"}))
    found = {one.prompt: one.answers for part in data.splits.values() for one in part}
    assert found["4 + 4 ="] == ("8",)


@pytest.mark.parametrize(
    ("label", "index"),
    [(0, 0), (2, 2), ("B", 1), ("no", 1), (" no ", 1), ("A", 2)],
)
def test_a_label_is_an_index_a_letter_or_a_text_and_a_text_wins(tmp_path: Path, label: object, index: int) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": f"p{n}", "choices": ["yes", "no", "A"], "label": label} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {one[2] for one in examples(TaskConfig(data=str(path)))} == {index}


@pytest.mark.parametrize("label", ["D", "b", "1", "", "maybe", 3, -1, True, 1.0, None])
def test_a_label_that_names_no_choice_is_refused(tmp_path: Path, label: object) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "p", "choices": ["yes", "no", "A"], "label": label}))
    with pytest.raises(
        TaskError, match=r"t\.jsonl:1: label: got .*, expected an integer from 0 to 2, .* letter or text"
    ):
        read_task(TaskConfig(data=str(path)))


def test_digits_of_a_csv_are_an_index_unless_they_are_a_choice(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "a": "5", "b": "1", "right": "1"} for n in range(40)]
    assert {one[2] for one in examples(config(write_csv(tmp_path / "a.csv", rows)))} == {1}
    rows = [{"question": f"{n}?", "a": "1", "b": "5", "right": "1"} for n in range(40)]
    assert {one[2] for one in examples(config(write_csv(tmp_path / "b.csv", rows)))} == {0}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({**FIELDS, "prompt": "qestion"}, "prompt: no column 'qestion'; got the columns"),
        ({**FIELDS, "label": "question"}, "label: got 'Is 0 even?', expected an integer from 0 to 1"),
        ({**FIELDS, "label": "question"}, "(label is made of 'question')"),
        ({**FIELDS, "prompt": "{{ qestion }}"}, "prompt: the template '{{ qestion }}' fails ('qestion' is u"),
        ({**FIELDS, "label": "{{ rihgt }}"}, "label: the template '{{ rihgt }}' fails ('rihgt' is undefined)"),
        ({**FIELDS, "label": "{{ right + 'x' }}"}, "label: the template \"{{ right + 'x' }}\" fails (unsupp"),
        ({**FIELDS, "choices": "{{ a.__class__.__mro__ }}"}, "choices: the template '{{ a.__class__.__mro__ }}' fails"),
        ({**FIELDS, "prompt": "right"}, "expected a string that is not blank (prompt is made of 'right')"),
    ],
)  # fmt: skip
def test_a_wrong_mapping_is_told_with_file_row_and_column(tmp_path: Path, fields: Any, told: str) -> None:
    path = write_parquet(tmp_path / "q.parquet", QUESTIONS)
    with pytest.raises(TaskError) as caught:
        read_task(config(path, fields=fields))
    assert str(caught.value).startswith(f"{path}, row 1: ")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_row_of_a_csv_is_told_with_its_line_and_column(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "q.csv", [*QUESTIONS, {**QUESTIONS[0], "right": "neither"}])
    with pytest.raises(TaskError, match=r"q\.csv:62: label: got 'neither', .* \(label is made of 'right'\)"):
        read_task(config(path))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fields": {"promt": "question"}}, r"fields: got \['promt'\], expected names among prompt, choices"),
        ({"fields": {"prompt": ""}}, "names of columns, or templates, none empty"),
        ({"fields": {"prompt": []}}, "names of columns, or templates, none empty"),
        ({"splits": {"train": "train"}}, r"splits: got \['train'\], expected names among search, validation, test"),
        ({"subset": "main"}, "subset: got 'main', expected none, as data is no Hugging Face dataset"),
        ({"system": "Be kind."}, "system: got 'Be kind.', expected none without chat_template"),
    ],
)
def test_an_impossible_option_is_refused_before_anything_is_read(options: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TaskConfig(data="nowhere.csv", **options)


def test_a_text_that_is_no_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fields\.prompt: got '{{ question', which is no Jinja template"):
        read_task(config(write_csv(tmp_path / "q.csv", QUESTIONS), fields={**FIELDS, "prompt": "{{ question"}))


def test_a_folder_may_hold_train_in_place_of_search_in_any_format(tmp_path: Path) -> None:
    folder = tmp_path / "quiz"
    write_csv(folder / "train.csv", QUESTIONS[:30])
    write_parquet(folder / "validation.parquet", QUESTIONS[30:40])
    write_csv(folder / "test.csv", QUESTIONS[40:])
    (folder / "README.md").write_text("# about")
    data = read_task(config(folder))
    assert {split: len(part) for split, part in data.splits.items()} == {"search": 30, "validation": 10, "test": 20}
    assert data.name == "quiz" and data.splits["search"][0].where == f"{folder}/train.csv:2"


def test_splits_are_named_and_two_may_divide_one(tmp_path: Path) -> None:
    folder = tmp_path / "quiz"
    write_csv(folder / "train.csv", QUESTIONS[:50])
    write_csv(folder / "dev.csv", QUESTIONS[50:])
    splits = {"search": "train", "validation": "train", "test": "dev"}
    data = read_task(config(folder, splits=splits, split_shares=(0.6, 0.2, 0.2)))
    sizes = {split: len(part) for split, part in data.splits.items()}
    assert sizes["search"] + sizes["validation"] == 50 and sizes["test"] == 10
    assert 30 <= sizes["search"] <= 45, "three of four"
    assert {one.prompt for one in data.splits["test"]} == {row["question"] for row in QUESTIONS[50:]}
    with pytest.raises(TaskError, match=r"has no split for validation and test, .* it has dev, train; name them"):
        read_task(config(folder))
    with pytest.raises(TaskError, match=r"splits: test: got 'tset', expected one of those that .* has: dev, train"):
        read_task(config(folder, splits={**splits, "test": "tset"}))
    with pytest.raises(TaskError, match=r"splits: .* expected none, as data is one file"):
        read_task(config(folder / "train.csv", splits=splits))
    write_parquet(folder / "train.parquet", QUESTIONS)
    with pytest.raises(TaskError, match=r"has both train\.csv and train\.parquet"):
        read_task(config(folder, splits=splits))


def test_names_of_tasks_leave_out_how_the_file_is_read() -> None:
    assert task_name(TaskConfig(data="some/mine.csv.gz")) == "mine"
    assert task_name(TaskConfig(data="hf:openai/gsm8k@main", subset="socratic")) == "gsm8k-socratic"
    assert task_name(TaskConfig(data="hf:gsm8k")) == "gsm8k"


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the extra `datasets` is installed")
def test_a_dataset_without_the_library_says_what_to_install() -> None:
    with pytest.raises(
        TaskError, match=r"task gsm8k: data: hf: needs the library `datasets`, .* 'moe_evo\[datasets\]'"
    ):
        read_task(config("hf:openai/gsm8k"))


def saved(folder: Path, **splits: Rows) -> str:
    """A dataset as `save_to_disk` writes it."""
    import datasets

    made = {name: datasets.Dataset.from_list([dict(row) for row in rows]) for name, rows in splits.items()}
    (made[""] if "" in made else datasets.DatasetDict(made)).save_to_disk(folder)
    return f"hf:{folder}"


@needs_datasets
def test_a_saved_dataset_is_read_by_its_splits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = saved(tmp_path / "quiz", train=QUESTIONS[:40], test=QUESTIONS[40:])
    capfd.readouterr()
    splits = {"search": "train", "validation": "train", "test": "test"}
    read = read_task(config(data, splits=splits))
    assert read.name == "quiz" and len(read.splits["test"]) == 20
    assert read.splits["test"][0].where == f"{data} test, row 1"
    assert len(read.splits["search"]) + len(read.splits["validation"]) == 40
    assert read.hash == read_task(config(data, splits=splits)).hash
    assert read.hash != read_task(config(data, splits={**splits, "test": "train"}, num_test=4)).hash
    assert capfd.readouterr() == ("", "")
    with pytest.raises(TaskError, match=r"has no split for validation, expected all of train, validation and test; it"):
        read_task(config(data))
    whole = saved(tmp_path / "whole", **{"": QUESTIONS})
    assert examples(config(whole)) == sorted((row["question"], ("yes", "no"), row["right"]) for row in QUESTIONS)


@needs_datasets
def test_a_folder_of_the_hub_is_read_with_its_subsets_and_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    for subset, rows in (("easy", QUESTIONS[:30]), ("hard", QUESTIONS[30:])):
        write_parquet(folder / subset / "train-00000-of-00002.parquet", rows[:10])
        write_parquet(folder / subset / "train-00001-of-00002.parquet", rows[10:20])
        write_parquet(folder / subset / "test-00000-of-00001.parquet", rows[20:])
    configs = [{"config_name": name, "data_files": [
        {"split": split, "path": f"{name}/{split}-*"} for split in ("train", "test")]} for name in ("easy", "hard")
    ]  # fmt: skip
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n# Quiz\n")
    splits = {"search": "train", "validation": "train", "test": "test"}
    read = read_task(config(f"hf:{folder}", subset="hard", splits=splits))
    assert read.name == "hub-hard"
    assert [one.prompt for one in read.splits["test"]] == [row["question"] for row in QUESTIONS[50:]]
    part = read_task(config(f"hf:{folder}", subset="hard", splits={**splits, "test": "test[:4]"}))
    assert [one.prompt for one in part.splits["test"]] == [row["question"] for row in QUESTIONS[50:54]]
    with pytest.raises(TaskError, match=r"the dataset '.*hub' cannot be read \(ValueError: .*easy.*hard"):
        read_task(config(f"hf:{folder}", subset="middle", splits=splits))
