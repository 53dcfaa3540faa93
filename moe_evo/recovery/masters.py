"""Float32 copies of the parameters that are trained, and the best of them so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Masters:
    """The copies of a model's parameters that an optimizer changes, by name; of one in float32 it is the parameter.

    best: what `keep` kept last, on the CPU.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.weights: dict[str, Tensor] = {
            name: one if one.dtype == torch.float32 else one.detach().float() for name, one in parameters.items()
        }
        self.best: dict[str, Tensor] = {}

    def take_gradients(self) -> None:
        """Move the parameters' gradients to their copies."""
        for name, weight in self.weights.items():
            parameter = self.parameters[name]
            if weight is not parameter and parameter.grad is not None:
                weight.grad, parameter.grad = parameter.grad.float(), None

    def drop_gradients(self) -> None:
        for one in (*self.parameters.values(), *self.weights.values()):
            one.grad = None

    def keep(self) -> None:
        """Remember the copies as the best."""
        self.best = {name: one.detach().to("cpu", copy=True) for name, one in self.weights.items()}

    def put(self) -> None:
        """Write the copies into the model, in its own number format."""
        self._put(self.weights)

    def put_best(self) -> None:
        """Write the best copies into the model; does nothing where none were kept."""
        if self.best:
            self._put(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """The copies and the best ones, to be stored."""
        found = {f"weight/{name}": one.detach().contiguous() for name, one in self.weights.items()}
        return found | {f"best/{name}": one.contiguous() for name, one in self.best.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` told, and write it into the model."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weight/{name}"])
        self.best = {name: tensors[f"best/{name}"] for name in self.weights if f"best/{name}" in tensors}
        self.put()

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if weights[name] is not parameter:
                    parameter.copy_(weights[name])
