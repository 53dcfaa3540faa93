"""The config of recovery: how a pruned model learns from the full one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from moe_evo.config.check import require, require_once, require_path, require_unset
from moe_evo.config.run import ScoringConfig, TrackingConfig

PARTS = ("experts", "adapters", "scales", "router", "norms", "attention", "all")
"""What `RecoverConfig.train` may name."""


Engine = Literal["torch", "deepspeed"]
Stage = Literal[2, 3]

_RATE_TIMES_WIDTH = 0.128
_BLOCK_TOKENS = 32_768
_TOKENS_A_NEURON = 4


def enough_tokens(num_kept: int, top_k: int, width: int) -> int:
    """With so many tokens, evenly routed, each expert of a layer meets four for each of its neurons.

    num_kept, top_k: experts, and how many of them are active. width: neurons of an expert, each of which is an unknown
    in every row of the down matrix.
    """
    return -(-_TOKENS_A_NEURON * num_kept * width // top_k)


_GRADIENTS, _BY_LAYER = ("logits", "router", "labels"), ("layerwise", "closed_form")
_READ_BY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("batch_size", "checks", "patience", "gradient_checkpointing"): _GRADIENTS,
    ("steps", "learning_rate"): (*_GRADIENTS, "layerwise"),
    ("train",): ("logits", "labels", "closed_form"),
    ("rank",): ("logits", "labels"),
    ("block_tokens",): _BY_LAYER,
    ("ridge",): ("closed_form",),
    ("label_weight",): ("labels",),
}
"""Options that only some of our methods read."""


@dataclass(frozen=True)
class RecoverConfig:
    """How a pruned model learns to answer as the full one does.

    Args:
        methods: What is done, one after the other. 'closed_form' fits the experts' down matrices, or what `train` says,
            to the outputs of the full model's layers by least squares, one MoE layer after the other, without
            gradients; 'layerwise' trains router and experts of each layer on these outputs; 'logits' learns the full
            model's next-token distributions; 'router' the same with router rows alone; 'labels' learns the right
            answers of the search split, too; or the method of another package, by its name or as package.module:name.
        train: logits, labels: what is trained: experts, or in their place low-rank adapters on them (LoRA), which take
            far less memory and become part of the weights at the end; scales (a factor on each expert's output),
            router, norms (all layer norms), attention, or all. Default: experts, router and norms. closed_form refits
            what it can of this: experts (also for adapters), scales and router. Default: experts.
        rank: Rank of adapters.
        search_split: Whether the prompts of the tasks' search split are learned from.
        prompts: File with more prompts, which need no answers: rows (JSONL, CSV, Parquet ... by its ending) with
            'prompt' or 'messages' (formatted as the task's prompts are) or 'text', or plain text with one text a line.
        answer_tokens: Most tokens of its own answer that the full model writes behind each prompt, to be learned with
            it; 0 learns prompts alone.
        top_k: Most probable tokens of the full model that are stored for each position; the rest is one number.
        prompt_weight: Weight of a position within a prompt, where those of an answer have 1.
        block_tokens: layerwise, closed_form: about how many tokens the layers' outputs are stored and compared at.
            Default: 32,768, and so many at least that an expert meets four for each of its neurons.
        ridge: closed_form: how strongly weights are held where they were, as a share of the mean square of what enters
            them. Ten times as strongly, and so on, where that leaves smaller errors at prompts that are held out.
        label_weight: labels: weight of the right answer's cross entropy beside the divergence from the full model.
        steps: Most steps of the optimizer (AdamW); layerwise: in each layer.
        batch_size: Prompts a step.
        batch_tokens: Most tokens, padding included, in one forward and backward pass; a step is made of as many passes
            as it needs. Where memory runs out, half of it is taken.
        learning_rate: After a warm-up of a twentieth of the steps; falls to 0 as a cosine. Default: 0.128 divided by
            the hidden size, as wider models need smaller steps (arXiv 2203.03466): 0.001 for 128, 3e-5 for 4096.
        checks: How many times the loss on the validation split is computed, at equal distances; the weights with the
            lowest loss are kept. The state is saved as often, from which a killed recovery goes on.
        patience: Stop after so many checks without a lower validation loss. Losses often rise at first, while the
            learning rate is high; so the default is as many as there are.
        gradient_checkpointing: Compute each layer again in the backward pass, which takes less memory and more time.
        engine: What takes the gradient steps of logits, router and labels: 'torch', on one device of this process; or
            'deepspeed', on cluster.gang_size workers of a Ray cluster, one GPU each, which share weights, gradients and
            moments among them (ZeRO, with model.sharding zero3) and keep them where model.offload says. Other methods
            work in this process either way.
        zero_stage: deepspeed: what each worker holds only its share of: 2, gradients, float32 weights and moments
            (faster, where a GPU holds the smaller model whole); 3, the model's weights, too.
        seed: Of the order of prompts.
    """

    methods: list[str] = field(default_factory=lambda: ["closed_form", "logits"])
    train: list[str] = field(default_factory=list)
    rank: int = 8
    search_split: bool = True
    prompts: str | None = None
    answer_tokens: int = 16
    top_k: int = 64
    prompt_weight: float = 0.1
    block_tokens: int | None = None
    ridge: float = 0.001
    label_weight: float = 1.0
    steps: int = 300
    batch_size: int = 32
    batch_tokens: int = 4096
    learning_rate: float | None = None
    checks: int = 10
    patience: int = 10
    gradient_checkpointing: bool = False
    engine: Engine = "torch"
    zero_stage: Stage = 3
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.methods), "recover.methods", self.methods, "at least one, such as logits")
        require_once("recover.train", self.train)
        require_path("recover.prompts", self.prompts)
        unknown = [part for part in self.train if part not in PARTS]
        require(not unknown, "recover.train", self.train, f"a list of {', '.join(PARTS)}")
        whole = {"experts", "all"} & {*self.train}
        require(
            not whole or "adapters" not in self.train, "recover.train", self.train,
            f"adapters or {' and '.join(sorted(whole))}: adapters are trained in place of whole experts",
        )  # fmt: skip
        require(
            "closed_form" not in self.methods or bool(self.refitted), "recover.train", self.train,
            "one of experts, adapters, scales or router for closed_form of recover.methods; or leave closed_form out",
        )  # fmt: skip
        require(
            self.search_split or self.prompts is not None, "recover.search_split", self.search_split,
            "true, or a file recover.prompts: there is nothing to learn from",
        )  # fmt: skip
        for option, least in (("answer_tokens", 0), ("top_k", 1), ("steps", 1), ("batch_size", 1), ("batch_tokens", 1),
                              ("checks", 1), ("patience", 1), ("rank", 1), ("seed", 0)):  # fmt: skip
            value = getattr(self, option)
            require(value >= least, f"recover.{option}", value, f"{least} or more")
        blocks = self.block_tokens
        require(blocks is None or blocks >= 1, "recover.block_tokens", blocks, "1 or more")
        for option in ("prompt_weight", "label_weight"):
            value = getattr(self, option)
            require(0 <= value < math.inf, f"recover.{option}", value, "0 or more")
        require(0 < self.ridge < math.inf, "recover.ridge", self.ridge, "more than 0, such as 0.001")
        rate = self.learning_rate
        require(rate is None or 0 < rate <= 100, "recover.learning_rate", rate, "more than 0, such as 0.001")
        require(
            self.prompt_weight > 0 or self.answer_tokens > 0 or "labels" in self.methods, "recover.prompt_weight",
            self.prompt_weight, "more than 0, as recover.answer_tokens is 0: only the last position would be learned",
        )  # fmt: skip

    def check_read(self) -> None:
        """Raise ConfigError for an option that none of the methods reads; those of other packages may read all."""
        if self.engine != "deepspeed":
            require_unset(self, "recover", ["zero_stage"], "as recover.engine is 'torch'")
        if not {*self.methods} <= {*_GRADIENTS, *_BY_LAYER}:
            return
        for options, methods in _READ_BY.items():
            if not {*methods} & {*self.methods}:
                reason = f"as only {' and '.join(methods)} of recover.methods read it"
                require_unset(self, "recover", options, reason)
        if "adapters" not in self.train:
            require_unset(self, "recover", ["rank"], "as adapters are not in recover.train")

    @property
    def refitted(self) -> frozenset[str]:
        """What closed_form solves for: of 'experts' (their down matrices), 'scales' and 'router' those in `train`."""
        if not self.train:
            return frozenset({"experts"})
        also = {"adapters": ("experts",), "all": ("experts", "router")}  # nothing is trained that adapters would save
        named = {part for one in self.train for part in also.get(one, (one,))}
        return frozenset(named & {"experts", "scales", "router"})

    def most_block_tokens(self, enough: int) -> int:
        """About how many tokens layers' outputs are stored at; enough: see `enough_tokens`."""
        return max(_BLOCK_TOKENS, enough) if self.block_tokens is None else self.block_tokens

    def rate(self, hidden_size: int) -> float:
        """The highest learning rate, for a model of this hidden size."""
        return _RATE_TIMES_WIDTH / hidden_size if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class RecoveryConfig(ScoringConfig):
    """What it takes to recover a model.

    Args:
        model: The full model, from which the smaller one learns.
        tasks: List of tasks whose prompts are learned from, and on whose test split the result is scored; a bare
            string is a task's data. --tasks.KEY changes the last task.
        evaluation: How models are scored.
        cluster: The workers of recover.engine deepspeed.
        recover: How the smaller model learns.
        tracking: Where its curves are seen beside the terminal.
    """

    recover: RecoverConfig = field(default_factory=RecoverConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
