"""Training over several workers: real process groups, against the training on one device."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import run_gang
from tiny_lessons import readings
from tiny_models import CONFIGS, tiny_model

from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import PARTS, RecoverConfig, Stage
from moe_evo.models.ranks import Ranks
from moe_evo.models.size.memory import training_per_rank
from moe_evo.models.size.size import read_size
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel
from moe_evo.recovery import sharded
from moe_evo.recovery.lessons import read_lessons, write_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.parts import trained_parameters
from moe_evo.recovery.sharded import ShardedJob, deal, put_weights, train_share
from moe_evo.recovery.sharded_state import ShardedState, read_tensors
from moe_evo.recovery.state import Learned
from moe_evo.recovery.training import Training

CPU = torch.device("cpu")
CONFIG = RecoverConfig(steps=20, batch_size=4, batch_tokens=20, checks=4, top_k=96, learning_rate=3e-3, patience=9)
TRAINED = ("experts", "router", "norms")
STAGES: list[Stage] = [2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller models, and what a full one is to teach them."""
    folder, full = tmp_path_factory.mktemp("sharded"), tiny_model("mixtral")
    for name, what in (("learned", readings(30)), ("validation", readings(12, seed=1)), ("one", readings(1))):
        write_lessons(folder, name, what, full, CPU, top_k=96, batch_tokens=100)
    student = tiny_model("mixtral", seed=5, num_local_experts=4)
    student.save_pretrained(folder / "student")
    student.bfloat16().save_pretrained(folder / "bfloat16")
    return folder


def job_of(
    folder: Path, state: Path, config: RecoverConfig = CONFIG, student: str = "student", **model: Any
) -> ShardedJob:
    options = ModelConfig(path=str(folder / student), device="cpu", sharding="zero3", self_check=False, **model)
    state.mkdir()
    names = ("learned", "validation")
    return ShardedJob(options, ModelSource(options).hash, folder, names, TRAINED, 0.0, config, state)


def on_one_device(job: ShardedJob, file: Path) -> tuple[Learned, MoEModel]:
    model = MoEModel(tiny_model("mixtral", seed=5, num_local_experts=4))
    material = Material(*(read_lessons(job.lessons, name) for name in job.names))
    parameters = trained_parameters(model, job.parts)
    learned = Training(model.language_model, parameters, material, job.recover, job.label_weight, file).run()
    return learned, model


def shares(ranks: Ranks, jobs: Sequence[ShardedJob]) -> list[Learned]:
    return [train_share(job, ranks) for job in jobs]


class _Killed(Exception):
    pass


def killed(ranks: Ranks, jobs: Sequence[ShardedJob]) -> None:
    def kill(learned: Learned) -> None:
        if learned.steps == 12:  # two steps after the second check
            raise _Killed

    for job in jobs:
        with pytest.raises(_Killed):
            train_share(job, ranks, kill)


def losses(learned: Learned) -> list[float]:
    return [value for check in learned.checks for value in (check.training, check.validation) if value is not None]


def weights(job: ShardedJob, step: int) -> dict[str, torch.Tensor]:
    return {name: tensor for kind, name, tensor in read_tensors(job.state, step) if kind == "weight"}


def test_two_workers_do_what_one_device_does(folder: Path, tmp_path: Path) -> None:
    """With both stages, offloaded or not, with checkpointed layers, and of more steps than there are lessons."""
    labels = {"parts": ("all",), "label_weight": 0.5}
    jobs = {
        "2": job_of(folder, tmp_path / "2", replace(CONFIG, zero_stage=2)),
        "2 offloaded": job_of(folder, tmp_path / "2o", replace(CONFIG, zero_stage=2), offload="cpu"),
        "2 checkpointed": job_of(folder, tmp_path / "2c", replace(CONFIG, zero_stage=2, gradient_checkpointing=True)),
        "2 labels": replace(job_of(folder, tmp_path / "2l", replace(CONFIG, zero_stage=2)), **labels),
        "3": job_of(folder, tmp_path / "3"),
        "3 offloaded": job_of(folder, tmp_path / "3o", offload="cpu"),
        "3 checkpointed": job_of(folder, tmp_path / "3c", replace(CONFIG, gradient_checkpointing=True)),
        "3 labels": replace(job_of(folder, tmp_path / "3l"), **labels),
    }
    of_ranks = run_gang(shares, 2, list(jobs.values()), timeout_s=280)
    plain, _ = expected = on_one_device(jobs["3"], tmp_path / "file")
    for place, (name, job) in enumerate(jobs.items()):
        learned, model = on_one_device(job, tmp_path / f"file {name}") if "labels" in name else expected
        for of_rank in of_ranks:
            assert losses(of_rank[place]) == pytest.approx(losses(learned), abs=1e-5, rel=0), name
            assert of_rank[place].tokens == plain.tokens and of_rank[place].steps == 20
        other = tiny_model("mixtral", seed=5, num_local_experts=4)
        put_weights(job.state, learned.best.step, other)
        for (path, one), two in zip(other.named_parameters(), model.language_model.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=2e-5, msg=f"{name}: {path}")


