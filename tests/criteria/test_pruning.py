"""Prunings that go layer after layer, and those whose layers keep as many experts as they deserve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_tasks as tiny
from asking import observer_of
from tiny_models import tiny_model

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.criteria.pruning import pruning_by, pruning_globally, pruning_progressively
from moe_evo.criteria.questions import Routed
from moe_evo.criteria.registry import CRITERIA
from moe_evo.errors import ConfigError, ModelError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.models.view import MoEModel

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
ROWS = [
    {"prompt": " ".join(WORDS[n % 4 : n % 4 + 1 + (3 * n) % 7]), "choices": [" yes", " no no"], "label": 0}
    for n in range(12)
]
SHAPE = ModelShape("mixtral", num_experts=(4, 4), top_k=(1, 1), decoder_layers=(0, 1))
GROUPED = ModelShape("deepseek_v3", (8,), (2,), (1,), num_expert_groups=2, min_kept_per_group=2)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("name", ["reap", "easy_ep", "mone", "leave_one_out"])
def test_a_progressive_pruning_is_a_loop_that_prunes_what_it_has_scored(tmp_path, family, name):
    moe = MoEModel(tiny_model(family, vocab_size=350), tiny.tiny_tokenizer(bos=True))
    evaluator = Evaluator(moe, [tiny.make_task(tmp_path, ROWS, moe.tokenizer)], EvaluationConfig())
    space = SearchSpace.build(moe.shape, num_kept=4)
    criterion = CRITERIA[name]
    kept = [tuple(range(8))] * moe.shape.num_layers
    for layer in range(moe.shape.num_layers):
        with moe.applied(Genome.from_kept(kept, 8, 2)):
            (found,) = observer_of(evaluator).about(replace(criterion.question, layer=layer)).layers
        scores = [criterion.formula(found)] * moe.shape.num_layers
        kept[layer] = pruning_by(scores, space).kept[layer]
    genome = criterion.progressive_genome(observer_of(evaluator), space)
    assert genome.kept == tuple(kept)
    assert genome.kept[0] == criterion.genome(observer_of(evaluator), space).kept[0]


def test_weights_are_scored_once_however_layers_are_pruned(tmp_path):
    moe = MoEModel(tiny_model("mixtral", vocab_size=350), tiny.tiny_tokenizer(bos=True))
    observer = observer_of(Evaluator(moe, [tiny.make_task(tmp_path, ROWS, moe.tokenizer)], EvaluationConfig()))
    space = SearchSpace.build(moe.shape, num_kept=4)
    aimer = CRITERIA["aimer"]
    assert aimer.progressive_genome(observer, space) == aimer.genome(observer, space)


def test_scores_are_asked_for_behind_the_layers_pruned_so_far_and_shared_genes_together():
    space = SearchSpace.build(ModelShape("mixtral", (4,) * 4, (1,) * 4, (0, 1, 2, 3)), num_kept=2, num_layer_groups=2)
    asked: list[tuple[tuple[int, ...], int]] = []

    def scores(pruned, layer):
        asked.append((pruned.num_kept, layer))
        return np.array([[0.0, 5.0, 1.0, 2.0], [4.0, 0.0, 0.0, 1.0]])[layer % 2]

    assert pruning_progressively(scores, space).kept == ((0, 1),) * 4
    assert asked == [((4, 4, 4, 4), 0), ((4, 4, 4, 4), 1), ((2, 2, 4, 4), 2), ((2, 2, 4, 4), 3)]


def test_a_global_pruning_keeps_the_largest_shares_of_all_layers():
    space = SearchSpace.build(SHAPE, num_kept=2)
    # as shares: 0.4 0.3 0.2 0.1 and 0.97 0.01 0.01 0.01, however large the scores are
    scores = [np.array([400.0, 300.0, 200.0, 100.0]), np.array([0.97, 0.01, 0.01, 0.01])]
    assert pruning_globally(scores, space).kept == ((0, 1, 2), (0,))


def test_a_global_pruning_counts_negative_scores_by_their_size():
    space = SearchSpace.build(SHAPE, num_kept=2)
    # shares -0.1 -0.2 -0.3 -0.4 and -0.25 four times: the best two of each are -0.1 -0.2, -0.25 -0.25
    scores = [np.array([-1.0, -2.0, -3.0, -4.0]), np.full(4, -8.0)]
    assert pruning_globally(scores, space).kept == ((0, 1), (0, 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_global_pruning_keeps_the_total_and_at_least_top_k_a_layer(seed):
    rng = np.random.default_rng(seed)
    shape = ModelShape("mixtral", (8,) * 6, (2,) * 6, tuple(range(6)))
    space = SearchSpace.build(shape, num_kept=int(rng.integers(2, 9)))
    scores = [rng.exponential(size=8) * 10 ** rng.uniform(-3, 3) for _ in range(6)]
    genome = pruning_globally(scores, space)
    assert sum(genome.num_kept) == sum(space.num_kept) and min(genome.num_kept) >= 2
    for kept, one in zip(genome.kept, scores, strict=True):  # the best of each layer
        assert set(kept) == set(np.argsort(-one)[: len(kept)].tolist())


def test_layers_without_any_score_keep_the_fewest():
    genome = pruning_globally([np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0])], SearchSpace.build(SHAPE, num_kept=2))
    assert genome.kept == ((0,), (1, 2, 3))


def test_a_global_pruning_refuses_groups_of_experts_in_one_line():
    space = SearchSpace.build(GROUPED, num_kept=4)
    with pytest.raises(
        ConfigError, match=r"^--allocation: got 'global', but deepseek_v3 chooses groups[^\n]*'uniform'$"
    ):
        pruning_globally([np.arange(8.0)], space)


def test_a_global_pruning_refuses_scores_that_are_no_numbers():
    with pytest.raises(ModelError, match="MoE layer 1: expert 0 scores inf"):
        pruning_globally([np.ones(4), np.array([np.inf, 0, 0, 0])], SearchSpace.build(SHAPE, num_kept=2))


def test_a_criterion_allocates_globally_by_its_own_scores(tmp_path):
    moe = MoEModel(tiny_model("mixtral", vocab_size=350), tiny.tiny_tokenizer(bos=True))
    observer = observer_of(Evaluator(moe, [tiny.make_task(tmp_path, ROWS, moe.tokenizer)], EvaluationConfig()))
    space = SearchSpace.build(moe.shape, num_kept=4)
    genome = CRITERIA["frequency"].global_genome(observer, space)
    tokens = [layer.tokens for layer in observer.about(Routed()).layers]  # layers have equally many: shares compare
    order = np.argsort(-np.concatenate(tokens), kind="stable")[:12]
    assert sum(genome.num_kept) == 12
    least = np.concatenate(tokens)[order[-1]]
    kept = [counts[list(some)].min() for counts, some in zip(tokens, genome.kept, strict=True)]
    dropped = [np.delete(counts, some).max() for counts, some in zip(tokens, genome.kept, strict=True)]
    assert min(kept) >= least >= max(dropped)
