"""The ways to recover a pruned model, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_evo.config.recover import RecoverConfig
from moe_evo.models.view import MoEModel
from moe_evo.plugins import Registry, lacking
from moe_evo.recovery.lessons import Lessons
from moe_evo.recovery.parts import trained_parameters
from moe_evo.recovery.state import Learned
from moe_evo.recovery.training import Done, Training


class RecoveryMethod(Protocol):
    """A way to make a smaller model compute what the full one does.

    description: one line for people. source: the paper that it is from. learns_labels: whether the lessons are to hold
    the right answers of the search split.
    """

    @property
    def description(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def learns_labels(self) -> bool: ...

    def recover(
        self, model: MoEModel, lessons: Lessons, validation: Lessons, config: RecoverConfig, file: Path, done: Done
    ) -> Learned:
        """Change the weights of `model`, and tell what was done.

        validation: lessons by which the weights that are kept are chosen. file: for the state, from which a killed
        recovery goes on. done: called after every step.
        """
        ...


@dataclass(frozen=True)
class Distillation:
    """Gradient steps on the divergence from the full model's next-token distributions.

    parts: what is trained unless the config says otherwise, see `moe_evo.config.recover.PARTS`.
    """

    description: str
    source: str
    parts: tuple[str, ...]
    learns_labels: bool = False

    def recover(
        self, model: MoEModel, lessons: Lessons, validation: Lessons, config: RecoverConfig, file: Path, done: Done
    ) -> Learned:
        parameters = trained_parameters(model, config.train or self.parts)
        weight = config.label_weight if self.learns_labels else 0.0
        return Training(model.language_model, parameters, lessons, validation, config, weight, file).run(done)


def _problem(method: Any) -> str | None:
    return lacking(
        method,
        ("description", "source", "learns_labels", "recover"),
        "moe_evo.recovery.methods.RecoveryMethod",
    )


_HINTON = (
    "Hinton et al. 2015, arXiv 1503.02531; with answers that the teacher writes: Kim and Rush 2016, arXiv 1606.07947"
)

RECOVERY_METHODS: Registry[RecoveryMethod] = Registry(
    "recovery method",
    ["moe_evo.recovery"],
    {
        "logits": Distillation("the full model's next-token distributions", _HINTON, ("experts", "router", "norms")),
        "router": Distillation("the same, by the router alone", _HINTON, ("router",)),
        "labels": Distillation(
            "the same, and the right answers of the search split",
            _HINTON,
            ("experts", "router", "norms"),
            learns_labels=True,
        ),
    },
    _problem,
)
