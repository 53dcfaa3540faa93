"""Router mode 'eep' against the paper's equations 5 and 6, written out token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import largest_difference, logits, random_merge, random_pruning, tiny_model, tokens

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.experts.eep_coefficients import load_eep_coefficients
from moe_evo.models.load import load_model
from moe_evo.models.routing import eep_route
from moe_evo.models.self_check import self_check
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel

PUBLISHED = Path(__file__).parents[3] / "shared" / "eep_coefficients"
EEP_FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "granitemoe"]
MIN_SHARE = 0.01


@pytest.fixture(scope="module")
def deep_mixtral() -> MoEModel:
    """32 layers of 8 experts, as in Mixtral-8x7B, everything else tiny."""
    model = tiny_model("mixtral", num_hidden_layers=32, hidden_size=16, intermediate_size=8)
    return MoEModel(model, router_mode="eep")


def paper_block(block: Any, gene: LayerGenome, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eqs. 5 and 6 for hidden (T, H): outputs (T, H), and (T,) whether the renormalisation is safe."""
    merging = torch.from_numpy(gene.expert_merging.copy()).double()
    mapping = torch.from_numpy(gene.router_mapping.copy()).double()
    gate_up = torch.einsum("ke,eih->kih", merging, block.experts.gate_up_proj.double())
    down = torch.einsum("ke,ehi->khi", merging, block.experts.down_proj.double())
    outputs, safe = [], []
    for token in hidden.double():
        probabilities = mapping @ torch.softmax(block.gate.weight.double() @ token, dim=0)
        chosen = probabilities.argsort(descending=True)[: gene.top_k]
        weights = probabilities[chosen]
        safe.append(bool(weights.sum() > MIN_SHARE * weights.abs().sum()))
        output = torch.zeros_like(token)
        for slot, weight in zip(chosen, weights / weights.sum(), strict=True):
            gate, up = (gate_up[slot] @ token).chunk(2)
            output += weight * (down[slot] @ (torch.nn.functional.silu(gate) * up))
        outputs.append(output)
    return torch.stack(outputs), torch.tensor(safe)


