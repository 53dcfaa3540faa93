"""The smaller model while it learns: in this process, or on the workers of a cluster while this one holds nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.commands.recovery_input import DEEPSPEED, LEARNED, VALIDATION, RecoveryJob, small_model
from moe_evo.records.recovery_folder import RecoveryFolder
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.recovery.state import Learned


class SmallModel:
    """The smaller model in this process: loaded when it is first asked for.

    checkpoint: what it is loaded from; newer weights may have been put into it since.
    """

    def __init__(self, job: RecoveryJob, checkpoint: Path, tracker: Tracker) -> None:
        self.checkpoint = checkpoint
        self._job = job
        self._tracker = tracker
        self._evaluator: Evaluator | None = None

    @property
    def evaluator(self) -> Evaluator:
        from moe_evo.models.source import ModelSource

        if self._evaluator is None:
            source = ModelSource(small_model(self._job.config.model, self.checkpoint))
            self._evaluator = load_evaluator(source, self._job.data, self._job.config.evaluation, self._tracker)
        return self._evaluator

    def written(self, folder: Path) -> Path:
        """A checkpoint of the model as it is now, in `folder` where it is none yet, after which it is dropped."""
        from moe_evo.models.export.export import export_checkpoint

        if not folder.is_dir():
            model = self.evaluator.model
            export_checkpoint(model, model.shape.identity(), folder, provenance={})
            del model
        self.checkpoint = folder
        self.drop()
        return folder

    def drop(self) -> None:
        """Free the memory that it takes."""
        import torch

        self._evaluator = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for other processes on this GPU


def trains_on_workers(job: RecoveryJob, number: int) -> bool:
    """Whether the method with this number among those that are done works on a cluster."""
    from moe_evo.recovery.methods import Distillation

    return job.recover.engine == DEEPSPEED and isinstance(job.methods[number], Distillation)


def learn_on_workers(
    job: RecoveryJob,
    folder: RecoveryFolder,
    student: SmallModel,
    tracker: Tracker,
    number: int,
    begin: Callable[[int], None],
    done: Callable[[Learned], None],
) -> Learned:
    """Let the workers train the smaller model by one method, and put the best weights into it here.

    begin: called with the number of steps that are done, whenever workers begin. done: called after every step.
    """
    from moe_evo.gangs.training import Listener, train_on_workers
    from moe_evo.models.source import ModelSource
    from moe_evo.recovery.methods import Distillation
    from moe_evo.recovery.sharded import ShardedJob, put_weights

    method, config = job.methods[number], job.config
    assert isinstance(method, Distillation)
    checkpoint = student.written(folder.student_of(number)) if number else student.checkpoint
    student.drop()
    model = replace(config.model, path=str(checkpoint), revision=None, self_check=False)
    state = folder.workers_state(number)
    state.mkdir(exist_ok=True)
    learned = train_on_workers(
        ShardedJob(
            model=model,
            hash=ModelSource(model).hash,
            lessons=folder.lessons,
            names=(LEARNED, VALIDATION),
            parts=method.trained(job.recover),
            label_weight=method.label_weight(job.recover),
            recover=job.recover,
            state=state,
        ),
        config.cluster,
        config.evaluation.threads,
        Listener(begin, done, tracker.message),
    )
    put_weights(state, learned.best.step, student.evaluator.model.language_model)
    return learned
