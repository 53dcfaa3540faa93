"""Training: against a plain loop, whatever the size of a pass, and from where it was killed."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lessons import readings
from tiny_models import CONFIGS, tiny_model

from moe_evo.config.recover import PARTS, RecoverConfig
from moe_evo.errors import ConfigError, OutOfMemory
from moe_evo.models.view import MoEModel
from moe_evo.recovery import training as module
from moe_evo.recovery.lessons import Lessons, read_lessons, write_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.parts import trained_parameters
from moe_evo.recovery.state import Learned, TrainingState
from moe_evo.recovery.training import Training

CPU = torch.device("cpu")
CONFIG = RecoverConfig(steps=12, batch_size=4, batch_tokens=10_000, checks=3, top_k=96, learning_rate=3e-3, patience=9)
TRAINED = ("experts", "router", "norms")
OWN_PARTS = [part for part in PARTS if part not in ("adapters", "scales")]  # the others are in test_adapters


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lessons, Lessons]:
    """What a full model is to teach, and for validation."""
    folder, full = tmp_path_factory.mktemp("lessons"), tiny_model("mixtral")
    for name, what in (("learned", readings(30)), ("validation", readings(12, seed=1))):
        write_lessons(folder, name, what, full, CPU, top_k=96, batch_tokens=100)
    return read_lessons(folder, "learned"), read_lessons(folder, "validation")


def small_model(seed: int = 5, dtype: torch.dtype = torch.float32) -> MoEModel:
    return MoEModel(tiny_model("mixtral", seed=seed, num_local_experts=4).to(dtype))


def trained(
    model: MoEModel,
    lessons: tuple[Lessons, Lessons],
    file: Path,
    config: RecoverConfig = CONFIG,
    parts: tuple[str, ...] = TRAINED,
    label_weight: float = 0.0,
) -> Learned:
    parameters = trained_parameters(model, parts)
    return Training(model.language_model, parameters, Material(*lessons), config, label_weight, file).run()


def losses(learned: Learned) -> list[float]:
    return [value for check in learned.checks for value in (check.training, check.validation) if value is not None]


def plain_loop(model: MoEModel, lessons: Lessons, config: RecoverConfig, label_weight: float) -> list[float]:
    """The same steps without batches, stored files or state: sequence by sequence, in float64 sums."""
    chosen = {*trained_parameters(model, TRAINED)}
    parameters = [one for name, one in model.language_model.named_parameters() if name in chosen]
    for one in parameters:
        one.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    epochs = [np.random.default_rng([config.seed, epoch]).permutation(len(lessons)) for epoch in range(9)]
    order = np.concatenate(epochs).tolist()
    found = []
    for step in range(config.steps):
        numbers = order[step * config.batch_size : (step + 1) * config.batch_size]
        total, weight, entropy, num_labels = 0.0, 0.0, 0.0, 0
        for number in numbers:
            places = lessons.positions([number])
            q = model.language_model(input_ids=lessons.rows([number])[0][None].long()).logits[0].log_softmax(-1)
            p = torch.zeros_like(q).scatter(1, lessons.ids[places].long(), lessons.log_probs[places].float())
            kl = (p.exp() * (p - q)).sum(-1)
            start = int(lessons.starts[number])
            weights = torch.tensor([config.prompt_weight] * start + [1.0] * (len(kl) - start))
            total, weight = total + (kl * weights).sum(), weight + weights.sum()
            for position, label in enumerate(lessons.labels[places].tolist()):
                if label >= 0:
                    entropy, num_labels = entropy - q[position, label], num_labels + 1
        loss = total / weight + (label_weight * entropy / num_labels if label_weight and num_labels else 0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        warm_up = math.ceil(0.05 * config.steps)
        falling = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (config.steps - warm_up)))
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(
            (step + 1) / warm_up, 1 if step < warm_up else falling
        )
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_training_does_what_a_plain_loop_does(
    label_weight: float, lessons: tuple[Lessons, Lessons], tmp_path: Path
) -> None:
    model, other = small_model(), small_model()
    config = replace(CONFIG, checks=12)
    learned = trained(model, lessons, tmp_path / "state", config, label_weight=label_weight)
    seen = [check.training for check in learned.checks[1:]]
    assert seen == pytest.approx(plain_loop(other, lessons[0], config, label_weight), rel=1e-4)
    assert learned.best.step == 12 and learned.best.validation < learned.checks[0].validation
    for (name, one), two in zip(
        model.language_model.named_parameters(), other.language_model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, two.detach(), rtol=1e-3, atol=1e-4, msg=name)
        assert not one.requires_grad


@pytest.mark.parametrize("change", [{"batch_tokens": 1}, {"batch_tokens": 25}, {"gradient_checkpointing": True}])
def test_the_size_of_a_pass_and_checkpointing_change_no_loss(
    change: dict, lessons: tuple[Lessons, Lessons], tmp_path: Path
) -> None:
    expected = losses(trained(small_model(), lessons, tmp_path / "whole"))
    assert losses(trained(small_model(), lessons, tmp_path / "parts", replace(CONFIG, **change))) == pytest.approx(
        expected, rel=1e-4
    )


def test_checkpointing_is_done_without_dropout(lessons: tuple[Lessons, Lessons], tmp_path: Path) -> None:
    noisy = tiny_model("mixtral", seed=5, num_local_experts=4, attention_dropout=0.5, router_jitter_noise=0.5)
    config = replace(CONFIG, gradient_checkpointing=True)
    expected = losses(trained(small_model(), lessons, tmp_path / "one"))
    assert losses(trained(MoEModel(noisy), lessons, tmp_path / "two", config)) == pytest.approx(expected, rel=1e-4)
    assert not noisy.training
    assert not any(getattr(one, "gradient_checkpointing", False) for one in noisy.modules())


def test_checkpointing_computes_layers_twice(lessons: tuple[Lessons, Lessons], tmp_path: Path) -> None:
    passes = []
    for checkpointing in (False, True):
        model, calls = small_model(), []
        model.layers[0].router.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        config = replace(CONFIG, gradient_checkpointing=checkpointing)
        trained(model, lessons, tmp_path / str(checkpointing), config)
        passes.append(sum(calls))
    assert passes[1] == 2 * passes[0] == 2 * 12


def test_a_killed_training_goes_on_with_the_same_losses_and_weights(
    lessons: tuple[Lessons, Lessons], tmp_path: Path
) -> None:
    whole, killed = small_model(), small_model()
    expected = trained(whole, lessons, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(learned: Learned) -> None:
        if learned.steps == 6:  # two steps after the second check
            raise Killed

    parameters = trained_parameters(killed, TRAINED)
    with pytest.raises(Killed):
        Training(killed.language_model, parameters, Material(*lessons), CONFIG, 0.0, tmp_path / "state").run(kill)
    assert TrainingState.load(tmp_path / "state").learned.steps == 4
    again = small_model()
    got = trained(again, lessons, tmp_path / "state")
    assert losses(got) == losses(expected) and got.steps == expected.steps and got.tokens == expected.tokens
    for one, two in zip(
        trained_parameters(again, TRAINED).values(), trained_parameters(whole, TRAINED).values(), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize("parts", [(part,) for part in OWN_PARTS])
def test_every_part_of_every_family_learns_and_nothing_else_changes(
    model_type: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    full = tiny_model(model_type)
    for name, seed in (("learned", 0), ("validation", 1)):
        write_lessons(tmp_path, name, readings(12, seed=seed), full, CPU, top_k=8, batch_tokens=100)
    both = read_lessons(tmp_path, "learned"), read_lessons(tmp_path, "validation")
    small = MoEModel(tiny_model(model_type, seed=1))
    before = copy.deepcopy(small.language_model.state_dict())
    chosen = trained_parameters(small, parts)
    config = replace(CONFIG, steps=4, checks=4, batch_size=12, learning_rate=1e-2)
    learned = trained(small, both, tmp_path / "state", config, parts)
    assert learned.checks[-1].training < learned.checks[1].training
    small.language_model.load_state_dict(before)
    trained(small, both, tmp_path / "again", replace(config, patience=1, learning_rate=1e-3), parts)
    tied = {one.data_ptr() for one in chosen.values()}
    for name, tensor in small.language_model.state_dict().items():
        if tensor.data_ptr() not in tied:
            assert torch.equal(tensor, before[name]), name


def test_weights_in_bfloat16_are_trained_in_float32(lessons: tuple[Lessons, Lessons], tmp_path: Path) -> None:
    model = small_model(dtype=torch.bfloat16)
    config = replace(CONFIG, learning_rate=1e-3)
    learned = trained(model, lessons, tmp_path / "state", config)
    state = TrainingState.load(tmp_path / "state")
    assert all(one.dtype == torch.float32 for name, one in state.tensors.items())
    assert learned.best.step == 12 and learned.best.validation < learned.checks[0].validation
    for name, one in trained_parameters(model, TRAINED).items():
        assert one.dtype == torch.bfloat16 and torch.equal(one, state.tensors[f"best/{name}"].bfloat16())


def test_a_loss_that_is_not_finite_ends_it_and_the_best_weights_are_kept(
    lessons: tuple[Lessons, Lessons], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divergences = module.divergences
    calls = []

    def failing(logits, *stored):
        calls.append(logits.requires_grad)
        return divergences(logits, *stored) * (math.nan if sum(calls) > 6 else 1.0)

    monkeypatch.setattr(module, "divergences", failing)
    model = small_model()
    learned = trained(model, lessons, tmp_path / "state")
    assert learned.steps == 6 and "loss of step 7 is not finite: lower recover.learning_rate" in learned.stopped
    assert learned.best.step == 4
    best = TrainingState.load(tmp_path / "state").tensors
    for name, one in trained_parameters(model, TRAINED).items():
        assert torch.equal(one, best[f"best/{name}"])


def test_it_stops_where_the_validation_loss_no_longer_falls(lessons: tuple[Lessons, Lessons], tmp_path: Path) -> None:
    config = replace(CONFIG, learning_rate=3.0, patience=2, checks=12)
    model, before = small_model(), small_model()
    learned = trained(model, lessons, tmp_path / "state", config)
    assert learned.steps == 2 and learned.best.step == 0
    assert learned.stopped == "the validation loss has not fallen since step 0"
    for one, two in zip(model.language_model.parameters(), before.language_model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_full_memory_halves_the_pass_and_repeats_the_step(
    lessons: tuple[Lessons, Lessons], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses(trained(small_model(), lessons, tmp_path / "one"))
    logits_of = module.logits_of

    def limited(model, rows, device):
        if len(rows) * max(map(len, rows)) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")  # no GPU here to fill
        return logits_of(model, rows, device)

    monkeypatch.setattr(module, "logits_of", limited)
    assert losses(trained(small_model(), lessons, tmp_path / "two")) == pytest.approx(expected, rel=1e-4)
    assert TrainingState.load(tmp_path / "two").batch_tokens <= 30


def test_one_sequence_that_does_not_fit_is_told(
    lessons: tuple[Lessons, Lessons], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")  # no GPU here to fill

    monkeypatch.setattr(module, "logits_of", full)
    with pytest.raises(OutOfMemory, match="with one sequence in a pass: shorten the prompts"):
        trained(small_model(), lessons, tmp_path / "state")


def test_a_part_that_a_model_lacks_is_refused() -> None:
    model = small_model()
    for part in OWN_PARTS:
        assert trained_parameters(model, [part])
    del model.layers[:]
    with pytest.raises(ConfigError, match=r"recover.train: got router, of which this model has no parameters"):
        trained_parameters(model, ["router"])
