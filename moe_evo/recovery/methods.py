"""The ways to recover a pruned model, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_evo.config.recover import RecoverConfig
from moe_evo.models.view import MoEModel
from moe_evo.plugins import Registry, lacking
from moe_evo.recovery.adapters import adapted
from moe_evo.recovery.closed_form import refit
from moe_evo.recovery.layer_repair import Repair, repaired_by_layers, train_layer
from moe_evo.recovery.material import Material
from moe_evo.recovery.parts import trained_parameters
from moe_evo.recovery.state import Learned
from moe_evo.recovery.training import Done, Training


class RecoveryMethod(Protocol):
    """A way to make a smaller model compute what the full one does.

    description: one line for people. source: the paper that it is from. unit: what one of its steps is called.
    learns_labels: whether the lessons are to hold the right answers of the search split. needs_blocks: whether it
    compares the outputs of single layers.
    """

    @property
    def description(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def unit(self) -> str: ...

    @property
    def learns_labels(self) -> bool: ...

    @property
    def needs_blocks(self) -> bool: ...

    def num_steps(self, config: RecoverConfig, num_layers: int) -> int:
        """How many steps there will be at most."""
        ...

    def recover(self, model: MoEModel, material: Material, config: RecoverConfig, file: Path, done: Done) -> Learned:
        """Change the weights of `model`, and tell what was done.

        file: for the state, from which a killed recovery goes on. done: called after every step.
        """
        ...


@dataclass(frozen=True)
class Distillation:
    """Gradient steps on the divergence from the full model's next-token distributions.

    parts: what is trained, see `moe_evo.config.recover.PARTS`; is_fixed: whatever the config says.
    """

    description: str
    source: str
    parts: tuple[str, ...]
    learns_labels: bool = False
    is_fixed: bool = False
    needs_blocks = False
    unit = "step"

    def num_steps(self, config: RecoverConfig, num_layers: int) -> int:
        return config.steps

    def recover(self, model: MoEModel, material: Material, config: RecoverConfig, file: Path, done: Done) -> Learned:
        parts, weight = self.trained(config), self.label_weight(config)
        with adapted(model, parts, config.rank, config.seed):
            parameters = trained_parameters(model, parts)
            return Training(model.language_model, parameters, material, config, weight, file).run(done)

    def trained(self, config: RecoverConfig) -> tuple[str, ...]:
        """The parts of the model that are trained."""
        return self.parts if self.is_fixed or not config.train else tuple(config.train)

    def label_weight(self, config: RecoverConfig) -> float:
        """Of right answers; 0 learns from the full model alone."""
        return config.label_weight if self.learns_labels else 0.0


@dataclass(frozen=True)
class LayerByLayer:
    """One MoE layer after the other, fitted to the outputs of the full model's layer."""

    description: str
    source: str
    repair: Repair
    learns_labels = False
    needs_blocks = True
    unit = "layer"

    def num_steps(self, config: RecoverConfig, num_layers: int) -> int:
        return num_layers

    def recover(self, model: MoEModel, material: Material, config: RecoverConfig, file: Path, done: Done) -> Learned:
        return repaired_by_layers(model, material, config, file, done, self.repair)


def _problem(method: Any) -> str | None:
    members = ("description", "source", "unit", "learns_labels", "needs_blocks", "num_steps", "recover")
    return lacking(method, members, "moe_evo.recovery.methods.RecoveryMethod")


_HINTON = (
    "Hinton et al. 2015, arXiv 1503.02531; with answers that the teacher writes: Kim and Rush 2016, arXiv 1606.07947"
)

RECOVERY_METHODS: Registry[RecoveryMethod] = Registry(
    "recovery method",
    ["moe_evo.recovery"],
    {
        "logits": Distillation("the full model's next-token distributions", _HINTON, ("experts", "router", "norms")),
        "router": Distillation("the same, by the router alone", _HINTON, ("router",), is_fixed=True),
        "labels": Distillation(
            "the same, and the right answers of the search split",
            _HINTON,
            ("experts", "router", "norms"),
            learns_labels=True,
        ),
        "layerwise": LayerByLayer(
            "the outputs of the full model's experts, layer by layer", "MoE-Pruner: arXiv 2410.12013", train_layer
        ),
        "closed_form": LayerByLayer("the same by least squares, without gradient steps", "ridge regression", refit),
    },
    _problem,
)
