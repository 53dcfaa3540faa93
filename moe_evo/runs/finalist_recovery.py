"""Finalists are recovered a little before the winner is chosen, as what heals best is not always what was best.

Each is written as a checkpoint, learns from the full model, and is scored on the validation split. It learns from
prompts of the search split alone, and others of these choose its weights. Finished finalists are in the journal, and
the work on one that is under way lies in the run's folder.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moe_evo.config.recover import enough_tokens
from moe_evo.config.run import RunConfig
from moe_evo.errors import RunError
from moe_evo.evaluation.evaluator import Evaluator, torch_threads
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, Individual, Outcome
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, RECOVERED, Journal
from moe_evo.records.result import FinalistRecoveries, RecoveredFinalist
from moe_evo.recovery.blocks import BlockTargets, few_tokens, has_blocks
from moe_evo.recovery.lessons import has_lessons, read_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.methods import RECOVERY_METHODS
from moe_evo.recovery.prompts import split_prompts
from moe_evo.recovery.state import Learned, TrainingState
from moe_evo.runs.finalists import Judged
from moe_evo.runs.recovery_cost import learned_and_held_out, recipe
from moe_evo.runs.teaching import keep_blocks, teach
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tracking.base import Tracker

_LEARNED, _HELD_OUT = "learned", "held-out"


class FinalistRecovery:
    """Recovers finalists of one run in this process.

    evaluator: has the full model, which stays in memory. cost: evaluations of the budget that all of it is counted as.
    """

    def __init__(
        self,
        config: RunConfig,
        evaluator: Evaluator,
        data: Sequence[TaskData],
        folder: RunFolder,
        journal: Journal,
        tracker: Tracker,
        cost: int,
    ) -> None:
        self._config = config
        self._evaluator = evaluator
        self._data = data
        self._folder = folder.finalists
        self._journal = journal
        self._tracker = tracker
        self._recover = recipe(config.selection)
        self.cost = cost

    def chosen(self, judged: Sequence[Judged]) -> list[Judged]:
        """The finalists, best first: the first `recover_finalists` by their scores after recovery, and the others.

        judged: those that saw the whole validation split, best first. Raises RunError where none could be recovered.
        """
        number = self._config.selection.recover_finalists
        few, others = judged[:number], judged[number:]
        known = self._journal.outcomes(MAIN, RECOVERED)
        for place, one in enumerate(few, start=1):
            if one.individual.number not in known:
                title = f"finalist {place} of {len(few)}"
                known[one.individual.number] = self._recovered(one.individual, title)
        shutil.rmtree(self._folder, ignore_errors=True)
        outcomes = {one.individual.number: known[one.individual.number] for one in few}
        keys = {one: found.rank_key for one, found in outcomes.items() if isinstance(found, Evaluation)}
        reasons = [found.reason for found in outcomes.values() if not isinstance(found, Evaluation)]
        if not keys:
            raise RunError(
                f"no finalist has a score after recovery ({reasons[0]}); search without selection.recover_finalists"
            )
        ranked = sorted(
            (one for one in few if one.individual.number in keys),
            key=lambda one: keys[one.individual.number],
            reverse=True,  # stable: of equal ones the better one before recovery is first
        )
        failed = [one for one in few if one.individual.number not in keys]
        return [*ranked, *failed, *others]

    def facts(self, judged: Sequence[Judged]) -> FinalistRecoveries:
        """What was recovered, in the order of `judged`, for the result of the run."""
        after, before = (self._journal.outcomes(MAIN, split) for split in (RECOVERED, "validation"))
        numbers = [one.individual.number for one in judged if one.individual.number in after]
        finalists = [RecoveredFinalist(one, _fitness(before[one]), _fitness(after[one])) for one in numbers]
        return FinalistRecoveries(
            methods=tuple(self._recover.methods),
            steps=self._config.selection.recover_steps,
            evaluations=self.cost,
            finalists=tuple(finalists),
        )

    def _recovered(self, finalist: Individual, title: str) -> Outcome:
        """The outcome on the validation split of a finalist that was recovered; it is in the journal afterwards."""
        started = time.perf_counter()
        material = self._material(finalist.genome)
        work = self._folder / str(finalist.number)
        student = work / "student"
        if not student.is_dir():
            work.mkdir(exist_ok=True)
            self._tracker.message(f"{title}: writing candidate {finalist.number} as a checkpoint")
            export_checkpoint(self._evaluator.model, finalist.genome, student, provenance={})
        # its logits were compared when it was written
        config = replace(self._config.model, path=str(student), revision=None, self_check=False)
        model = load_model(ModelSource(config))
        for number, name in enumerate(self._recover.methods):
            self._learn(model, name, material, work / f"state-{number}.safetensors", title)
        evaluator = Evaluator(model, self._evaluator.tasks, self._config.evaluation)
        (outcome,) = evaluator.evaluate([None], "validation")
        outcome = replace(outcome, duration_s=time.perf_counter() - started)
        self._journal.record([(MAIN, finalist.number, RECOVERED, outcome)])
        shutil.rmtree(work)
        self._tell(finalist, outcome, title)
        del model, evaluator
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return outcome

    def _material(self, genome: Genome) -> Material:
        """What the full model has to teach; it is asked once. genome: a finalist's, all of which have one size."""
        prompts = None
        formats = [PromptFormat(one.config, one, self._evaluator.model.tokenizer) for one in self._data]
        self._folder.mkdir(exist_ok=True)
        numbers = learned_and_held_out(sum(len(one.splits["search"]) for one in self._data))
        for name, chosen in zip((_LEARNED, _HELD_OUT), numbers, strict=True):
            if has_lessons(self._folder, name):
                continue
            if prompts is None:
                prompts = split_prompts(self._data, formats, "search", self._recover.answer_tokens, labelled=False)
            some = [prompts[number] for number in chosen]
            teach(self._evaluator, some, self._folder, name, self._recover, self._tracker)
        model = self._evaluator.model
        width = model.family.expert_width(model.language_model.config)
        enough = enough_tokens(max(genome.num_kept), min(genome.top_k), width)
        is_new = not has_blocks(self._folder)
        if is_new:
            most = self._recover.most_block_tokens(enough)
            keep_blocks(self._evaluator, self._folder, _LEARNED, most, self._tracker)
        learned, held_out = (read_lessons(self._folder, name) for name in (_LEARNED, _HELD_OUT))
        blocks = BlockTargets.load(self._folder)
        line = few_tokens(blocks, learned, enough)
        if is_new and line is not None:
            self._tracker.message(line)
        return Material(learned, held_out, blocks)

    def _learn(self, model: MoEModel, name: str, material: Material, file: Path, title: str) -> None:
        method = RECOVERY_METHODS.get(name, "selection.recover_finalists")
        begun = TrainingState.load(file).learned.steps if file.is_file() else 0
        steps = method.num_steps(self._recover, model.shape.num_layers)
        self._tracker.stage(f"{title}: recovering ({name})", steps, begun, unit=method.unit)

        def done(learned: Learned) -> None:
            self._tracker.advanced(
                1, f"loss {learned.checks[-1].validation:.4f} (before: {learned.checks[0].validation:.4f})"
            )

        with torch_threads(self._config.evaluation.threads):
            method.recover(model, material, self._recover, file, done)

    def _tell(self, finalist: Individual, outcome: Outcome, title: str) -> None:
        self._tracker.recorded(MAIN, RECOVERED, Individual(finalist.candidate, outcome))
        before = _fitness(self._journal.outcome(MAIN, finalist.number, "validation"))
        after = outcome.fitness if isinstance(outcome, Evaluation) else None
        told = (
            f"no score ({outcome})" if after is None else f"{after:.4f} on the validation split (before: {before:.4f})"
        )
        self._tracker.message(f"{title}: candidate {finalist.number} recovered to {told}")


def _fitness(outcome: Outcome) -> float | None:
    return outcome.fitness if isinstance(outcome, Evaluation) else None
