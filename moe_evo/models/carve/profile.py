"""What enters the FFNs of a dense model on some texts, and what its neurons do there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from moe_evo.models.carve.build import FFN
from moe_evo.models.experts.outputs import Experts, experts_computed_by
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel

_CHUNK_ELEMENTS = 1 << 23  # of intermediate results, 32 MiB in float32


def drawn_rows(rows: Sequence[Sequence[int]], num_tokens: int, rng: np.random.Generator) -> list[Tensor]:
    """Rows in a random order until they have `num_tokens` together; the last one is cut. All if they have fewer."""
    found: list[Tensor] = []
    left = num_tokens
    for number in rng.permutation(len(rows)).tolist():
        if left <= 0:
            break
        found.append(torch.tensor(rows[number][:left]))
        left -= len(found[-1])
    return found


@torch.inference_mode()
def ffn_inputs(moe: MoEModel, rows: Sequence[Tensor], batch_tokens: int, done: Callable[[int], None]) -> list[Tensor]:
    """What enters every FFN at all N tokens of these rows, (N, H) a layer, on the CPU in the model's dtype.

    moe: a dense model as one of a single expert. done: called with the number of rows of each batch.
    """
    seen: list[Tensor] = []

    def keep(_layer: MoELayer, experts: Experts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        seen.append(hidden)
        return experts(hidden, index, gates)

    decoder = moe.language_model.get_decoder()
    parts: list[list[Tensor]] = [[] for _ in moe.layers]
    with experts_computed_by(moe, keep):
        for batch in _batches(rows, batch_tokens):
            padded = pad_sequence(batch, batch_first=True).to(moe.device)
            lengths = torch.tensor(list(map(len, batch)), device=moe.device)
            real = torch.arange(padded.shape[1], device=moe.device) < lengths[:, None]
            decoder(input_ids=padded, attention_mask=real.long(), use_cache=False)
            for part, hidden in zip(parts, seen, strict=True):
                part.append(hidden[real.reshape(-1)].cpu())
            seen.clear()
            done(len(batch))
    return [torch.cat(part) for part in parts]


def _batches(rows: Sequence[Tensor], batch_tokens: int) -> Iterator[list[Tensor]]:
    """Rows of similar length together, at most so many tokens with padding, but one row at least."""
    batch: list[Tensor] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) + 1) * len(row) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def inner_of(ffn: FFN, hidden: Tensor, activation: nn.Module) -> Tensor:
    """What enters the down matrix, (N, I) float32, for hidden states (N, H)."""
    product: Tensor = activation(hidden.float() @ ffn.gate.float().T) * (hidden.float() @ ffn.up.float().T)
    return product


def is_active(inner: Tensor, ffn: FFN, share: float) -> Tensor:
    """(N, I) whether a neuron is among the `share` of neurons that add the longest vectors to the FFN's output.

    inner: (N, I). CMoE (arXiv 2502.04416) takes the largest |inner| alone; a neuron's down column has a length, too.
    """
    added: Tensor = inner.abs() * ffn.down.float().norm(dim=0)
    number = max(round(share * inner.shape[1]), 1)
    least = added.topk(number, dim=1).values[:, -1:]
    active: Tensor = (added >= least) & (added > 0)
    return active


def outputs_of(inner: Tensor, ffn: FFN, neurons: Tensor) -> Iterator[Tensor]:
    """What each group of neurons (E, m) puts out, for a few tokens of `inner` (N, I) at a time: (n, E, H) float32."""
    down = ffn.down.float()[:, neurons]
    size = max(1, _CHUNK_ELEMENTS // (len(neurons) * max(ffn.down.shape[0], neurons.shape[1])))
    for part in torch.split(inner, size):
        yield torch.einsum("nem,hem->neh", part[:, neurons], down)
