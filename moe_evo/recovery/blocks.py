"""What the experts of the full model's layers put out, and what enters those of the smaller model.

Methods that repair one MoE layer after the other compare the two, without gradients through the model. Outputs are of
the routed experts together, (N, H) a layer: what a layer adds to the residual stream besides shared experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_evo.files.write import whole_file, write_whole
from moe_evo.models.experts.outputs import Experts, experts_computed_by
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel
from moe_evo.recovery.lessons import Lessons, batches_of, logits_of

_FILE = "blocks-{:05d}.safetensors"
_INDEX = "blocks.json"


@dataclass(frozen=True)
class BlockInputs:
    """What enters the experts of one layer at N tokens: hidden (N, H), chosen experts and gates (N, k).

    lessons: (N,) the number of the lesson that each token is of.
    """

    hidden: Tensor
    index: Tensor
    gates: Tensor
    lessons: Tensor

    def at(self, chosen: Tensor) -> BlockInputs:
        """The same at some tokens; chosen: (N,) which."""
        return BlockInputs(self.hidden[chosen], self.index[chosen], self.gates[chosen], self.lessons[chosen])


@dataclass(frozen=True)
class BlockTargets:
    """Outputs of the full model's experts. folder: where they are. numbers: of the lessons whose tokens they are of."""

    folder: Path
    numbers: tuple[int, ...]
    shards: int

    @classmethod
    def load(cls, folder: Path) -> BlockTargets:
        told = json.loads((folder / _INDEX).read_text("utf-8"))
        return cls(folder, tuple(told["numbers"]), told["shards"])

    def of(self, layer: int) -> Tensor:
        """(N, H) of one MoE layer."""
        parts = []
        for shard in range(self.shards):
            with safe_open(self.folder / _FILE.format(shard), framework="pt") as opened:
                parts.append(opened.get_tensor(str(layer)))
        return torch.cat(parts)


def few_tokens(blocks: BlockTargets, lessons: Lessons, enough: int) -> str | None:
    """A line for people where a least-squares fit rests on fewer tokens than are enough; see `enough_tokens`."""
    number = int(lessons.lengths[list(blocks.numbers)].sum())
    if number >= enough:
        return None
    more = "give more prompts" if len(blocks.numbers) == len(lessons) else "raise recover.block_tokens"
    return (
        f"closed_form rests on {number:,} tokens, where {enough:,} would be four for each neuron of an expert: so it "
        f"holds weights nearer to what they were, and brings back less; {more}"
    )


def has_blocks(folder: Path) -> bool:
    """Whether `write_blocks` has written all."""
    return (folder / _INDEX).is_file()


@torch.inference_mode()
def write_blocks(folder: Path, lessons: Lessons, model: MoEModel, *, most_tokens: int, batch_tokens: int) -> None:
    """Keep what the experts of every layer put out at the tokens of some lessons, drawn at random.

    most_tokens: about so many, and all of one lesson at least.
    """
    order = np.random.default_rng(0).permutation(len(lessons)).tolist()
    ends = np.cumsum([int(lessons.lengths[number]) for number in order])
    numbers = sorted(order[: max(int(np.searchsorted(ends, most_tokens, side="right")), 1)])
    outputs: dict[int, Tensor] = {}

    def keep(layer: MoELayer, experts: Experts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        outputs[layer.number] = experts(hidden, index, gates)
        return outputs[layer.number]

    shards = 0
    with experts_computed_by(model, keep):
        for batch in _batches(lessons, numbers, batch_tokens, model):
            rows = lessons.rows(batch)
            logits_of(model.language_model, rows, model.device)
            real = _real(rows)
            kept = {str(layer): one[real.to(one.device)].cpu().contiguous() for layer, one in outputs.items()}
            with whole_file(folder / _FILE.format(shards)) as temporary:
                save_file(kept, temporary)
            shards += 1
    write_whole(folder / _INDEX, json.dumps({"numbers": numbers, "shards": shards}) + "\n")


class _Reached(Exception):
    """A forward pass has come to the layer that is looked at."""


@torch.inference_mode()
def block_inputs(
    model: MoEModel, lessons: Lessons, numbers: Sequence[int], layer: int, batch_tokens: int
) -> BlockInputs:
    """What enters the experts of one MoE layer of `model`, in the order of `BlockTargets`; on the CPU."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(found: MoELayer, experts: Experts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        if found.number != layer:
            return experts(hidden, index, gates)
        seen.append((hidden, index, gates))
        raise _Reached

    parts: list[list[Tensor]] = [[], [], [], []]
    with experts_computed_by(model, keep):
        for batch in _batches(lessons, numbers, batch_tokens, model):
            rows = lessons.rows(batch)
            try:
                logits_of(model.language_model, rows, model.device)
            except _Reached:
                real = _real(rows)
                lessons_of = torch.tensor(batch).repeat_interleave(torch.tensor(list(map(len, rows))))
                read = [one[real.to(one.device)].cpu() for one in seen.pop()]
                for part, one in zip(parts, [*read, lessons_of], strict=True):
                    part.append(one)
    with torch.inference_mode(mode=False):
        return BlockInputs(*(torch.cat(part).clone() for part in parts))


def _batches(lessons: Lessons, numbers: Sequence[int], batch_tokens: int, model: MoEModel) -> list[list[int]]:
    """Always in the same order of lessons, whatever the size of a batch."""
    vocabulary = int(model.language_model.config.get_text_config().vocab_size)
    return batches_of(lessons.lengths.tolist(), numbers, batch_tokens, vocabulary)


def _real(rows: Sequence[Tensor]) -> Tensor:
    """(B T,) where a padded batch of these rows has tokens."""
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    return (torch.arange(width) < lengths[:, None]).reshape(-1)
