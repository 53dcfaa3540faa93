"""Merges by loops over tokens, experts and pairs in float64; nothing of `moe_evo` computes here.

What a token is routed to and what an expert answers comes from `brute_force`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import brute_force
import numpy as np

Groups = list[tuple[int, list[int]]]
"""Each dominant expert and all members."""


def tokens_of(language_model: Any, sequences: Iterable[list[int]]) -> list[list[np.ndarray]]:
    """For each MoE layer the hidden states (H,) that enter its experts."""
    entered: list[list[np.ndarray]] = []
    for sequence in sequences:
        for layer, hidden in enumerate(brute_force.inputs_of(language_model, sequence)):
            if len(entered) <= layer:
                entered.append([])
            entered[layer].extend(hidden)
    return entered


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    product = math.fsum(a * b for a, b in zip(first, second, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in first) * math.fsum(b * b for b in second))


def known(language_model: Any, sequences: list[list[int]]) -> list[dict[str, Any]]:
    """For each MoE layer usage, REAP scores, cosines of logits, mean cosines of answers, and mean answers."""
    found = []
    blocks = [block for block in map(brute_force.block_of, language_model.model.layers) if block is not None]
    sums = brute_force.observe(language_model, sequences)
    for (router, experts), tokens, seen in zip(blocks, tokens_of(language_model, sequences), sums, strict=True):
        number = len(router.weight)
        logits = np.array([brute_force.logits_of(router, token) for token in tokens])
        config = language_model.config
        answers = [[brute_force.answer(config, experts, j, token) for j in range(number)] for token in tokens]
        gate = np.ones((number, number))
        output = np.ones((number, number))
        for i, j in itertools.combinations(range(number), 2):
            gate[i, j] = gate[j, i] = cosine(logits[:, i], logits[:, j])
            mean = math.fsum(cosine(each[i], each[j]) for each in answers) / len(tokens)
            output[i, j] = output[j, i] = mean
        found.append(
            {
                "usage": seen["tokens"],
                "reap": np.array(
                    [s / n if n else 0.0 for s, n in zip(seen["gated_norms"], seen["tokens"], strict=True)]
                ),
                "gate": gate,
                "output": output,
                "mean": np.array([sum(each[j] for each in answers) / len(tokens) for j in range(number)]),
                "tokens": len(tokens),
            }
        )
    return found


def around_dominants(number: int, votes: np.ndarray, alike: np.ndarray) -> Groups:
    dominants = brute_force.best(votes, number, range(len(votes)))
    groups = {dominant: [dominant] for dominant in dominants}
    for expert in range(len(votes)):
        if expert not in groups:
            groups[max(dominants, key=lambda one: alike[expert, one])].append(expert)
    return sorted((dominant, sorted(members)) for dominant, members in groups.items())


def agglomeration(number: int, votes: np.ndarray, features: np.ndarray) -> Groups:
    """Merge the two clusters with the least mean distance between their members, until `number` are left."""
    clusters = [[expert] for expert in range(len(features))]

    def distance(pair: tuple[int, int]) -> float:
        first, second = (clusters[place] for place in pair)
        return sum(math.dist(features[i], features[j]) for i in first for j in second) / (len(first) * len(second))

    while len(clusters) > number:
        i, j = min(itertools.combinations(range(len(clusters)), 2), key=distance)
        clusters[i] += clusters.pop(j)
    return led(clusters, votes)


def ream(number: int, votes: np.ndarray, alike: np.ndarray) -> Groups:
    """Centroids take in turn, the best first, at most so many that the group is an eighth, or that all find room."""
    size = max(math.ceil(len(votes) / 8), math.ceil(len(votes) / number))
    centroids = brute_force.best(votes, number, range(len(votes)))
    free = [expert for expert in range(len(votes)) if expert not in centroids]
    groups = []
    for centroid in centroids:
        taken = sorted(free, key=lambda one: -alike[centroid, one])[: size - 1]
        free = [expert for expert in free if expert not in taken]
        groups.append((centroid, sorted([centroid, *taken])))
    assert not free
    return sorted(groups)


def spectral(number: int, votes: np.ndarray, alike: np.ndarray) -> Groups:
    """The partition with the least k-means cost of all there are, on Ng, Jordan and Weiss's embedding."""
    degrees = alike.sum(axis=1)
    values, vectors = np.linalg.eigh(alike / np.sqrt(np.outer(degrees, degrees)))
    points = vectors[:, np.argsort(-values)[:number]]
    points = np.array([row / math.sqrt(sum(row**2)) for row in points])

    def cost(clusters: list[list[int]]) -> float:
        return sum(float(((points[cluster] - points[cluster].mean(axis=0)) ** 2).sum()) for cluster in clusters)

    return led(min(partitions(len(points), number), key=cost), votes)


def partitions(number: int, parts: int) -> Iterator[list[list[int]]]:
    """All ways to divide 0..number-1 into `parts` clusters."""

    def extended(clusters: list[list[int]], expert: int) -> Iterator[list[list[int]]]:
        if expert == number:
            if len(clusters) == parts:
                yield [list(cluster) for cluster in clusters]
            return
        for cluster in clusters:
            cluster.append(expert)
            yield from extended(clusters, expert + 1)
            cluster.pop()
        if len(clusters) < parts:
            yield from extended([*clusters, [expert]], expert + 1)

    yield from extended([], 0)


def led(clusters: list[list[int]], votes: np.ndarray) -> Groups:
    return sorted((max(cluster, key=lambda one: (votes[one], -one)), sorted(cluster)) for cluster in clusters)


def of_parts(layer: dict[str, Any], num_parts: int, make: Callable[[dict[str, Any]], Groups]) -> Groups:
    """Groups of each group of a group-limited router by itself."""
    size = len(layer["usage"]) // num_parts
    found = []
    for first in range(0, len(layer["usage"]), size):
        part = slice(first, first + size)
        own = {name: layer[name][part] for name in ("usage", "reap", "mean")}
        own |= {name: layer[name][part, part] for name in ("gate", "output")}
        found += [(first + dominant, [first + member for member in members]) for dominant, members in make(own)]
    return found


GROUPS: dict[str, Callable[[int, dict[str, Any]], Groups]] = {
    "m_smoe": lambda number, layer: around_dominants(number, layer["usage"], layer["gate"]),
    "average": lambda number, layer: around_dominants(number, layer["usage"], layer["gate"]),
    "hc_smoe": lambda number, layer: agglomeration(number, layer["usage"], layer["mean"]),
    "ream": lambda number, layer: ream(number, layer["reap"], layer["gate"] + layer["output"]),
    "uncurl": lambda number, layer: spectral(number, layer["usage"], (layer["gate"] + 1) / 2),
}
WEIGHTS: dict[str, Callable[[dict[str, Any], int], float]] = {
    "m_smoe": lambda layer, expert: layer["usage"][expert],
    "hc_smoe": lambda layer, expert: layer["usage"][expert],
    "uncurl": lambda layer, expert: layer["usage"][expert],
    "ream": lambda layer, expert: layer["reap"][expert],
    "average": lambda layer, expert: 1.0,
}


def merged_expert(stacked: np.ndarray, weights: Sequence[float], dominant: int, members: Sequence[int]) -> np.ndarray:
    """sum_j w_j theta_j / sum_j w_j over the members, one after the other; the dominant one where all w_j are 0."""
    if sum(weights[expert] for expert in members) == 0:
        return np.asarray(stacked[dominant])
    total = 0.0
    for expert in members:
        total = total + weights[expert] * stacked[expert].astype(np.float64)
    return np.asarray(total) / sum(weights[expert] for expert in members)
