"""Writes a search to Weights & Biases. This is the only file that imports wandb.

Every key is listed in `experiments/wandb.md`; curves are drawn against `evaluations`, those of a recovery against
`recovery/step`.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import wandb
from safetensors import safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from wandb.sdk import wandb_setup

from moe_evo.config.task import SPLITS
from moe_evo.evaluation.pool import PoolStatus
from moe_evo.genomes.population import Evaluation, EvaluationFailure, Individual
from moe_evo.plain import plain
from moe_evo.records.journal import MAIN, RANDOM
from moe_evo.records.result import RunResult
from moe_evo.report.front import names_of
from moe_evo.tasks.data import REPORTED
from moe_evo.tracking.curves import SearchStatistics
from moe_evo.versions import ADVICE

if TYPE_CHECKING:
    from moe_evo.tracking.wandb_run import WandbRun

_INIT_TIMEOUT_S = 30.0
_EXIT_TIMEOUT_S = 5.0
_PICTURE_INTERVAL_S = 60.0
_RATE_WINDOW_S = 30.0
_MOST_INCREMENTS = 80  # the pages of W&B show the last hundred of a table
_ROW = (
    "search", "number", "operator", "parents", "phase", "digest", "fitness", "standard_error", "tie_break",
    "failure", "evaluation_s",
)  # fmt: skip


def begin(run: WandbRun, stopped: Callable[[], None]) -> wandb.Run:
    """Open the run; raises what wandb raises. stopped: called when W&B asks for the run to stop."""
    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_machine_info=True,
        x_disable_meta=True,  # the metadata would contain the command line and the user's name
        x_disable_stats=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=1,
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=run.finish_timeout_s,
        finish_timeout_raises=True,
        stop_on_fatal_error=True,
        stop_fn=stopped,  # by default it interrupts the main thread
        reinit="create_new",
    )
    return wandb.init(
        mode=run.mode,
        project=run.config.project,
        entity=run.config.entity,
        group=run.config.group,
        job_type=run.job_type,
        name=run.name,
        tags=[*run.config.tags, *run.tags],
        id=run.id,
        resume="allow",
        config=dict(run.settings),
        dir=str(run.folder.absolute()),
        settings=settings,
    )


def end(run: wandb.Run, exit_code: int) -> str:
    """Finish the run and wait for its upload; returns what failed without an exception, or ''."""
    log = Path(run.settings.log_internal)
    run.finish(exit_code=exit_code)
    refused = log.is_file() and "fatal error" in log.read_text("utf-8", errors="replace")
    return f"not everything was uploaded, see {log}" if refused else ""


def teardown(*, kill: bool = False) -> None:
    """End W&B's service process, unless other code in this process has a W&B run open.

    kill: end it at once. Otherwise wandb waits for it when this process exits, even if it hangs. Raises LookupError
    where the process cannot be found in this version of wandb.
    """
    if wandb.run is not None:
        return
    process = _service_process()
    try:
        if kill and process:
            process.kill()
        elif not kill:
            wandb.teardown()
    finally:
        if process:
            process.wait(_EXIT_TIMEOUT_S)


def _service_process() -> Any:
    """W&B's service process; None where there is none. wandb has no public name for it."""
    try:
        connection = wandb_setup.singleton()._connection
        return connection and connection._proc and connection._proc._process
    except AttributeError as error:
        raise LookupError(
            f"wandb {wandb.__version__} has its own process elsewhere than expected ({error}); {ADVICE}"
        ) from error


