"""Where an answer begins behind a chat template that thinks, behind a prefix, and in a prompt that is too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_tasks as tiny

from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError, TaskError
from moe_evo.tasks.data import read_task
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.registry import build_task

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
CHATML = f"{TURNS}{OPENING}{{% endif %}}"
SWITCH = (
    f"{TURNS}{OPENING}{{% if enable_thinking is defined and enable_thinking is false %}}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OPENED = f"{TURNS}{OPENING}{{{{ '<think>\n' }}}}{{% endif %}}"
NO_WAY_OUT = (
    "{% if enable_thinking is defined and enable_thinking is false %}{{ raise_exception('always') }}{% endif %}"
    + OPENED.replace("'<think>\n'", "'<think>'")
)
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|end|>{% else %}"
    "<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DEFAULT_OFF = (
    f"{TURNS}{OPENING}{{% if enable_thinking is defined and enable_thinking %}}<think>{{% endif %}}{{% endif %}}"
)
ASKED = "<|im_start|>user\none and two<|im_end|>\n<|im_start|>assistant\n"
CLOSED = "<think>\n\n</think>\n\n"

ROWS = [{"prompt": "one and two", "answers": "three"}, {"prompt": "yes no", "answers": "maybe"}]


def format_of(folder: Path, template: str | None, rows: tiny.Rows = ROWS, **options: Any) -> PromptFormat:
    tokenizer = tiny.tiny_tokenizer(chat=template is not None)
    if template is not None:
        tokenizer.chat_template = template
        options = {"chat_template": True, **options}
    data = read_task(TaskConfig(data=tiny.write_splits(folder / "t", rows), **options))
    return PromptFormat(data.config, data, tokenizer)


def prompt_of(folder: Path, template: str | None, **options: Any) -> str:
    format = format_of(folder, template, **options)
    return format.prompt(format.data.splits["search"][0])


@pytest.mark.parametrize(
    ("template", "expected", "how"),
    [
        (CHATML, ASKED, None),
        (SWITCH, ASKED + CLOSED, "chat_template_kwargs enable_thinking: false"),
        (OPENED, ASKED + CLOSED, "generation_prefix '\\n</think>\\n\\n'"),
        (NO_WAY_OUT, ASKED + CLOSED, "generation_prefix '\\n\\n</think>\\n\\n'"),
        (DEFAULT_OFF, ASKED, None),
        (HARMONY, "<|start|>user<|message|>one and two<|end|><|start|>assistant<|channel|>final<|message|>",
         "generation_prefix '<|channel|>final<|message|>'"),
    ],
    ids=["no thinking", "a switch", "an open block", "no switch", "a switch that is off", "channels"],
)  # fmt: skip
def test_an_answer_begins_behind_the_thinking_which_is_told(
    tmp_path: Path, template: str, expected: str, how: str | None
) -> None:
    format = format_of(tmp_path, template)
    assert format.prompt(format.data.splits["search"][0]) == expected
    if how is None:
        assert format.notes == ()
    else:
        (note,) = format.notes
        assert f"is left out by {how};" in note and note.startswith("task t: the chat template lets the model think")


def test_the_model_may_think_where_the_config_says_so(tmp_path: Path) -> None:
    for template, options, expected in (
        (SWITCH, {"generation_prefix": ""}, ASKED),
        (SWITCH, {"chat_template_kwargs": {"enable_thinking": True}}, ASKED),
        (SWITCH, {"chat_template_kwargs": {"enable_thinking": False}}, ASKED + CLOSED),
        (OPENED, {"generation_prefix": ""}, f"{ASKED}<think>\n"),
        (OPENED, {"generation_prefix": "Hm.</think>"}, f"{ASKED}<think>\nHm.</think>"),
    ):
        format = format_of(tmp_path, template, **options)
        assert format.prompt(format.data.splits["search"][0]) == expected
        assert format.notes == ()
    with pytest.raises(
        TaskError, match=r"chat_template_kwargs: got \['enable_thnking'\], expected names that the chat"
    ):
        prompt_of(tmp_path, SWITCH, chat_template_kwargs={"enable_thnking": False})


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "set chat_template: true"),
        ({"generation_prefix": "</think>"}, "use answer_prefix for a text before every answer"),
    ],
)
def test_options_of_chats_are_refused_without_a_chat_template(option: Any, advice: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{next(iter(option))}: got .*, expected none without chat_template; {advice}"
    ):
        TaskConfig(data="x.jsonl", **option)


def test_a_prefix_of_answers_stands_in_shots_and_before_what_is_scored(tmp_path: Path) -> None:
    shots = tiny.write_rows(tmp_path / "s.jsonl", [{"prompt": "a cat", "answers": "dog"}])
    options = {"few_shot": shots, "answer_prefix": " Answer:"}
    assert prompt_of(tmp_path, None, **options) == "a cat Answer: dog\n\none and two Answer:"
    assert prompt_of(tmp_path, tiny.CHAT_TEMPLATE, **options) == (
        "<user>a cat<end><assistant>Answer: dog<end><user>one and two<end><assistant> Answer:"
    )
    for template in (None, tiny.CHAT_TEMPLATE):
        format = format_of(tmp_path, template, **options)
        one = format.data.splits["search"][0]
        context, (answer,) = format.pair_tokens(one, (format.following_answer(one),))
        assert format.decode([list(context), list(answer)]) == [format.prompt(one), " three"]
    with pytest.raises(
        ConfigError, match=r"answer_prefix: got ' Answer:', expected none, as the task's examples are texts"
    ):
        read_task(TaskConfig(data=tiny.write_splits(tmp_path / "x", [{"text": "a"}] * 2), answer_prefix=" Answer:"))


def test_a_choice_behind_a_prefix_keeps_the_space_that_parts_them(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "choices": [" yes", " no"], "label": 0},
        {"prompt": "two", "choices": ["a", "b"], "label": 0},
    ]
    format = format_of(tmp_path, tiny.CHAT_TEMPLATE, rows, answer_prefix="I say")
    one = format.data.splits["search"][0]
    context, choices = format.pair_tokens(one, one.choices)
    assert format.decode([[*context, *choice] for choice in choices]) == [
        f"<user>one<end><assistant>I say {choice}" for choice in ("yes", "no")
    ]
    fresh = format_of(tmp_path, tiny.CHAT_TEMPLATE, rows)
    context, choices = fresh.pair_tokens(one, one.choices)
    assert fresh.decode([[*context, *choice] for choice in choices]) == [
        f"<user>one<end><assistant>{choice}" for choice in ("yes", "no")
    ]


def test_prompts_and_texts_that_are_too_long_are_told_with_where_they_are_cut(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    rows = [{"prompt": "yes " * n, "answers": "no"} for n in (1, 2, 30, 40)]
    folder = tiny.write_splits(tmp_path / "t", rows)
    data = read_task(TaskConfig(data=folder, max_length=20, max_new_tokens=4, search_metric="log_likelihood"))
    longest = len(tokenizer("yes " * 40)["input_ids"]) + 4
    assert build_task(data, tokenizer, 64).notes == (
        f"task t: 2 of 8 prompts with their answers are longer than 20 tokens (max_length), and lose their beginning; "
        f"the longest has {longest}",
    )
    texts = tiny.write_splits(tmp_path / "x", [{"text": "yes " * n} for n in (30, 2)])
    (note,) = build_task(read_task(TaskConfig(data=texts, max_length=20)), tokenizer, 64).notes
    assert note.startswith("task x: 3 of 6 texts are longer than 20 tokens (max_length), and lose their end;")
    assert build_task(read_task(TaskConfig(data=texts)), tokenizer, 64).notes == ()
    tokenizer.model_max_length = 20
    (note,) = build_task(read_task(TaskConfig(data=texts)), tokenizer, 64).notes
    assert "longer than 20 tokens (what the tokenizer takes)" in note


def test_a_beginning_that_template_and_tokenizer_both_write_stands_once(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    data = read_task(TaskConfig(data=tiny.write_splits(tmp_path / "t", ROWS), chat_template=True))
    one = data.splits["search"][0]
    for template, number in (
        ("{{ bos_token }}" + CHATML, 1),
        ("{{ bos_token }}{{ bos_token }}" + CHATML, 1),
        (CHATML, 0),
    ):
        tokenizer.chat_template = template
        tokens = PromptFormat(data.config, data, tokenizer).prompt_tokens(one)
        assert tokens.count(tokenizer.bos_token_id) == number
