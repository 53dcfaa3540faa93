"""Few numbers that are trained in place of all of an expert's, and become part of its weights at the end.

'adapters': to each expert matrix W a product of two thin ones is added, W + s B A, where B begins at zero (LoRA: Hu et
al. 2021, arXiv 2106.09685; s falls with the root of the rank: arXiv 2312.03732). 'scales': each expert's output has a
factor.

They are computed with where merged experts are, so stored layouts and the library's own kernels stay as they are. The
`peft` library does the same sums for stacked experts, but puts a module of its own in the place of each experts module,
which others hold on to, and rounds B A by itself to the model's number format: in bfloat16 that is neither what is
merged at the end nor what float32 adapters say. Here the sum is rounded once, and what was trained is what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_evo.models.experts_hook import Compute, Hook, hooks_in_force
from moe_evo.models.layer import MoELayer
from moe_evo.models.routing import Substitute
from moe_evo.models.view import MoEModel

_GAIN = 5.0  # a step of the optimizer changes W by about so many times what it would change it by itself
_MATRICES = ("gate_up_proj", "down_proj")
_BIAS = "down_proj_bias"
_SCALES = "output_scales"


@contextmanager
def adapted(model: MoEModel, parts: Sequence[str], rank: int, seed: int) -> Iterator[None]:
    """Let the experts of a model have what `parts` names of 'adapters' and 'scales', as parameters in float32.

    They are fitted into the weights where the block ends without an error, and are gone afterwards; see
    `of_adapters` and `of_scales`. rank: of B (out, rank) and A (rank, in). seed: of the first A.
    """
    adapters = [_LayerAdapter(layer, parts, rank, seed) for layer in model.layers]
    adapters = [one for one in adapters if one.names]
    if not adapters:
        yield
        return
    try:
        with hooks_in_force(model.language_model, (layer.experts for layer in model.layers)), ExitStack() as stack:
            for one in adapters:
                stack.callback(Hook(one.experts, one.compute).remove)
            yield
        for one in adapters:
            one.fold()
    finally:
        for one in adapters:
            one.remove()


def of_adapters(layer: MoELayer) -> list[nn.Parameter]:
    """The parameters of a layer's adapters within `adapted`; none elsewhere."""
    names = [name for matrix in _MATRICES for name in _factor_names(matrix)]
    return [layer.experts._parameters[name] for name in names if name in layer.experts._parameters]  # type: ignore[misc]


def of_scales(layer: MoELayer) -> list[nn.Parameter]:
    """The factors (E,) of a layer's experts within `adapted`; none elsewhere."""
    return [one for name, one in layer.experts.named_parameters(recurse=False) if name == _SCALES]


def _factor_names(matrix: str) -> tuple[str, str]:
    return f"{matrix}_lora_A", f"{matrix}_lora_B"


class _LayerAdapter:
    """What is trained of one layer's experts. names: of its parameters, which the experts module has meanwhile."""

    def __init__(self, layer: MoELayer, parts: Sequence[str], rank: int, seed: int) -> None:
        self.experts: Any = layer.experts
        self.names: list[str] = []
        self._rank = rank
        if "adapters" in parts:
            generator = torch.Generator().manual_seed(seed * 100_003 + layer.number)
            for matrix in _MATRICES:
                self._add_factors(matrix, generator)
        if "scales" in parts:
            self._add(_SCALES, torch.ones(layer.num_experts))

    def _add_factors(self, matrix: str, generator: torch.Generator) -> None:
        """A (E, rank, in), whose rows have a length of about 1, and B (E, out, rank), which is zero."""
        num_experts, rows, columns = getattr(self.experts, matrix).shape
        inputs, outputs = (rows, columns) if self.experts.is_transposed else (columns, rows)
        first = torch.randn(num_experts, self._rank, inputs, generator=generator) / inputs**0.5
        name_a, name_b = _factor_names(matrix)
        self._add(name_a, first)
        self._add(name_b, torch.zeros(num_experts, outputs, self._rank))

    def _add(self, name: str, values: Tensor) -> None:
        parameter = nn.Parameter(values.to(self.experts.down_proj.device), requires_grad=False)
        self.experts.register_parameter(name, parameter)
        self.names.append(name)

    def compute(self, compute: Compute, experts: Any, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """What the layer's experts put out, as they would after `fold`."""
        return compute(Substitute(experts, **self.weights()), hidden, index, gates)

    def weights(self) -> dict[str, Tensor]:
        """The experts' tensors in the model's number format, where they are others than the stored ones."""
        found: dict[str, Tensor] = {}
        for matrix in _MATRICES:
            name_a, name_b = _factor_names(matrix)
            if name_a in self.names:
                found[matrix] = self._added(matrix, getattr(self.experts, name_b), getattr(self.experts, name_a))
        if _SCALES in self.names:
            scales = getattr(self.experts, _SCALES)
            found["down_proj"] = found.get("down_proj", self.experts.down_proj).float() * scales[:, None, None]
            if hasattr(self.experts, _BIAS):
                found[_BIAS] = getattr(self.experts, _BIAS).float() * scales[:, None]
        return {name: one.to(getattr(self.experts, name).dtype) for name, one in found.items()}

    def _added(self, matrix: str, factor_b: Tensor, factor_a: Tensor) -> Tensor:
        """W + s B A in float32, in the layout of W."""
        left, right = (factor_a.mT, factor_b.mT) if self.experts.is_transposed else (factor_b, factor_a)
        weight, (_, rank, inputs) = getattr(self.experts, matrix).float(), factor_a.shape
        return torch.baddbmm(weight, left, right, alpha=_GAIN * (inputs / rank) ** 0.5)

    @torch.no_grad()
    def fold(self) -> None:
        """Write what was trained into the experts' own weights."""
        for name, one in self.weights().items():
            getattr(self.experts, name).copy_(one)

    def remove(self) -> None:
        for name in self.names:
            delattr(self.experts, name)
