"""Prompts of a run stay as they were when it began: the clock of chat templates stands still."""

from __future__ import annotations

import shutil
import sqlite3
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tiny_tasks as tiny
from transformers.utils import chat_template_utils

from moe_evo.commands.plan import plan
from moe_evo.commands.search import search
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import RunError
from moe_evo.models.source import ModelSource
from moe_evo.runs import open_pool
from moe_evo.tasks.data import check_tasks
from moe_evo.tasks.frozen_clock import FROZEN_TIME, with_frozen_clock
from moe_evo.tracking.base import Trackers

BODY = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
CLOCKS = {
    "a date": "{{ strftime_now('%d %b %Y') }}",
    "a date without zeros, and the time": "{{ strftime_now('%-d/%-m/%y %H:%M:%S %p 100%%') }}",
    "where it is defined": "{% if strftime_now is defined %}{% set d = strftime_now('%A, %B %e') %}{% endif %}{{ d }}",
    "in a macro": "{% macro f() %}{{ strftime_now('%j') }}{% endmacro %}{% for n in [1, 2] %}{{ f() }}{% endfor %}",
    "behind an empty line": "\n\n{{ strftime_now('%Y-%m-%dT%H') }}\n",
    "as a number": "{{ strftime_now('%Y')|int - 1 }}",
}
TASK = TaskConfig(data="syll", num_search=16, num_validation=8, num_test=16, chat_template=True)


def checkpoint(folder: Path, template: str) -> ModelConfig:
    """The embedded model with a chat template."""
    shutil.copytree(ModelSource(ModelConfig()).location, folder)
    (folder / "chat_template.jinja").write_text(template)
    return ModelConfig(path=str(folder), device="cpu", self_check=False)


def config(model: ModelConfig, folder: Path) -> RunConfig:
    return RunConfig(
        model=model,
        tasks=[TASK],
        search=SearchConfig(algorithm="random", num_kept=4, evaluations=3),
        evaluation=EvaluationConfig(threads=1),
        selection=SelectionConfig(finalists=1, baselines=[]),
        folder=str(folder),
    )


def set_clock(patch: pytest.MonkeyPatch, ahead: timedelta) -> None:
    """A stand-in for the machine's clock, which a test cannot set."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + ahead

    patch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
def test_a_template_renders_as_if_it_were_always_the_same_day(clock: str, tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = FROZEN_TIME.strftime
    messages = [{"role": "user", "content": "yes"}]
    got = tokenizer.apply_chat_template(messages, chat_template=with_frozen_clock(clock + BODY), tokenize=False)
    assert got == environment.from_string(clock + BODY).render(messages=messages)
    assert with_frozen_clock(BODY) == BODY


def test_a_run_goes_on_another_day_with_the_prompts_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "model", CLOCKS["a date"] + BODY)
    run = config(model, tmp_path / "run")
    (today,) = open_pool._built(check_tasks(run.tasks), ModelSource(model).tokenizer, run.evaluation)
    search(run, Trackers())
    (tmp_path / "run" / "result.json").unlink()
    set_clock(monkeypatch, timedelta(days=40))
    rendered = ModelSource(model).tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert datetime.now().strftime("%d %b %Y") not in rendered, "the clock that templates read is another"
    (later,) = open_pool._built(check_tasks(run.tasks), ModelSource(model).tokenizer, run.evaluation)
    assert later.digest == today.digest
    assert search(run, Trackers()).result.is_file()


def test_prompts_that_change_by_themselves_are_refused_on_resume(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "{{ range(100000)|random }} " + BODY)
    run = config(model, tmp_path / "run")
    search(run, Trackers())
    (tmp_path / "run" / "result.json").unlink()
    (problem,) = plan(run).problems
    assert "the tokens of task syll are not those that this run began with" in str(problem)
    with pytest.raises(RunError) as caught:
        search(run, Trackers())
    assert str(caught.value) == str(problem) and "\n" not in str(problem)


def test_a_run_of_before_tokens_were_recorded_goes_on(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", BODY)
    run = config(model, tmp_path / "run")
    folder = search(run, Trackers())
    folder.result.unlink()
    with sqlite3.connect(folder.journal) as journal:
        assert journal.execute("DELETE FROM meta WHERE key LIKE 'hash/tokens%'").rowcount == 1
    assert search(run, Trackers()).result.is_file()


def test_tokens_are_those_of_all_splits_and_scorers(tmp_path: Path) -> None:
    def digest(name: str, **options: Any) -> str:
        rows = [{"prompt": f"{n} one two", "answers": ["three", "four"]} for n in range(4)]
        found: str = tiny.make_task(tmp_path / name, rows, tiny.tiny_tokenizer(), **options).digest
        return found

    plain = digest("a")
    assert digest("b") == plain
    others = [digest("c", prefix="x "), digest("d", search_metric="log_likelihood"), digest("e", max_length=40)]
    assert len({plain, *others}) == 4
