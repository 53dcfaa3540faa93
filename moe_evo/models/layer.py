"""One MoE layer of a loaded model, and the two hooks through which a genome changes what it computes.

The router's forward is wrapped, and merged experts are computed through the experts' hook. Both are in place only
while a plan is installed. Weights are never written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_evo.config.model import RouterMode
from moe_evo.genomes.genome import LayerGenome, Matrix
from moe_evo.models.experts_hook import Compute, Hook
from moe_evo.models.families import Family
from moe_evo.models.merged_cache import MergedCache, MergedKey, MergedTensors, merged_key
from moe_evo.models.merging import copied_experts, is_selection, mix_rows
from moe_evo.models.routing import RouterOutput, Substitute, eep_route, exported_route, masked_route
from moe_evo.models.variants.dynamic_routing import DynamicRouting, active_weights
from moe_evo.models.weight_shapes import local_shape, whole_shape


@dataclass
class LayerPlan:
    """What the hooks of one layer compute.

    router_mapping: W_RM (K, E). indices: (K,) the expert that each slot uses (for a
    pruning, the kept experts), or None where slots are merged experts. expert_merging: W_EM (K, E) where the experts
    are replaced by merged tensors, else None.
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
        """A plan that uses both hooks and computes the untouched layer: experts and indices in reverse order."""
        identity = np.eye(num_experts, dtype=np.float32)
        backwards = torch.arange(num_experts - 1, -1, -1)
        return cls(identity, top_k, indices=backwards, expert_merging=identity[::-1].copy())


class MoELayer:
    """The router and experts of one MoE layer; `install` makes them follow a plan until `remove`.

    dynamic_routing: a rule that the router follows from now on, with any plan and without one.
    """

    def __init__(
        self,
        number: int,
        block: nn.Module,
        family: Family,
        config: Any,
        router_mode: RouterMode,
        dynamic_routing: DynamicRouting | None = None,
    ) -> None:
        self.number = number
        self.router: nn.Module = block.get_submodule(family.router)
        self.experts: nn.Module = block.get_submodule("experts")
        self._family = family
        self._router_mode = router_mode
        self._renormalise = family.renormalises(config)
        self._scaling = family.scaling(config)
        # accelerate's offload hook loads the weights and then calls _old_forward
        self._slot = "_old_forward" if hasattr(self.router, "_old_forward") else "forward"
        self._merging: Hook | None = None
        self._dynamic_routing = dynamic_routing
        self._num_active: list[Tensor] = []
        if dynamic_routing is not None:
            self.router.__dict__[self._slot] = partial(self._route, [None])

    @property
    def num_active(self) -> Tensor | None:
        """How many experts each token of the last forward pass ran, (T,) int32; None without dynamic routing."""
        return torch.cat(self._num_active) if self._num_active else None

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
        """Weights and indices (T, top_k) of the router for logits (T, E) if only `kept` (T, E) may be chosen.

        The exported model, which lacks the other experts, routes so. Each group of experts must have enough left.
        """
        return masked_route(self.router, self._family.router_tensors, logits, kept, top_k)

    def merged_tensors(self, expert_merging: Matrix, into: MergedTensors | None = None) -> MergedTensors:
        """The experts' tensors (K, ...) for W_EM (K, E).

        into: tensors that may be overwritten with the result, where they lie on this layer's device.
        """
        into = into or {}
        with torch.inference_mode(mode=False):
            return {
                name: mix_rows(
                    expert_merging, stacked,
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
        """The key of `plan`'s merged tensors in the cache; None for a plan that merges nothing."""
        return None if plan.expert_merging is None else merged_key(self.number, plan.expert_merging)

    def install(self, plans: Sequence[LayerPlan | None], cache: MergedCache) -> None:
        """Follow `plans`, each for an equal part of the tokens in turn, with merged tensors from `cache`.

        None leaves its part as it is. Plans that merge take a block of `hooks_in_force`.
        """

        def merged(compute: Compute, _experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            parts = zip(plans, *(tensor.chunk(len(plans)) for tensor in (hidden, index, weights)), strict=True)
            outputs = [compute(self._experts_of(plan, cache), *part) for plan, *part in parts]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        if any(plan is not None and plan.expert_merging is not None for plan in plans):
            self._merging = Hook(self.experts, merged)
        if any(plan is not None for plan in plans):
            self._previous_forward = self.router.__dict__.get(self._slot)
            self.router.__dict__[self._slot] = partial(self._route, plans)

    def remove(self) -> None:
        """Remove the plan; does nothing where none is installed."""
        if self._merging is not None:
            self._merging.remove()
            self._merging = None
        if not hasattr(self, "_previous_forward"):
            return
        if self._previous_forward is None:
            del self.router.__dict__[self._slot]
        else:
            self.router.__dict__[self._slot] = self._previous_forward
        del self._previous_forward

    def _experts_of(self, plan: LayerPlan | None, cache: MergedCache) -> Any:
        """The layer's experts, or the merged ones where `plan` merges."""
        key = None if plan is None else self.merged_key(plan)
        if plan is None or plan.expert_merging is None or key is None:
            return self.experts
        expert_merging = plan.expert_merging

        def build(into: MergedTensors) -> MergedTensors:
            return self.merged_tensors(expert_merging, into)

        merged = cache.get(key, self._bytes_of(len(expert_merging)), build)
        return Substitute(self.experts, num_experts=len(plan.expert_merging), **merged)

    def _route(self, plans: Sequence[LayerPlan | None], hidden: Tensor) -> RouterOutput:
        parts = zip(plans, hidden.chunk(len(plans)), strict=True)
        self._num_active = []
        outputs = [self._route_by(plan, part) for plan, part in parts]
        if len(outputs) == 1:
            return outputs[0]
        logits, weights, index = zip(*outputs, strict=True)
        return logits[0], torch.cat(weights), torch.cat(index)  # no block reads the logits

    def _route_by(self, plan: LayerPlan | None, hidden: Tensor) -> RouterOutput:
        if plan is None:
            output: RouterOutput = type(self.router).forward(self.router, hidden)
            return self._dynamic(output)
        if not plan.router_rows:  # built in the first forward, where offloaded weights are in reach
            plan.router_rows = self._router_rows(plan.router_mapping)
            plan.indices = None if plan.indices is None else plan.indices.to(hidden.device)
        rows = plan.router_rows
        if self._router_mode == "eep":
            output = eep_route(
                self.router, hidden, rows["mapping"], plan.top_k,
                renormalise=self._renormalise, scaling=self._scaling,
            )  # fmt: skip
        else:
            output = exported_route(self.router, hidden, rows, plan.top_k)
        logits, weights, index = self._dynamic(output)
        if plan.indices is not None:
            index = plan.indices[index]
        return logits, weights, index

    def _dynamic(self, output: RouterOutput) -> RouterOutput:
        """The output under the layer's dynamic routing; indices are still slots."""
        if self._dynamic_routing is None:
            return output
        logits, weights, index = output
        active = self._dynamic_routing.active(self.number, output)
        self._num_active.append(active.sum(dim=-1, dtype=torch.int32))
        return logits, active_weights(weights, active, renormalises=self._renormalise), index

    def _router_rows(self, router_mapping: Matrix) -> dict[str, Tensor]:
        if self._router_mode == "exported":
            return self.mapped_router(router_mapping)
        device = self.router_tensors()["weight"].device
        return {"mapping": torch.from_numpy(router_mapping.copy()).to(device)}
