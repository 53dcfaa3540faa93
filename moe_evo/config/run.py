"""The config of a whole run. Its sections are frozen dataclasses, in which every default stands once.

Each section checks its own values, and is passed to the part of the program that it is named after. The docstrings
are the help texts of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_evo.config.check import require, require_name, require_once, require_path
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.search import ACTIVE, QUALITY, TASKS, SearchConfig
from moe_evo.config.task import TaskConfig

_MOST_OBJECTIVES = 6  # hypervolumes of more take long

WandbMode = Literal["auto", "online", "offline", "disabled"]


@dataclass(frozen=True)
class SelectionConfig:
    """What happens when the budget is spent.

    Args:
        finalists: So many of which most is expected after the search are scored on a quarter of the validation split,
            half of them on more of it, a quarter on all; the best there is scored on the test split.
        recover_finalists: So many of the best finalists are recovered (moe-evo recover) from the full model before the
            winner is chosen, and the one that scores best on the validation split then is the winner: what heals best
            is not always what was best. In closed form, on prompts of the search split. It takes a part of
            search.evaluations, which moe-evo plan tells. Not on a cluster.
        recover_steps: Gradient steps after that (method logits of moe-evo recover).
        random_search: Also spend the same number of evaluations on random prunings (best of N).
        soup: Also average finalists that keep the same experts, for as long as it helps on the validation split;
            moe-evo export takes the winner, or this with --which soup.
        baselines: One-shot methods whose genomes are scored beside the winner (moe-evo criteria lists them, and
            package.module:name is one, too). Merges are taken without reordering neurons; see model.alignment.
    """

    finalists: int = 20
    recover_finalists: int = 0
    recover_steps: int = 0
    random_search: bool = False
    soup: bool = False
    baselines: list[str] = field(default_factory=lambda: ["frequency", "reap"])

    def __post_init__(self) -> None:
        require(self.finalists >= 1, "selection.finalists", self.finalists, "1 or more")
        require_once("selection.baselines", self.baselines)
        number, steps = self.recover_finalists, self.recover_steps
        require(
            0 <= number <= self.finalists, "selection.recover_finalists", number,
            f"0 to selection.finalists ({self.finalists})",
        )  # fmt: skip
        require(
            steps == 0 or (steps > 0 and number > 0), "selection.recover_steps", steps,
            "0, as selection.recover_finalists is 0" if steps > 0 else "0 or more",
        )  # fmt: skip
        require(
            not (number and self.soup), "selection.soup", self.soup,
            "false, as selection.recover_finalists changes what finalists score, but not averages of them",
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
        for option in ("project", "group", "entity"):
            require_name(f"tracking.{option}", getattr(self, option) or "")
        are_tags = all(0 < len(tag) <= 64 and tag.isprintable() for tag in self.tags)
        require(are_tags, "tracking.tags", self.tags, "tags of 1 to 64 characters, all printable")
        require_once("tracking.tags", self.tags)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.folder is None or bool(self.folder), "folder", self.folder, "a folder")
        require_path("folder", self.folder)
        objectives, by_task = self.search.objectives, TASKS in self.search.objectives
        require(
            not by_task or len(self.tasks) > 1, "search.objectives", objectives,
            "'quality', as there is one task; give two or more tasks, each of which is an objective",
        )  # fmt: skip
        require(
            not by_task or not self.evaluation.is_fresh, "evaluation.examples", self.evaluation.examples,
            "'fixed', as each task is an objective: only their common score is corrected for fresh examples",
        )  # fmt: skip
        if self.selection.recover_finalists:
            self._check_recovery()
        number = len(objectives) + by_task * (len(self.tasks) - 1)
        require(
            number <= _MOST_OBJECTIVES, "search.objectives", objectives,
            f"at most {_MOST_OBJECTIVES} objectives with one for each of the {len(self.tasks)} tasks; give fewer tasks",
        )  # fmt: skip
        require(
            not self.search.has_front or self.evaluation.race is None, "evaluation.race", self.evaluation.race,
            "none, as search.objectives has several: what is worse in one may be better in another",
        )  # fmt: skip
        for option in ("top_p", "dynamic_skipping"):
            value = getattr(self.model, option)
            require(
                value is None or ACTIVE not in objectives, f"model.{option}", value,
                "none, as experts active a token are an objective: how many run is then known of no genome",
            )  # fmt: skip

    def _check_recovery(self) -> None:
        """Raise ConfigError where finalists cannot be recovered: only whole, stock models in this process can."""
        option, number, model = "selection.recover_finalists", self.selection.recover_finalists, self.model
        needed: dict[str, tuple[object, object]] = {
            "cluster.address": (self.cluster.address, None),
            "model.sharding": (model.sharding, "single"),
            "model.router": (model.router, "exported"),
            "model.experts": (model.experts, "own"),
            "model.alignment": (model.alignment, None),
            "model.dynamic_skipping": (model.dynamic_skipping, None),
            "model.top_p": (model.top_p, None),
            "search.objectives": (self.search.objectives, [QUALITY]),
        }
        for name, (value, wanted) in needed.items():
            told = f"without {name} ({value})" if wanted is None else f"with {name} {wanted} (it is {value})"
            require(value == wanted, option, number, f"it {told}; or 0, and moe-evo recover for the winner afterwards")
        kept = self.search.num_kept
        require(isinstance(kept, int), option, number, f"it with one search.num_kept for all layers, not {kept}; or 0")


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
