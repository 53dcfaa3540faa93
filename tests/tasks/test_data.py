"""Reading, checking and splitting task data: every mistake gets one line with file and line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_tasks as tiny

from moe_evo.config.task import SPLITS, TaskConfig
from moe_evo.errors import ConfigError, TaskError
from moe_evo.tasks.data import check_tasks, is_share, read_task, reported
from moe_evo.tasks.sources import embedded_task_names, task_name

CHOICE = {"prompt": "p", "choices": ["a", "b"], "label": 0}
CHOICE_METRICS = "accuracy, accuracy_norm, log_likelihood, probability, probability_norm"
MALFORMED = [
    ('{"prompt": "p", "choices": ["a", "b"], "label": 2}', "label: got 2, expected an integer from 0 to 1"),
    ('{"prompt": "p", "choices": ["a", "b"], "label": -1}', "label: got -1, expected an integer from 0 to 1"),
    ('{"prompt": "p", "choices": ["a", "b"], "label": "0"}', "label: got '0', expected an integer"),
    ('{"prompt": "p", "choices": ["a", "b"], "label": true}', "label: got True, expected an integer"),
    ('{"prompt": "p", "choices": ["a", "b"], "label": 0.0}', "label: got 0.0, expected an integer"),
    ('{"prompt": "p", "choices": ["a", "b"]}', "has no 'label'; got the fields ['choices', 'prompt']"),
    ('{"prompt": "p", "choices": ["a"], "label": 0}', "choices: got ['a'], expected a list of at least 2 distinct"),
    ('{"prompt": "p", "choices": ["a", "a"], "label": 0}', "choices: got ['a', 'a'], expected a list of at least 2"),
    ('{"prompt": "p", "choices": ["a", 1], "label": 0}', "choices: got ['a', 1], expected a list of at least 2"),
    ('{"prompt": "p", "choices": "ab", "label": 0}', "choices: got 'ab', expected a list of at least 2 distinct"),
    ('{"choices": ["a", "b"], "label": 0}', "has no 'prompt'"),
    ('{"prompt": 3, "choices": ["a", "b"], "label": 0}', "prompt: got 3, expected a string that is not blank"),
    ('{"prompt": " ", "choices": ["a", "b"], "label": 0}', "prompt: got ' ', expected a string that is not blank"),
    ("[1]", "got [1], expected a JSON object"),
    ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    ("{'prompt': 1}", "not JSON"),
]


def config(path, **options) -> TaskConfig:
    return TaskConfig(data=str(path), **options)


@pytest.mark.parametrize(("line", "complaint"), MALFORMED)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path, line, complaint):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(CHOICE)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        read_task(config(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert complaint in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("row", "options", "complaint"),
    [
        ({"prompt": "p", "answers": []}, {}, "answers: got [], expected a string or a list of at least 1 string"),
        ({"prompt": "p", "answers": 42}, {}, "answers: got 42, expected a string or a list"),
        ({"prompt": "p", "answers": ["a", " "]}, {}, "answers: got ['a', ' ']"),
        ({"prompt": "p", "answers": "a"}, {"metric": "number_match"}, "expected a number in them"),
        ({"prompt": "p", "answers": "a"}, {"metric": "first_option"}, "has no 'choices'"),
        (
            {"prompt": "p", "answers": "a", "choices": ["b", "c"]},
            {"metric": "first_option"},
            "expected one of the choices",
        ),
        ({"text": ["a"]}, {}, "text: got ['a'], expected a string that is not blank"),
        ({"text": "a"}, {"kind": "choice"}, "has no 'choices'"),
        ({"text": "a"}, {"kind": "generation"}, "has no 'prompt'"),
        ({"answer": "a"}, {"kind": "distillation"}, "has no 'prompt'"),
        ({"question": "a"}, {}, "got the fields ['question'], expected 'prompt' with 'choices' and 'label'"),
    ],
)
def test_a_row_that_does_not_fit_its_kind_is_refused(tmp_path, row, options, complaint):
    path = tmp_path / "mine.jsonl"
    tiny.write_rows(path, [row])
    with pytest.raises(TaskError) as caught:
        read_task(config(path, **options))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert complaint in str(caught.value)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(CHOICE).encode() + b'\n{"prompt": "\xe9"}\n')
    with pytest.raises(TaskError, match=r"mine\.jsonl:2: not UTF-8 at byte 12"):
        read_task(config(path))


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps({**CHOICE, "prompt": f"p{n}"}) for n in range(40)]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert sum(map(len, read_task(config(path)).splits.values())) == 40


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(TaskError, match=r"mine\.jsonl: is empty"):
        read_task(config(path))


def test_data_that_do_not_exist_are_refused_with_the_embedded_names(tmp_path):
    with pytest.raises(TaskError, match=r"no file, no folder and no embedded task; embedded tasks are .*sentiment"):
        read_task(config("sentimnet"))


def test_a_folder_without_all_splits_is_refused(tmp_path):
    tiny.write_rows(tmp_path / "search.jsonl", [CHOICE])
    with pytest.raises(TaskError, match=r"has no split for validation and test, .* it has search;"):
        read_task(config(tmp_path))


def test_a_missing_few_shot_file_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"few_shot: no file 'nowhere\.jsonl'"):
        read_task(config("sentiment", few_shot="nowhere.jsonl"))


def test_the_same_input_in_two_splits_is_refused_with_both_places(tmp_path):
    rows = [{**CHOICE, "prompt": f"p{n}"} for n in range(3)]
    folder = tiny.write_splits(tmp_path / "t", rows)
    tiny.write_rows(tmp_path / "t" / "test.jsonl", [{**CHOICE, "prompt": "new"}, {**rows[1], "choices": ["b", "a"]}])
    with pytest.raises(TaskError, match=r"search\.jsonl:2 \(search\) repeats the input of .*test\.jsonl:2 \(test\);"):
        read_task(config(folder))


def test_what_stands_in_two_splits_is_dropped_where_that_is_asked(tmp_path):
    """Test keeps it, else validation; few-shot examples keep what is in any split."""
    rows = [{**CHOICE, "prompt": f"p{n}"} for n in range(12)]
    folder = tmp_path / "t"
    for split, own in (("search", rows[:8]), ("validation", rows[5:10]), ("test", [*rows[7:], rows[2], rows[4]])):
        tiny.write_rows(folder / f"{split}.jsonl", own)
    shots = tiny.write_rows(tmp_path / "shots.jsonl", rows[4:5])
    with pytest.raises(TaskError, match=r"repeats the input of .* \(and \d+ more such\); .* or set drop_repeated"):
        read_task(config(folder))
    read = read_task(config(folder, drop_repeated=True, few_shot=shots))
    assert {split: [one.prompt for one in part] for split, part in read.splits.items()} == {
        "search": ["p0", "p1", "p3"],
        "validation": ["p5", "p6"],
        "test": ["p7", "p8", "p9", "p10", "p11", "p2"],
    }
    assert read.dropped == {"search": 5, "validation": 3, "test": 1}


def test_the_same_prompt_with_other_choices_may_stand_in_two_splits(tmp_path):
    folder = tiny.write_splits(tmp_path / "t", [{**CHOICE, "prompt": f"p{n}"} for n in range(3)])
    others = [{**CHOICE, "prompt": f"p{n}", "choices": ["a", "c"]} for n in range(2)]
    tiny.write_rows(tmp_path / "t" / "test.jsonl", others)
    assert len(read_task(config(folder)).splits["test"]) == 2


def test_a_few_shot_example_may_not_be_evaluated(tmp_path):
    rows = [{**CHOICE, "prompt": f"p{n}"} for n in range(3)]
    folder = tiny.write_splits(tmp_path / "t", rows)
    shots = tiny.write_rows(tmp_path / "shots.jsonl", rows[2:])
    with pytest.raises(
        TaskError, match=r"search\.jsonl:3 \(search\) repeats the input of .*shots\.jsonl:1 \(few_shot\)"
    ):
        read_task(config(folder, few_shot=shots))


def test_a_split_with_fewer_than_two_examples_is_refused(tmp_path):
    folder = tiny.write_splits(tmp_path / "t", [{**CHOICE, "prompt": f"p{n}"} for n in range(3)])
    tiny.write_rows(tmp_path / "t" / "validation.jsonl", [{**CHOICE, "prompt": "q"}])
    with pytest.raises(TaskError, match=r"split validation has 1 examples \(search 3, validation 1, test 2\)"):
        read_task(config(folder))
    path = tiny.write_rows(tmp_path / "one.jsonl", [CHOICE])
    with pytest.raises(TaskError, match=r"split search has 1 examples \(search 1, validation 0, test 0\)"):
        read_task(config(path))


def test_the_hash_split_is_the_same_everywhere_and_forever(tmp_path):
    path = tiny.write_rows(tmp_path / "t.jsonl", [{**CHOICE, "prompt": f"prompt {n}"} for n in range(20)])
    splits = read_task(config(path)).splits
    numbers = {split: [int(one.prompt.split()[1]) for one in examples] for split, examples in splits.items()}
    assert numbers == {
        "search": [0, 2, 6, 7, 14, 15, 19],
        "validation": [1, 9, 16, 17],
        "test": [3, 4, 5, 8, 10, 11, 12, 13, 18],
    }


def test_repeated_prompts_land_in_the_same_split(tmp_path):
    variants = [
        {**CHOICE, "prompt": text} for n in range(30) for text in (f"Prompt {n}", f"prompt  {n} ", f"ＰＲＯＭＰＴ {n}")
    ]
    splits = read_task(config(tiny.write_rows(tmp_path / "t.jsonl", variants))).splits
    digests = {split: {one.digest for one in examples} for split, examples in splits.items()}
    assert sum(map(len, digests.values())) == len(set.union(*digests.values())) == 30


@pytest.mark.parametrize(
    ("different", "told"),
    [(1, "all 120 examples have the same prompt"), (4, "all 120 examples have only 4 different prompts")],
)
def test_examples_with_too_few_different_prompts_to_split_are_told_so(tmp_path, different, told):
    rows = [{**CHOICE, "prompt": f"p{n % different}", "choices": ["a", f"b{n}"]} for n in range(120)]
    path = tiny.write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(TaskError, match=told) as found:
        read_task(config(path))
    assert "equal prompts always go into one split" in str(found.value)


def test_split_shares_are_kept_roughly(tmp_path):
    path = tiny.write_rows(tmp_path / "t.jsonl", [{**CHOICE, "prompt": f"p{n}"} for n in range(2000)])
    splits = read_task(config(path, split_shares=(0.5, 0.1, 0.4))).splits
    shares = [len(splits[split]) / 2000 for split in ("search", "validation", "test")]
    assert shares == pytest.approx([0.5, 0.1, 0.4], abs=0.03)


def test_limits_take_a_fair_sample_in_the_order_of_the_file(tmp_path):
    rows = [{**CHOICE, "prompt": f"p{n}", "label": int(n >= 100)} for n in range(200)]  # sorted by label
    data = read_task(config(tiny.write_splits(tmp_path / "t", rows), num_search=50))
    labels = [one.label for one in data.splits["search"]]
    assert len(labels) == 50
    assert labels == sorted(labels)
    assert 10 < sum(labels) < 40
    with pytest.raises(TaskError, match="num_search: got 1, expected at least 2"):
        read_task(config(tmp_path / "t", num_search=1))


def test_the_kind_follows_from_the_fields(tmp_path):
    rows = {
        "choice": CHOICE,
        "generation": {"prompt": "p", "answers": "a", "choices": ["a", "b"]},
        "perplexity": {"text": "t"},
    }
    for kind, row in rows.items():
        field = "text" if kind == "perplexity" else "prompt"
        folder = tiny.write_splits(tmp_path / kind, [{**row, field: f"x{n}"} for n in range(2)])
        data = read_task(config(folder))
        assert (data.name, data.kind) == (kind, kind)
        assert data.splits["search"][0].where.endswith("search.jsonl:1")


@pytest.mark.parametrize(
    ("kind", "metric", "allowed"),
    [("choice", "f1", CHOICE_METRICS), ("perplexity", "accuracy", "log_likelihood"),
     ("auto", "exact_match", CHOICE_METRICS)],
)  # fmt: skip
def test_a_metric_of_another_kind_is_refused(kind, metric, allowed):
    with pytest.raises(ConfigError, match=f"metric: got '{metric}', expected {allowed} or default"):
        check_tasks([config("sentiment", kind=kind, metric=metric)])


def test_what_a_search_maximises_is_the_metric_unless_another_is_named():
    assert read_task(config("sentiment")).search_metric == "accuracy"
    assert read_task(config("sentiment", metric="accuracy_norm")).search_metric == "accuracy_norm"
    data = read_task(config("sentiment", search_metric="probability"))
    assert (data.metric, data.search_metric) == ("accuracy", "probability")
    assert [reported(split, [data]) for split in SPLITS] == ["search_reported", "validation", "test"]
    assert [reported(split, [read_task(config("sentiment"))]) for split in SPLITS] == list(SPLITS)


@pytest.mark.parametrize("kind", ["choice", "auto"])
def test_a_search_metric_of_another_kind_is_refused_as_a_metric_is(kind):
    expected = f"expected {CHOICE_METRICS} or default for a task of kind choice"
    with pytest.raises(ConfigError, match=rf"tasks \(nli\)\.search_metric: got 'f1', {expected}"):
        check_tasks([config("nli", kind=kind, search_metric="f1")])


def test_an_unknown_search_metric_of_generation_is_refused_with_the_nearest_name(tmp_path):
    folder = tiny.write_splits(tmp_path / "t", [{"prompt": f"p{n}", "answers": "a"} for n in range(2)])
    with pytest.raises(ConfigError, match=r"\.search_metric: got 'log_likelyhood', did you mean 'log_likelihood'\?"):
        read_task(config(folder, search_metric="log_likelyhood"))


def test_examples_must_suit_the_search_metric_too(tmp_path):
    folder = tiny.write_splits(tmp_path / "t", [{"prompt": f"p{n}", "answers": "a"} for n in range(2)])
    with pytest.raises(TaskError, match=r"search\.jsonl:1: answers: .* as the metric is number_match"):
        read_task(config(folder, search_metric="number_match"))


def test_search_metrics_of_different_units_are_not_mixed_into_one_fitness():
    tasks = [config("nli", search_metric="log_likelihood"), config("syll", search_metric="log_likelihood")]
    assert is_share(check_tasks(tasks)), "what is reported is accuracy"
    with pytest.raises(ConfigError, match=r"on the search split would mix units \(nli is in nats, syll is a share"):
        check_tasks([tasks[0], config("syll", search_metric="probability")])


def test_names_come_from_the_data_and_must_differ(tmp_path):
    assert task_name(config("some/where/mine.jsonl")) == "mine"
    assert task_name(config("some/where/my.task")) == "my.task"
    assert task_name(config("sentiment", name="other")) == "other"
    assert [one.name for one in check_tasks([config("sentiment"), config("nli")])] == ["sentiment", "nli"]
    with pytest.raises(ConfigError, match="got the name 'nli' twice"):
        check_tasks([config("nli"), config("sentiment", name="nli")])


def test_metrics_of_different_units_are_not_mixed_into_one_fitness():
    check_tasks([config("nli"), config("syll", metric="accuracy_norm")])
    with pytest.raises(ConfigError, match=r"nli is in nats, syll is a share from 0 to 1"):
        check_tasks([config("nli", metric="log_likelihood"), config("syll")])


def test_data_that_is_too_long_for_a_file_name_is_refused():
    with pytest.raises(ConfigError, match="names have at most 255 bytes"):
        config("x" * 300)


def test_the_hash_follows_every_byte_read(tmp_path):
    folder = tiny.write_splits(tmp_path / "t", [{**CHOICE, "prompt": f"p{n}"} for n in range(3)])
    shots = tiny.write_rows(tmp_path / "s.jsonl", [{**CHOICE, "prompt": "s"}])
    plain, with_shots = read_task(config(folder)).hash, read_task(config(folder, few_shot=shots)).hash
    assert plain != with_shots
    with (tmp_path / "t" / "test.jsonl").open("a") as file:
        file.write("\n")
    assert read_task(config(folder)).hash != plain


@pytest.mark.parametrize("name", embedded_task_names())
def test_embedded_tasks_are_sound(name):
    data = read_task(config(name))
    assert data.kind == "choice"
    assert {split: len(examples) >= 200 for split, examples in data.splits.items()} == dict.fromkeys(data.splits, True)


def test_checking_data_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from moe_evo.config.task import TaskConfig; from moe_evo.tasks.data import check_tasks; "
        "check_tasks([TaskConfig(data='sentiment')]); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
