"""`ShardedTraining`: one of several workers that train a smaller model together, by DeepSpeed's ZeRO.

Every worker reads its share of a step's lessons. Stage 2 divides float32 weights, gradients and moments among the
workers, stage 3 the model's weights, too. What is learned is what `Training` learns on one device, up to rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import RecoverConfig
from moe_evo.errors import ModelError, OutOfMemory, RowOutOfMemory
from moe_evo.models.free_memory import MEMORY_ERRORS, is_out_of_memory
from moe_evo.models.load import load_model
from moe_evo.models.placement import weights_dtype
from moe_evo.models.ranks import Ranks
from moe_evo.models.source import ModelSource
from moe_evo.models.transformers_border import LIBRARY_ERRORS, checkpoint_layers, one_line
from moe_evo.models.weight_shapes import whole_shape
from moe_evo.models.zero3 import BUCKET, imported_deepspeed, join_deepspeed, training_settings
from moe_evo.recovery.lessons import logits_of, read_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.parts import trained_parameters
from moe_evo.recovery.sharded_state import KINDS, Kind, ShardedState, read_tensors, write_tensors
from moe_evo.recovery.state import Learned
from moe_evo.recovery.training import (
    MOST_NORM,
    Done,
    Objective,
    drawn,
    learn,
    schedule,
    train_without_noise,
)


@dataclass(frozen=True)
class ShardedJob:
    """What every worker is told.

    model: the smaller one; its offload says where what is divided lies between uses. hash: of that checkpoint. lessons:
    folder of them; names: of those that are learned, and of those that choose the weights. parts, label_weight: see
    `Distillation`. state: folder of the state, on storage that all workers share.
    """

    model: ModelConfig
    hash: str
    lessons: Path
    names: tuple[str, str]
    parts: tuple[str, ...]
    label_weight: float
    recover: RecoverConfig
    state: Path


def train_share(
    job: ShardedJob,
    ranks: Ranks,
    done: Done = lambda learned: None,
    ready: Callable[[], None] = lambda: None,
) -> Learned:
    """Train as one of the workers of the process group; all of them call this.

    done: called after every step. ready: called when the first is about to be made. Raises ModelError where this
    worker's checkpoint is another one, OutOfMemory where memory runs out: with fewer tokens in a pass the training can
    go on.
    """
    source = ModelSource(_on_own_gpu(job.model))
    if source.hash != job.hash:
        raise ModelError(f"{job.model.path}: is another checkpoint on this node; put the same files on every node")
    learned, validation = (read_lessons(job.lessons, name) for name in job.names)
    dtype = weights_dtype(job.model, source.transformers_config)
    settings = training_settings(source.config, source.transformers_config, dtype, job.recover.zero_stage)
    if job.recover.zero_stage == 3:
        model = load_model(source, ranks, slices=settings)
    else:
        join_deepspeed(job.model)
        model = load_model(ModelSource(_whole(source.config)))
    parameters = trained_parameters(model, job.parts)
    engine = _engine(model.language_model, parameters, settings, job)
    material = Material(learned, validation)
    training = ShardedTraining(engine, parameters, material, job, ranks, model.device)
    ready()
    found = training.run(done)
    dist.barrier()  # a worker that leaves while another one still receives breaks that
    return found


class ShardedTraining:
    """A worker's share of a training. engine: DeepSpeed's, around the smaller model."""

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        material: Material,
        job: ShardedJob,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._objective = Objective(material.lessons, job.recover.prompt_weight, job.label_weight)
        self._validation = Objective(material.validation, job.recover.prompt_weight, job.label_weight)
        self._config = job.recover
        self._folder = job.state
        self._ranks = ranks
        self._device = device
        self._batch_tokens = job.recover.batch_tokens
        self._saved: int | None = None  # the step whose tensors are on disk
        self._rate = job.recover.rate(engine.module.config.get_text_config().hidden_size)

    def run(self, done: Done) -> Learned:
        """Train until the last step, or until it stops helping; the weights are in the state's folder afterwards."""
        train_without_noise(self._engine.module)
        if self._config.gradient_checkpointing:
            checkpoint_layers(self._engine.module, enable=True)
        # of the first worker: on a network's file system others may see an older one
        state = self._ranks.gather(ShardedState.load(self._folder))[0]
        if state is None:
            return learn(self, Learned(), self._config, done)
        self._batch_tokens = min(state.batch_tokens, self._batch_tokens)
        self._load(state.learned.steps)
        self._saved = state.learned.steps
        return learn(self, state.learned, self._config, done)

    def step(self, number: int) -> tuple[float, int]:
        """See `Learner`."""
        lessons = self._objective.lessons
        numbers = drawn(self._config, len(lessons), number)
        loss = self._forward_and_backward(numbers)
        if math.isfinite(loss):
            self._update(self._rate * schedule(number, self._config.steps))
        return loss, sum(int(lessons.lengths[one]) for one in numbers)

    def validation_loss(self) -> float:
        """See `Learner`."""
        objective = self._validation
        numbers = range(len(objective.lessons))
        total, loss = objective.total(numbers), 0.0
        self._engine.module.eval()
        with torch.no_grad():
            for batch, is_real in self._passes(objective, numbers):
                with self._memory_of(batch):
                    loss += float(self._share(objective, batch, total)) * is_real
        self._engine.module.train()
        return self._sum(loss)

    def save(self, learned: Learned, *, is_best: bool) -> None:
        """See `Learner`; the weights of the best step stay on disk."""
        if learned.steps != self._saved:
            tensors = self._tensors(has_moments=learned.steps > 0)
            if self._ranks.rank == 0:
                write_tensors(self._folder, learned.steps, tensors)
            else:
                for _ in tensors:  # gathering them takes all workers
                    pass
            self._saved = learned.steps
        if self._ranks.rank == 0:
            ShardedState(learned, self._batch_tokens).save(self._folder)

    def _forward_and_backward(self, numbers: Sequence[int]) -> float:
        """The loss of some lessons of all workers; their gradients are summed up."""
        objective, loss = self._objective, 0.0
        total, passes = objective.total(numbers), self._passes(objective, numbers)
        for place, (batch, is_real) in enumerate(passes):
            self._engine.set_gradient_accumulation_boundary(place == len(passes) - 1)
            with self._memory_of(batch):
                share = self._share(objective, batch, total) * is_real
                self._engine.backward(share * self._ranks.size)  # DeepSpeed takes the mean over workers
            loss += float(share.detach())
        return self._sum(loss)

    def _share(self, objective: Objective, batch: Sequence[int], total: tuple[float, int]) -> Tensor:
        return objective.share(logits_of(self._engine, objective.lessons.rows(batch), self._device), batch, total)

    @contextmanager
    def _memory_of(self, batch: Sequence[int]) -> Iterator[None]:
        """Within the block an error of a full memory becomes OutOfMemory; batch: the lessons that are read."""
        try:
            yield
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            where = f"out of memory on {self._device} of worker {self._ranks.rank}"
            if len(batch) > 1:
                raise OutOfMemory(where) from error
            raise RowOutOfMemory(
                f"{where} with one sequence in a pass: shorten the prompts (tasks' max_length), train fewer parts "
                "(recover.train), set recover.gradient_checkpointing, or take more workers (cluster.gang_size)"
            ) from error

    def _update(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()

    def _passes(self, objective: Objective, numbers: Sequence[int]) -> list[tuple[list[int], bool]]:
        """This worker's passes, and whether they count: all workers make equally many."""
        lengths = objective.lessons.lengths.tolist()
        dealt = [
            objective.batches(self._engine.module, share, self._batch_tokens)
            for share in deal(lengths, numbers, self._ranks.size)
        ]
        most, own = max(map(len, dealt)), dealt[self._ranks.rank]
        shortest = min(numbers, key=lambda number: lengths[number])
        return [(batch, True) for batch in own] + [([shortest], False)] * (most - len(own))

    def _sum(self, value: float) -> float:
        """Over all workers."""
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total)

    def _tensors(self, *, has_moments: bool) -> Iterator[tuple[Kind, str, Tensor]]:
        """The whole float32 weights and moments, one after the other; gathering each takes all workers."""
        library = imported_deepspeed().utils
        kinds: Sequence[Kind] = KINDS if has_moments else KINDS[:1]
        for name, parameter in self._parameters.items():
            for kind in kinds:
                if kind == "weight":
                    found = library.safe_get_full_fp32_param(parameter)
                else:
                    found = library.safe_get_full_optimizer_state(parameter, kind)
                yield kind, name, found.float().cpu().contiguous()

    def _load(self, steps: int) -> None:
        """Take weights and moments of a step."""
        deepspeed = imported_deepspeed()
        if steps:  # a step at rate 0 lets the optimizer make its moments, wherever they are offloaded to
            self._forward_and_backward([0])
            self._update(0.0)
        for kind, name, tensor in read_tensors(self._folder, steps):
            parameter, value = self._parameters[name], tensor.to(self._device)
            if kind == "weight":
                deepspeed.utils.safe_set_full_fp32_param(parameter, value)
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                    parameter.copy_(value)
            else:
                deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)
        for state in self._engine.optimizer.optimizer.state.values():
            state["step"].fill_(steps)


