"""Training on the workers of a real Ray cluster: what one device does, also where workers are lost or run out."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from ray.cluster_utils import Cluster
from tiny_lessons import readings
from tiny_models import tiny_model

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import RecoverConfig, Stage
from moe_evo.errors import ClusterError, ModelError
from moe_evo.gangs import training as module
from moe_evo.gangs.training import Listener, train_on_workers
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel
from moe_evo.recovery import sharded
from moe_evo.recovery.lessons import read_lessons, write_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.parts import trained_parameters
from moe_evo.recovery.sharded import ShardedJob, put_weights
from moe_evo.recovery.sharded_state import ShardedState
from moe_evo.recovery.state import Learned
from moe_evo.recovery.training import Training

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers' processes cannot import tests

CONFIG = RecoverConfig(steps=20, batch_size=4, batch_tokens=32, checks=4, top_k=96, learning_rate=3e-3, patience=9)
TRAINED = ("experts", "router", "norms")
CLUSTER = ClusterConfig(address="auto", gang_size=2, resources={"CPU": 1})

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, full = tmp_path_factory.mktemp("workers"), tiny_model("mixtral")
    for name, what in (("learned", readings(30)), ("validation", readings(12, seed=1))):
        write_lessons(folder, name, what, full, torch.device("cpu"), top_k=96, batch_tokens=100)
    tiny_model("mixtral", seed=5, num_local_experts=4).save_pretrained(folder / "student")
    return folder


def job_of(folder: Path, state: Path, stage: Stage) -> ShardedJob:
    model = ModelConfig(path=str(folder / "student"), device="cpu", sharding="zero3", self_check=False)
    state.mkdir()
    names, config = ("learned", "validation"), replace(CONFIG, zero_stage=stage)
    return ShardedJob(model, ModelSource(model).hash, folder, names, TRAINED, 0.0, config, state)


class Heard:
    """What is told while workers train."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.steps: list[int] = []
        self.messages: list[str] = []

    def done(self, learned: Learned) -> None:
        self.steps.append(learned.steps)


def losses(learned: Learned) -> list[float]:
    return [value for check in learned.checks for value in (check.training, check.validation) if value is not None]


def assert_learned_as_on_one_device(job: ShardedJob, learned: Learned, file: Path) -> None:
    model = MoEModel(tiny_model("mixtral", seed=5, num_local_experts=4))
    material = Material(*(read_lessons(job.lessons, name) for name in job.names))
    parameters = trained_parameters(model, TRAINED)
    expected = Training(model.language_model, parameters, material, job.recover, 0.0, file).run()
    assert losses(learned) == pytest.approx(losses(expected), abs=1e-5, rel=0)
    assert (learned.steps, learned.tokens) == (20, expected.tokens)
    other = tiny_model("mixtral", seed=5, num_local_experts=4)
    put_weights(job.state, learned.best.step, other)
    for (name, one), two in zip(other.named_parameters(), model.language_model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5, msg=name)


def test_two_workers_of_ray_do_what_one_device_does(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    job, heard = job_of(folder, tmp_path / "state", 2), Heard()
    learned = train_on_workers(job, CLUSTER, 1, Listener(heard.begun.append, heard.done, heard.messages.append))
    assert_learned_as_on_one_device(job, learned, tmp_path / "file")
    assert heard.begun == [0] and heard.steps == list(range(1, 21))
    assert not any("lost" in message for message in heard.messages)


def test_training_goes_on_where_a_worker_runs_out_of_memory_and_where_one_is_killed(
    cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, heard, pids = job_of(folder, tmp_path / "state", 3), Heard(), tmp_path / "pids"
    be_worker = module._be_worker
    pids.mkdir()

    def limited_worker(settings: dict[str, Any]) -> None:
        rank = module.train.get_context().get_world_rank()
        (pids / str(rank)).write_text(str(os.getpid()))
        logits_of = sharded.logits_of

        def limited(model: Any, rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
            if rank == 1 and len(rows) * max(map(len, rows)) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")  # no GPU here to fill
            return logits_of(model, rows, device)

        sharded.logits_of = limited
        be_worker(settings)

    monkeypatch.setattr(module, "_be_worker", limited_worker)

    def done(learned: Learned) -> None:
        heard.done(learned)
        if learned.steps == 12 and heard.steps.count(12) == 1:
            os.kill(int((pids / "1").read_text()), signal.SIGKILL)

    learned = train_on_workers(job, CLUSTER, 1, Listener(heard.begun.append, done, heard.messages.append))
    assert_learned_as_on_one_device(job, learned, tmp_path / "file")
    state = ShardedState.load(job.state)
    assert state is not None and state.batch_tokens == 16
    told = [message for message in heard.messages if not message.startswith("waiting")]
    assert told[0] == "out of memory on cpu of worker 1; going on with passes of 16 tokens"
    assert "a worker was lost (" in told[1] and len(told) == 2
    assert heard.begun in ([0, 0, 10], [0, 0, 15])  # a few more steps may be made before the death is seen
    assert heard.steps[-1] == 20


def test_what_no_other_worker_could_do_ends_at_once(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    job, heard = replace(job_of(folder, tmp_path / "state", 3), hash="another"), Heard()
    with pytest.raises(ModelError, match="is another checkpoint on this node; put the same files on every node"):
        train_on_workers(job, CLUSTER, 1, Listener(heard.begun.append, heard.done, heard.messages.append))
    assert len(heard.begun) == 1


def test_workers_that_die_again_and_again_end_it_with_what_to_do(
    cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying_worker(settings: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(module, "_be_worker", dying_worker)
    job, heard = job_of(folder, tmp_path / "state", 3), Heard()
    two = replace(CLUSTER, max_attempts=2)
    with pytest.raises(ClusterError, match=r"workers were lost 2 times in a row .*run the same command again"):
        train_on_workers(job, two, 1, Listener(heard.begun.append, heard.done, heard.messages.append))
    assert sum("a worker was lost" in message for message in heard.messages) == 1
