"""What a run would be refused for, found before weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_evo.config.cluster import num_ranks
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.errors import ConfigError
from moe_evo.genomes.space import SearchSpace

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.models.source import ModelSource


def check_methods_of(config: RunConfig, space: SearchSpace) -> None:
    """Raise ConfigError or ModelError where a run asks for one-shot methods that cannot serve it."""
    from moe_evo.criteria.merges import MERGES
    from moe_evo.criteria.registry import check_methods

    check_methods("selection.baselines", config.selection.baselines, space)
    check_methods("search.init", config.search.init_methods, space)
    shares_genes = any(len(numbers) > 1 for numbers in space.layer_groups)
    for name in config.search.init_methods:
        if shares_genes and name in MERGES:
            raise ConfigError(
                f"search.init: {name} gives each layer experts of its own, but search.num_layer_groups makes layers "
                "share theirs; use a method that prunes, or leave num_layer_groups out"
            )


def check_model(config: ScoringConfig, source: ModelSource) -> None:
    """Raise ConfigError where the model cannot compute or be shared among ranks as is asked, from config.json alone."""
    from moe_evo.models.placement import check_placement
    from moe_evo.models.ranks import Ranks
    from moe_evo.models.variants.meo import check_experts
    from moe_evo.models.variants.skipping import check_skipping

    family, transformers_config = source.family, source.transformers_config
    check_skipping(config.model.dynamic_skipping, source.shape)
    check_experts(config.model.experts, family, transformers_config)
    if config.model.router == "eep":
        family.check_eep_router(transformers_config)
    check_placement(config.model, family, transformers_config, Ranks(0, num_ranks(config.model, config.cluster)))
