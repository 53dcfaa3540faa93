"""`Evaluator`: genomes in, outcomes out. The only place that runs forward passes to score genomes.

The model stays loaded. Equal genomes are computed once. An `Engine` computes what others have in common once; where
it cannot run on a model, genomes are applied to the model one after the other. Nothing here knows of pools, journals
or searches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from moe_evo.config.evaluation import EvaluationConfig, FitnessRule
from moe_evo.evaluation.batch_memory import BatchMemory
from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.generate import generate_together
from moe_evo.evaluation.engine.packing import Clock, most_tokens, packing_for, size_class
from moe_evo.evaluation.engine.scoring import Scored
from moe_evo.evaluation.engine.sharing import sharing_for
from moe_evo.evaluation.engine.states import StateCache
from moe_evo.evaluation.fitness import evaluation_of
from moe_evo.evaluation.prepared import Indices, Prepared, PreparedBatches
from moe_evo.evaluation.racing import is_beaten
from moe_evo.evaluation.task_report import TaskReport, joined
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import EvaluationFailure, ExampleScores, Outcome
from moe_evo.genomes.space import check_fits
from moe_evo.models.free_memory import MEMORY_ERRORS
from moe_evo.models.rope_limit import check_row_lengths
from moe_evo.models.view import MoEModel
from moe_evo.tasks.answered import Answered
from moe_evo.tasks.base import ForwardBatch, GenerateBatch, TaskScores
from moe_evo.tasks.samples import Sample
from moe_evo.tasks.task import Task
from moe_evo.versions import newer_than_tested

T = TypeVar("T")


class Evaluator:
    """A loaded model and the tasks that its genomes are scored on.

    Where several ranks hold the model, each has an evaluator of its own. All make the same calls in the same order and
    get the same outcomes, also where an outcome is a failure. states: the state cache of another evaluator of the
    model, to be shared. clock: times passes, default: the device's.

    switched_off: the kinds of sharing that the self-checks refused; they cost time and no score. Raises ConfigError
    where rows may be so long that their scores would depend on their batch (`check_row_lengths`).
    """

    def __init__(
        self,
        model: MoEModel,
        tasks: Sequence[Task],
        config: EvaluationConfig,
        states: StateCache | None = None,
        clock: Clock | None = None,
    ) -> None:
        assert tasks and len({task.name for task in tasks}) == len(tasks), "tasks need distinct names"
        check_row_lengths(model.language_model.config, [(task.name, task.max_length) for task in tasks])
        self.model = model
        self.tasks = tuple(tasks)
        self._config = config
        self._memory = BatchMemory(config.batch_tokens, model)
        sharing = sharing_for(model, config, states)
        self._engine = sharing.engine
        self.switched_off = (*model.switched_off, *sharing.switched_off)
        self._packing = packing_for(config, model, clock)
        self._batches = PreparedBatches(
            model,
            self.tasks,
            self.forward,
            races=config.race is not None,
            shared_prefixes=self._engine is not None and self._engine.reads_shared_prefixes,
        )

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a batch: the config's number, or less where that did not fit in memory."""
        return self._memory.batch_tokens

    @property
    def fitness_rule(self) -> FitnessRule:
        """How the scores of several tasks become one fitness."""
        return self._config.fitness

    @property
    def states(self) -> StateCache | None:
        """The cache of recent genomes' hidden states; None without an engine."""
        return None if self._engine is None else self._engine.states

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: packages newer than the tested ones, sharing that is not used, and tasks' prompts."""
        of_tasks = (note for task in self.tasks for note in task.notes)
        return (*filter(None, [newer_than_tested()]), *map(str, self.switched_off), *of_tasks)

    @property
    def shares_layers(self) -> bool:
        """Whether layers that genomes have in common are computed once."""
        return self._engine is not None

    def evaluate(
        self,
        genomes: Sequence[Genome | None],
        split: str,
        indices: Indices | None = None,
        rivals: Sequence[ExampleScores | None] | None = None,
    ) -> list[Outcome]:
        """One outcome a genome, in order; None is the untouched model. split: one of `SCORINGS`, or a `Sample` of it.

        rivals: for each genome the scores of an individual; where the genome is surely worse it is stopped
        before it has seen all examples (`EvaluationConfig.race`). Raises GenomeError, before anything is
        computed, where a genome does not fit the model, and OutOfMemory.
        """
        for genome in genomes:
            if genome is not None:
                check_fits(genome, self.model.shape)
        rival_of = dict(zip(genomes, rivals or [None] * len(genomes), strict=True))
        started = time.perf_counter()
        examined = self.examine(list(rival_of), split, indices, list(rival_of.values()))
        duration_s = (time.perf_counter() - started) / max(len(rival_of), 1)
        outcomes = {
            genome: self._outcome(found, split, indices, duration_s)
            for genome, found in zip(rival_of, examined, strict=True)
        }
        return [outcomes[genome] for genome in genomes]

    def examine(
        self,
        genomes: Sequence[Genome | None],
        split: str,
        indices: Indices | None = None,
        rivals: Sequence[ExampleScores | None] | None = None,
    ) -> list[dict[str, TaskScores] | EvaluationFailure]:
        """For each genome the scores of the examples that it saw, by task name; `rivals` as for `evaluate`."""
        started = time.perf_counter()
        reports: list[list[Sequence[TaskReport]]] = [[] for _ in genomes]
        racing = list(range(len(genomes)))
        for part in range(self._batches.num_parts(split, indices)):
            if part and rivals is not None:
                racing = [number for number in racing if not self._is_out(split, reports[number], rivals[number])]
            if not racing:
                break
            chosen = [genomes[number] for number in racing]
            own = self.within_memory(partial(self._reports, chosen, split, indices, part))
            for of_rank in self.model.example_ranks.gather(own):
                for number, found in zip(racing, of_rank, strict=True):
                    reports[number].append(found)
        duration_s = (time.perf_counter() - started) / max(len(genomes), 1)
        self._memory.tidy_after(len(genomes))
        return [self._scores(split, found, duration_s) for found in reports]

    def answered(self, genome: Genome | None, split: str, first: int | None = None) -> tuple[Answered, ...]:
        """What a genome answers to the examples of a split, or to the first so many of each task, with their scores.

        None is the untouched model. Raises OutOfMemory.
        """
        numbers = {task.name: task.numbers(split)[:first] for task in self.tasks}
        own = self.within_memory(partial(self._reports, [genome], split, numbers, 0))
        ranks = [reports for (reports,) in self.model.example_ranks.gather(own)]
        of_tasks = zip(self.tasks, zip(*ranks, strict=True), strict=True)
        return tuple(
            one for task, reports in of_tasks
            for one in task.answered(split, [part for report in reports for part in report.parts])
        )  # fmt: skip

    def _is_out(self, split: str, reports: Sequence[Sequence[TaskReport]], rival: ExampleScores | None) -> bool:
        """Whether a genome is surely worse than its rival, so that it is stopped; the same on all ranks."""
        found = self._scores(split, reports, 0.0)
        is_out = isinstance(found, EvaluationFailure)
        if not isinstance(found, EvaluationFailure) and rival and self._config.race is not None:
            is_out = is_beaten(list(found.values()), [rival[task.name] for task in self.tasks], self._config.race)
        return bool(self.model.ranks.gather(is_out)[0])

    def _scores(
        self, split: str, found: Sequence[Sequence[TaskReport]], duration_s: float
    ) -> dict[str, TaskScores] | EvaluationFailure:
        """found: reports a task, of every rank and part."""
        scores = {}
        for task, reports in zip(self.tasks, zip(*found, strict=True), strict=True):
            if not all(report.is_finite for report in reports):
                return EvaluationFailure("non_finite", f"task {task.name}: logits or scores are not finite", duration_s)
            scores[task.name] = joined(task, split, reports, self.model.shape.num_layers)
        return scores

    def within_memory(self, compute: Callable[[], T]) -> T:
        """What `compute` returns; where memory runs out, it is called again with half the tokens in a batch.

        Raises OutOfMemory where a batch of one row is too much, or where other ranks wait for this one.
        """
        while True:
            try:
                return compute()
            except MEMORY_ERRORS as error:
                self._memory.lower_after(error)
            # outside of `except`: the error keeps the tensors of its stack frames alive
            self._batches.forget()  # references and states belong to the old batches
            if self._engine is not None:
                self._engine.forget()
            self._memory.free()

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits (M, V) of whatever function the model computes at the moment."""
        assert not batch.shared_prefix, "only an engine reads shared prefixes"
        self._memory.note(batch)
        logits: Tensor = self.model.language_model(
            input_ids=batch.input_ids,
            attention_mask=self.model.attention_masks(batch.position_ids, batch.ends, batch.counts),
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.kept,
        ).logits
        return logits

    def _reports(
        self, genomes: Sequence[Genome | None], split: str, indices: Indices | None, part: int
    ) -> list[tuple[TaskReport, ...]]:
        """For each genome one report a task.

        A genome that fails does not end this early, as other ranks would wait.
        """
        with torch.inference_mode(), torch_threads(self._config.threads):
            prepared = self._batches.of(split, indices, self.batch_tokens)[part]
            reports = [tuple(TaskReport() for _ in self.tasks) for _ in genomes]
            whole = [self.model.shape.identity() if genome is None else genome for genome in genomes]
            if self._engine is not None:
                self._run_together(self._engine, whole, prepared, reports, is_whole=indices is None)
            else:
                for genome, own in zip(whole, reports, strict=True):
                    self._run_alone(genome, prepared, own)
            self._generate(whole, prepared, reports, is_whole=indices is None)
        return reports

    def _run_together(
        self,
        engine: Engine,
        genomes: Sequence[Genome],
        prepared: Sequence[Prepared],
        reports: Sequence[Sequence[TaskReport]],
        is_whole: bool,
    ) -> None:
        """Score all `ForwardBatch`es with the engine, each for all genomes."""
        for index, one in enumerate(prepared):
            for batch, reference in zip(one.batches, one.references, strict=True):
                if isinstance(batch, ForwardBatch):
                    copies = min(self._copies(batch.num_tokens), len(genomes))
                    self._memory.note(batch, copies)
                    add = partial(_add_scored, [report[index] for report in reports], one, batch, reference)
                    engine.run(batch, genomes, add, copies=copies, keep=is_whole, packing=self._packing)

    def _run_alone(self, genome: Genome, prepared: Sequence[Prepared], reports: Sequence[TaskReport]) -> None:
        """Score all `ForwardBatch`es for one genome, without the engine."""
        with self.model.applied(genome):
            for one, report in zip(prepared, reports, strict=True):
                for position, (batch, reference) in enumerate(zip(one.batches, one.references, strict=True)):
                    if isinstance(batch, ForwardBatch):
                        scored = Scored(self.forward(batch), self._active(batch))
                        if position < one.num_counted:
                            _add_scored([report], one, batch, reference, 0, scored)

    def _active(self, batch: ForwardBatch) -> Tensor | None:
        """See `Scored`, after a forward pass of the batch."""
        found = self.model.num_active
        return None if found is None else found.reshape(batch.kept.shape)[batch.kept]

    def _generate(
        self,
        genomes: Sequence[Genome],
        prepared: Sequence[Prepared],
        reports: Sequence[Sequence[TaskReport]],
        is_whole: bool,
    ) -> None:
        """Score all `GenerateBatch`es, each for as many genomes at a time as are packed together."""
        for index, one in enumerate(prepared):
            for position, batch in enumerate(one.batches):
                if isinstance(batch, GenerateBatch):
                    for kind, together in self._packs(batch, genomes):
                        with self._packing.timed(kind, len(together)):
                            self._memory.note(batch, len(together))
                            chosen = [genomes[number] for number in together]
                            rows = generate_together(self.model, self._engine, batch, chosen, is_whole, self._packing)
                        for number, found in zip(together, rows, strict=True):
                            if position < one.num_counted:
                                report = reports[number][index]
                                report.add(batch, one.score(batch, found.new), bool(found.is_finite.all()))
                                report.count(found.active, found.num_new)

    def _packs(self, batch: GenerateBatch, genomes: Sequence[Genome]) -> Iterator[tuple[Hashable, list[int]]]:
        """Genomes that generate together, as (kind of pass for `Packing`, numbers of genomes).

        All genomes of a pack have the same top_k.
        """
        by_top_k: dict[tuple[int, ...], list[int]] = {}
        for number, genome in enumerate(genomes):
            by_top_k.setdefault(genome.top_k, []).append(number)
        # ranks with different examples must still generate equally often
        num_tokens = max(self.model.example_ranks.gather(batch.num_tokens))
        for numbers in by_top_k.values():
            kind = ("generate", size_class(num_tokens), all(genomes[number].is_pruning for number in numbers))
            while numbers:
                together = self._packing.together(kind, min(self._copies(num_tokens), len(numbers)))
                yield kind, numbers[:together]
                numbers = numbers[together:]

    def _copies(self, num_tokens: int) -> int:
        """The most genomes that fit into one pass, where each has `num_tokens` tokens."""
        return max(most_tokens(self._config, self.model, self.batch_tokens) // num_tokens, 1)

    def _outcome(
        self,
        examined: dict[str, TaskScores] | EvaluationFailure,
        split: str,
        indices: Indices | None,
        duration_s: float,
    ) -> Outcome:
        if isinstance(examined, EvaluationFailure):
            return replace(examined, duration_s=duration_s)
        is_complete = all(
            len(examined[task.name].examples) == len(task.numbers(split, (indices or {}).get(task.name)))
            for task in self.tasks
        )
        sample = Sample.read(split)
        return evaluation_of(
            examined,
            self._config.fitness,
            is_complete=is_complete,
            duration_s=duration_s,
            sample=None if sample is None else sample.number,
        )


def _add_scored(
    reports: Sequence[TaskReport],
    prepared: Prepared,
    batch: ForwardBatch,
    reference: Tensor | None,
    number: int,
    scored: Scored,
) -> None:
    """Add to the report of genome `number` what its logits score, and the experts that ran where rows are scored."""
    reports[number].add(batch, prepared.score(batch, scored.logits, reference))
    if scored.active is not None:
        reports[number].count(scored.active[batch.positions] * batch.scored, batch.scored)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """So many threads of torch, until the block is left."""
    previous = torch.get_num_threads()
    torch.set_num_threads(previous if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
