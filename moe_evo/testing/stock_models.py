"""Stock models with fewer experts, whose logits are the expected ones of a genome; and random genomes.

State dicts are sliced and mixed here, without the code that evaluates genomes, and loaded into unmodified
transformers classes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import ModelShape
from moe_evo.models.transformers_border import transformers

EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names under which configs of transformers have the number of experts."""

ROUTERS = r"\.(mlp|block_sparse_moe)\.(gate|router)\.\w+$"


def stock_model(model: Any, genome: Genome, shape: ModelShape) -> Any:
    """A stock model with K experts, whose tensors are mixed from those of `model` by `genome`'s matrices."""
    config = copy.deepcopy(model.config)
    field = next(name for name in EXPERT_FIELDS if name in config.to_dict())
    setattr(config, field, genome.num_kept[0])
    config.num_experts_per_tok = genome.top_k[0]
    small = transformers.AutoModelForCausalLM.from_config(config).eval()
    genes = dict(zip(shape.decoder_layers, genome.layers, strict=True))
    state = {name: mixed(name, tensor, genes) for name, tensor in model.state_dict().items()}
    small.load_state_dict(state)
    return small


def mixed(name: str, tensor: torch.Tensor, genes: dict[int, LayerGenome]) -> torch.Tensor:
    """The tensor `name` of the smaller model."""
    layer = re.search(r"layers\.(\d+)\.", name)
    gene = genes.get(int(layer[1])) if layer else None
    if gene is None:
        return tensor
    if ".experts." in name:
        return combined(gene.expert_merging, tensor)
    if re.search(ROUTERS, name):
        return combined(gene.router_mapping, tensor)
    return tensor


def combined(matrix: npt.NDArray[np.float32], tensor: torch.Tensor) -> torch.Tensor:
    """(K, E) times (E, ...) in float64."""
    product = np.tensordot(matrix.astype(np.float64), tensor.double().numpy(), axes=1)
    return torch.from_numpy(product).to(tensor.dtype)


def random_kept(shape: ModelShape, num_kept: int, *, seed: int) -> list[list[int]]:
    """A random choice of `num_kept` experts a layer, with equally many in each router group."""
    rng = np.random.default_rng(seed)
    groups = shape.num_expert_groups
    size = shape.num_experts[0] // groups
    return [
        sorted(
            group * size + int(expert)
            for group in range(groups)
            for expert in rng.permutation(size)[: num_kept // groups]
        )
        for _ in range(shape.num_layers)
    ]


def random_pruning(shape: ModelShape, num_kept: int, *, top_k: int = 2, seed: int = 0) -> Genome:
    return Genome.from_kept(random_kept(shape, num_kept, seed=seed), shape.num_experts, top_k)


def random_merge(
    shape: ModelShape, num_kept: int | Sequence[int], *, top_k: int | Sequence[int] = 2, seed: int = 0
) -> Genome:
    """A genome with random dense matrices W_EM and, drawn independently, W_RM."""
    rng = np.random.default_rng(seed)
    kept = [num_kept] * shape.num_layers if isinstance(num_kept, int) else num_kept
    active = [top_k] * shape.num_layers if isinstance(top_k, int) else top_k

    def matrix(layer: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.5, size=(kept[layer], shape.num_experts[layer])).astype(np.float32)

    return Genome(tuple(LayerGenome(matrix(i), matrix(i), active[i]) for i in range(shape.num_layers)))


def tokens(*, batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """(batch, length) ids without special tokens."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(language_model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = language_model(input_ids=input_ids, use_cache=False, **arguments).logits
    return found


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())
