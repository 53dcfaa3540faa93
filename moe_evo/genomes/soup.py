"""Soups: the average of several good individuals of a run that share a pruning pattern.

Merged experts and router rows are linear in a genome's matrices, so the mean of the matrices is the mean of
the models' weights (Model soups, arXiv 2203.05482; Sparse Model Soups, arXiv 2306.16788).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Evaluation, Individual, Population


def greedy_soup(validated: Population, score: Callable[[Genome], Individual]) -> tuple[Individual, int]:
    """Average the best individual with one more at a time, for as long as the validation score gets better.

    validated: with their outcomes on the validation split. score: evaluates a genome there. Returns the
    soup and the number of individuals in it: 1, and the best itself, where no average was better.
    """
    best = validated.best
    ingredients = [best.genome]
    for one in alike(validated):
        tasted = score(averaged([*ingredients, one.genome]))
        if isinstance(tasted.outcome, Evaluation) and tasted.outcome.rank_key > best.evaluation.rank_key:
            best = tasted
            ingredients.append(one.genome)
    return best, len(ingredients)


def alike(validated: Population) -> list[Individual]:
    """The individuals that can be averaged with the best: all others of its pruning pattern, best first."""
    best = validated.best.genome
    others = validated.ranked[1:]
    return [one for one in others if (one.genome.kept, one.genome.top_k) == (best.kept, best.top_k)]


def averaged(genomes: Sequence[Genome]) -> Genome:
    """The mean of each matrix; genomes keep as many experts and have the same top_k."""
    layers = zip(*(genome.layers for genome in genomes), strict=True)
    return Genome(tuple(_averaged(some) for some in layers))


def _averaged(layers: Sequence[LayerGenome]) -> LayerGenome:
    merging = np.stack([layer.expert_merging for layer in layers]).mean(axis=0)
    mapping = np.stack([layer.router_mapping for layer in layers]).mean(axis=0)
    return LayerGenome(merging, mapping, layers[0].top_k)