def test_every_part_of_every_family_learns_as_on_one_device(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=3, checks=3)
    jobs, expected = {}, {}
    for family in sorted(CONFIGS):
        folder = tmp_path / family
        for name, seed in (("learned", 0), ("validation", 1)):
            write_lessons(folder, name, readings(12, seed=seed), tiny_model(family), CPU, top_k=8, batch_tokens=100)
        student = tiny_model(family, seed=1)
        student.save_pretrained(folder / "student")
        for stage in STAGES:
            job = job_of(folder, folder / str(stage), replace(config, zero_stage=stage))
            jobs[family, stage] = replace(job, parts=("all",))
        material = Material(*(read_lessons(folder, name) for name in job.names))
        model = MoEModel(student)
        parameters = trained_parameters(model, ["all"])
        expected[family] = Training(model.language_model, parameters, material, config, 0.0, folder / "file").run()
    for (family, stage), learned in zip(jobs, run_gang(shares, 2, list(jobs.values()), timeout_s=280)[0], strict=True):
        assert losses(learned) == pytest.approx(losses(expected[family]), abs=1e-5, rel=0), (family, stage)


def test_any_parts_alone_learn_as_on_one_device(folder: Path, tmp_path: Path) -> None:
    """Also those before which nothing has a gradient."""
    config = replace(CONFIG, steps=3, checks=3)
    parts = [(part,) for part in PARTS if part not in ("adapters", "scales")]  # which one device trains
    jobs = {
        (one, stage): replace(job_of(folder, tmp_path / f"{one}-{stage}", replace(config, zero_stage=stage)), parts=one)
        for one in parts
        for stage in STAGES
    }
    expected = {one: on_one_device(jobs[one, 2], tmp_path / f"file {one}")[0] for one in parts}
    for (one, stage), learned in zip(jobs, run_gang(shares, 2, list(jobs.values()), timeout_s=280)[0], strict=True):
        assert losses(learned) == pytest.approx(losses(expected[one]), abs=1e-5, rel=0), (one, stage)


def test_a_killed_training_goes_on_with_the_same_losses_and_weights(folder: Path, tmp_path: Path) -> None:
    """Also with another stage of ZeRO."""
    changes: list[dict[str, Any]] = [{"zero_stage": 2}, {}, {"offload": "cpu"}]
    whole, broken = (
        [
            job_of(folder, tmp_path / f"{name}-{place}", replace(CONFIG, zero_stage=one.get("zero_stage", 3)),
                   offload=one.get("offload", "none"))
            for place, one in enumerate(changes)
        ]
        for name in ("whole", "killed")
    )  # fmt: skip
    expected = run_gang(shares, 2, whole)[0]
    run_gang(killed, 2, broken)
    for job in broken:
        state = ShardedState.load(job.state)
        assert state is not None and state.learned.steps == 10
        assert {file.name for file in job.state.glob("step-*")} == {"step-000010"}
    swapped = replace(broken[2], recover=replace(CONFIG, zero_stage=2))
    for one, two, job, other in zip(
        run_gang(shares, 2, [*broken[:2], swapped])[0], expected, broken, whole, strict=True
    ):
        rounding = 0 if job is not broken[2] else 1e-6
        assert losses(one) == pytest.approx(losses(two), abs=rounding, rel=0)
        assert (one.steps, one.tokens) == (two.steps, two.tokens)
        got, want = weights(job, 20), weights(other, 20)
        assert got.keys() == want.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, want[name], rtol=0, atol=10 * rounding)


