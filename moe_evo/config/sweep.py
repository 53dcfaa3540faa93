"""The config of a sweep: that of a run, and the grid of options that differ between runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_evo.config.check import require
from moe_evo.config.run import RunConfig


@dataclass(frozen=True)
class GridConfig:
    """Which runs a sweep makes: one for every combination.

    Args:
        num_kept: Experts kept in every layer, as in 2,4,6; default: search.num_kept alone.
        seeds: Seeds, as in 0,1,2; default: search.seed alone.
        algorithms: Algorithms, as in eep,random; default: search.algorithm alone.
        tasks: Data of tasks, as in nli,syll, each for runs of its own; default: every run has all of `tasks`.
        warm_start: Runs that keep fewer experts begin from the next larger run of the same seed, so those
            come first; see search.warm_start.
        max_concurrent: Most runs at a time; all of them share the gangs.
        max_failures: How often a run that crashed is started again, to go on where it stood.
    """

    num_kept: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    algorithms: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    warm_start: bool = False
    max_concurrent: int = 4
    max_failures: int = 3

    def __post_init__(self) -> None:
        for option in ("num_kept", "seeds", "algorithms", "tasks"):
            values = getattr(self, option)
            require(len(set(values)) == len(values), f"sweep.{option}", values, "each value once")
        require(not self.num_kept or min(self.num_kept) >= 1, "sweep.num_kept", self.num_kept, "1 or more")
        require(not self.seeds or min(self.seeds) >= 0, "sweep.seeds", self.seeds, "0 or more")
        require(self.max_concurrent >= 1, "sweep.max_concurrent", self.max_concurrent, "1 or more")
        require(self.max_failures >= 0, "sweep.max_failures", self.max_failures, "0 or more")


@dataclass(frozen=True)
class SweepConfig(RunConfig):
    """Many runs that differ in a few options.

    Args:
        model: The model.
        tasks: List of the tasks whose fitness is searched for; a bare string is a task's data.
            --tasks.KEY changes the last task.
        evaluation: How genomes are scored.
        cluster: Where they are scored.
        search: The search.
        selection: How the winner is chosen, and what stands beside it.
        tracking: Where people look at the runs.
        folder: Where the sweep is kept, with a folder for each run; default: runs/ and a name made of tasks.
        sweep: Which runs.
    """

    sweep: GridConfig = field(default_factory=GridConfig)
