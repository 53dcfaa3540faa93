"""`MoEModel`: a loaded transformers model that computes any genome's function without being changed.

Inside `with moe.applied(genome):` the very same `moe.language_model` routes and merges as the genome
says; outside it is the untouched model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from moe_evo.config.model import RouterMode
from moe_evo.errors import ModelError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import check_fits
from moe_evo.models.agreement import SwitchedOff
from moe_evo.models.experts_hook import hooks_in_force
from moe_evo.models.families import family_of
from moe_evo.models.free_memory import half_of_free_gib
from moe_evo.models.layer import LayerPlan, MoELayer
from moe_evo.models.merged_cache import MergedCache
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.models.transformers_border import transformers
from moe_evo.models.tree_masks import attention_masks, takes_any_mask
from moe_evo.models.variants.dynamic_routing import DynamicRouting
from moe_evo.models.variants.meo import MEO
from moe_evo.models.weight_shapes import whole_shape


class MoEModel:
    """A causal language model with a uniform handle on its MoE layers.

    language_model: the transformers model, in eval mode; call it and `generate` as usual.
    tokenizer: may be None where a checkpoint has none. merged_cache_gib: memory for merged layers that
    are kept for the next genomes; None is half of what is free on the model's device now. device: where
    inputs go; default: where the weights are. ranks: the processes that hold the model; all must make the same
    calls in the same order. splits_examples: each rank runs its own inputs (ZeRO-3), else all the same.
    dynamic_routing: a rule by which tokens do without some of their experts.

    reads_trees: whether rows that begin alike may share tokens (`tree_masks`). switched_off: the kinds of sharing that
    `self_check` refused.
    """

    def __init__(
        self,
        language_model: Any,
        tokenizer: Any = None,
        *,
        router_mode: RouterMode = "exported",
        merged_cache_gib: float | None = None,
        device: torch.device | None = None,
        ranks: Ranks = ALONE,
        splits_examples: bool = False,
        dynamic_routing: DynamicRouting | None = None,
    ) -> None:
        config = language_model.config
        self.language_model = language_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.router_mode: RouterMode = router_mode
        self.device: torch.device = language_model.device if device is None else device
        self.ranks = ranks
        self.splits_examples = splits_examples
        self.family = family_of({"model_type": config.model_type}, config.name_or_path or "model")
        self.shape = self.family.shape(config)
        if router_mode == "eep":
            self.family.check_eep_router(config)
        self.dynamic_routing = dynamic_routing
        self.layers = self._find_layers()
        self.computes_meo = language_model.get_experts_implementation()[""] == MEO
        self.merged_cache = MergedCache(half_of_free_gib(self.device) if merged_cache_gib is None else merged_cache_gib)
        self.reads_trees = takes_any_mask(config)
        self.switched_off: tuple[SwitchedOff, ...] = ()
        self._is_ready = False  # in a block of `ready_for`
        config.output_router_logits = False  # only a training loss reads them, and it expects E columns
        config.return_dict = True  # a checkpoint may ask for tuples, but outputs are read by name here

    @property
    def example_ranks(self) -> Ranks:
        """The ranks that divide the examples among them; this rank alone where all run the same examples."""
        return self.ranks if self.splits_examples else ALONE

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.language_model.dtype
        return dtype

    @property
    def num_active(self) -> torch.Tensor | None:
        """How many experts each token of the last forward pass ran, all MoE layers together, (T,) int32.

        None without dynamic routing, where it is top_k in each layer.
        """
        found = [layer.num_active for layer in self.layers]
        known = [one.to(self.device) for one in found if one is not None]
        return torch.stack(known).sum(dim=0, dtype=torch.int32) if known else None

    @contextmanager
    def applied(self, genome: Genome) -> Iterator[Any]:
        """Make `language_model` compute `genome`'s function; yields the language model.

        Raises GenomeError where the genome does not fit the model.
        """
        with self.applied_together([genome]):
            yield self.language_model

    @contextmanager
    def applied_together(self, genomes: Sequence[Genome]) -> Iterator[Any]:
        """Make the rows of a batch follow `genomes`, an equal part each, in turn; they have the same top_k."""
        assert len({genome.top_k for genome in genomes}) == 1, "genomes that go together have the same top_k"
        for genome in genomes:
            check_fits(genome, self.shape)
        layers = zip(*(genome.layers for genome in genomes), strict=True)
        with self.installed([[self.plan(gene, number) for gene in genes] for number, genes in enumerate(layers)]):
            yield self.language_model

    @contextmanager
    def ready_for(self, plans: Iterable[tuple[int, LayerPlan]]) -> Iterator[None]:
        """A block within which `planned` may be called with these plans, each with the number of its MoE layer."""
        assert not self._is_ready, "a genome is applied already: leave its `with` block first"
        keys = [key for number, plan in plans if (key := self.layers[number].merged_key(plan)) is not None]
        self._is_ready = True
        try:
            self.merged_cache.use(keys)
            if keys:
                with hooks_in_force(self.language_model, (layer.experts for layer in self.layers)):
                    yield
            else:  # prunings need no other experts than the model's own
                yield
        finally:
            self._is_ready = False

    @contextmanager
    def planned(self, number: int, plans: Sequence[LayerPlan | None]) -> Iterator[None]:
        """Make MoE layer `number` compute `plans`, each for an equal part of its tokens in turn.

        None is the untouched layer. May be called only within a block of `ready_for`.
        """
        assert self._is_ready, "planned outside of a block of ready_for"
        layer = self.layers[number]
        layer.install(plans, self.merged_cache)
        try:
            yield
        finally:
            layer.remove()

    @property
    def is_spread(self) -> bool:
        """Whether the weights lie on several devices."""
        return len({weight.device for weight in self.language_model.parameters()}) > 1

    def attention_masks(
        self, position_ids: torch.Tensor, ends: torch.Tensor, counts: torch.Tensor, prefix_tokens: int = 0
    ) -> Any:
        """The language model's `attention_mask` for token trees; each (P, T), see `tree_masks`."""
        if not self.reads_trees:
            assert not prefix_tokens, "a model that knows no trees reads no shared prefixes"
            return (counts > 0).long()
        return attention_masks(
            self.language_model.config, position_ids, ends, counts, self.dtype, prefix_tokens=prefix_tokens
        )

    def merged_fits(self, genome: Genome) -> bool:
        """Whether all layers that `genome` merges fit in the cache; others are merged anew in every forward."""
        needed = sum(
            layer.merged_bytes(gene.expert_merging) for layer, gene in zip(self.layers, genome.layers, strict=True)
        )
        return needed <= self.merged_cache.budget_bytes

    def random_tokens(self, *, batch: int = 2, length: int = 16) -> torch.Tensor:
        """(batch, length) token ids that are the same in every process."""
        generator = torch.Generator().manual_seed(0)
        num_tokens = whole_shape(self.language_model.get_input_embeddings().weight)[0]
        return torch.randint(0, num_tokens, (batch, length), generator=generator).to(self.device)

    def _find_layers(self) -> list[MoELayer]:
        decoder_layers = self.language_model.get_decoder().layers
        found = []
        for number, (position, num_experts) in enumerate(
            zip(self.shape.decoder_layers, self.shape.num_experts, strict=True)
        ):
            block: Any = getattr(decoder_layers[position], self.family.block, None)
            if not (hasattr(block, self.family.router) and hasattr(block, "experts")):
                raise ModelError(
                    f"decoder layer {position} of this {self.family.model_type} model has no "
                    f"{self.family.router} and experts in {self.family.block}; transformers "
                    f"{transformers.__version__} lays it out differently"
                )
            config = self.language_model.config
            layer = MoELayer(number, block, self.family, config, self.router_mode, self.dynamic_routing)
            assert layer.num_experts == num_experts, (position, layer.num_experts, num_experts)
            found.append(layer)
        return found

    def plan(self, gene: LayerGenome, number: int) -> LayerPlan | None:
        """How MoE layer `number` computes `gene`; None where that is the untouched layer."""
        untouched = gene.is_identity and gene.top_k == self.shape.top_k[number]
        return None if untouched else LayerPlan.of(gene)

    @contextmanager
    def installed(self, plans: Sequence[Sequence[LayerPlan | None]]) -> Iterator[None]:
        """plans: for each MoE layer what `planned` takes."""
        changed = [(number, plan) for number, some in enumerate(plans) for plan in some if plan is not None]
        with self.ready_for(changed), ExitStack() as stack:
            for number, some in enumerate(plans):
                if changed:
                    stack.enter_context(self.planned(number, some))
            yield
