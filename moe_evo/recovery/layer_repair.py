"""MoE layer after MoE layer, each fitted to what the full model's layer puts out at the same tokens.

What enters a layer comes from the layers before it as they were repaired, so that their errors are made up for. Only
one layer is looked at at a time, and no gradients go through the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_evo.config.recover import RecoverConfig
from moe_evo.files.write import whole_file
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel
from moe_evo.recovery.blocks import BlockInputs, block_inputs
from moe_evo.recovery.masters import Masters
from moe_evo.recovery.material import Material
from moe_evo.recovery.pass_memory import PassMemory
from moe_evo.recovery.state import Check, Learned, TrainingState
from moe_evo.recovery.training import Done, Objective, schedule

_TOKENS_A_STEP = 1024

Repair = Callable[[MoELayer, BlockInputs, Tensor, RecoverConfig, PassMemory], None]
"""Changes the weights of one layer so that at its inputs it puts out the targets (N, H), in passes that fit memory."""


def repaired_by_layers(
    model: MoEModel, material: Material, config: RecoverConfig, file: Path, done: Done, repair: Repair
) -> Learned:
    """Repair every MoE layer in turn; a step is a layer. The model has the best weights afterwards.

    The best are those after the layer behind which the validation loss was lowest: later layers are put back. A repair
    that was killed goes on behind the last layer that was done; each layer has a file of its own beside `file`.
    """
    assert material.blocks is not None, "the full model's outputs were asked for"
    numbers = material.blocks.numbers
    objective = Objective(material.validation, config.prompt_weight, 0.0)
    memory = PassMemory(config.batch_tokens, model.device, "or lower recover.block_tokens")

    def checked(learned: Learned) -> Learned:
        loss = memory.within(lambda: objective.loss(model.language_model, model.device, memory.batch_tokens))
        learned = replace(learned, checks=(*learned.checks, Check(learned.steps, None, loss)))
        TrainingState(learned, memory.batch_tokens).save(file)
        return learned

    def repaired(layer: MoELayer, targets: Tensor) -> int:
        """Repair a layer, from its first weights where memory had run out; returns the number of tokens."""
        put_weights(layer, before[layer.number])
        inputs = block_inputs(model, material.lessons, numbers, layer.number, memory.batch_tokens)
        repair(layer, inputs, targets, config, memory)
        return len(inputs.hidden)

    if file.is_file():
        state = TrainingState.load(file)
        learned, memory.batch_tokens = state.learned, min(state.batch_tokens, config.batch_tokens)
    else:
        learned = checked(Learned())
    before = {layer.number: _load(layer, file) for layer in model.layers[: learned.steps]}
    for layer in model.layers[learned.steps :]:
        started = time.perf_counter()
        before[layer.number] = copied_weights(layer)
        tokens = memory.within(partial(repaired, layer, material.blocks.of(layer.number)))
        with whole_file(_file_of(layer, file)) as temporary:
            save_file(copied_weights(layer), temporary)
        learned = checked(
            replace(
                learned,
                steps=learned.steps + 1,
                tokens=learned.tokens + tokens,
                duration_s=learned.duration_s + time.perf_counter() - started,
            )
        )
        before = {number: one for number, one in before.items() if number >= learned.best.step}
        done(learned)
    for layer in model.layers[learned.best.step :]:
        put_weights(layer, before[layer.number])
    return learned


def _trained(layer: MoELayer) -> dict[str, nn.Parameter]:
    tensors = {**layer.router_tensors(), **{f"experts.{name}": one for name, one in layer.expert_tensors().items()}}
    return {name: one for name, one in tensors.items() if isinstance(one, nn.Parameter)}


def copied_weights(layer: MoELayer) -> dict[str, Tensor]:
    """The layer's parameters as they are now, on the CPU."""
    return {name: one.detach().to("cpu", copy=True) for name, one in _trained(layer).items()}


def put_weights(layer: MoELayer, tensors: Mapping[str, Tensor]) -> None:
    """Give the layer the parameters that `copied_weights` copied."""
    with torch.no_grad():
        for name, one in _trained(layer).items():
            one.copy_(tensors[name])


def _file_of(layer: MoELayer, file: Path) -> Path:
    return file.with_name(f"{file.stem}-layer-{layer.number}.safetensors")


def _load(layer: MoELayer, file: Path) -> dict[str, Tensor]:
    """Put a layer's repaired weights into the model; returns those that were there."""
    before = copied_weights(layer)
    put_weights(layer, load_file(_file_of(layer, file)))
    return before


def train_layer(
    layer: MoELayer, inputs: BlockInputs, targets: Tensor, config: RecoverConfig, memory: PassMemory
) -> None:
    """Train router and experts of one layer on the mean squared difference of its outputs from the targets."""
    parameters = _trained(layer)
    masters = Masters(parameters)
    device = next(iter(parameters.values())).device
    rate, scale = config.rate(targets.shape[1]), float(targets.float().square().mean().clamp(min=1e-12))
    optimizer = torch.optim.AdamW(masters.weights.values(), lr=rate, weight_decay=0.0, fused=True)
    try:
        for one in parameters.values():
            one.requires_grad_(True)
        for step in range(config.steps):
            rng = np.random.default_rng([config.seed, layer.number, step])
            chosen = torch.from_numpy(rng.permutation(len(targets))[:_TOKENS_A_STEP])
            masters.drop_gradients()
            for piece in torch.split(chosen, memory.batch_tokens):
                hidden = inputs.hidden[piece].to(device)
                _, gates, index = layer.router(hidden)
                difference = layer.experts(hidden, index, gates).float() - targets[piece].to(device).float()
                loss = difference.square().sum() / (scale * targets.shape[1] * len(chosen))
                loss.backward()
            masters.take_gradients()
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, config.steps)
            optimizer.step()
            masters.put()
    finally:
        masters.drop_gradients()
        for one in parameters.values():
            one.requires_grad_(False)
