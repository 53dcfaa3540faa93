"""Chats and instructions: `messages` with earlier turns, a system's text, and what the chat template makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks as tiny

from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError, TaskError
from moe_evo.tasks.data import TaskData, read_task
from moe_evo.tasks.prompt import PromptFormat

ASK = {"role": "user", "content": "one and two?"}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SYSTEM = {"role": "system", "content": "Be short."}


def chats(path: Path, number: int = 40, system: tuple[Any, ...] = (SYSTEM,)) -> str:
    return write(path, [
        {"messages": [
            *system,
            {"role": "user", "content": f"Hello, I am {n}."},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "And how old?"},
            {"role": "assistant", "content": f"I am {n}."},
        ]}
        for n in range(number)
    ])  # fmt: skip


def read(path: str, **options: Any) -> TaskData:
    return read_task(TaskConfig(data=path, **options))


def rendered(data: TaskData, number: int = 0) -> str:
    format = PromptFormat(data.config, data, tiny.tiny_tokenizer(chat=True))
    return format.prompt(data.splits["search"][number])


def test_the_last_turn_is_the_answer_and_all_before_it_the_prompt(tmp_path: Path) -> None:
    data = read(chats(tmp_path / "c.jsonl"), chat_template=True)
    assert (data.kind, data.metric) == ("generation", "exact_match")
    one = data.splits["search"][0]
    name = one.answers[0].removeprefix("I am ").removesuffix(".")
    assert one.prompt == "And how old?" and one.system == "Be short."
    assert rendered(data) == (
        f"<system>Be short.<end><user>Hello, I am {name}.<end><assistant>Hello.<end><user>And how old?<end><assistant>"
    )
    with pytest.raises(
        ConfigError, match=r"chat_template: got false, expected true, as .*c\.jsonl:\d+ has several turns"
    ):
        read(chats(tmp_path / "c.jsonl"))


def test_chats_that_differ_only_in_earlier_turns_are_other_inputs(tmp_path: Path) -> None:
    """They are split by all that was said; the last turn is the same in all of them."""
    splits = read(chats(tmp_path / "c.jsonl", 200), chat_template=True).splits
    assert all(len(part) > 20 for part in splits.values())
    plain = {one.digest for one in read(write(tmp_path / "p.jsonl", [
        {"prompt": f"p{n}", "answers": "a"} for n in range(40)
    ])).splits["search"]}  # fmt: skip
    single = {one.digest for one in read(write(tmp_path / "m.jsonl", [
        {"messages": [{"role": "user", "content": f"p{n}"}, {"role": "assistant", "content": "a"}]} for n in range(40)
    ]), chat_template=True).splits["search"]}  # fmt: skip
    assert plain == single, "a chat of one turn is its prompt"


def test_shots_and_prefix_stand_behind_the_system_and_before_the_chat(tmp_path: Path) -> None:
    shots = chats(tmp_path / "s.jsonl", 1, system=())
    rows = [{"prompt": f"p{n}", "answers": f"{n}"} for n in range(40)]
    data = read(write(tmp_path / "t.jsonl", rows), chat_template=True, few_shot=shots, prefix="Now: ", system="Sum up.")
    assert rendered(data) == (
        "<system>Sum up.<end><user>Now: Hello, I am 0.<end><assistant>Hello.<end><user>And how old?<end>"
        f"<assistant>I am 0.<end><user>{data.splits['search'][0].prompt}<end><assistant>"
    )
    with pytest.raises(ConfigError, match=r"few_shot: .*s\.jsonl:1 has a system text, expected none; set system"):
        read(data.config.data, chat_template=True, few_shot=chats(tmp_path / "s.jsonl", 1))


def test_instructions_take_their_system_text_from_a_column(tmp_path: Path) -> None:
    rows = [{"instruction": f"Sum {n}", "role": "Be exact." if n % 2 else "", "output": f"{n}"} for n in range(40)]
    fields = {"prompt": "{{ instruction }}", "system": "role", "answers": "output"}
    data = read(write(tmp_path / "t.jsonl", rows), chat_template=True, fields=fields)
    for one in data.splits["search"]:
        assert one.system == ("Be exact." if int(one.answers[0]) % 2 else "")
    with pytest.raises(ConfigError, match=r"system: got 'Hi.', expected none, as .*t\.jsonl:\d+ has its own"):
        read(str(tmp_path / "t.jsonl"), chat_template=True, fields=fields, system="Hi.")


def test_chats_with_choices_and_without_answers_are_tasks_too(tmp_path: Path) -> None:
    rows = [
        {"messages": [ASK, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": f"{n}?"}],
         "choices": ["yes", "no"], "label": "no"}
        for n in range(40)
    ]  # fmt: skip
    data = read(write(tmp_path / "t.jsonl", rows), chat_template=True)
    assert data.kind == "choice" and data.splits["test"][0].turns == (("user", ASK["content"]), ("assistant", "Yes"))
    bare = [{"messages": row["messages"]} for row in rows]
    told = r"b\.jsonl:1: messages: .* expected a turn of the assistant at the end, which is the answer"
    with pytest.raises(TaskError, match=told):
        read(write(tmp_path / "b.jsonl", bare), chat_template=True)
    learned = read(str(tmp_path / "b.jsonl"), chat_template=True, kind="distillation")
    assert learned.splits["search"][0].answers == ()


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "messages: got [], expected a list of at least 1 turn"),
        ("hello", "messages: got 'hello', expected a list of at least 1 turn"),
        ([{"role": "user"}], "messages[0]: got {'role': 'user'}, expected a 'role'"),
        ([{"role": "tool", "content": "x"}], "messages[0]: got {'role': 'tool', 'content': 'x'}, expected a 'role'"),
        ([ASK, {"role": "system", "content": "x"}], "messages[1]: got {'role': 'system', 'content': 'x'}, expected"),
        ([{"role": "system", "content": "x"}], "expected a user's turn at the end"),
        ([ASK, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "expected a user's turn"),
        ([{"role": "user", "content": [{"type": "text"}]}], "and a 'content' of text"),
    ],
)  # fmt: skip
def test_a_chat_that_is_none_is_refused_with_its_turn(tmp_path: Path, messages: Any, told: str) -> None:
    with pytest.raises(TaskError) as caught:
        read(write(tmp_path / "t.jsonl", [{"messages": messages, "answers": "a"}]), chat_template=True)
    assert str(caught.value).startswith(f"{tmp_path}/t.jsonl:1: messages") and told in str(caught.value)
    with pytest.raises(TaskError, match="no messages beside a prompt"):
        read(write(tmp_path / "t.jsonl", [{"messages": [ASK], "prompt": "p", "answers": "a"}]), chat_template=True)
