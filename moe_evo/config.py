"""The config of a run: frozen dataclasses that hold every default once and check themselves.

Each section goes to the part of the program that it is named after. The docstrings below are the
help texts of the command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_evo.errors import ConfigError

RouterMode = Literal["exported", "eep"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
TaskKind = Literal["auto", "choice", "generation", "perplexity", "distillation"]
Metric = Literal[
    "default", "accuracy", "accuracy_norm", "log_likelihood",
    "exact_match", "contains", "f1", "first_option", "number_match", "negative_kl",
]  # fmt: skip
Algorithm = Literal["eep", "eep_release", "random"]
FitnessRule = Literal["mean", "worst"]
Sharding = Literal["single", "device_map", "tensor_parallel", "zero3"]
Offload = Literal["none", "cpu", "nvme"]
PlacementStrategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]
WandbMode = Literal["auto", "online", "offline", "disabled"]


def require(condition: bool, option: str, got: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{option}: got {got!r}, expected {expected}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model is searched, and how it is loaded.

    Args:
        path: Checkpoint folder or Hugging Face name; 'embedded' is the small Mixtral of this package.
        revision: Branch, tag or commit of a Hugging Face name (not for folders).
        dtype: Number format of weights, evaluation and export; 'auto' takes the checkpoint's own.
        device: 'auto' (a GPU where there is one), 'cpu', 'cuda', 'cuda:1', ...
        router: 'exported' remaps router rows, which a stock checkpoint can hold; 'eep' remaps
            probabilities after the softmax, as the paper does.
        trust_remote_code: Run code that comes with the checkpoint's tokenizer. Only for sources that you
            trust; the model itself always runs the library's code.
        self_check: After loading, rebuild every expert once and compare the view with the untouched model.
        merged_cache_gib: Memory for merged layers that are kept for the next genomes; what does not fit
            is merged anew in every forward pass. Default: half of the memory that is free after loading.
        sharding: 'single', one process and one device; 'device_map', one process that spreads layers over
            several GPUs, the CPU and disk; 'tensor_parallel', cluster.gang_size processes that each hold a
            slice of every expert; 'zero3', the same number that each hold a slice of every weight and
            gather one layer at a time (DeepSpeed), for a model larger than the gang's GPU memory.
        offload: zero3: where the slices lie between uses: 'none' (the GPU), 'cpu' or 'nvme'.
        offload_folder: Folder for what is offloaded to disk (zero3 with 'nvme', device_map).
        max_memory: device_map: most memory for weights on each device, as in {0: 70GiB, cpu: 200GiB}.
    """

    path: str = "embedded"
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    router: RouterMode = "exported"
    trust_remote_code: bool = False
    self_check: bool = True
    merged_cache_gib: float | None = None
    sharding: Sharding = "single"
    offload: Offload = "none"
    offload_folder: str | None = None
    max_memory: dict[int | str, str] | None = None

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", self.path, "a folder or a Hugging Face name")
        cache = self.merged_cache_gib
        require(cache is None or cache >= 0, "model.merged_cache_gib", cache, "0 or more")
        zero3 = self.sharding == "zero3"
        require(zero3 or self.offload == "none", "model.offload", self.offload, "'none' without model.sharding zero3")
        require(
            self.offload != "nvme" or self.offload_folder is not None, "model.offload_folder", self.offload_folder,
            "a folder on a fast local disk, as model.offload is 'nvme'",
        )  # fmt: skip
        require(
            self.offload_folder is None or self.offload == "nvme" or self.sharding == "device_map",
            "model.offload_folder", self.offload_folder, "none: only model.offload nvme and device_map use it",
        )  # fmt: skip
        require(
            self.max_memory is None or self.sharding == "device_map", "model.max_memory", self.max_memory,
            "none: only model.sharding device_map uses it",
        )  # fmt: skip
        sizes = (self.max_memory or {}).values()
        require(
            all(re.fullmatch(r"\d+(\.\d+)?\s?[KMGT]i?B", size) for size in sizes), "model.max_memory", self.max_memory,
            "sizes such as 70GiB",
        )  # fmt: skip


