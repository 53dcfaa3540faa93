"""A smaller model learns from lessons by gradient steps: what is minimised, the loop, and `Training` on one device.

Every step is a function of the weights and its number, so that a training that goes on from its file has the same
losses as one that was never killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moe_evo.config.recover import RecoverConfig
from moe_evo.models.transformers_border import checkpoint_layers
from moe_evo.recovery.lessons import UNLABELLED, Lessons, batches_of, logits_of
from moe_evo.recovery.losses import cross_entropies, divergences
from moe_evo.recovery.masters import Masters
from moe_evo.recovery.material import Material
from moe_evo.recovery.pass_memory import PassMemory
from moe_evo.recovery.state import Check, Learned, TrainingState

_WARM_UP = 0.05
_ADVICE = "train fewer parts or adapters (recover.train) or set recover.gradient_checkpointing"
_MOMENTS = ("exp_avg", "exp_avg_sq")
MOST_NORM = 1.0
"""Of the gradient; a larger one is scaled down to it."""

Done = Callable[[Learned], None]


@dataclass(frozen=True, eq=False)
class Objective:
    """What is minimised: the weighted mean of divergences, and of labelled positions the mean cross entropy."""

    lessons: Lessons
    prompt_weight: float
    label_weight: float

    def total(self, numbers: Sequence[int]) -> tuple[float, int]:
        """Of some lessons the sum of their positions' weights, and how many positions have a label."""
        weights = self.lessons.weights(numbers, self.prompt_weight)
        labels = self.lessons.labels[self.lessons.positions(numbers)]
        return float(weights.sum()), int((labels != UNLABELLED).sum())

    def share(self, logits: Tensor, numbers: Sequence[int], total: tuple[float, int]) -> Tensor:
        """What some lessons add to the loss of all lessons that `total` is of. logits: (M, V) float32 of them."""
        positions, device = self.lessons.positions(numbers), logits.device
        ids, log_probs, rest, labels = (
            stored[positions].to(device)
            for stored in (self.lessons.ids, self.lessons.log_probs, self.lessons.rest, self.lessons.labels)
        )
        weights = self.lessons.weights(numbers, self.prompt_weight).to(device)
        loss = (weights * divergences(logits, ids, log_probs, rest)).sum() / max(total[0], 1e-9)
        if self.label_weight and total[1]:
            loss = loss + self.label_weight * cross_entropies(logits, labels).sum() / total[1]
        return loss

    @torch.no_grad()
    def loss(self, language_model: Any, device: torch.device, batch_tokens: int) -> float:
        """Of all lessons; batch_tokens: most tokens of a pass."""
        numbers = range(len(self.lessons))
        total, loss = self.total(numbers), 0.0
        for batch in self.batches(language_model, numbers, batch_tokens):
            loss += float(self.share(logits_of(language_model, self.lessons.rows(batch), device), batch, total))
        return loss

    def batches(self, language_model: Any, numbers: Sequence[int], batch_tokens: int) -> list[list[int]]:
        """Some lessons in passes of at most so many tokens."""
        vocabulary = int(language_model.config.get_text_config().vocab_size)
        return batches_of(self.lessons.lengths.tolist(), numbers, batch_tokens, vocabulary)


class Learner(Protocol):
    """What `learn` takes steps with: a smaller model, its optimizer and its state on disk."""

    def step(self, number: int) -> tuple[float, int]:
        """One step of the optimizer; returns its loss and the number of tokens read.

        Changes nothing if it raises, or where the loss is not finite.
        """
        ...

    def validation_loss(self) -> float: ...

    def save(self, learned: Learned, *, is_best: bool) -> None:
        """Keep the state, from which a killed training goes on; is_best: and the weights, as the best so far."""
        ...