def failing(ranks: Ranks, job: ShardedJob) -> Learned:
    divergences = sharded.Objective.share
    calls = []

    def share(self: Any, logits: torch.Tensor, numbers: Sequence[int], total: Any) -> torch.Tensor:
        calls.append(logits.requires_grad)
        found = divergences(self, logits, numbers, total)
        return found * (math.nan if ranks.rank == 1 and sum(calls) > 16 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded.Objective, "share", share)
        return train_share(job, ranks)


def test_a_loss_that_is_not_finite_on_one_worker_ends_it_on_all_and_the_best_weights_stay(
    folder: Path, tmp_path: Path
) -> None:
    job = job_of(folder, tmp_path / "state")
    one, two = (replace(learned, duration_s=0.0) for learned in run_gang(failing, 2, job))
    assert one == two and "is not finite: lower recover.learning_rate" in one.stopped
    assert one.best.step == 5 * (one.steps // 5) and one.is_over(CONFIG.steps)
    assert all(tensor.isfinite().all() for tensor in weights(job, one.best.step).values())
    (again,) = run_gang(shares, 2, [job])[0]
    assert replace(again, duration_s=0.0) == one  # it is over, whoever asks again


def test_it_stops_where_the_validation_loss_no_longer_falls(folder: Path, tmp_path: Path) -> None:
    job = job_of(folder, tmp_path / "state", replace(CONFIG, learning_rate=3.0, patience=2, checks=20))
    (learned,) = run_gang(shares, 2, [job])[0]
    assert learned.steps == 2 and learned.best.step == 0
    assert learned.stopped == "the validation loss has not fallen since step 0"
    model, before = (tiny_model("mixtral", seed=5, num_local_experts=4) for _ in range(2))
    put_weights(job.state, learned.best.step, model)
    for one, two in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, two)


def test_weights_in_bfloat16_are_trained_in_float32(folder: Path, tmp_path: Path) -> None:
    jobs = [
        job_of(folder, tmp_path / str(stage), replace(CONFIG, learning_rate=1e-3, zero_stage=stage), "bfloat16")
        for stage in STAGES
    ]
    for job, learned in zip(jobs, run_gang(shares, 2, jobs)[0], strict=True):
        assert learned.best.step == 20 and learned.best.validation < learned.checks[0].validation
        found = weights(job, 20)
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.values())


def held(ranks: Ranks, job: ShardedJob) -> int:
    """Bytes of all tensors between two steps, when gradients are gone and moments are there."""
    found = []

    def count(learned: Learned) -> None:
        if learned.steps == 3:
            storages = [one.untyped_storage() for one in gc.get_objects() if isinstance(one, torch.Tensor)]
            found.append(sum({one.data_ptr(): one.nbytes() for one in storages}.values()))

    train_share(job, ranks, count)
    return found[0]


@pytest.mark.parametrize("stage", STAGES)
def test_the_plan_tells_the_memory_of_a_worker(stage: Stage, folder: Path, tmp_path: Path) -> None:
    wide = tiny_model("mixtral", seed=5, num_local_experts=4, hidden_size=256, intermediate_size=512)
    wide.save_pretrained(folder / f"wide {stage}")
    job = job_of(folder, tmp_path / "state", replace(CONFIG, steps=4, checks=1, zero_stage=stage), f"wide {stage}")
    size = read_size(ModelSource(job.model), 2)
    plan = training_per_rank(size, size.shape.num_experts, 2, stage, "none")
    gradients = -(-size.parameters // 2) * (4 + 4)  # which are not there now
    for found in run_gang(held, 2, replace(job, parts=("all",))):
        assert 0.9 * (plan.device - gradients) < found < 1.1 * (plan.device + plan.gathered)


def test_lessons_are_dealt_evenly() -> None:
    lengths = [5, 3, 9, 1, 7, 2, 8]
    shares = deal(lengths, range(7), 2)
    assert sorted(shares[0] + shares[1]) == list(range(7))
    assert abs(sum(lengths[one] for one in shares[0]) - sum(lengths[one] for one in shares[1])) <= 1
    assert deal(lengths, [3], 3) == [[3], [], []]
