"""What a run would be refused for, found before weights are read."""

from __future__ import annotations

from moe_evo.config.cluster import num_ranks
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.search import RANDOM
from moe_evo.errors import ConfigError
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.registry import check_search


def check_methods_of(config: RunConfig, space: SearchSpace) -> None:
    """Raise ConfigError or ModelError where a run asks for a search or one-shot methods that cannot serve it."""
    from moe_evo.criteria.merges import Merge
    from moe_evo.criteria.registry import METHODS, check_methods

    check_search(config.search, space)
    check_methods("selection.baselines", config.selection.baselines, space)
    check_methods("search.init", config.search.init_methods, space, also=[RANDOM])
    shares_genes = any(len(numbers) > 1 for numbers in space.layer_groups)
    for name in config.search.init_methods:
        if shares_genes and isinstance(METHODS[name], Merge):
            raise ConfigError(
                f"search.init: {name} gives each layer experts of its own, but search.num_layer_groups makes layers "
                "share theirs; use a method that prunes, or leave num_layer_groups out"
            )


def check_model(config: ScoringConfig) -> None:
    """Raise ConfigError where the model cannot compute or be shared among ranks as is asked, from config.json alone."""
    from moe_evo.models.placement import check_placement
    from moe_evo.models.ranks import Ranks
    from moe_evo.models.size.size import read_config
    from moe_evo.models.variants.meo import check_experts
    from moe_evo.models.variants.skipping import check_skipping

    family, transformers_config = read_config(config.model)
    check_skipping(config.model.dynamic_skipping, family.shape(transformers_config))
    check_experts(config.model.experts, family, transformers_config)
    if config.model.router == "eep":
        family.check_eep_router(transformers_config)
    check_placement(config.model, family, transformers_config, Ranks(0, num_ranks(config.model, config.cluster)))