def learn(learner: Learner, learned: Learned, config: RecoverConfig, done: Done) -> Learned:
    """Train from where `learned` stands until the last step, or until it stops helping.

    done: called after every step.
    """
    every = max(config.steps // config.checks, 1)
    losses: list[float] = []
    if not learned.checks:
        learned = _checked(learner, learned, [], config)
    while learned.steps < config.steps and not learned.stopped:
        started = time.perf_counter()
        loss, tokens = learner.step(learned.steps)
        if not math.isfinite(loss):
            reason = f"the loss of step {learned.steps + 1} is not finite: lower recover.learning_rate"
            learned = replace(learned, stopped=reason)
            learner.save(learned, is_best=False)
            break
        losses.append(loss)
        learned = replace(
            learned,
            steps=learned.steps + 1,
            tokens=learned.tokens + tokens,
            duration_s=learned.duration_s + time.perf_counter() - started,
        )
        if learned.steps % every == 0 or learned.steps == config.steps:
            learned = _checked(learner, learned, losses, config)
            losses = []
        done(learned)
    return learned


def _checked(learner: Learner, learned: Learned, losses: Sequence[float], config: RecoverConfig) -> Learned:
    """Compute the validation loss, keep the weights if it is the lowest, and save the state.

    losses: of the steps since the check before.
    """
    validation = learner.validation_loss()
    training = sum(losses) / len(losses) if losses else None
    checks = (*learned.checks, Check(learned.steps, training, validation))
    learned = replace(learned, checks=checks)
    best, is_best = learned.best, False
    if not math.isfinite(validation):
        reason = f"the validation loss after step {learned.steps} is not finite: lower recover.learning_rate"
        learned = replace(learned, stopped=reason)
    elif best is checks[-1]:
        is_best = True
    elif sum(check.step > best.step for check in checks) >= config.patience:
        learned = replace(learned, stopped=f"the validation loss has not fallen since step {best.step}")
    learner.save(learned, is_best=is_best)
    return learned


def drawn(config: RecoverConfig, lessons: int, step: int) -> list[int]:
    """The numbers of a step's lessons: every lesson once, in an order of its own, before any comes again.

    lessons: how many there are.
    """
    size = config.batch_size
    places = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng([config.seed, epoch]).permutation(lessons)
        for epoch in {place // lessons for place in places}
    }
    return [int(orders[place // lessons][place % lessons]) for place in places]


class Training:
    """A smaller model on one device, and what it learns from.

    parameters: of the language model, those that are trained; their float32 copies are what the optimizer changes.
    label_weight: of right answers; 0 learns from the full model alone. file: where the state is kept.
    """

    def __init__(
        self,
        language_model: Any,
        parameters: Mapping[str, nn.Parameter],
        material: Material,
        config: RecoverConfig,
        label_weight: float,
        file: Path,
    ) -> None:
        self._model = language_model
        self._masters = Masters(parameters)
        self._objective = Objective(material.lessons, config.prompt_weight, label_weight)
        self._validation = Objective(material.validation, config.prompt_weight, label_weight)
        self._config = config
        self._file = file
        self._device = next(iter(parameters.values())).device
        self._memory = PassMemory(config.batch_tokens, self._device, _ADVICE)
        weights = self._masters.weights.values()
        self._rate = config.rate(language_model.config.get_text_config().hidden_size)
        self._optimizer = torch.optim.AdamW(weights, lr=self._rate, weight_decay=0.0, fused=True)

    def run(self, done: Done = lambda learned: None) -> Learned:
        """Train until the last step, or until it stops helping; the model has the best weights afterwards.

        done: called after every step. Raises OutOfMemory where a single sequence does not fit.
        """
        try:
            self._prepare()
            learned = self._load(TrainingState.load(self._file)) if self._file.is_file() else Learned()
            return learn(self, learned, self._config, done)
        finally:
            self._restore()

    def step(self, number: int) -> tuple[float, int]:
        """See `Learner`."""
        return self._memory.within(lambda: self._step(number))

    def _step(self, number: int) -> tuple[float, int]:
        self._masters.drop_gradients()
        numbers = drawn(self._config, len(self._objective.lessons), number)
        total, loss, tokens = self._objective.total(numbers), 0.0, 0
        for batch in self._objective.batches(self._model, numbers, self._memory.batch_tokens):
            rows = self._objective.lessons.rows(batch)
            share = self._objective.share(logits_of(self._model, rows, self._device), batch, total)
            share.backward()  # type: ignore[no-untyped-call]
            loss += float(share.detach())
            tokens += sum(map(len, rows))
        if math.isfinite(loss):
            self._update(number)
        return loss, tokens

    def _update(self, number: int) -> None:
        self._masters.take_gradients()
        torch.nn.utils.clip_grad_norm_(self._masters.weights.values(), MOST_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * schedule(number, self._config.steps)
        self._optimizer.step()
        self._masters.put()

    def validation_loss(self) -> float:
        """See `Learner`."""
        return self._memory.within(self._validation_loss)

    def _validation_loss(self) -> float:
        return self._validation.loss(self._model, self._device, self._memory.batch_tokens)

    def save(self, learned: Learned, *, is_best: bool) -> None:
        """See `Learner`."""
        if is_best:
            self._masters.keep()
        tensors = self._masters.tensors()
        for name, weight in self._masters.weights.items():
            state = self._optimizer.state[weight]
            tensors |= {f"{moment}/{name}": state[moment].contiguous() for moment in _MOMENTS if moment in state}
        TrainingState(learned, self._memory.batch_tokens, tensors).save(self._file)

    def _load(self, state: TrainingState) -> Learned:
        steps = state.learned.steps
        self._memory.batch_tokens = min(state.batch_tokens, self._memory.batch_tokens)
        self._masters.load(state.tensors)
        for name, weight in self._masters.weights.items():
            if steps:
                moments = {one: state.tensors[f"{one}/{name}"].to(weight) for one in _MOMENTS}
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(steps), device=weight.device),
                    **moments,
                }
        return state.learned

    def _prepare(self) -> None:
        """Let the parameters have gradients; without dropout, as nothing random may change a loss."""
        self._model.requires_grad_(False)
        for parameter in self._masters.parameters.values():
            parameter.requires_grad_(True)
        if self._config.gradient_checkpointing:
            checkpoint_layers(self._model, enable=True)
            train_without_noise(self._model)

    def _restore(self) -> None:
        """The best weights, and no gradients."""
        self._masters.put_best()
        self._masters.drop_gradients()
        if self._config.gradient_checkpointing:
            checkpoint_layers(self._model, enable=False)
        self._model.requires_grad_(False).eval()


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: rises to 1 in a twentieth of the steps, and falls to 0 as a cosine."""
    warm_up = max(math.ceil(_WARM_UP * steps), 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def train_without_noise(language_model: nn.Module) -> None:
    """Set training mode, in which layers are checkpointed, with every dropout and router noise at 0."""
    language_model.train()
    for module in language_model.modules():
        for name in ("p", "attention_dropout", "jitter_noise", "router_jitter_noise"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
