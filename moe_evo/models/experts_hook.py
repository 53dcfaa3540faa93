"""The one hook through which others act on the experts of a loaded model: merging, and whoever observes them.

While `hooks_in_force` is open, the experts go through an implementation that is registered with transformers'
`ExpertsInterface`. It calls the functions that were hooked to each experts module, or what the model had before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_evo.models.transformers_border import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, eager_experts

IMPLEMENTATION = "moe_evo"
_HOOK = "moe_evo_forward"

Compute = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""Of experts (a module, or what stands in for one), hidden (T, H), index (T, k) and gates (T, k): outputs (T, H)."""


@contextmanager
def hooks_in_force(language_model: Any, experts: Iterable[nn.Module]) -> Iterator[None]:
    """Let the experts of all MoE layers go through their hooks, until the block is left.

    Blocks may stand inside one another.
    """
    previous = language_model.get_experts_implementation()
    if previous[""] == IMPLEMENTATION:  # the block around this one has done it
        yield
        return
    own = {
        module: ALL_EXPERTS_FUNCTIONS.get_interface(previous[""], eager_experts(module)) for module in experts
    }  # all before the first is set: a library that has changed raises here
    for module, compute in own.items():
        module.__dict__[_HOOK] = compute
    try:
        language_model.set_experts_implementation(IMPLEMENTATION)
        yield
    finally:
        language_model.set_experts_implementation(previous)
        for module in own:
            del module.__dict__[_HOOK]


class Hook:
    """Lets `forward` compute a layer's experts, given what would have computed them, until `remove`.

    experts: the module of one MoE layer. Only in a block of `hooks_in_force`. Of several hooks the newest is called
    by the model, and is the first that has to go.
    """

    def __init__(self, experts: nn.Module, forward: Callable[[Compute, Any, Tensor, Tensor, Tensor], Tensor]) -> None:
        self._experts = experts
        self._previous: Compute = experts.__dict__[_HOOK]
        self._own: Compute = partial(forward, self._previous)
        experts.__dict__[_HOOK] = self._own

    def remove(self) -> None:
        assert self._experts.__dict__[_HOOK] is self._own, "the newest hook goes first"
        self._experts.__dict__[_HOOK] = self._previous


def _experts_forward(experts: nn.Module, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """The experts implementation 'moe_evo'."""
    output: Tensor = experts.__dict__[_HOOK](experts, hidden, index, gates)
    return output


ExpertsInterface.register(IMPLEMENTATION, _experts_forward)
