"""`Task`: data, tokenised rows and batch limits, the same for all kinds of task; and `Scorer`, one for each kind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moe_evo.config.task import SPLITS
from moe_evo.tasks.answered import Answered
from moe_evo.tasks.base import Batch, ForwardBatch, Scores, TaskScores, scored_log_probs
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.data import REPORTED, TaskData
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import BatchLimits, Row, TokenisedSplits
from moe_evo.tasks.samples import Sample, scoring_of
from moe_evo.tasks.weighted_metric import with_weighted


class Scorer(Protocol):
    """How one kind of task turns examples into rows, and logits into scores; `needs_reference`: see `Task`.

    It is made of a `PromptFormat`, and goes by the name of its `moe_evo.tasks.kinds.Kind`.
    `moe_evo.testing.tasks.TaskContract` tests a new one. A scorer whose answers can be shown also has a method
    `answers` with the arguments of `combine`, which returns a `Given` for each example.

    >>> import json, tempfile
    >>> from moe_evo.config.task import TaskConfig
    >>> from moe_evo.tasks.base import target_log_probs
    >>> from moe_evo.tasks.data import read_task
    >>> from moe_evo.tasks.examples import parse_answers
    >>> from moe_evo.tasks.kinds import KINDS, NATS, Kind
    >>> from moe_evo.tasks.registry import build_task
    >>> from moe_evo.testing.tiny_tasks import run_task, tiny_llama, tiny_tokenizer
    >>> class LastWord:  # how probable the answer is behind its prompt
    ...     needs_reference = False
    ...     batches = staticmethod(forward_batches)
    ...
    ...     def __init__(self, format):
    ...         self.format = format
    ...
    ...     def rows(self, number, example):
    ...         context, (answer,) = self.format.pair_tokens(example, example.answers[:1])
    ...         return [Row(number, context + answer[:-1], len(context) - 1, ((0, answer),), len(context))]
    ...
    ...     def score(self, batch, output, reference):
    ...         return target_log_probs(batch, output)  # (B, 1)
    ...
    ...     def combine(self, examples, partials):
    ...         return {"last_word": np.array([float(rows[0][0]) for rows in partials])}
    >>> kind = KINDS.register("last_word")(Kind({"last_word": NATS}, parse_answers, LastWord))
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     for n in range(30):
    ...         print(json.dumps({"prompt": f"{n} and one is", "answers": [f" {n + 1}"]}, sort_keys=True), file=file)
    ...     file.flush()
    ...     data = read_task(TaskConfig(data=file.name, name="sums", kind="last_word"))
    >>> tokenizer = tiny_tokenizer()
    >>> scores = run_task(build_task(data, tokenizer, batch_tokens=64), tiny_llama(), tokenizer)
    >>> data.metric, bool((scores.score < 0).all()), sorted(scores.metrics)
    ('last_word', True, ['last_word'])
    """

    needs_reference: bool

    def rows(self, number: int, example: Example) -> list[Row]:
        """What the model reads for the example of this number, at least one row."""
        ...

    def batches(self, rows: Sequence[Row], limits: BatchLimits) -> Sequence[Batch]:
        """The rows to run forward, or to generate from."""
        ...

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None) -> Tensor:
        """See `Task.score`."""
        ...

    def combine(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> Mapping[str, Scores]:
        """Metrics of N examples: name -> (N,), or () where a metric is of all examples together.

        partials: for each example, the partial results of its rows, on the CPU.
        """
        ...


@dataclass(frozen=True)
class _Scoring:
    """What the examples of one split are scored by. rows: of every split that this scorer scores."""

    split: str
    metric: str
    scorer: Scorer
    rows: TokenisedSplits


class Task:
    """A named data set with a scorer for each metric that counts; it knows nothing of experts.

    scorers: by metric; one scorer may compute both metrics of the data. Where an argument is called `split`, it is
    one of `SCORINGS`, or the name of a `Sample` of it: the search split is scored by `search_metric`, unless it is
    asked for as REPORTED. scorer: that of what is reported. needs_reference: scores compare with the untouched model.
    notes: lines for the user on its prompts, such as how many are too long.
    """

    def __init__(
        self, data: TaskData, scorers: Mapping[str, Scorer], limits: BatchLimits, format: PromptFormat | None = None
    ) -> None:
        self.name = data.name
        self.max_length = data.config.max_length  # of a prompt with its answer, in tokens
        self.scorer = scorers[data.metric]
        self.needs_reference = any(scorer.needs_reference for scorer in scorers.values())
        self._splits = data.splits
        self._limits = limits
        self._scorings = _scorings(data, scorers)
        self.notes = () if format is None else format.notes  # all examples are tokens by now

    @cached_property
    def digest(self) -> str:
        """Tells apart tasks whose examples have become other tokens, as by another tokenizer or chat template."""
        content = hashlib.sha256()
        for rows in dict.fromkeys(scoring.rows for scoring in self._scorings.values()):
            rows.digest_into(content)
        return content.hexdigest()

    def num_examples(self, split: str) -> int:
        return len(self.numbers(split))

    def numbers(self, split: str, indices: Iterable[int] | None = None) -> list[int]:
        """The numbers of all examples of the split or sample, or those among `indices`, ascending and each once."""
        if indices is not None:
            return sorted({int(one) for one in indices})
        sample, examples = Sample.read(split), self._examples(split)
        return list(range(len(examples))) if sample is None else sample.of(examples)

    def batches(
        self,
        split: str,
        indices: Iterable[int] | None = None,
        batch_tokens: int | None = None,
        trees: bool = True,
        shared_prefixes: bool = False,
    ) -> Sequence[Batch]:
        """The examples (or those numbered `indices`) as batches; tokens are made once and kept.

        batch_tokens: most tokens of a batch where that is less than the task's own limit. trees: rows
        that begin alike share those tokens. shared_prefixes: whether batches may have a shared prefix.
        """
        scoring = self._scoring(split)
        rows = scoring.rows.of(scoring.split)
        chosen = [row for number in self.numbers(split, indices) for row in rows[number]]
        shared_prefix = scoring.rows.shared_prefix if shared_prefixes else None
        return scoring.scorer.batches(chosen, self._limits.lowered_to(batch_tokens, trees, shared_prefix))

    def prompt_batches(
        self, split: str, indices: Iterable[int] | None = None, batch_tokens: int | None = None, trees: bool = True
    ) -> Sequence[ForwardBatch]:
        """Each example's input once, without answers; the same whatever a search maximises."""
        scoring = self._scoring(REPORTED if split == "search" else split)
        rows = scoring.rows.of(scoring.split)
        chosen = [rows[number][0].prompt for number in self.numbers(split, indices)]
        return forward_batches(chosen, self._limits.lowered_to(batch_tokens, trees))

    def reference(self, batch: ForwardBatch, logits: Tensor) -> Tensor:
        """What `score` compares with: the untouched model's results, on the CPU; see `needs_reference`."""
        assert self.needs_reference, f"task {self.name} is scored without a reference"
        return scored_log_probs(batch, logits).cpu()

    def score(self, split: str, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        """Partial results (B, anything) of one batch of this split.

        output: logits (M, V) of a ForwardBatch, or new tokens (B, at most max_new_tokens) of a
        GenerateBatch.
        """
        return self._scoring(split).scorer.score(batch, output, reference)

    def combine(self, split: str, parts: Iterable[tuple[npt.NDArray[np.int64], Tensor]]) -> TaskScores:
        """Partial results of this split put together; parts: (B,) examples and (B, anything) results of a batch."""
        numbers, examples, partials = self._by_example(split, parts)
        scoring = self._scoring(split)
        found = with_weighted(scoring.scorer.combine(examples, partials), scoring.metric)
        metrics = {name: float(values.mean()) for name, values in found.items()}
        return TaskScores(np.array(numbers), found[scoring.metric], found.get("log_likelihood"), metrics)

    def answered(self, split: str, parts: Iterable[tuple[npt.NDArray[np.int64], Tensor]]) -> list[Answered]:
        """The examples of `parts`, which are as for `combine`, each with what was answered and its score."""
        numbers, examples, partials = self._by_example(split, parts)
        scoring = self._scoring(split)
        found = with_weighted(scoring.scorer.combine(examples, partials), scoring.metric)
        scores = found[scoring.metric].tolist()
        tell = getattr(scoring.scorer, "answers", None)
        given = [None] * len(numbers) if tell is None else tell(examples, partials)
        return [
            Answered(self.name, scoring.split, number, example, one, scoring.metric, score if isfinite(score) else None)
            for number, example, one, score in zip(numbers, examples, given, scores, strict=True)
        ]

    def _by_example(
        self, split: str, parts: Iterable[tuple[npt.NDArray[np.int64], Tensor]]
    ) -> tuple[list[int], list[Example], list[list[Tensor]]]:
        """Numbers of the examples, the examples, and the partial results of each one's rows."""
        of_example: dict[int, list[Tensor]] = {}
        for examples, partial in parts:
            for number, row in zip(examples.tolist(), partial.cpu(), strict=True):
                of_example.setdefault(number, []).append(row)
        numbers, known = sorted(of_example), self._examples(split)
        return numbers, [known[number] for number in numbers], [of_example[number] for number in numbers]

    def _examples(self, split: str) -> Sequence[Example]:
        return self._splits[self._scoring(split).split]

    def _scoring(self, split: str) -> _Scoring:
        return self._scorings[scoring_of(split)]


def _scorings(data: TaskData, scorers: Mapping[str, Scorer]) -> dict[str, _Scoring]:
    """How the examples are scored, by the names in SCORINGS; each is tokenised once for each of its scorers."""
    reporter, searcher = scorers[data.metric], scorers[data.search_metric]
    rows = TokenisedSplits(data.splits, reporter.rows)
    searched = {"search": data.splits["search"]}
    search_rows = rows if searcher is reporter else TokenisedSplits(searched, searcher.rows)
    found = {split: _Scoring(split, data.metric, reporter, rows) for split in SPLITS}
    found[REPORTED] = found["search"]
    return found | {"search": _Scoring("search", data.search_metric, searcher, search_rows)}
