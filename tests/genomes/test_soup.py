"""Soups: what is averaged, what is kept, and a run that ends with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import logits, random_merge, tiny_model, tokens
from transformers import AutoModelForCausalLM

from moe_evo.cli.main import main
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual, Population
from moe_evo.genomes.soup import averaged, greedy_soup
from moe_evo.models.merging import mix_rows
from moe_evo.models.view import MoEModel

KEPT = np.eye(4, dtype=np.float32)[[0, 2]]


def merged(*values: float) -> Genome:
    """Experts 0 and 2 of four, with `values` of expert 1 in the first slot of each layer."""
    layers = []
    for value in values:
        matrix = KEPT.copy()
        matrix[0, 1] = value
        layers.append(LayerGenome(matrix, matrix.copy(), 1))
    return Genome(tuple(layers))


def validated(*genomes: Genome, fitness: list[float]) -> Population:
    individuals = [
        Individual(Candidate(number, genome, "gaussian_mutation"), Evaluation(score, num_examples=8, scores={}))
        for number, (genome, score) in enumerate(zip(genomes, fitness, strict=True))
    ]
    return Population().with_outcomes(individuals)


def scoring(target: float):
    """Fitness is highest where the first layer's value is `target`; tells what was asked."""
    asked: list[float] = []

    def score(genome: Genome) -> Individual:
        value = float(genome.layers[0].expert_merging[0, 1])
        asked.append(round(value, 4))
        outcome = Evaluation(1 - abs(value - target), num_examples=8, scores={})
        return Individual(Candidate(99, genome, "soup"), outcome)

    return score, asked


def test_a_soup_grows_for_as_long_as_it_gets_better() -> None:
    score, asked = scoring(0.2)
    population = validated(merged(0.1), merged(0.3), merged(0.5), fitness=[0.9, 0.89, 0.7])
    soup, number = greedy_soup(population, score)
    assert asked == [0.2, 0.3], "the mean of two, then of three"
    assert number == 2 and soup.genome == merged(np.float32(0.2))


def test_what_does_not_help_is_left_out_and_the_next_is_tried() -> None:
    score, asked = scoring(0.0)
    soup, number = greedy_soup(validated(merged(0.1), merged(0.3), merged(-0.1), fitness=[0.9, 0.8, 0.7]), score)
    assert asked == [0.2, 0.0] and number == 2
    assert float(soup.genome.layers[0].expert_merging[0, 1]) == 0.0


def test_without_a_better_average_the_best_stays_as_it_is() -> None:
    population = validated(merged(0.1), merged(0.3), fitness=[0.99, 0.8])
    soup, number = greedy_soup(population, scoring(0.1)[0])
    assert (soup, number) == (population.best, 1)


def test_an_average_in_which_another_expert_dominates_still_takes_individuals_of_the_first_pattern() -> None:
    def signed(first: float, other: float) -> Genome:
        matrix = KEPT.copy()
        matrix[0, :2] = first, other
        return Genome((LayerGenome(matrix, KEPT.copy(), 1),))

    genomes = [signed(1.0, 0.5), signed(-0.9, 0.5), signed(0.8, 0.5)]
    assert len({one.kept for one in genomes}) == 1 and averaged(genomes[:2]).kept != genomes[0].kept
    score = scoring(0.5)[0]
    assert greedy_soup(validated(*genomes, fitness=[0.9, 0.8, 0.7]), score)[1] == 2, "the third is as good, not better"
    asked: list[Genome] = []

    def noting(genome: Genome) -> Individual:
        asked.append(genome)
        return score(genome)

    greedy_soup(validated(*genomes, fitness=[0.9, 0.8, 0.7]), noting)
    assert len(asked) == 2


def test_only_individuals_of_one_pruning_pattern_are_averaged() -> None:
    other = Genome((LayerGenome(np.eye(4, dtype=np.float32)[[0, 3]] + 0.1, np.eye(4, dtype=np.float32)[[0, 3]], 1),))
    score, asked = scoring(0.2)
    assert greedy_soup(validated(merged(0.1), other, fitness=[0.9, 0.8]), score)[1] == 1 and not asked


def test_an_average_that_cannot_be_scored_is_left_out() -> None:
    def score(genome: Genome) -> Individual:
        return Individual(Candidate(9, genome, "soup"), EvaluationFailure("non_finite", "logits"))

    population = validated(merged(0.1), merged(0.3), fitness=[0.9, 0.8])
    assert greedy_soup(population, score) == (population.best, 1)


def test_the_average_of_genomes_is_the_average_of_their_models_weights() -> None:
    moe = MoEModel(tiny_model("mixtral"))
    genomes = [random_merge(moe.shape, 4, seed=seed) for seed in range(3)]
    soup = averaged(genomes)
    for number, layer in enumerate(moe.layers):
        for stacked in layer.expert_tensors().values():
            of_each = [mix_rows(genome.layers[number].expert_merging, stacked) for genome in genomes]
            of_soup = mix_rows(soup.layers[number].expert_merging, stacked)
            torch.testing.assert_close(of_soup, torch.stack(of_each).mean(dim=0), rtol=1e-5, atol=1e-6)


def test_a_run_may_end_with_a_soup_that_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "search", "--folder", str(tmp_path / "run"), "--model.self_check", "false", "--selection.soup", "true",
        "--tasks", "[{data: arith, num_search: 30, num_validation: 20, num_test: 10, metric: log_likelihood}]",
        "--search.algorithm", "eep",
        "--search.evaluations", "60", "--search.eep.num_pruning", "12", "--search.eep.num_initial", "6",
        "--selection.baselines", "[]",
    ]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = {row["key"]: row for row in result["rows"]}
    assert list(rows) == ["full", "soup", "best_pruning", "best"], "a log-likelihood leaves room for a better average"
    soup, best = rows["soup"], rows["best"]
    assert soup["title"].startswith("soup of ")
    assert soup["scores"]["validation"]["fitness"] > best["scores"]["validation"]["fitness"]
    assert set(result["winners_curse"]) == {"search_validation", "validation_test", "search_test"}
    lost = result["winners_curse"]["search_test"]
    lead = {
        split: best["scores"][split]["fitness"] - rows["full"]["scores"][split]["fitness"] for split in best["scores"]
    }
    assert lost["value"] == pytest.approx(lead["search"] - lead["test"], abs=1e-9)
    assert f"exported is {best['title']}, the last row; with --which soup it is the {soup['title']}\n" in printed
    assert main(["export", str(tmp_path / "run"), "--which", "soup", "--to", str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out.startswith(f"exported    {soup['title']} (soup of the run)\n")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.isfinite(logits(small, tokens())).all()
    again = (tmp_path / "run" / "result.json").read_bytes()
    (tmp_path / "run" / "result.json").unlink()
    assert main(["search", "--resume", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(again), "resumed: nothing is new"
    assert "luck     winner minus full model " in capsys.readouterr().out


def test_a_run_without_a_soup_says_what_can_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", "--folder", str(tmp_path / "run"), "--model.self_check", "false", "--search.evaluations", "4"]
    tasks = ["--tasks", "[{data: syll, num_search: 4, num_validation: 4, num_test: 4}]"]
    assert main([*words, *tasks, "--selection.baselines", "[]"]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--which", "soup", "--to", str(tmp_path / "small")]) == 2
    assert "--which: got 'soup', expected one of best" in capsys.readouterr().err
