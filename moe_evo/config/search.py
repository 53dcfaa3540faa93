"""The config of a search: the algorithm, the search space, the budget and the algorithm's parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe_evo.config.check import require, require_once, require_path

RANDOM = "random"
"""The origin of initial candidates that are drawn at random, not made by a one-shot method."""

QUALITY, TASKS, PARAMETERS, ACTIVE = "quality", "tasks", "parameters", "active"
"""Names of objectives: the fitness over all tasks, that of every task, experts kept, and experts active a token."""


@dataclass(frozen=True)
class EEPConfig:
    """Evolution of the EEP method (arXiv 2407.00945); see `eep_release` for the published values.

    Args:
        num_initial: Random prunings before evolution starts; at most half of the default num_pruning.
        num_pruning: Evaluations, the initial ones included, after which merging starts; default: half
            of the budget. Give the budget itself for a run that only prunes.
        layer_rate: Probability that a layer group is mutated (pruning phase) and that one of its two
            matrices is (merging phase).
        swap_rate: Pruning phase: probability that a slot of a mutated layer takes another expert. At
            least one slot always does.
        entry_rate: Merging phase: probability that an entry of a mutated matrix changes.
        sigma: Merging phase: standard deviation of the change.
        crossover_rate: Probability that a child has two parents.
        crossover_bias: Probability that a row (or an unmutated matrix) comes from the first parent.
        pruning_crossover: Also cross prunings, with repair of experts chosen twice.
        layer_crossover_rate: Share of crossovers that exchange whole layers in place of rows.
        prefix_rate: Probability that a child keeps all layer groups of its (first) parent before one that is
            drawn at random, so that its evaluation starts there.
        normalise_rate: Probability that the rows of a merged child are divided by their sums.
        mutation_margin: Parents of a mutation are within so many units of the best.
        mutation_parents: At least so many individuals may be parents of a mutation.
        crossover_margin: Parents of a crossover are within so many units of the best.
        crossover_parents: At least so many individuals may be parents of a crossover.
        margin_unit: Unit of the two margins: 'standard_errors' of the best fitness, or 'fitness'.
    """

    num_initial: int = 31
    num_pruning: int | None = None
    layer_rate: float = 0.25
    swap_rate: float = 0.15
    entry_rate: float = 0.25
    sigma: float = 0.065
    crossover_rate: float = 0.3
    crossover_bias: float = 0.6
    pruning_crossover: bool = True
    layer_crossover_rate: float = 0.0
    prefix_rate: float = 0.0
    normalise_rate: float = 0.1
    mutation_margin: float = 0.25  # genomes are scored on the same examples, so differences have less noise than scores
    mutation_parents: int = 2
    crossover_margin: float = 0.25
    crossover_parents: int = 6
    margin_unit: Literal["standard_errors", "fitness"] = "standard_errors"

    def __post_init__(self) -> None:
        for option in ("num_initial", "mutation_parents", "crossover_parents"):
            require(getattr(self, option) >= 1, f"search.eep.{option}", getattr(self, option), "at least 1")
        rates = (
            "layer_rate", "swap_rate", "entry_rate", "crossover_rate", "crossover_bias",
            "layer_crossover_rate", "prefix_rate", "normalise_rate",
        )  # fmt: skip
        for option in rates:
            rate = getattr(self, option)
            require(0 <= rate <= 1, f"search.eep.{option}", rate, "a probability from 0 to 1")
        require(self.layer_rate > 0, "search.eep.layer_rate", self.layer_rate, "more than 0")
        for option in ("sigma", "mutation_margin", "crossover_margin"):
            require(getattr(self, option) >= 0, f"search.eep.{option}", getattr(self, option), "0 or more")
        require(self.sigma > 0, "search.eep.sigma", self.sigma, "more than 0")
        if self.num_pruning is not None:
            require(
                self.num_pruning >= self.num_initial, "search.eep.num_pruning", self.num_pruning,
                f"at least search.eep.num_initial ({self.num_initial})",
            )  # fmt: skip


EEP_RELEASE = EEPConfig(
    num_initial=31,
    num_pruning=101,
    pruning_crossover=False,
    mutation_margin=0.03,
    crossover_margin=0.01,
    margin_unit="fitness",
)
"""The values of the released search: 31 random prunings and 70 children of them, then merging."""


@dataclass(frozen=True)
class SurrogateConfig:
    """Search by a Gaussian process that learns from every evaluation which experts, and pairs of them, matter.

    Args:
        num_warmup: Prunings that are scored before the first is proposed; at most half of the budget.
        batch: Candidates between two fits. Each fit knows all that was scored before the batch.
        pool: Prunings among which each candidate is chosen.
        priors: One-shot criteria (moe-evo criteria lists them; or package.module:name) whose opinions of the
            experts the process knows from the beginning; what each would keep is scored first, and how far it is
            right is learned. They look at the model once; [] for none.
    """

    num_warmup: int = 30
    batch: int = 10
    pool: int = 600
    priors: list[str] = field(default_factory=lambda: ["reap", "soft_frequency"])

    def __post_init__(self) -> None:
        for option in ("num_warmup", "batch"):
            require(getattr(self, option) >= 1, f"search.surrogate.{option}", getattr(self, option), "at least 1")
        require(self.pool >= 20, "search.surrogate.pool", self.pool, "at least 20")
        require_once("search.surrogate.priors", self.priors)


@dataclass(frozen=True)
class SearchConfig:
    """What is searched, by which algorithm, for how long.

    Args:
        algorithm: 'surrogate', which learns from every evaluation and only prunes; 'eep', evolution that prunes, then
            merges; 'eep_release', the same with the published parameters; 'random'; or the search of another
            package, by its name or as package.module:name.
        num_kept: Experts kept in every MoE layer, or a list with one number a layer. Or a budget that layers share,
            as in {mean: 4, min: 2, max: 8}: each layer keeps its own number between min and max, mean on average.
            Layers that differ load with moe_evo.load_pruned, not with stock transformers or vLLM.
        objectives: What is maximised: 'quality' alone, or a front of several: [quality, parameters] also keeps few
            experts, between the bounds of num_kept, as in {min: 2, max: 8}; [quality, active] also makes few experts
            active a token, from 1 to top_k in each layer; 'tasks' in place of 'quality' makes every task an objective
            of its own. Not for EEP. moe-evo export RUN --which front-2 takes a point of the front.
        top_k: Experts active a token; default: the model's.
        num_layer_groups: Consecutive layers share genes in so many groups; default: none are shared.
        multiple_of: num_kept must be a multiple of this (for expert-parallel serving).
        evaluations: Budget.
        seed: Candidate n depends on this seed, n and earlier outcomes, and on nothing else.
        eep: Parameters of 'eep'.
        surrogate: Parameters of 'surrogate'.
        warm_start: Folder of a finished run of the same model that kept more experts: half of the initial
            prunings keep only experts that one of its ten best prunings keeps (not for 'random').
        init: What the initial candidates are: 'random', or one-shot methods (moe-evo criteria lists them; or
            package.module:name), each as it is and with some experts swapped. One name, a list for equal shares, or
            shares as in {random: 2, reap: 1}.
    """

    algorithm: str = "surrogate"
    num_kept: int | list[int] | dict[str, int] = 4
    objectives: list[str] = field(default_factory=lambda: [QUALITY])
    top_k: int | None = None
    num_layer_groups: int | None = None
    multiple_of: int = 1
    evaluations: int = 402
    seed: int = 0
    eep: EEPConfig = field(default_factory=EEPConfig)
    surrogate: SurrogateConfig = field(default_factory=SurrogateConfig)
    warm_start: str | None = None
    init: list[str] | dict[str, float] = field(default_factory=lambda: [RANDOM])

    def __post_init__(self) -> None:
        self._check_objectives()
        require_path("search.warm_start", self.warm_start)
        if isinstance(self.num_kept, dict):
            self._check_range(self.num_kept)
        else:
            numbers = [self.num_kept] if isinstance(self.num_kept, int) else list(self.num_kept)
            require(bool(numbers) and min(numbers) >= 1, "search.num_kept", self.num_kept, "1 or more")
        require(self.top_k is None or self.top_k >= 1, "search.top_k", self.top_k, "1 or more")
        require(self.multiple_of >= 1, "search.multiple_of", self.multiple_of, "1 or more")
        require(self.evaluations >= 1, "search.evaluations", self.evaluations, "1 or more")
        require(self.seed >= 0, "search.seed", self.seed, "0 or more")
        require(
            self.algorithm == "eep" or self.eep == EEPConfig(), "search.eep", "changed values",
            f"none, as search.algorithm is {self.algorithm!r}; use algorithm 'eep' to change them",
        )  # fmt: skip
        require(
            self.algorithm == "surrogate" or self.surrogate == SurrogateConfig(), "search.surrogate", "changed values",
            f"none, as search.algorithm is {self.algorithm!r}; use algorithm 'surrogate' to change them",
        )  # fmt: skip
        require(
            self.warm_start is None or self.algorithm != "random", "search.warm_start", self.warm_start,
            "none, as random search begins nowhere",
        )  # fmt: skip
        require_once("search.init", list(self.init))
        shares = self.init_shares.values()
        require(
            bool(shares) and min(shares) >= 0 and sum(shares) > 0, "search.init", self.init,
            "names, or names with shares that are not negative",
        )  # fmt: skip
        require(
            not self.init_methods or (self.algorithm != "random" and self.warm_start is None), "search.init", self.init,
            "only 'random' in a random search, or beside search.warm_start",
        )  # fmt: skip

    def _check_range(self, given: dict[str, int]) -> None:
        """Raise ConfigError where num_kept is no range."""
        is_free = PARAMETERS in self.objectives
        keys = ["min", "max"] if is_free else ["min", "mean", "max"]
        wanted = "{min: 2, max: 8}, as 'parameters' is an objective" if is_free else "{mean: 4, min: 2, max: 8}"
        require(set(given) == set(keys), "search.num_kept", given, f"numbers as in {wanted}")
        in_order = [1, given["min"], given.get("mean", given["min"]), given["max"]]
        require(in_order == sorted(in_order), "search.num_kept", given, f"1 <= {' <= '.join(keys)}")

    def _check_objectives(self) -> None:
        """Raise ConfigError where the objectives do not go together, or with the number of experts."""
        given, known = self.objectives, [QUALITY, TASKS, PARAMETERS, ACTIVE]
        require(set(given) <= set(known), "search.objectives", given, f"some of {', '.join(known)}")
        require(len(set(given)) == len(given), "search.objectives", given, "each objective once")
        require((QUALITY in given) != (TASKS in given), "search.objectives", given, "'quality' or 'tasks' among them")
        require(
            PARAMETERS not in given or isinstance(self.num_kept, dict), "search.num_kept", self.num_kept,
            "bounds such as {min: 2, max: 8}, as 'parameters' is an objective",
        )  # fmt: skip

    @property
    def has_front(self) -> bool:
        """Whether there is more than one objective, so that a front of individuals is found."""
        return self.objectives != [QUALITY]

    @property
    def kept_label(self) -> str:
        """The experts to keep, for names of folders and runs."""
        if isinstance(self.num_kept, dict):
            mean = [str(self.num_kept["mean"])] if "mean" in self.num_kept else []
            return "of".join([*mean, f"{self.num_kept['min']}to{self.num_kept['max']}"])
        return "-".join(map(str, [self.num_kept] if isinstance(self.num_kept, int) else self.num_kept))

    @property
    def mean_kept(self) -> float:
        """Experts kept a layer on the average; the middle between the bounds where that is free."""
        if isinstance(self.num_kept, dict):
            return self.num_kept.get("mean", (self.num_kept["min"] + self.num_kept["max"]) / 2)
        return self.num_kept if isinstance(self.num_kept, int) else sum(self.num_kept) / len(self.num_kept)

    @property
    def init_shares(self) -> dict[str, float]:
        """Shares of the initial candidates by origin; their sum need not be 1."""
        return dict(self.init) if isinstance(self.init, dict) else dict.fromkeys(self.init, 1.0)

    @property
    def priors(self) -> list[str]:
        """The one-shot criteria whose scores of the experts the search begins with."""
        return self.surrogate.priors if self.algorithm == "surrogate" else []

    @property
    def init_methods(self) -> list[str]:
        """The one-shot methods among the origins."""
        return [name for name, share in self.init_shares.items() if name != RANDOM and share > 0]
