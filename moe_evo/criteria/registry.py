"""The one-shot methods, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moe_evo.config.model import ModelConfig
from moe_evo.criteria import scores as scores_module
from moe_evo.criteria.merges import MERGES
from moe_evo.criteria.naee import Naee
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.pruning import Scores, pruning_by, pruning_globally, pruning_progressively
from moe_evo.criteria.questions import OfPrompts, Outputs, Question, Routed, Routers, Trials, Weights
from moe_evo.criteria.scores import aimer, leave_one_out, router_norm, router_norm_absolute
from moe_evo.criteria.subsets import check_spares_one
from moe_evo.criteria.task_specific import TaskSpecific
from moe_evo.errors import ConfigError
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import SearchSpace
from moe_evo.plugins import Registry, lacking

REAP_PAPER = "Lasby et al. 2025, arXiv 2510.13999; CerebrasResearch/reap"
CHOWDHURY = "Chowdhury et al. 2024, arXiv 2405.16646; nowazrabbani/MoE_Pruning"


class Method(Protocol):
    """A genome without a search.

    title: of its row in a table. description: one line for people. source: the paper or code that it is from.
    One that also has `global_genome` or `progressive_genome` can do what `moe-evo prune` calls so.
    `moe_evo.testing.methods` tests a new one. Most score each expert, which takes a formula and no class:

    >>> from moe_evo.testing.methods import evaluator_of, observer_of
    >>> def mean_gate(layer):  # of its tokens; (E,) of what was observed in one layer
    ...     return layer.gates / layer.tokens.clip(1)
    >>> criterion = Criterion("mean_gate", "mean gate weight of its tokens", "an example", Routed(), mean_gate)
    >>> METHODS.register("mean_gate")(criterion).title
    'mean_gate pruning'
    >>> evaluator = evaluator_of("mixtral")
    >>> space = SearchSpace.build(evaluator.model.shape, num_kept=4)
    >>> METHODS["mean_gate"].genome(observer_of(evaluator), space).num_kept
    (4, 4, 4)
    """

    @property
    def title(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def source(self) -> str: ...

    def genome(self, observer: Observer, space: SearchSpace) -> Genome: ...


@dataclass(frozen=True)
class Criterion:
    """A score for every expert, higher is kept.

    question: what must be observed of a layer. formula: scores (E,) from the observation of one layer.
    """

    name: str
    description: str
    source: str
    question: Question
    formula: Callable[[Any], Scores]

    @property
    def title(self) -> str:
        return f"{self.name} pruning"

    @property
    def needs_base_model(self) -> bool:
        """Whether it compares with the checkpoint before fine-tuning, which `comparing_with` sets."""
        return isinstance(self.question, Routers) and self.question.base is None

    def comparing_with(self, base: ModelConfig, base_hash: str, tuned: ModelConfig) -> Criterion:
        """The criterion for a model that was tuned from the checkpoint `base`."""
        return replace(self, question=Routers(tuned=tuned, base=base, base_hash=base_hash))

    def check(self, space: SearchSpace) -> None:
        """Raise ModelError where the criterion tries layers without one expert and some layer needs all of its own."""
        if isinstance(self.question, Trials):
            check_spares_one(space.shape)

    def scores(self, observer: Observer) -> tuple[Scores, ...]:
        """(E,) a MoE layer, of the untouched model."""
        return tuple(map(self.formula, observer.about(self.question).layers))

    def genome(self, observer: Observer, space: SearchSpace) -> Genome:
        return pruning_by(self.scores(observer), space)

    def global_genome(self, observer: Observer, space: SearchSpace) -> Genome:
        """As many experts in all as `space` keeps, but each layer its own number; see `pruning_globally`."""
        return pruning_globally(self.scores(observer), space)

    def progressive_genome(self, observer: Observer, space: SearchSpace) -> Genome:
        """Layer after layer, each scored with the layers before it already pruned."""

        def scores(pruned: Genome, layer: int) -> Scores:
            assert isinstance(question, OfPrompts)
            found: Scores = self.formula(observer.about(replace(question, genome=pruned, layer=layer)).layers[0])
            return found

        question = self.question
        # weights do not depend on what goes before
        return pruning_progressively(scores, space) if question.needs_data else self.genome(observer, space)


CRITERIA: dict[str, Criterion] = {
    one.name: one
    for one in (
        Criterion("frequency", "tokens routed to the expert", REAP_PAPER, Routed(), scores_module.frequency),
        Criterion("soft_frequency", "sum of its gate weights", REAP_PAPER, Routed(), scores_module.soft_frequency),
        Criterion("ean", "sum of the norms of its outputs", REAP_PAPER, Routed(), scores_module.ean),
        Criterion("mean_ean", "mean norm of its outputs", REAP_PAPER, Routed(), scores_module.mean_ean),
        Criterion(
            "weighted_ean",
            "sum of its gate weights times output norms",
            REAP_PAPER,
            Routed(),
            scores_module.weighted_ean,
        ),
        Criterion("reap", "mean of its gate weights times output norms", REAP_PAPER, Routed(), scores_module.reap),
        Criterion("msan", "mean squared norm of its outputs", "arXiv 2606.15716", Routed(), scores_module.msan),
        Criterion(
            "easy_ep",
            "sum of its gate weights times output norms times how far its tokens' hidden states turn",
            "Dong et al. 2025, arXiv 2504.06792; RUCAIBox/EASYEP",
            Routed(),
            scores_module.easy_ep,
        ),
        Criterion(
            "mone",
            "how much its outputs vary times its gate weights",
            "Zhang et al. 2025, arXiv 2507.00390; zxgx/mode-pd",
            Outputs(),
            scores_module.mone,
        ),
        Criterion(
            "leave_one_out",
            "how far the layer's output moves without it",
            "NVIDIA Model-Optimizer",
            Trials(),
            leave_one_out,
        ),
        Criterion("aimer", "how unlike in size its weights are; needs no data", "AIMER's repository", Weights(), aimer),
        Criterion(
            "router_norm",
            "how much longer fine-tuning made its router row (--base_model); needs no data",
            CHOWDHURY,
            Routers(),
            router_norm,
        ),
        Criterion(
            "router_norm_absolute",
            "how much longer or shorter fine-tuning made its router row (--base_model); needs no data",
            CHOWDHURY,
            Routers(),
            router_norm_absolute,
        ),
    )
}

_OTHERS: tuple[Method, ...] = (Naee("naee"), TaskSpecific())

_MEMBERS = ("title", "name", "description", "source", "genome")

METHODS: Registry[Method] = Registry(
    "one-shot method",
    ["moe_evo.criteria", "moe_evo.merges"],
    {**CRITERIA, **{one.name: one for one in _OTHERS}, **MERGES},
    lambda thing: lacking(thing, _MEMBERS, "moe_evo.criteria.registry.Method, as a Criterion or a Merge is"),
    hint=" (see moe-evo criteria)",
)
"""All that make a genome without a search: criteria, merges and others, also those of other packages."""


def criteria_of(option: str, names: Iterable[str]) -> dict[str, Criterion]:
    """Those of the methods, by name; raises ConfigError where one does not score experts one by one."""
    found = {}
    for name in names:
        method = METHODS.get(name, option)
        if not isinstance(method, Criterion):
            raise ConfigError(f"{option}: got {name!r}, expected one that scores every expert ({', '.join(CRITERIA)})")
        found[name] = method
    return found


def check_methods(
    option: str,
    names: Iterable[str],
    space: SearchSpace | None = None,
    *,
    has_base_model: bool = False,
    also: Sequence[str] = (),
) -> None:
    """Raise ConfigError for a name that no method has, or that needs a checkpoint that is not given.

    also: what the option takes beside methods. space: if given, also raises (ConfigError or ModelError) for a method
    that cannot prune to it.
    """
    for name in names:
        method = METHODS.get(name, option, also)
        if isinstance(method, TaskSpecific | Criterion) and space is not None:
            method.check(space)
        if isinstance(method, Criterion) and method.needs_base_model and not has_base_model:
            raise ConfigError(
                f"{option}: {name} compares with the checkpoint before fine-tuning, which only "
                "`moe-evo prune --base_model PATH` takes"
            )