def check_against_paper(moe: MoEModel, genome: Genome) -> float:
    """Every MoE block on random hidden states; returns the share of tokens whose weights cancel."""
    hidden = torch.randn(1, 40, moe.language_model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    blocks = [layer.mlp for layer in moe.language_model.model.layers]
    all_safe = []
    with torch.inference_mode(), moe.applied(genome):
        for block, gene in zip(blocks, genome.layers, strict=True):
            expected, safe = paper_block(block, gene, hidden[0])
            got = block(hidden)[0].double()
            assert torch.isfinite(got).all()
            scale = expected[safe].abs().amax(dim=-1).clamp(min=1)  # weights that nearly cancel are large
            assert float(((got - expected)[safe].abs().amax(dim=-1) / scale).max()) <= 2e-5
            all_safe.append(safe)
        assert torch.isfinite(moe.language_model(input_ids=tokens()).logits).all()
    return 1 - float(torch.cat(all_safe).double().mean())


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published coefficients are not here")
@pytest.mark.parametrize(
    ("name", "num_kept", "most_unsafe"),
    [
        ("arc-e_budget_6", 6, 0.0),
        ("gsm8k_budget_6", 6, 0.01),
        ("boolq_budget_4", 4, 0.05),
        ("rte_budget_4", 4, 0.05),
        ("squad_budget_2", 2, 0.3),
    ],
)
def test_published_coefficients_compute_the_papers_equations(
    deep_mixtral: MoEModel, name: str, num_kept: int, most_unsafe: float
) -> None:
    genome = load_eep_coefficients(PUBLISHED / f"{name}.pth", deep_mixtral.shape)
    assert genome.num_kept == (num_kept,) * 32
    assert check_against_paper(deep_mixtral, genome) <= most_unsafe


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published coefficients are not here")
def test_published_pruning_is_the_same_in_both_router_modes(deep_mixtral: MoEModel) -> None:
    genome = load_eep_coefficients(PUBLISHED / "arc-e_budget_6.pth", deep_mixtral.shape)
    assert genome.is_pruning
    exported = MoEModel(deep_mixtral.language_model, router_mode="exported")
    with deep_mixtral.applied(genome):
        eep = logits(deep_mixtral.language_model, tokens())
    with exported.applied(genome):
        assert largest_difference(logits(exported.language_model, tokens()), eep) <= 2e-6


@pytest.mark.parametrize("top_k", [1, 2])
def test_untied_matrices_compute_the_papers_equations(deep_mixtral: MoEModel, top_k: int) -> None:
    near_pruning = random_pruning(deep_mixtral.shape, 4)
    noise = random_merge(deep_mixtral.shape, 4)
    genome = Genome(
        tuple(
            LayerGenome(
                pruned.expert_merging + 0.2 * noisy.expert_merging,
                pruned.router_mapping + 0.2 * noisy.router_mapping,
                top_k,
            )
            for pruned, noisy in zip(near_pruning.layers, noise.layers, strict=True)
        )
    )
    check_against_paper(deep_mixtral, genome)


@pytest.mark.parametrize("model_type", EEP_FAMILIES)
def test_identity_in_eep_mode_passes_the_self_check(checkpoint, model_type: str) -> None:
    moe = load_model(ModelSource(ModelConfig(path=str(checkpoint(model_type)), device="cpu", router="eep")))
    assert moe.router_mode == "eep"


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_eep_mode_is_refused_where_it_has_no_meaning(checkpoint, model_type: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.router: got 'eep', but {model_type} .*use 'exported'"):
        load_model(ModelSource(ModelConfig(path=str(checkpoint(model_type)), device="cpu", router="eep")))


def test_ungrouped_deepseek_v2_has_an_eep_mode_with_its_scaling() -> None:
    model = tiny_model("deepseek_v2", topk_method="greedy", n_group=None, topk_group=None)
    self_check(MoEModel(model, router_mode="eep"))


def test_pruning_without_renormalisation_keeps_the_probabilities_over_all_experts(checkpoint) -> None:
    config = ModelConfig(path=str(checkpoint("olmoe")), device="cpu", router="eep")
    moe = load_model(ModelSource(config))
    genome = random_pruning(moe.shape, 4)
    router, hidden = moe.layers[0].router, torch.randn(20, 32)
    with torch.inference_mode(), moe.applied(genome):
        scores, weights, index = router(hidden)
    kept = torch.tensor(genome.kept[0])
    over_all = torch.softmax(scores, dim=-1)
    best = over_all[:, kept].topk(2, dim=-1)
    assert torch.equal(index, kept[best.indices])
    assert largest_difference(weights, best.values) <= 1e-7
    exported = MoEModel(moe.language_model, router_mode="exported")
    with exported.applied(genome):
        as_exported = logits(exported.language_model, tokens())
    with moe.applied(genome):
        assert largest_difference(logits(moe.language_model, tokens()), as_exported) > 1e-3


@pytest.mark.parametrize("rows", [[[1.0, 0], [-1, 0]], [[1, 0], [-3, 0]], [[0, 0], [0, 0]], [[-1, 0], [-1, 0]]])
def test_weights_that_cancel_stay_finite_and_bounded(mixtral: MoEModel, rows: list[list[float]]) -> None:
    mapping = torch.zeros(2, 8)
    mapping[:, :2] = torch.tensor(rows)
    router = mixtral.layers[0].router
    _, weights, _ = eep_route(router, torch.randn(9, 32), mapping, 2, renormalise=True, scaling=1.0)
    assert torch.isfinite(weights).all() and float(weights.abs().max()) <= 1.0


def test_tiny_probabilities_are_still_renormalised(mixtral: MoEModel) -> None:
    mapping = torch.zeros(2, 8)
    mapping[0, 0] = mapping[1, 1] = 1e-20
    router = mixtral.layers[0].router
    _, weights, _ = eep_route(router, torch.randn(9, 32), mapping, 2, renormalise=True, scaling=1.0)
    assert np.allclose(weights.sum(dim=-1), 1, atol=1e-6)
