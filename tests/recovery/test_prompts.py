"""What is learned from: prompts of the search split and of files, and nothing that is held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_tasks as tiny

from moe_evo.config.task import TaskConfig
from moe_evo.errors import TaskError
from moe_evo.recovery.prompts import file_prompts, read_prompts, split_prompts
from moe_evo.tasks.data import TaskData, read_task
from moe_evo.tasks.prompt import PromptFormat

CHOICES = [{"prompt": f"{n} is", "choices": [" yes", " no no"], "label": n % 2} for n in range(9)]


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    tiny.write_splits(tmp_path / "digits", CHOICES)
    return read_task(TaskConfig(data=str(tmp_path / "digits"), prefix="so: "))


def formats(*tasks: TaskData) -> list[PromptFormat]:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    return [PromptFormat(one.config, one, tokenizer) for one in tasks]


def text_of(tokens) -> str:
    return tiny.tiny_tokenizer(bos=True).decode(tokens, skip_special_tokens=True)


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


def test_prompts_of_a_split_look_as_the_task_s_and_lack_answers(data: TaskData) -> None:
    prompts = split_prompts([data], formats(data), "search", 8, labelled=False)
    assert [text_of(one.tokens) for one in prompts] == [f"so: {one.prompt}" for one in data.splits["search"]]
    assert all(one.lacks_answer and one.stop == "\n" for one in prompts)


def test_labelled_ones_have_the_right_answer(data: TaskData, tmp_path: Path) -> None:
    prompts = split_prompts([data], formats(data), "search", 8, labelled=True)
    for one, example in zip(prompts, data.splits["search"], strict=True):
        assert text_of(one.tokens + one.answer) == f"so: {example.prompt}{example.choices[example.label]}"
        assert not one.lacks_answer
    tiny.write_splits(tmp_path / "open", [{"prompt": f"{n} and", "answers": [f"{n}", "never"]} for n in range(9)])
    generation = read_task(TaskConfig(data=str(tmp_path / "open")))
    first = split_prompts([generation], formats(generation), "search", 8, labelled=True)[0]
    example = generation.splits["search"][0]
    assert text_of(first.tokens + first.answer) == f"{example.prompt} {example.answers[0]}"


def test_texts_are_read_whole_and_not_gone_on_with(tmp_path: Path) -> None:
    tiny.write_splits(tmp_path / "texts", [{"text": f"{n} is a text"} for n in range(9)])
    data = read_task(TaskConfig(data=str(tmp_path / "texts")))
    for labelled in (False, True):
        prompts = split_prompts([data], formats(data), "search", 8, labelled=labelled)
        assert [text_of(one.tokens) for one in prompts] == [one.text for one in data.splits["search"]]
        assert all(one.is_text and not one.lacks_answer for one in prompts)


def test_a_long_prompt_leaves_space_for_an_answer(tmp_path: Path) -> None:
    tiny.write_splits(
        tmp_path / "long", [{**one, "prompt": f"{n} " + "good bad " * 30} for n, one in enumerate(CHOICES)]
    )
    data = read_task(TaskConfig(data=str(tmp_path / "long"), max_length=20))
    (longest,) = {len(one.tokens) for one in split_prompts([data], formats(data), "search", 8, labelled=False)}
    assert longest == 12


def test_a_file_has_prompts_in_json_or_texts_line_by_line(data: TaskData, tmp_path: Path) -> None:
    lines = ['{"prompt": "one more", "label": 7}', "", '{"text": "a whole text"}']
    found = read_prompts(write(tmp_path / "more.jsonl", *lines), [data])
    prompts = file_prompts(found, formats(data), 8)
    assert [text_of(one.tokens) for one in prompts] == ["so: one more", "a whole text"]
    assert [(one.lacks_answer, one.is_text) for one in prompts] == [(True, False), (False, True)]
    plain = read_prompts(write(tmp_path / "more.txt", "  one line ", "", "{two: lines}"), [data])
    assert [text_of(one.tokens) for one in file_prompts(plain, formats(data), 8)] == ["one line", "{two: lines}"]
    assert plain.hash != found.hash


def test_rows_of_any_format_are_prompts_and_chats_need_a_chat_template(data: TaskData, tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path / "more.csv", "prompt,label", '"one, more",7', "two,8"), [data])
    assert [text_of(one.tokens) for one in file_prompts(found, formats(data), 8)] == ["so: one, more", "so: two"]
    chat = '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "one more"}]}'
    found = read_prompts(write(tmp_path / "m.jsonl", chat), [data])
    with pytest.raises(TaskError, match=r"m\.jsonl:1: has several turns or a system text, expected a prompt alone"):
        file_prompts(found, formats(data), 8)


def test_with_several_tasks_a_prompt_says_as_whose_it_is_formatted(data: TaskData, tmp_path: Path) -> None:
    tiny.write_splits(tmp_path / "other", [{**one, "prompt": f"other {one['prompt']}"} for one in CHOICES])
    other = read_task(TaskConfig(data=str(tmp_path / "other"), prefix="or: "))
    line = '{"prompt": "one more", "task": "other"}'
    (prompt,) = file_prompts(read_prompts(write(tmp_path / "m.jsonl", line), [data, other]), formats(data, other), 8)
    assert text_of(prompt.tokens) == "or: one more"
    for line, got in (('{"prompt": "x"}', None), ('{"prompt": "x", "task": "third"}', "third")):
        with pytest.raises(TaskError) as error:
            read_prompts(write(tmp_path / "m.jsonl", line), [data, other])
        assert f"m.jsonl:1: task: got {got!r}, expected one of digits, other, as whose prompts" in str(error.value)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_what_is_held_out_is_refused_however_it_is_written(
    split: str, suffix: str, data: TaskData, tmp_path: Path
) -> None:
    held_out = data.splits[split][0].prompt
    written = held_out.upper().replace(" ", "  ")
    line = f'{{"prompt": "{written}"}}' if suffix == "jsonl" else written
    with pytest.raises(TaskError) as error:
        read_prompts(write(tmp_path / f"m.{suffix}", '{"prompt": "fine"}', line), [data])
    assert f"m.{suffix}:2: is in the {split} split of task digits, by which the result is judged; leave it out" in str(
        error.value
    )


def test_examples_that_a_limit_leaves_out_are_held_out_all_the_same(data: TaskData, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "digits" / "test.jsonl", [{**CHOICES[0], "prompt": f"late {n}"} for n in range(4)])
    limited = read_task(replace(data.config, num_test=2))
    assert len(limited.splits["test"]) == 2
    for prompt in (f"late {n}" for n in range(4)):
        with pytest.raises(TaskError, match="is in the test split of task digits"):
            read_prompts(write(tmp_path / "m.txt", prompt), [limited])


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("m.jsonl", [], "m.jsonl: is empty, expected one prompt or text a line"),
        ("m.txt", ["  "], "m.txt: is empty, expected one prompt or text a line"),
        ("m.jsonl", ["not json"], "m.jsonl:1: not JSON"),
        ("m.jsonl", ["[1]"], "m.jsonl:1: got [1], expected a JSON object"),
        ("m.jsonl", ['{"question": "x"}'], "m.jsonl:1: has no 'prompt'; got the fields ['question']"),
        ("m.jsonl", ['{"prompt": " "}'], "m.jsonl:1: prompt: got ' ', expected a string that is not blank"),
    ],
)
def test_what_is_no_prompt_is_told_with_its_line(
    name: str, lines: list[str], expected: str, data: TaskData, tmp_path: Path
) -> None:
    with pytest.raises(TaskError) as error:
        read_prompts(write(tmp_path / name, *lines), [data])
    assert expected in str(error.value)


def test_a_file_that_is_not_there_and_a_text_too_short_are_told(data: TaskData, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"recover.prompts: got 'no.jsonl', expected a file"):
        read_prompts("no.jsonl", [data])
    plain = PromptFormat(data.config, data, tiny.tiny_tokenizer(bos=False))
    with pytest.raises(TaskError, match=r"m.txt:1: got a text of 1 tokens, expected at least 2"):
        file_prompts(read_prompts(write(tmp_path / "m.txt", "a"), [data]), [plain], 8)
