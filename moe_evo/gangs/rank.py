"""What one process of a gang does: join the others, load its part of the model, evaluate.

A plain class; `gang.py` makes it an actor. All ranks of a gang get the same calls in the same order.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.criteria.questions import Question
from moe_evo.errors import ModelError, TaskError
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import ExampleScores, Outcome
from moe_evo.plugins import import_modules
from moe_evo.tasks.data import TaskData

if TYPE_CHECKING:  # torch is imported when a rank loads its model
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.tasks.task import Task


@dataclass(frozen=True)
class Work:
    """The tasks of a run, and how they are scored.

    key: equal for equal tasks, data and scoring, whichever run they belong to. modules: to import before, as they
    register kinds of task or metrics. tokens: `Task.digest` by the name of a task, as the run's driver has it; ranks
    with others are refused.
    """

    key: str
    data: tuple[TaskData, ...]
    evaluation: EvaluationConfig
    modules: tuple[str, ...] = ()
    tokens: Mapping[str, str] = field(default_factory=dict)


class Rank:
    """Rank `rank` of `size`, with its part of one model and an evaluator for each work."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._evaluators: dict[str, Evaluator] = {}
        self._num_computed = 0

    def pid(self) -> int:
        return os.getpid()

    def free_port(self) -> int:
        """A port of this machine that nothing listens on."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
            return port

    def watch(self) -> None:
        """Never returns, so that a caller that waits for it learns at once when the process dies."""
        threading.Event().wait()

    def share_memory(self, num_ranks: int) -> None:
        """Call it before `load`: so many ranks take memory side by side where this one does."""
        from moe_evo.models.free_memory import share_memory

        share_memory(num_ranks)

    def progress(self) -> int:
        """How many MoE layers this rank has computed so far; it grows as long as the rank does not hang."""
        return self._num_computed

    def load(
        self,
        model: ModelConfig,
        model_hash: str,
        meeting_point: tuple[str, int],
        timeout_s: float,
        report: Callable[[str], None],
    ) -> None:
        """Join the other ranks and load the model; `report` is called with the progress, in words.

        timeout_s: longest wait of one rank for another.
        Raises ModelError, also where the checkpoint is not the one that `model_hash` names.
        """
        from moe_evo.models.load import load_model
        from moe_evo.models.ranks import Ranks, join_ranks
        from moe_evo.models.source import ModelSource

        source = ModelSource(model)
        if source.hash != model_hash:
            raise ModelError(
                f"{model.path} on {socket.gethostname()}: is not the checkpoint that the run was started with; "
                "put the same files on every node"
            )
        with _reported(report):
            self._tokenizer = source.tokenizer
            ranks = join_ranks(self._rank, self._size, *meeting_point, timeout_s) if self._size > 1 else Ranks()
            self._model = load_model(source, ranks)
        for layer in self._model.layers:
            layer.experts.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self._num_computed += 1

    def begin(self, work: Work, halvings: int) -> Sequence[str]:
        """Tokenise the tasks of `work`, and return the `Evaluator.notes` of this rank.

        halvings: how often the batch size of `work` is halved. Raises TaskError where examples become other tokens
        here than where the run was started.
        """
        from moe_evo.evaluation.evaluator import Evaluator
        from moe_evo.tasks.registry import build_task

        import_modules(work.modules)
        evaluation = replace(work.evaluation, batch_tokens=max(work.evaluation.batch_tokens >> halvings, 1))
        tasks = [build_task(one, self._tokenizer, evaluation.batch_tokens) for one in work.data]
        _check_tokens(tasks, work.tokens)
        states = next((one.states for one in self._evaluators.values()), None)  # one memory for all works
        evaluator = self._evaluators[work.key] = Evaluator(self._model, tasks, evaluation, states)
        return evaluator.notes

    def forget(self, works: Sequence[str]) -> None:
        """Drop the tasks of these works, and what was computed for them."""
        for key in works:
            self._evaluators.pop(key, None)

    def evaluate(
        self, key: str, genomes: Sequence[Genome], split: str, rivals: Sequence[ExampleScores | None]
    ) -> list[Outcome]:
        """One outcome a genome; see `Evaluator.evaluate`."""
        return self._evaluators[key].evaluate(genomes, split, rivals=rivals)

    def ask(self, key: str, question: Question) -> Any:
        """See `answer`."""
        from moe_evo.criteria.answering import answer

        return answer(question, self._evaluators[key])


class _reported:
    """Report once a second how much memory the process uses, until the block is left."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before_gib = 0.0

    def __enter__(self) -> None:
        self._before_gib = _held_gib()
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        started = time.monotonic()
        while not self._left.wait(1.0):
            held_gib = max(_held_gib() - self._before_gib, 0.0)
            self._report(f"{held_gib:.1f} GiB a rank after {time.monotonic() - started:.0f} s")


def _check_tokens(tasks: Sequence[Task], expected: Mapping[str, str]) -> None:
    for task in tasks:
        if expected.get(task.name, task.digest) != task.digest:
            raise TaskError(
                f"task {task.name} on {socket.gethostname()}: its examples become other tokens than where the run was "
                "started; give every node the same transformers and tokenizers, and a chat template that always "
                "writes the same"
            )


def _held_gib() -> float:
    """Memory of this process: on its GPU where it has one, else on the host."""
    import torch

    from moe_evo.models.free_memory import held_bytes

    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else held_bytes()
    return held / 2**30
