"""A task: data, tokenised rows and limits, which are alike in all kinds, and a scorer for what is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moe_evo.tasks.base import Batch, ForwardBatch, Scores, TaskScores, scored_log_probs
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.examples import Example
from moe_evo.tasks.rows import BatchLimits, Row, TokenisedSplits


class Scorer(Protocol):
    """What one kind of task does with its examples; `needs_reference` is told of at `Task`.

    It is made of a `PromptFormat`, and goes by the name of its `moe_evo.tasks.kinds.Kind`.
    `moe_evo.testing.tasks.TaskContract` tests a new one.

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


class Task:
    """A named data set with a scorer; it knows nothing of experts.

    needs_reference: scores compare with the untouched model. metric: the name of what `score` is.
    """

    def __init__(self, data: TaskData, scorer: Scorer, limits: BatchLimits) -> None:
        self.name = data.name
        self.metric = data.metric
        self.needs_reference = scorer.needs_reference
        self.scorer = scorer
        self._splits = data.splits
        self._limits = limits
        self._rows = TokenisedSplits(data.splits, scorer.rows)

    def num_examples(self, split: str) -> int:
        return len(self._splits[split])

    def numbers(self, split: str, indices: Iterable[int] | None = None) -> list[int]:
        """The numbers of all examples of the split, or those among `indices`, ascending and each once."""
        return list(range(self.num_examples(split))) if indices is None else sorted({int(one) for one in indices})

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
        that begin alike share those tokens. shared_prefixes: what rows of the task begin with may stand apart.
        """
        rows = self._rows.of(split)
        chosen = [row for number in self.numbers(split, indices) for row in rows[number]]
        shared_prefix = self._rows.shared_prefix if shared_prefixes else None
        return self.scorer.batches(chosen, self._limits.lowered_to(batch_tokens, trees, shared_prefix))

    def prompt_batches(
        self, split: str, indices: Iterable[int] | None = None, batch_tokens: int | None = None, trees: bool = True
    ) -> Sequence[ForwardBatch]:
        """Each example's input once, without an answer: what is seen before the model speaks."""
        rows = self._rows.of(split)
        chosen = [rows[number][0].prompt for number in self.numbers(split, indices)]
        return forward_batches(chosen, self._limits.lowered_to(batch_tokens, trees))

    def reference(self, batch: ForwardBatch, logits: Tensor) -> Tensor:
        """What `score` needs to know of the untouched model, on the CPU; see `needs_reference`."""
        assert self.needs_reference, f"task {self.name} is scored without a reference"
        return scored_log_probs(batch, logits).cpu()

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        """Partial results (B, anything) of one batch.

        output: logits (M, V) of a ForwardBatch, or new tokens (B, at most max_new_tokens) of a
        GenerateBatch.
        """
        return self.scorer.score(batch, output, reference)

    def combine(self, split: str, parts: Iterable[tuple[npt.NDArray[np.int64], Tensor]]) -> TaskScores:
        """Partial results of this split put together; parts: (B,) examples and (B, anything) results of a batch."""
        of_example: dict[int, list[Tensor]] = {}
        for examples, partial in parts:
            for number, row in zip(examples.tolist(), partial.cpu(), strict=True):
                of_example.setdefault(number, []).append(row)
        numbers = sorted(of_example)
        found = self.scorer.combine(
            [self._splits[split][number] for number in numbers], [of_example[number] for number in numbers]
        )
        metrics = {name: float(values.mean()) for name, values in found.items()}
        return TaskScores(np.array(numbers), found[self.metric], found.get("log_likelihood"), metrics)
