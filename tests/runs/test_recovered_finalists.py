"""Finalists that are recovered before the winner is chosen: what decides, what it costs, and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from child_runs import content, in_child

from moe_evo.cli.main import main
from moe_evo.commands.plan import plan
from moe_evo.commands.search import search
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import RunError
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, RECOVERED, Journal
from moe_evo.recovery import layer_repair
from moe_evo.runs.finalist_recovery import FinalistRecovery
from moe_evo.runs.finalists import Judged, better_half
from moe_evo.runs.halving import cost
from moe_evo.runs.recovery_cost import learned_and_held_out, recovery_cost
from moe_evo.tracking.base import Trackers
from moe_evo.tracking.start import _history

CONFIG = RunConfig(
    model=ModelConfig(self_check=False),
    tasks=[TaskConfig(data="syll", num_search=40, num_validation=24, num_test=16)],
    search=SearchConfig(algorithm="random", num_kept=2, evaluations=40, seed=1),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=4, recover_finalists=2, recover_steps=3, baselines=[]),
)
# 8 of 40 prompts are held out. The full model answers and reads all, and 32 again: 112. Each finalist reads 32 prompts
# 2.5 times on the way to 4 layers and in 6 fits, and 8 in 5 checks; in 3 steps 32 three times each, and 8 in 3 checks
COST = 34  # (112 + 2 * (32 * 8.5 + 8 * 5 + 3 * 32 * 3 + 8 * 3)) / 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task's data as files of their own, from which other splits can be made."""
    folder, source = tmp_path_factory.mktemp("data") / "syll", resources.files("moe_evo") / "data" / "tasks" / "syll"
    folder.mkdir()
    for split, number in (("search", 40), ("validation", 24), ("test", 16)):
        (folder / f"{split}.jsonl").write_text("\n".join(lines(Path(str(source)), split)[:number]) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def config(data: Path) -> RunConfig:
    return replace(CONFIG, tasks=[TaskConfig(data=str(data))])


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(config, tmp_path_factory.mktemp("finished") / "run", RECORDED)


def run(config: RunConfig, folder: Path, tracker: Trackers | None = None) -> RunFolder:
    return search(replace(config, folder=str(folder)), tracker or Trackers())


class Recorded(Trackers):
    """Remembers what was written into the journal."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[tuple[str, str, int]] = []

    def recorded(self, search: str, split: str, individual: Individual) -> None:
        self.outcomes.append((search, split, individual.number))


RECORDED = Recorded()
"""Of the run that `finished` makes."""


def lines(folder: Path, split: str) -> list[str]:
    return (folder / f"{split}.jsonl").read_text("utf-8").splitlines()


def test_the_winner_is_the_finalist_that_scores_best_on_the_validation_split_once_recovered(
    finished: RunFolder, config: RunConfig
) -> None:
    result = finished.read_result()
    assert result.finalists is not None and result.finalists.methods == ("closed_form", "logits")
    first, second = result.finalists.finalists
    assert first.recovered is not None and second.recovered is not None and first.recovered >= second.recovered
    assert result.best.candidate == first.candidate
    with finished.open_journal() as journal:
        after, before = journal.outcomes(MAIN, RECOVERED), journal.outcomes(MAIN, "validation")
        for one in (first, second):
            assert (one.recovered, one.pruned) == (after[one.candidate].fitness, before[one.candidate].fitness)
        assert len(after) == 2 and {one.num_examples for one in after.values()} == {24}
    assert result.best.validation is not None and result.best.validation.fitness == first.pruned
    assert not finished.finalists.exists()


def test_trackers_hear_of_recovered_scores_when_they_are_found_and_when_a_run_is_replayed(finished: RunFolder) -> None:
    with finished.open_journal() as journal:
        numbers = {*journal.outcomes(MAIN, RECOVERED)}
        replayed = [(search, split, one.number) for search, split, one in _history(journal)]
    for told in (RECORDED.outcomes, replayed):
        assert sorted(one for one in told if one[1] == RECOVERED) == sorted((MAIN, RECOVERED, n) for n in numbers)


def test_a_recovered_score_is_that_of_a_checkpoint_that_is_recovered_alone_on_the_same_prompts(
    finished: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "syll"
    other.mkdir()
    numbers = dict(zip(("search", "validation"), learned_and_held_out(40), strict=True))
    rows = lines(data, "search")
    for split, chosen in numbers.items():
        (other / f"{split}.jsonl").write_text("".join(rows[number] + "\n" for number in chosen), "utf-8")
    (other / "test.jsonl").write_text((data / "validation.jsonl").read_text("utf-8"), "utf-8")
    assert main(["export", str(finished.path), "--to", str(tmp_path / "pruned")]) == 0
    words = ["--tasks", str(other), "--evaluation.threads", "1", "--recover.steps", "3", "--recover.checks", "2"]
    capsys.readouterr()
    assert main(["recover", str(tmp_path / "pruned"), *words, "--to", str(tmp_path / "recovered"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    result = finished.read_result()
    assert result.finalists is not None
    best = result.finalists.finalists[0]
    assert (scores["pruned"]["fitness"], scores["recovered"]["fitness"]) == (best.pruned, best.recovered)
    with finished.open_journal() as journal:
        metrics = journal.outcome(MAIN, best.candidate, RECOVERED).metrics
    told = scores["recovered"]["metrics"]["syll/log_likelihood"]
    assert told == pytest.approx(metrics["syll/log_likelihood"], rel=1e-5)


def test_what_recovery_costs_is_taken_off_the_budget_and_told(
    finished: RunFolder, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finished.read_result()
    with finished.open_journal() as journal:
        assert len(journal.told(MAIN)) == 40 - COST and journal.recovery_cost == COST
    assert result.search.evaluations == 40 - COST and result.best.evaluations == 40
    assert result.finalists is not None and (result.finalists.evaluations, result.finalists.steps) == (COST, 3)
    assert main(["show", str(finished.path)]) == 0
    told = f"finalists recovered on the validation split (closed_form + logits, 3 steps; for {COST} evaluations): #"
    assert told in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["report", str(finished.path), "--to", str(page)]) == 0
    assert f"closed_form + logits, 3 steps; for {COST} evaluations" in page.read_text("utf-8")
    planned = plan(replace(config, folder=str(tmp_path / "other"))).search
    assert planned is not None and (planned.recovered_finalists, planned.recovery_evaluations) == (2, COST)
    with finished.open_journal() as journal:
        seen = sum(len(journal.outcomes(MAIN, split)) for split in ("validation", RECOVERED))
    assert planned.evaluations["validation"] == seen + 1  # and the full model


def test_plan_tells_the_share_of_the_budget_and_the_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["plan", "--tasks", "syll", "--search.num_kept", "2", "--folder", str(tmp_path / "run")]
    told = []
    for steps in ("0", "9"):
        assert main([*words, "--selection.recover_finalists", "3", "--selection.recover_steps", steps]) == 0
        (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("finalists")]
        told.append(line)
    assert told[0] == (
        "finalists   3 are recovered for 27 of these search evaluations; each takes 4.2 MiB beside the model and "
        "activations"
    )
    assert "each takes 4.2 MiB" not in told[1] and "for 37 of" in told[1]


@pytest.mark.parametrize(
    ("examples", "sample", "steps", "expected"),
    [
        ([300], None, 0, (840 + 3 * (240 * 8.5 + 60 * 5)) / 300),
        ([300], None, 9, (840 + 3 * (240 * 8.5 + 60 * 5 + 3 * 9 * 32 + 60 * 3)) / 300),
        ([5000, 5000], 50, 0, (2 * 400 + 320 + 3 * (320 * 8.5 + 80 * 5)) / 100),  # 400 prompts at most
    ],
)
def test_the_cost_is_examples_read_over_those_of_an_evaluation(examples, sample, steps, expected) -> None:
    fresh = {} if sample is None else {"examples": "fresh", "sample_size": sample}
    given = replace(
        CONFIG,
        evaluation=EvaluationConfig(**fresh),
        selection=SelectionConfig(recover_finalists=3, recover_steps=steps),
    )
    assert recovery_cost(given, examples, 4) == int(np.ceil(expected))
    assert recovery_cost(replace(given, selection=SelectionConfig()), examples, 4) == 0


def test_prompts_that_choose_the_weights_are_not_learned() -> None:
    for number in (2, 3, 40, 1000):
        learned, held_out = learned_and_held_out(number)
        assert learned and held_out and not set(learned) & set(held_out)
        assert len(learned) + len(held_out) == min(number, 400) and max(*learned, *held_out) < number


@pytest.mark.parametrize("looked_at", [2, 7])
def test_a_killed_run_goes_on_and_recovers_no_finalist_twice(
    looked_at: int, finished: RunFolder, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """looked_at: layers until it is killed, four of each finalist."""
    real, seen, marker = layer_repair.block_inputs, [0], tmp_path / "reached"

    def stopping(*words):
        seen[0] += 1
        if seen[0] == looked_at:
            marker.touch()
            time.sleep(600)
        return real(*words)

    def counting(*words):
        seen[0] += 1
        return real(*words)

    monkeypatch.setattr(layer_repair, "block_inputs", stopping)
    child = in_child(partial(run, config, tmp_path / "run"))
    while not marker.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert marker.exists() and (tmp_path / "run" / "finalists").is_dir()
    with Journal(tmp_path / "run" / "journal.sqlite", read_only=True) as journal:
        assert len(journal.outcomes(MAIN, RECOVERED)) == looked_at // 4
    seen[0] = 0
    monkeypatch.setattr(layer_repair, "block_inputs", counting)
    again = run(config, tmp_path / "run")
    assert seen[0] == 8 - (looked_at - 1)
    assert content(again.path) == content(finished.path)
    assert again.read_result().finalists == finished.read_result().finalists and not again.finalists.exists()


def judged_individuals(number: int) -> list[Judged]:
    genomes = [Genome.from_kept([[place, 7]] * 4, [8] * 4, [2] * 4) for place in range(number)]
    outcome = Evaluation(0.5, 0.0, 0.1, 10, 0.1)
    return [Judged(Individual(Candidate(n, one, "x"), outcome), 0.5) for n, one in enumerate(genomes)]


def chosen_of(folder: Path, outcomes: list[Evaluation | EvaluationFailure]) -> list[int]:
    """Which candidates are chosen, the best first, where recovery came to these outcomes; five are judged."""
    judged = judged_individuals(5)
    selection = SelectionConfig(recover_finalists=len(outcomes))
    with Journal(folder / "journal.sqlite") as journal:
        journal.propose(MAIN, [one.individual.candidate for one in judged])
        journal.record([(MAIN, number, RECOVERED, one) for number, one in enumerate(outcomes)])
        recovery = FinalistRecovery(
            replace(CONFIG, selection=selection), None, (), RunFolder(folder), journal, Trackers(), COST  # type: ignore[arg-type]
        )  # fmt: skip
        return [one.individual.number for one in recovery.chosen(judged)]


def test_recovered_scores_change_the_order_of_those_that_were_recovered_and_of_no_others(tmp_path: Path) -> None:
    scores = [Evaluation(one, 0.0, 0.1, 10, 0.1) for one in (0.4, 0.7, 0.6)]
    assert chosen_of(tmp_path, [*scores]) == [1, 2, 0, 3, 4]


def test_of_equal_recovered_scores_the_better_one_before_is_first_and_failures_are_last(tmp_path: Path) -> None:
    score, failed = Evaluation(0.4, 0.0, 0.1, 10, 0.1), EvaluationFailure("non_finite", "logits are not finite")
    assert chosen_of(tmp_path, [failed, score, score]) == [1, 2, 0, 3, 4]
    (tmp_path / "none").mkdir()
    with pytest.raises(RunError, match=r"no finalist has a score after recovery .*logits are not finite"):
        chosen_of(tmp_path / "none", [failed, failed])


def test_as_many_finalists_see_the_whole_split_as_are_recovered() -> None:
    ranked = [one.individual for one in judged_individuals(5)]
    assert [len(better_half(ranked, fewest)) for fewest in (1, 4, 9)] == [3, 4, 5]
    assert cost(20, [400], merges=False) == 13 and cost(20, [400], merges=False, fewest=8) == 16


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cluster.address", "local"], "got 2, expected it without cluster.address (local); or 0, and moe-evo rec"),
        (["--model.router", "eep"], "got 2, expected it with model.router exported (it is eep)"),
        (["--model.experts", "meo"], "got 2, expected it with model.experts own (it is meo)"),
        (["--model.top_p", "0.9"], "got 2, expected it without model.top_p (0.9)"),
        (["--model.dynamic_skipping", "0.5"], "got 2, expected it without model.dynamic_skipping (0.5)"),
        (["--model.alignment", "a.safetensors"], "got 2, expected it without model.alignment"),
        (["--model.sharding", "device_map"], "got 2, expected it with model.sharding single (it is device_map)"),
        (["--search.num_kept", "[2, 3, 3, 3]"], "got 2, expected it with one search.num_kept for all layers"),
        (
            ["--search.algorithm", "surrogate", "--search.objectives", "[quality, active]"],
            "got 2, expected it with search.objectives ['quality']",
        ),
        (["--selection.soup", "true"], "selection.soup: got True, expected false, as selection.recover_finalists"),
        (["--selection.finalists", "1"], "recover_finalists: got 2, expected 0 to selection.finalists (1)"),
        (["--selection.recover_steps", "-1"], "selection.recover_steps: got -1, expected 0 or more"),
        (
            ["--selection.recover_finalists", "0", "--selection.recover_steps", "3"],
            "selection.recover_steps: got 3, expected 0, as selection.recover_finalists is 0",
        ),
        (
            ["--search.evaluations", "19"],
            "recover_finalists: got 2, whose recovery counts as 19 of 19 evaluations; raise search.evaluations, rec",
        ),
    ],
)
def test_what_cannot_be_recovered_is_refused_before_anything_starts(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--tasks", "[{data: syll, num_search: 300, num_validation: 24, num_test: 16}]"]
    given = ["search", *task, "--selection.recover_finalists", "2", *words, "--folder", str(tmp_path / "run")]
    assert main(given) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert expected in err[-1] and not (tmp_path / "run").exists()


def test_a_sweep_on_shared_gangs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "--tasks", "syll", "--selection.recover_finalists", "2", "--folder", str(tmp_path / "sweep")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert (
        "selection.recover_finalists: got 2, expected 0, as runs share gangs on a cluster; or it with --no-tune" in told
    )
    assert not (tmp_path / "sweep").exists()
