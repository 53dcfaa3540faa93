"""How finalists are recovered before the winner is chosen, and what that costs in evaluations; no torch here.

The unit is an example that a model reads, however long: an evaluation on the search split reads each of its examples
once. A step of training reads an example three times, as a backward pass takes about two forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_evo.config.recover import RecoverConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig

_MOST_PROMPTS = 400
_HELD_OUT = 5  # every fifth prompt chooses the weights
_CHECKS = 2
_PASSES_A_STEP = 3
_FITS = 6  # of each layer, with ridges of which the last is the best one


def recipe(selection: SelectionConfig) -> RecoverConfig:
    """The recovery of each finalist: in closed form, and then by `recover_steps` gradient steps."""
    methods = ["closed_form", *(["logits"] if selection.recover_steps else [])]
    return RecoverConfig(methods=methods, steps=max(selection.recover_steps, 1), checks=_CHECKS)


def learned_and_held_out(number: int) -> tuple[list[int], list[int]]:
    """Which of so many prompts of the search split finalists learn from, and which choose their weights; ascending."""
    chosen = np.random.default_rng(0).permutation(number)[:_MOST_PROMPTS]
    held_out = max(len(chosen) // _HELD_OUT, 1)
    return sorted(chosen[held_out:].tolist()), sorted(chosen[:held_out].tolist())


def recovery_cost(config: RunConfig, examples: Sequence[int], num_layers: int) -> int:
    """The evaluations of the budget that recovering finalists takes; 0 where none is asked for.

    examples: of the search split of each task. num_layers: MoE layers. The full model writes answers to all prompts,
    reads them, and reads once more those whose layers' outputs are kept. In closed form a finalist reads the prompts up
    to each layer, the layer reads them once a fit, and those that choose the weights are read behind each layer; they
    are also read at each check of a training.
    """
    selection = config.selection
    if not selection.recover_finalists:
        return 0
    recover = recipe(selection)
    learned, held_out = map(len, learned_and_held_out(sum(examples)))
    full = 2 * (learned + held_out) + learned
    each = learned * ((num_layers + 1) / 2 + _FITS) + held_out * (num_layers + 1)
    if selection.recover_steps:
        each += _PASSES_A_STEP * recover.steps * recover.batch_size + held_out * (1 + recover.checks)
    read = sum(examples)
    if config.evaluation.is_fresh:
        read = sum(min(config.evaluation.sample_size, number) for number in examples)
    return math.ceil((full + selection.recover_finalists * each) / read)


def without_recovery(search: SearchConfig, evaluations: int) -> SearchConfig:
    """The search with what is left of its budget beside so many evaluations, which recovering finalists costs."""
    return replace(search, evaluations=search.evaluations - evaluations)