def deal(lengths: Sequence[int], numbers: Sequence[int], workers: int) -> list[list[int]]:
    """Some lessons for each worker, so that all have about as many tokens; lengths: of all lessons."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    tokens = [0] * workers
    for number in sorted(numbers, key=lambda one: -lengths[one]):
        least = tokens.index(min(tokens))
        shares[least].append(number)
        tokens[least] += lengths[number]
    return shares


def put_weights(folder: Path, step: int, language_model: nn.Module) -> None:
    """Write the weights that a training had after a step into a whole model, in its own number format."""
    parameters = dict(language_model.named_parameters())
    with torch.no_grad():
        for kind, name, tensor in read_tensors(folder, step):
            if kind == "weight":
                parameters[name].copy_(tensor)


def _on_own_gpu(model: ModelConfig) -> ModelConfig:
    """The same model, for a worker that sees the GPUs of others, too."""
    if model.device == "cpu" or not torch.cuda.is_available():
        return model
    return replace(model, device=f"cuda:{torch.cuda.current_device()}")


def _whole(model: ModelConfig) -> ModelConfig:
    """The same model, for a worker that holds all of its weights."""
    return replace(model, sharding="single", offload="none", offload_folder=None)


def _engine(
    language_model: Any, parameters: Mapping[str, nn.Parameter], settings: dict[str, Any], job: ShardedJob
) -> Any:
    """DeepSpeed's engine around the model, which trains these parameters."""
    language_model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    if job.recover.zero_stage == 3:
        # DeepSpeed frees a trained weight behind its gradient only where the module's input has a gradient, too
        language_model.enable_input_require_grads()
    numbers = sum(prod(whole_shape(parameter)) for parameter in parameters.values())
    zero = settings["zero_optimization"] | {"reduce_bucket_size": min(BUCKET, numbers)}
    settings = settings | {"zero_optimization": zero, "gradient_clipping": MOST_NORM}
    rate = job.recover.rate(language_model.config.get_text_config().hidden_size)
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what DeepSpeed deprecates in itself and in torch
        try:
            return imported_deepspeed().initialize(model=language_model, optimizer=optimizer, config=settings)[0]
        except LIBRARY_ERRORS as error:
            raise ModelError(f"{job.model.path}: DeepSpeed cannot train it ({one_line(error)})") from error
