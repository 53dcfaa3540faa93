"""What every kind of task and every metric promises, over all of this package."""

from __future__ import annotations

import importlib.util
from types import MappingProxyType

import pytest

from moe_evo.config.task import TaskConfig
from moe_evo.errors import ModelError
from moe_evo.tasks.answer_metrics import ANSWER_METRICS
from moe_evo.tasks.data import read_task
from moe_evo.tasks.kinds import KINDS
from moe_evo.tasks.registry import build_task
from moe_evo.testing import tiny_tasks as tiny
from moe_evo.testing.tasks import PROMPTS, MetricContract, TaskContract

needs_sacrebleu = pytest.mark.skipif(
    importlib.util.find_spec("sacrebleu") is None, reason="the extra `sacrebleu` is not installed"
)


class TestChoice(TaskContract):
    name = "choice"
    rows = tuple({"prompt": p, "choices": [" yes", " no no", " dog"], "label": n % 3} for n, p in enumerate(PROMPTS))


class TestGeneration(TaskContract):
    name = "generation"
    rows = tuple({"prompt": prompt, "answers": ["cat", "dog"]} for prompt in PROMPTS)

    def test_prompts_to_generate_from_are_padded_on_the_left(self, tmp_path, tokenizer):
        for batch in self.make(tmp_path, "generation", tokenizer, batch_tokens=100_000).batches("search"):
            assert batch.attention_mask[:, -1].all()
            assert (batch.attention_mask.diff(dim=1) >= 0).all()


class TestAnswerLikelihood(TaskContract):
    name = "generation"
    rows = tuple({"prompt": prompt, "answers": ["cat and dog", "yes"]} for prompt in PROMPTS)
    options = MappingProxyType({"metric": "log_likelihood"})


class TestPerplexity(TaskContract):
    name = "perplexity"
    rows = tuple({"text": prompt} for prompt in PROMPTS)


class TestDistillation(TaskContract):
    name = "distillation"
    rows = tuple({"prompt": prompt} for prompt in PROMPTS)


class TestExactMatch(MetricContract):
    name = "exact_match"
    cases = (("Cat", ["cat", "dog"], 1.0), ("a cat", ["cat"], 0.0))


class TestContains(MetricContract):
    name = "contains"
    cases = (("it is a cat", ["cat", "dog"], 1.0), ("it is a cow", ["cat", "dog"], 0.0))


class TestF1(MetricContract):
    name = "f1"
    cases = (("the cat", ["cat"], 1.0), ("black cat", ["cat"], 2 / 3))


class TestFirstOption(MetricContract):
    name = "first_option"
    cases = (("cat", ["cat"], 0.0),)  # nothing of these examples is a choice


class TestNumberMatch(MetricContract):
    name = "number_match"
    cases = (("it is 1,000", ["1000"], 1.0), ("3 or 4", ["3"], 0.0))


class TestRougeL(MetricContract):
    name = "rouge_l"
    cases = (("the cat sat", ["a dog", "the cat, sitting"], 2 / 3), ("no", ["yes"], 0.0))


@needs_sacrebleu
class TestSentenceBleu(MetricContract):
    name = "sentence_bleu"
    cases = (("the cat sat on the mat", ["a dog", "the cat sat on the mat"], 1.0), ("no", ["yes"], 0.0))


@needs_sacrebleu
class TestSentenceChrf(MetricContract):
    name = "sentence_chrf"
    cases = (("the cat sat on the mat", ["a dog", "the cat sat on the mat"], 1.0), ("no", ["yes"], 0.0))


def test_everything_is_in_this_suite():
    suites = TaskContract.__subclasses__() + MetricContract.__subclasses__()
    here = {one.name for one in suites if one.__module__ == __name__}
    assert here == {*KINDS, *ANSWER_METRICS}


def test_a_model_without_tokenizer_is_refused(tmp_path):
    config = TaskConfig(data=tiny.write_splits(tmp_path / "t", TestChoice.rows))
    with pytest.raises(ModelError, match="without a tokenizer"):
        build_task(read_task(config), None, 64)
