"""The config of the model: which one, and how it is loaded.

The docstring of each section is its help text on the command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_evo.config.check import require, require_path

RouterMode = Literal["exported", "eep"]
ExpertsMode = Literal["own", "meo"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Sharding = Literal["single", "device_map", "tensor_parallel", "zero3"]
Offload = Literal["none", "cpu", "nvme"]


class EmbeddedModel(NamedTuple):
    """A model of this package: its folder in moe_evo/data, and its name for people."""

    folder: str
    title: str


EMBEDDED_MODELS = {
    "embedded": EmbeddedModel("model", "moe_evo embedded Mixtral"),
    "embedded-fine": EmbeddedModel("fine", "moe_evo embedded Qwen3-MoE"),
}
"""By what `model.path` calls them."""


MOST_GIB = 2**20
"""More memory than any machine has."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model is searched, and how it is loaded.

    Args:
        path: Checkpoint folder or Hugging Face name; 'embedded' is the small Mixtral of this
            package (8 experts a layer), 'embedded-fine' its small Qwen3-MoE (32).
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
        alignment: File with a new order of the neurons of every expert, applied after loading; moe-evo prune
            --aligned true writes it. It changes what merges of experts compute, but not the unmerged model.
        dynamic_skipping: Skip a token's second expert where its weight is less than this number times the weight of
            the first (NAEE; moe-evo prune --method naee prints the median): one number, or a list with one a
            MoE layer. It is only emulated, and no checkpoint can hold it.
        top_p: Run only a token's most probable experts, as few as have probabilities with a sum of this number at
            least, and top_k at most (arXiv 2403.07652): more than 0, up to 1, which runs all. It is only emulated,
            and no checkpoint can hold it.
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
    top_p: float | None = None

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", self.path, "a folder or a Hugging Face name")
        for option in ("path", "offload_folder", "alignment"):
            require_path(f"model.{option}", getattr(self, option))
        require(
            self.revision is None or (bool(self.revision) and self.path not in EMBEDDED_MODELS), "model.revision",
            self.revision, "none, as the model comes with this package" if self.revision else "a branch, tag or commit",
        )  # fmt: skip
        require(
            not self.trust_remote_code or self.path not in EMBEDDED_MODELS, "model.trust_remote_code", True,
            "false, as the model comes with this package",
        )  # fmt: skip
        cache = self.merged_cache_gib
        require(cache is None or 0 <= cache <= MOST_GIB, "model.merged_cache_gib", cache, f"0 to {MOST_GIB:,}")
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
        if self.top_p is not None:
            require(0 < self.top_p <= 1, "model.top_p", self.top_p, "more than 0, up to 1")
            require(
                skipping is None, "model.top_p", self.top_p,
                "none: model.dynamic_skipping says already which experts a token does without",
            )  # fmt: skip
            require(
                self.router == "exported", "model.top_p", self.top_p,
                "none: with model.router 'eep' the numbers that experts are chosen by are no probabilities",
            )  # fmt: skip
        for device, size in (self.max_memory or {}).items():
            is_device = device in ("cpu", "disk") or str(device).isdecimal()
            require(
                is_device, "model.max_memory", device, "numbers of GPUs, cpu and disk, as in {0: 70GiB, cpu: 200GiB}"
            )
            is_size = re.fullmatch(r"\d{1,9}(\.\d+)?\s?[KMGT]i?B", size)
            require(is_size is not None, "model.max_memory", self.max_memory, "sizes such as 70GiB")
