"""Lessons: sequences that the full model has read, with what it expects after each token.

They are kept in files, so that the full and the smaller model need not be in memory together. Of the V probabilities
of a next token the k largest are stored, and the sum of the others as one number. Letters in shapes: S lessons,
N positions of all of them, M positions of some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_evo.files.write import whole_file, write_whole
from moe_evo.tasks.batches import MAX_LOGITS

UNLABELLED = -1  # in `labels`: no right next token is known
_SHARD_POSITIONS = 2**18
_LEAST_LOG = -1e4  # exp of it is 0, and float16 holds it


@dataclass(frozen=True)
class Reading:
    """Tokens to read, (T,). start: where an answer begins to be predicted. labels: right next tokens from there on."""

    tokens: tuple[int, ...]
    start: int
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Lessons:
    """S lessons of N positions.

    lengths: (S,) tokens of each. starts: (S,) the position of each that predicts the first token of an answer. tokens:
    (N,) what is read. labels: (N,) right next tokens, or UNLABELLED. ids: (N, k) the full model's most probable next
    tokens. log_probs: (N, k) float16 of these. rest: (N,) float16, the logarithm of the sum of all other
    probabilities.
    """

    lengths: Tensor
    starts: Tensor
    tokens: Tensor
    labels: Tensor
    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> list[int]:
        """(S + 1,) the first position of each lesson among all, and N."""
        return [0, *self.lengths.cumsum(0).tolist()]

    @cached_property
    def _starts(self) -> list[int]:
        return self.starts.tolist()

    def rows(self, numbers: Sequence[int]) -> list[Tensor]:
        """The tokens (T,) of some lessons."""
        return [self.tokens[self.offsets[number] : self.offsets[number + 1]] for number in numbers]

    def positions(self, numbers: Sequence[int]) -> Tensor:
        """(M,) the positions of some lessons, one lesson after the other."""
        return torch.cat([torch.arange(self.offsets[number], self.offsets[number + 1]) for number in numbers])

    def weights(self, numbers: Sequence[int], prompt_weight: float) -> Tensor:
        """(M,) how much each position of some lessons counts: 1 where an answer is predicted."""
        found = torch.full((sum(int(self.lengths[number]) for number in numbers),), prompt_weight)
        done = 0
        for number in numbers:
            length = self.offsets[number + 1] - self.offsets[number]
            found[done + self._starts[number] : done + length] = 1.0
            done += length
        return found


def batches_of(lengths: Sequence[int], numbers: Sequence[int], batch_tokens: int, vocabulary: int) -> list[list[int]]:
    """Some of the sequences with these lengths in batches of similar length, the longest last.

    A batch, padded, has at most `batch_tokens` tokens, and no more logits than `MAX_LOGITS`; one sequence at least.
    """
    most = min(batch_tokens, MAX_LOGITS // vocabulary)
    batches: list[list[int]] = []
    for number in sorted(numbers, key=lambda one: lengths[one]):
        if batches and (len(batches[-1]) + 1) * lengths[number] <= most:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def logits_of(language_model: Any, rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """(M, V) float32 logits at all positions of some sequences, one after the other. rows: (T,) tokens of each."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    # padding comes last, where a causal model's earlier positions do not see it
    input_ids = pad_sequence(list(rows), batch_first=True).long().to(device)
    logits: Tensor = language_model(input_ids=input_ids, use_cache=False).logits
    is_real = torch.arange(input_ids.shape[1], device=device) < lengths[:, None]
    return logits[is_real].float()


@torch.inference_mode()
def write_lessons(
    folder: Path,
    name: str,
    readings: Sequence[Reading],
    language_model: Any,
    device: torch.device,
    *,
    top_k: int,
    batch_tokens: int,
    done: Callable[[int], None] = lambda number: None,
) -> None:
    """Let the full model read everything, and keep what it expects in `folder` under this name.

    The lessons are stored in the order of their lengths. done: called with the number of sequences that were read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = int(language_model.config.get_text_config().vocab_size)
    lengths = [len(one.tokens) for one in readings]
    parts: list[Lessons] = []
    shards: list[str] = []
    for numbers in batches_of(lengths, range(len(readings)), batch_tokens, vocabulary):
        chosen = [readings[number] for number in numbers]
        parts.append(_read(language_model, chosen, device, min(top_k, vocabulary)))
        done(len(chosen))
        if sum(len(part.tokens) for part in parts) >= _SHARD_POSITIONS:
            shards.append(_write_shard(folder, f"{name}-{len(shards):05d}", parts))
            parts = []
    if parts:
        shards.append(_write_shard(folder, f"{name}-{len(shards):05d}", parts))
    write_whole(folder / f"{name}.json", json.dumps({"shards": shards}) + "\n")


def has_lessons(folder: Path, name: str) -> bool:
    """Whether all lessons of this name were written."""
    return (folder / f"{name}.json").is_file()


def read_lessons(folder: Path, name: str) -> Lessons:
    """The lessons that `write_lessons` wrote under this name."""
    shards = json.loads((folder / f"{name}.json").read_text("utf-8"))["shards"]
    return _joined([Lessons(**load_file(folder / shard)) for shard in shards])


def bytes_of_lessons(positions: int, top_k: int) -> int:
    """Bytes on disk of so many positions: of each two tokens, k tokens with their log-probabilities, and the rest."""
    return positions * (2 * 4 + top_k * (4 + 2) + 2)


def _read(language_model: Any, readings: Sequence[Reading], device: torch.device, top_k: int) -> Lessons:
    rows = [torch.tensor(one.tokens, dtype=torch.int32) for one in readings]
    log_probs = logits_of(language_model, rows, device).log_softmax(dim=-1)
    largest, ids = log_probs.topk(top_k, dim=-1)
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(dim=-1)
    unknown = [(UNLABELLED,) * (len(one.tokens) - len(one.labels)) for one in readings]
    labels = [label for one, none in zip(readings, unknown, strict=True) for label in (*none, *one.labels)]
    return Lessons(
        lengths=torch.tensor([len(row) for row in rows], dtype=torch.int32),
        starts=torch.tensor([one.start for one in readings], dtype=torch.int32),
        tokens=torch.cat(rows),
        labels=torch.tensor(labels, dtype=torch.int32),
        ids=ids.int().cpu(),
        log_probs=largest.clamp(min=_LEAST_LOG).half().cpu(),
        rest=rest.clamp(min=_LEAST_LOG).half().cpu(),
    )


def _write_shard(folder: Path, name: str, parts: Sequence[Lessons]) -> str:
    whole = _joined(parts)
    file = f"{name}.safetensors"
    with whole_file(folder / file) as temporary:
        save_file({one.name: getattr(whole, one.name) for one in fields(Lessons)}, temporary)
    return file


def _joined(parts: Sequence[Lessons]) -> Lessons:
    return Lessons(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Lessons)))