class SearchLog:
    """Writes the events of a search to a W&B run.

    num_rows: most rows of the table of individuals. fitness_label: what fitness is called in captions. Outcomes that a
    resumed W&B run has already are not written again: its keys `recorded/...` tell how many of the journal it has.
    """

    def __init__(
        self, run: wandb.Run, *, num_rows: int, fitness_label: str = "fitness", step_metric: str = "evaluations"
    ) -> None:
        self._run = run
        self._fitness_label = fitness_label
        self._statistics = {MAIN: SearchStatistics(), RANDOM: SearchStatistics()}
        self._individuals: dict[tuple[str, int], Individual] = {}
        self._recorded: Counter[str] = Counter()
        self._held: dict[str, float] = dict(run.summary) if run.resumed else {}
        self._table = wandb.Table(columns=list(_ROW), log_mode="INCREMENTAL")
        self._rows = self._pending = 0
        self._batch = max(10, -(-num_rows // _MOST_INCREMENTS))
        self._times: deque[float] = deque()
        self._drawn = ""  # the caption of the pictures that were written last
        self._drawn_at = monotonic()
        self._result: RunResult | None = None
        run.define_metric(step_metric)
        run.define_metric("*", step_metric=step_metric)

    def recorded(self, search: str, split: str, individual: Individual, at: float | None) -> None:
        """Write an outcome. at: its time in monotonic seconds; None for an outcome of an earlier process."""
        key = f"recorded/{search}_{split}"
        self._recorded[key] += 1
        values = self._values(search, split, individual, at)
        if self._recorded[key] > self._held.get(key, 0):
            self._run.log({**values, key: self._recorded[key]})
        if search in self._statistics and split == "search":
            self._add_row(search, individual)
            if search == MAIN:
                self._draw_at_intervals()

    def told(self, history: Sequence[tuple[str, str, Individual]]) -> None:
        """Write the outcomes in the journal when this process began, as (search, split, individual)."""
        for search, split, individual in history:
            self.recorded(search, split, individual, at=None)

    def pool(self, status: PoolStatus) -> None:
        """Write the present status of the gangs."""
        states = Counter(gang.state for gang in status.gangs)
        values = {f"gangs/{state}": states[state] for state in ("busy", "ready", "loading", "waiting")}
        counts = {"gangs/restarts": status.restarts, "queue/waiting": status.waiting}
        self._run.log({**values, **counts, "queue/under_way": status.under_way, **self._here()})

    def measured(self, values: Mapping[str, float]) -> None:
        """Write a point of the curves of a recovery."""
        key = "recorded/recovery"
        self._recorded[key] += 1
        if self._recorded[key] > self._held.get(key, 0):
            self._run.log({**values, key: self._recorded[key]})

    def finished(self, result: RunResult, files: Sequence[Path]) -> None:
        """Write the final table, the summary, pictures of the winner, and the files as an artifact."""
        self._result = result
        self._run.summary.update(_summary(result))
        self._run.log({"final": _final_table(result), **self._here()})
        if result.front:
            self._run.log({"front": _front_table(result), **self._here()})
        artifact = wandb.Artifact(f"result-{self._run.id}", type="result")
        path = result.model.path
        name = Path(path).name if Path(path).is_absolute() else path
        for file in files:
            with artifact.new_file(file.name, mode="wb") as target:
                target.write(_renamed(file, path, name))
        with artifact.new_file("result.json", encoding="utf-8") as stream:
            json.dump(plain(replace(result, model=replace(result.model, path=name))), stream, indent=2)
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """Write what is not written yet: rows of the table, and pictures of the winner or else of the best so far."""
        self._flush()
        best = self._statistics[MAIN].best
        if self._result is not None:  # another candidate than that of the keys best/fitness and best/number, perhaps
            winner = self._individuals[MAIN, self._result.rows[-1].candidate]
            self._draw(winner, f"the winner: {self._caption(winner)}, test {self._result.rows[-1].test}")
        elif best is not None:
            self._draw(best, self._caption(best))

    def _values(self, search: str, split: str, individual: Individual, at: float | None) -> dict[str, float]:
        """The values that an outcome adds to the curves, by key."""
        statistics = self._statistics.get(search)
        fitness = individual.outcome.fitness if isinstance(individual.outcome, Evaluation) else None
        if statistics is None:
            name = f"{individual.candidate.operator}/{split}"
            return {"evaluations": 0} | ({name: fitness} if fitness is not None else {})
        if split != "search":  # at the position where its search fitness is drawn
            values: dict[str, float] = {"evaluations": statistics.position.get(individual.number, 0)}
            return values | ({f"{split}/{search}": fitness} if fitness is not None else {})
        self._individuals[search, individual.number] = individual  # with the fitness that it was searched by
        values = statistics.add(individual)
        if search != MAIN:
            kept = ("fitness", "best/fitness")
            return {"evaluations": values["evaluations"], **{f"{search}/{k}": values[k] for k in kept if k in values}}
        return values | self._rate(at)

    def _rate(self, at: float | None) -> dict[str, float]:
        """Evaluations per second over the last half minute."""
        if at is None:
            return {}
        self._times.append(at)
        while at - self._times[0] > _RATE_WINDOW_S:
            self._times.popleft()
        elapsed_s = at - self._times[0]
        return {"evaluations_per_s": (len(self._times) - 1) / elapsed_s} if elapsed_s > 0 else {}

    def _here(self) -> dict[str, float]:
        return {"evaluations": self._statistics[MAIN].evaluations}

    def _add_row(self, search: str, individual: Individual) -> None:
        self._rows += 1
        if self._rows <= self._held.get("recorded/rows", 0):
            return
        self._table.add_data(*_row(search, individual))
        self._pending += 1
        if self._pending % self._batch == 0:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._run.log({"individuals": self._table, "recorded/rows": self._rows, **self._here()})
            self._pending = 0

    def _draw_at_intervals(self) -> None:
        best, now = self._statistics[MAIN].best, monotonic()
        if best is not None and now - self._drawn_at > _PICTURE_INTERVAL_S:
            self._draw(best, self._caption(best))

    def _caption(self, individual: Individual) -> str:
        return f"candidate {individual.number}, {self._fitness_label} {individual.evaluation.fitness:.4f}"

    def _draw(self, individual: Individual, caption: str) -> None:
        from moe_evo.tracking.pictures import genome_pictures

        self._drawn_at = monotonic()
        if caption != self._drawn:
            self._drawn = caption
            pictures = {
                f"best/{name}": wandb.Image(pixels, caption=caption)
                for name, pixels in genome_pictures(individual.genome).items()
            }
            self._run.log({**pictures, **self._here()})


def _row(search: str, individual: Individual) -> list[Any]:
    candidate, outcome = individual.candidate, individual.outcome
    failure = outcome.kind if isinstance(outcome, EvaluationFailure) else None
    numbers: list[float | None] = [None, None, None]
    if isinstance(outcome, Evaluation):
        numbers = [outcome.fitness, outcome.standard_error, outcome.tie_break]
    parents = " ".join(map(str, candidate.parents))
    phase = "pruning" if candidate.genome.is_pruning else "merging"
    head = [search, candidate.number, candidate.operator, parents, phase, candidate.genome.digest]
    return [*head, *numbers, failure, outcome.duration_s]


def _summary(result: RunResult) -> dict[str, float]:
    """Numbers to sort runs by: `best/test`, `best/test_low`, `gain/test`, ..."""
    values: dict[str, float] = {}
    names = {"search": REPORTED} if result.search_note else {}  # `search` is the fitness that curves show
    for row in result.lines:
        for split, score in row.scores.items():
            values[f"{row.key}/{names.get(split, split)}"] = score.fitness
            if split == "test":
                values |= {f"{row.key}/test_low": score.low, f"{row.key}/test_high": score.high}
    for split in ("validation", "test"):
        if f"best/{split}" in values and f"full/{split}" in values:
            values[f"gain/{split}"] = values[f"best/{split}"] - values[f"full/{split}"]
    best, num_experts = result.best, result.model.num_experts
    values |= {"num_kept": float(np.mean(best.num_kept)), "share_kept": sum(best.num_kept) / sum(num_experts)}
    if best.parameters is not None and best.bytes is not None:
        values |= {"parameters": best.parameters, "bytes": best.bytes}
    search = result.search
    return values | {
        "failures": search.failures, "evaluations": search.evaluations, "evaluation_s": search.evaluation_s,
    }  # fmt: skip


def _final_table(result: RunResult) -> wandb.Table:
    splits = ("search", "validation", "test")
    parts = [f"{split}{part}" for split in splits for part in ("", "_low", "_high")]
    table = wandb.Table(columns=["key", "title", "num_kept", "evaluations", *parts])
    for row in result.lines:
        found = (row.scores.get(split) for split in splits)
        scores = [part for one in found for part in ((one.fitness, one.low, one.high) if one else (None, None, None))]
        table.add_data(row.key, row.title, float(np.mean(row.num_kept)), row.evaluations, *scores)
    return table


def _front_table(result: RunResult) -> wandb.Table:
    """One row a point of the front: its objectives on every split, its size, and what loads its checkpoint."""
    names = [f"{split}/{name}" for split in ("expected", *SPLITS) for name in names_of(result)]
    table = wandb.Table(columns=["key", "candidate", "num_kept", "top_k", "parameters", "loader", *names])
    for point in result.front:
        row = point.row
        told = {f"{split}/{name}": one for split, values in point.values.items() for name, one in values.items()}
        means = (float(np.mean(row.num_kept)), float(np.mean(row.top_k)))
        table.add_data(row.key, row.candidate, *means, row.parameters, row.loader, *(told.get(name) for name in names))
    return table


def _renamed(genome_file: Path, path: str, name: str) -> bytes:
    """A genome file with the model's name in place of its path on this machine."""
    content = genome_file.read_bytes()
    with safe_open(genome_file, framework="numpy") as file:
        metadata = {key: value.replace(json.dumps(path), json.dumps(name)) for key, value in file.metadata().items()}
    return save_tensors(load_tensors(content), metadata)
