"""The config of a run: frozen dataclasses that hold every default once and check themselves.

Each section goes to the part of the program that it is named after. The docstrings below are the
help texts of the command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_evo.cluster_config import ClusterConfig
from moe_evo.config_check import require
from moe_evo.search_config import SearchConfig

RouterMode = Literal["exported", "eep"]
ExpertsMode = Literal["own", "meo"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
TaskKind = Literal["auto", "choice", "generation", "perplexity", "distillation"]
Metric = Literal[
    "default", "accuracy", "accuracy_norm", "log_likelihood",
    "exact_match", "contains", "f1", "first_option", "number_match", "negative_kl",
]  # fmt: skip
FitnessRule = Literal["mean", "worst"]
StateDevice = Literal["model", "cpu"]
Sharding = Literal["single", "device_map", "tensor_parallel", "zero3"]
Offload = Literal["none", "cpu", "nvme"]
WandbMode = Literal["auto", "online", "offline", "disabled"]


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
        experts: 'own' runs every expert that a token is routed to; 'meo' merges them for the token, weighted by its
            gates, and runs the one that comes of it (arXiv 2310.09762), which no checkpoint can hold.
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
        alignment: File that reorders the neurons of every expert after loading, as moe-evo prune --aligned true
            writes it. What the model computes stays, but what merges of its experts compute does not.
        dynamic_skipping: A token does without its second expert where that has less than so many times the
            weight of its first (NAEE; moe-evo prune --method naee tells the median): one number, or a list
            with one a MoE layer. Only emulated, and no checkpoint can hold it.
    """

    path: str = "embedded"
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    router: RouterMode = "exported"
    experts: ExpertsMode = "own"
    trust_remote_code: bool = False
    self_check: bool = True
    merged_cache_gib: float | None = None
    sharding: Sharding = "single"
    offload: Offload = "none"
    offload_folder: str | None = None
    max_memory: dict[int | str, str] | None = None
    alignment: str | None = None
    dynamic_skipping: float | list[float] | None = None

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
        require(
            self.alignment is None or self.sharding == "single", "model.alignment", self.alignment,
            "none: only model.sharding single has whole experts whose neurons can be reordered",
        )  # fmt: skip
        skipping = self.dynamic_skipping
        thresholds = skipping if isinstance(skipping, list) else [skipping or 0.0]
        require(
            bool(thresholds) and min(thresholds) >= 0 and max(thresholds) <= 1, "model.dynamic_skipping", skipping,
            "0 to 1",
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
class EvaluationConfig:
    """How genomes are scored.

    Args:
        fitness: Over several tasks: their 'mean' score or the 'worst' one.
        batch_tokens: Most tokens, padding included, in one forward pass.
        threads: Threads of torch on the CPU; default: one a core.
        share_layers: Compute layers that genomes have in common once, and start the children of recent
            genomes where they differ; false runs every genome from the first layer on.
        pack_tokens: Genomes with so many tokens together go through a layer at once; or 'measured': as many as
            turn out to be fastest, with batch_tokens at most. Default: 'measured' on a GPU; on the CPU one genome
            at a time, as scores then do not depend, in the last bits, on what is evaluated together.
        state_cache_gib: Memory for the hidden states of recent genomes. Default: a quarter of what is free
            after loading.
        state_device: Where those states are kept: on the 'model' device, or in the memory of the 'cpu'.
        race: Stop an individual early that is worse than the sixth best with this confidence, as 0.95,
            after a fifth or a half of the examples. Default: all individuals see all examples.
    """

    fitness: FitnessRule = "mean"
    batch_tokens: int = 8192
    threads: int | None = None
    share_layers: bool = True
    pack_tokens: int | Literal["measured"] | None = None
    state_cache_gib: float | None = None
    state_device: StateDevice = "model"
    race: float | None = None

    def __post_init__(self) -> None:
        cache = self.state_cache_gib
        require(cache is None or cache >= 0, "evaluation.state_cache_gib", cache, "0 or more")
        require(self.batch_tokens >= 1, "evaluation.batch_tokens", self.batch_tokens, "1 or more")
        pack = self.pack_tokens
        require(
            pack in (None, "measured") or (isinstance(pack, int) and pack >= 1), "evaluation.pack_tokens", pack,
            "1 or more, or 'measured'",
        )  # fmt: skip
        require(self.threads is None or self.threads >= 1, "evaluation.threads", self.threads, "1 or more")
        confidence = self.race
        require(confidence is None or 0.5 <= confidence < 1, "evaluation.race", confidence, "at least 0.5, below 1")
        require(
            confidence is None or self.fitness == "mean", "evaluation.race", confidence,
            "none, as evaluation.fitness is 'worst': which task is the worst shows at the end",
        )  # fmt: skip


SPEED_ONLY = ("batch_tokens", "threads", "share_layers", "pack_tokens", "state_cache_gib", "state_device")
"""Options of `EvaluationConfig` that do not change what is computed."""


@dataclass(frozen=True)
class SelectionConfig:
    """What happens when the budget is spent.

    Args:
        finalists: The best so many by search fitness are scored on the validation split; the best
            there is scored on the test split.
        random_search: Also spend the same number of evaluations on random prunings (best of N).
        soup: Also average finalists that keep the same experts, for as long as it helps on the validation split;
            moe-evo export takes the winner, or this with --which soup.
        baselines: One-shot methods whose genomes are scored beside the winner (moe-evo criteria lists them). Merges
            are taken without reordering neurons; see model.alignment.
    """

    finalists: int = 20
    random_search: bool = False
    soup: bool = False
    baselines: list[str] = field(default_factory=lambda: ["frequency", "reap"])

    def __post_init__(self) -> None:
        require(self.finalists >= 1, "selection.finalists", self.finalists, "1 or more")


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