@dataclass(frozen=True)
class TaskConfig:
    """One task: where its examples are and how answers are scored.

    Args:
        name: Name in results; default: the data's file or folder name.
        kind: 'choice', 'generation', 'perplexity', 'distillation', or 'auto' by the examples' fields.
        data: A JSONL file, a folder of them, or the name of an embedded task (arith, city, gloss, infl,
            langid, nli, sarcasm, sentiment, syll). A folder holds
            search.jsonl, validation.jsonl and test.jsonl; other files are split by a hash of the prompt.
        metric: What counts; 'default' is accuracy (choice), exact_match (generation), log_likelihood
            (perplexity) or negative_kl (distillation).
        split_shares: Shares of search, validation and test where one file is split by hash.
        num_search: Most examples of the search split that are used; 0 means all.
        num_validation: The same for the validation split.
        num_test: The same for the test split.
        prefix: Text that is put before every prompt.
        few_shot: JSONL file whose examples, with answers, are put before every prompt.
        chat_template: Wrap the prompt as a user's turn with the tokenizer's chat template.
        max_new_tokens: Longest answer that is generated.
        stop: A generated answer ends before this text; default: the end of the line (a model that begins
            its answer with one then answers nothing).
        max_length: Longest prompt with answer, in tokens; longer prompts lose their beginning.
    """

    name: str = ""
    kind: TaskKind = "auto"
    data: str = ""
    metric: Metric = "default"
    split_shares: tuple[float, float, float] = (0.3, 0.2, 0.5)
    num_search: int = 0
    num_validation: int = 0
    num_test: int = 0
    prefix: str = ""
    few_shot: str | None = None
    chat_template: bool = False
    max_new_tokens: int = 32
    stop: str = "\n"
    max_length: int = 2048

    def __post_init__(self) -> None:
        where = f"tasks ({self.name or self.data or 'unnamed'})"
        require(bool(self.data), f"{where}.data", self.data, "a file, a folder or an embedded task")
        shares_ok = min(self.split_shares) > 0 and abs(sum(self.split_shares) - 1) < 1e-6
        require(shares_ok, f"{where}.split_shares", self.split_shares, "three positive shares with sum 1")
        for option in ("num_search", "num_validation", "num_test"):
            require(getattr(self, option) >= 0, f"{where}.{option}", getattr(self, option), "0 (all) or more")
        require(self.max_new_tokens > 0, f"{where}.max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.max_length > 1, f"{where}.max_length", self.max_length, "at least 2")

    def num_examples(self, split: str) -> int:
        """Most examples of `split` that are used; 0 means all."""
        return int(getattr(self, f"num_{split}"))


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
    normalise_rate: float = 0.1
    mutation_margin: float = 0.25  # genomes share their examples: differences are surer than scores
    mutation_parents: int = 2
    crossover_margin: float = 0.25
    crossover_parents: int = 6
    margin_unit: Literal["standard_errors", "fitness"] = "standard_errors"

    def __post_init__(self) -> None:
        for option in ("num_initial", "mutation_parents", "crossover_parents"):
            require(getattr(self, option) >= 1, f"search.eep.{option}", getattr(self, option), "at least 1")
        rates = (
            "layer_rate", "swap_rate", "entry_rate", "crossover_rate", "crossover_bias",
            "layer_crossover_rate", "normalise_rate",
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
class SearchConfig:
    """What is searched, by which algorithm, for how long.

    Args:
        algorithm: 'eep'; 'eep_release', the same with the published parameters; or 'random'.
        num_kept: Experts kept in every MoE layer, or a list with one number a layer.
        top_k: Experts active a token; default: the model's.
        num_layer_groups: Consecutive layers share genes in so many groups; default: none are shared.
        multiple_of: num_kept must be a multiple of this (for expert-parallel serving).
        evaluations: Budget.
        seed: Candidate n depends on this seed, n and earlier outcomes, and on nothing else.
        eep: Parameters of 'eep'.
        warm_start: Folder of a finished run of the same model that kept more experts: half of the initial
            prunings keep only experts that one of its ten best prunings keeps ('eep' only).
    """

    algorithm: Algorithm = "eep"
    num_kept: int | list[int] = 4
    top_k: int | None = None
    num_layer_groups: int | None = None
    multiple_of: int = 1
    evaluations: int = 402
    seed: int = 0
    eep: EEPConfig = field(default_factory=EEPConfig)
    warm_start: str | None = None

    def __post_init__(self) -> None:
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
            self.warm_start is None or self.algorithm != "random", "search.warm_start", self.warm_start,
            "none, as random search begins nowhere",
        )  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig:
    """How genomes are scored.

    Args:
        fitness: Over several tasks: their 'mean' score or the 'worst' one.
        batch_tokens: Most tokens, padding included, in one forward pass.
        threads: Threads of torch on the CPU; default: one a core.
    """

    fitness: FitnessRule = "mean"
    batch_tokens: int = 8192
    threads: int | None = None

    def __post_init__(self) -> None:
        require(self.batch_tokens >= 1, "evaluation.batch_tokens", self.batch_tokens, "1 or more")
        require(self.threads is None or self.threads >= 1, "evaluation.threads", self.threads, "1 or more")


@dataclass(frozen=True)
class SelectionConfig:
    """What happens when the budget is spent.

    Args:
        finalists: The best so many by search fitness are scored on the validation split; the best
            there is scored on the test split.
        random_search: Also spend the same number of evaluations on random prunings (best of N).
        frequency: Also score the pruning that keeps the most used experts of each layer.
    """

    finalists: int = 20
    random_search: bool = False
    frequency: bool = True

    def __post_init__(self) -> None:
        require(self.finalists >= 1, "selection.finalists", self.finalists, "1 or more")


@dataclass(frozen=True)
class ClusterConfig:
    """Where evaluations run: in this process, or on Ray gangs that each hold the model once.

    Args:
        address: Default: in this process, without Ray. 'local' starts a Ray of this command's own on this
            machine, 'auto' joins the Ray cluster that runs here (or that RAY_ADDRESS names), HOST:PORT
            joins that one.
        num_gangs: How many gangs, or 'auto': as many as fit and are needed, more when nodes join, fewer
            when nodes leave or a gang is idle for idle_release_s.
        gang_size: Ranks of a gang, one GPU each, that hold one model together (model.sharding says how);
            with device_map the GPUs of its one process.
        resources: Ray resources of one rank, as in {GPU: 1, CPU: 4}; default: one GPU where the cluster
            has any, else one CPU.
        labels: Ray node labels that a gang's nodes must have, as in {accelerator: h100}.
        strategy: Placement of a gang's ranks on nodes (Ray's placement group strategies).
        max_batch: Most genomes in one request; fewer are sent while evaluations are slow or few are left.
        deadline_s: Longest time for one evaluation before its gang counts as hung; default: 20 times the
            slowest so far and at least one minute, and half an hour for a gang's first.
        load_timeout_s: Longest time for a gang to load the model.
        max_attempts: A genome that broke so many gangs is given up; the same number of failures to load
            in a row, with no success before, ends the run.
        idle_release_s: 'auto': a gang that is idle for so long is released; a shared service ends when it
            had no run for so long.
        service: Name of a service of gangs that several runs on one cluster share in fair turns, with
            their evaluations in one cache; default: gangs of this run alone.
    """

    address: str | None = None
    num_gangs: int | Literal["auto"] = "auto"
    gang_size: int = 1
    resources: dict[str, float] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    strategy: PlacementStrategy = "PACK"
    max_batch: int = 16
    deadline_s: float | None = None
    load_timeout_s: float = 3600.0
    max_attempts: int = 3
    idle_release_s: float = 300.0
    service: str | None = None

    def __post_init__(self) -> None:
        for option in ("num_gangs", "gang_size", "max_batch", "max_attempts"):
            value = getattr(self, option)
            require(value == "auto" or value >= 1, f"cluster.{option}", value, "1 or more")
        for option in ("deadline_s", "load_timeout_s", "idle_release_s"):
            value = getattr(self, option)
            require(value is None or value > 0, f"cluster.{option}", value, "more than 0")
        amounts = self.resources
        require(
            amounts is None or (bool(amounts) and min(amounts.values()) > 0), "cluster.resources", amounts,
            "positive amounts, as in {GPU: 1, CPU: 4}",
        )  # fmt: skip
        require(self.service is None or bool(self.service), "cluster.service", self.service, "a name")
        if self.address is None:
            defaults = ClusterConfig(address="auto")
            for option, value in vars(self).items():
                require(
                    option == "address" or value == getattr(defaults, option), f"cluster.{option}", value,
                    "none without cluster.address; add --cluster.address auto (or local)",
                )  # fmt: skip


@dataclass(frozen=True)
class TrackingConfig:
    """Where people look at a run beside the terminal; nothing of it changes what a search finds.

    Args:
        wandb: Weights & Biases: 'online'; 'offline', into the run's folder; 'disabled'; or 'auto': what
            WANDB_MODE says, else online if WANDB_API_KEY is set, else disabled.
        project: W&B project.
        entity: W&B team or user; default: that of the key.
        group: W&B group, by which runs of one sweep or question are shown together.
        tags: W&B tags.
    """

    wandb: WandbMode = "auto"
    project: str = "moe_evo"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(
            bool(self.project) and len(self.project) <= 128 and not set(self.project) & set("/\\#?%:"),
            "tracking.project", self.project, "a name of at most 128 characters, none of / \\ # ? % :",
        )  # fmt: skip
        for option, length in (("group", 128), ("entity", 128)):
            value = getattr(self, option)
            require(value is None or 0 < len(value) <= length, f"tracking.{option}", value, "1 to 128 characters")
        require(all(0 < len(tag) <= 64 for tag in self.tags), "tracking.tags", self.tags, "tags of 1 to 64 characters")


def num_ranks(model: ModelConfig, cluster: ClusterConfig) -> int:
    """Processes that hold one model together; device_map has one, with gang_size devices."""
    return cluster.gang_size if model.sharding in ("tensor_parallel", "zero3") else 1


def _embedded_tasks() -> list[TaskConfig]:
    return [TaskConfig(data="syll")]


@dataclass(frozen=True)
class ScoringConfig:
    """What it takes to score a genome.

    Args:
        model: The model.
        tasks: List of tasks; a bare string is a task's data. --tasks.KEY changes the last task.
        evaluation: How genomes are scored.
        cluster: Where they are scored.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    tasks: list[TaskConfig] = field(default_factory=_embedded_tasks)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "at least one task")
        sharding, size = self.model.sharding, self.cluster.gang_size
        needs_gang = sharding in ("tensor_parallel", "zero3")
        require(
            not needs_gang or self.cluster.address is not None, "model.sharding", sharding,
            "'single' or 'device_map' in one process; add --cluster.address auto (or local) for gangs",
        )  # fmt: skip
        require(
            size == 1 or sharding != "single", "cluster.gang_size", size,
            "1, as model.sharding is 'single'; use tensor_parallel, zero3 or device_map",
        )  # fmt: skip


@dataclass(frozen=True)
class RunConfig(ScoringConfig):
    """A whole run.

    Args:
        model: The model.
        tasks: List of the tasks whose fitness is searched for; a bare string is a task's data.
            --tasks.KEY changes the last task.
        evaluation: How genomes are scored.
        cluster: Where they are scored.
        search: The search.
        selection: How the winner is chosen, and what stands beside it.
        tracking: Where people look at the run.
        folder: Where the run is kept; default: runs/ and a name made of tasks, num_kept, algorithm and seed.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    folder: str | None = None


def difference(old: Any, new: Any, path: str = "") -> Sequence[str]:
    """Lines `key: old -> new` for every leaf in which two plain nested configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line for key in keys for line in difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for index, (a, b) in pairs for line in difference(a, b, f"{path}[{index}]")]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
