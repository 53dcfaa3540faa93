"""One MoE layer of a loaded model, and the two hooks through which a genome acts on it.

The router's forward is wrapped and the experts go through a function registered with transformers'
`ExpertsInterface`. Both are in place only while a plan is installed; weights are never written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_evo.config.model import RouterMode
from moe_evo.genomes.genome import LayerGenome, Matrix
from moe_evo.models.families import Family
from moe_evo.models.merged_cache import KeptRow, MergedCache, MergedKey, MergedTensors, merged_key
from moe_evo.models.merging import copied_experts, is_selection, mix_rows
from moe_evo.models.routing import RouterOutput, Substitute, eep_route, exported_route, masked_route
from moe_evo.models.transformers_border import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, eager_experts
from moe_evo.models.weight_shapes import local_shape, whole_shape

IMPLEMENTATION = "moe_evo"
_HOOK = "moe_evo_forward"


@dataclass
class LayerPlan:
    """What the hooks of one layer compute.

    router_mapping: W_RM (K, E). indices: (K,) what a routed slot is called for the experts (the kept
    experts' own numbers for a pruning), or None where slots are merged experts. expert_merging: W_EM
    (K, E) where merged tensors stand in for the experts, else None.
    """

    router_mapping: Matrix
    top_k: int
    indices: Tensor | None = None
    expert_merging: Matrix | None = None
    router_rows: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, genome: LayerGenome) -> LayerPlan:
        merging = genome.expert_merging
        if is_selection(merging):
            return cls(genome.router_mapping, genome.top_k, indices=torch.tensor(copied_experts(merging)))
        return cls(genome.router_mapping, genome.top_k, expert_merging=merging)

    @classmethod
    def reversed_identity(cls, num_experts: int, top_k: int) -> LayerPlan:
        """Both hooks at work for the function of the untouched layer: experts and indices in reverse."""
        identity = np.eye(num_experts, dtype=np.float32)
        backwards = torch.arange(num_experts - 1, -1, -1)
        return cls(identity, top_k, indices=backwards, expert_merging=identity[::-1].copy())


class MoELayer:
    """The router and experts of one MoE layer; `install` makes them follow a plan until `remove`."""

    def __init__(self, number: int, block: nn.Module, family: Family, config: Any, router_mode: RouterMode) -> None:
        self.number = number
        self.router: nn.Module = block.get_submodule(family.router)
        self.experts: nn.Module = block.get_submodule("experts")
        self._family = family
        self._router_mode = router_mode
        self._renormalise = family.renormalises(config)
        self._scaling = family.scaling(config)
        # accelerate's offload hook loads the weights and then calls _old_forward
        self._slot = "_old_forward" if hasattr(self.router, "_old_forward") else "forward"

    @property
    def num_experts(self) -> int:
        return whole_shape(self.router_tensors()["weight"])[0]

    def router_tensors(self) -> dict[str, Tensor]:
        """Everything of the router that has one row an expert: weight (E, H), biases (E,).

        Offloaded and ZeRO-3 tensors are empty outside of the router's forward.
        """
        return {name: getattr(self.router, name) for name in self._family.router_tensors}

    def expert_tensors(self) -> dict[str, Tensor]:
        """The experts' stacked weights (E, ...) and biases; in a forward the slices of this rank.

        Offloaded and ZeRO-3 tensors are empty outside of the experts' forward.
        """
        return {name: getattr(self.experts, name) for name in self._family.expert_tensors}

    def mapped_router(self, router_mapping: Matrix) -> dict[str, Tensor]:
        """The router's tensors (K, ...) for W_RM (K, E), as an exported checkpoint holds them."""
        with torch.inference_mode(mode=False):  # a later caller may not be in inference mode
            return {name: mix_rows(router_mapping, rows) for name, rows in self.router_tensors().items()}

    def route_among(self, logits: Tensor, kept: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Weights and indices (T, top_k) that the router makes of logits (T, E) if it had only `kept` (T, E) to choose.

        As the exported model routes whose other experts are gone. With groups of experts each must have enough left.
        """
        return masked_route(self.router, self._family.router_tensors, logits, kept, top_k)

    def merged_tensors(
        self, expert_merging: Matrix, known: Mapping[int, KeptRow] | None = None, into: MergedTensors | None = None
    ) -> MergedTensors:
        """The experts' tensors (K, ...) for W_EM (K, E).

        known: rows that were merged before, by their numbers. into: tensors that may be overwritten with the result,
        where they lie on this layer's device.
        """
        rows, into = known or {}, into or {}
        with torch.inference_mode(mode=False):
            return {
                name: mix_rows(
                    expert_merging, stacked, {slot: (kept[name], row) for slot, (kept, row) in rows.items()},
                    out=into[name] if name in into and into[name].device == stacked.device else None,
                )
                for name, stacked in self.expert_tensors().items()
            }  # fmt: skip

    def merged_bytes(self, expert_merging: Matrix) -> int:
        """Memory that `merged_tensors` takes on this rank; 0 where W_EM (K, E) merges nothing."""
        return 0 if is_selection(expert_merging) else self._bytes_of(len(expert_merging))

    def _bytes_of(self, num_experts: int) -> int:
        """Memory of the tensors of so many experts on this rank."""
        tensors = self.expert_tensors().values()
        return num_experts * sum(math.prod(local_shape(tensor)[1:]) * tensor.element_size() for tensor in tensors)

    def merged_key(self, plan: LayerPlan) -> MergedKey | None:
        """Where the cache keeps what `plan` merges; None for a plan that merges nothing."""
        return None if plan.expert_merging is None else merged_key(self.number, plan.expert_merging)

    def install(self, plans: Sequence[LayerPlan | None], cache: MergedCache, implementation: str) -> None:
        """Follow `plans`, each for an equal part of the tokens in turn, with merged tensors from `cache`.

        None leaves its part as it is. implementation: transformers' name of how experts are computed.
        """
        base = experts_function(self.experts, implementation)

        def experts_forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if all(plan is None or plan.expert_merging is None for plan in plans):
                return base(self.experts, hidden, index, weights)
            parts = zip(plans, *(tensor.chunk(len(plans)) for tensor in (hidden, index, weights)), strict=True)
            outputs = [base(self._experts_of(plan, cache), *part) for plan, *part in parts]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        self.experts.__dict__[_HOOK] = experts_forward
        if any(plan is not None for plan in plans):
            self._previous_forward = self.router.__dict__.get(self._slot)
            self.router.__dict__[self._slot] = partial(self._route, plans)

    def remove(self) -> None:
        """Back to the untouched layer; harmless where nothing is installed."""
        self.experts.__dict__.pop(_HOOK, None)
        if not hasattr(self, "_previous_forward"):
            return
        if self._previous_forward is None:
            del self.router.__dict__[self._slot]
        else:
            self.router.__dict__[self._slot] = self._previous_forward
        del self._previous_forward

    def _experts_of(self, plan: LayerPlan | None, cache: MergedCache) -> Any:
        """The experts, or what stands in for them where `plan` merges."""
        key = None if plan is None else self.merged_key(plan)
        if plan is None or plan.expert_merging is None or key is None:
            return self.experts
        expert_merging = plan.expert_merging

        def build(into: MergedTensors) -> MergedTensors:
            return self.merged_tensors(expert_merging, cache.known_rows(key), into)

        merged = cache.get(key, self._bytes_of(len(expert_merging)), build)
        return Substitute(self.experts, num_experts=len(plan.expert_merging), **merged)

    def _route(self, plans: Sequence[LayerPlan | None], hidden: Tensor) -> RouterOutput:
        parts = zip(plans, hidden.chunk(len(plans)), strict=True)
        outputs = [self._route_by(plan, part) for plan, part in parts]
        if len(outputs) == 1:
            return outputs[0]
        logits, weights, index = zip(*outputs, strict=True)
        return logits[0], torch.cat(weights), torch.cat(index)  # no block reads the logits

    def _route_by(self, plan: LayerPlan | None, hidden: Tensor) -> RouterOutput:
        if plan is None:
            output: RouterOutput = type(self.router).forward(self.router, hidden)
            return output
        if not plan.router_rows:  # built in the first forward, where offloaded weights are in reach
            plan.router_rows = self._router_rows(plan.router_mapping)
            plan.indices = None if plan.indices is None else plan.indices.to(hidden.device)
        rows = plan.router_rows
        if self._router_mode == "eep":
            logits, weights, index = eep_route(
                self.router, hidden, rows["mapping"], plan.top_k,
                renormalise=self._renormalise, scaling=self._scaling,
            )  # fmt: skip
        else:
            logits, weights, index = exported_route(self.router, hidden, rows, plan.top_k)
        if plan.indices is not None:
            index = plan.indices[index]
        return logits, weights, index

    def _router_rows(self, router_mapping: Matrix) -> dict[str, Tensor]:
        if self._router_mode == "exported":
            return self.mapped_router(router_mapping)
        device = self.router_tensors()["weight"].device
        return {"mapping": torch.from_numpy(router_mapping.copy()).to(device)}


def experts_function(experts: nn.Module, implementation: str) -> Callable[..., Tensor]:
    """An experts implementation as a function of (experts, hidden, index, weights)."""
    eager = eager_experts(experts)
    function: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, eager)
    return function


def _experts_forward(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts implementation 'moe_evo', in force while experts may be merged."""
    output: Tensor = experts.__dict__[_HOOK](hidden, index, weights)
    return output


ExpertsInterface.register(IMPLEMENTATION, _experts_forward)
