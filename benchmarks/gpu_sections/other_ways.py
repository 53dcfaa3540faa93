"""The same genomes on the same examples in other ways: lm-evaluation-harness' manner, and the published loop's.

Neither package is needed: what they do is written down here, for a GPU, with what suits them best.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from baselines import Question, questions

from gpu_sections.bench import Bench
from gpu_sections.made_models import choice_task, empty_model, made_up_data, merging_family, pruning_family
from gpu_sections.record import Record, free_memory
from gpu_sections.timing import seconds_of, timed
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.view import MoEModel
from moe_evo.tasks.data import TaskData

BATCH_SIZES = (32, 128)  # rows
NUM_GENOMES = {"pruning": 12, "merging": 6}
SAMPLE = 2  # genomes of each phase that the other ways score

Correct = npt.NDArray[np.float64]
"""(N,) 1 for an example whose most probable choice is the right one, else 0."""


def baselines(bench: Bench, record: Record) -> None:
    """Both models: a pruning and its children, then children that merge, one by one as a search asks for them."""
    (folder := bench.folder / "baselines").mkdir()
    data = made_up_data(folder, 12 if bench.is_small else 192, words=6 if bench.is_small else 20)
    for number, name in enumerate(bench.names):
        record.may_use((number + 1) / len(bench.names))
        _of_model(bench, record, name, data)


def _of_model(bench: Bench, record: Record, name: str, data: TaskData) -> None:
    model = bench.models.get(name)
    families = {"pruning": pruning_family, "merging": merging_family}
    genomes = {phase: make(model, 3 if bench.is_small else NUM_GENOMES[phase]) for phase, make in families.items()}
    scores: dict[Genome, Correct] = {}
    record.attempt(f"{name}, pruning, moe_evo", partial(_ours, bench, model, data, genomes["pruning"], scores))
    full = FullForwards(model.language_model, list(questions(data, model.tokenizer)), bench.device)
    harness = partial(_applied, model, full)
    point = f"{name}, pruning, full forwards"
    record.attempt(point, partial(_sampled, bench, full, harness, genomes["pruning"], scores, tunes=True))
    record.attempt(f"{name}, merging, moe_evo", partial(_ours, bench, model, data, genomes["merging"], scores))
    point = f"{name}, merging, full forwards"
    record.attempt(point, partial(_sampled, bench, full, harness, genomes["merging"], scores))
    record.attempt(f"{name}, rebuilt weights", partial(_rebuilt, bench, model, full, genomes["pruning"], scores))


def _ours(
    bench: Bench, model: MoEModel, data: TaskData, genomes: Sequence[Genome], scores: dict[Genome, Correct]
) -> dict[str, Any]:
    """An evaluator as a search has it; what it makes once a run (tokens, batches) is made before."""
    config = EvaluationConfig()
    evaluator = Evaluator(model, [choice_task(data, model, config.batch_tokens)], config)
    evaluator.evaluate([None], "search")
    spent = []
    for genome in genomes:
        seconds, (outcome,) = timed(partial(evaluator.evaluate, [genome], "search"), bench.device)
        spent.append(seconds)
        assert isinstance(outcome, Evaluation), outcome
        assert outcome.scores is not None
        (scores[genome],) = outcome.scores.values()
    shares_layers = evaluator.shares_layers
    del evaluator  # the other ways need room, too
    model.merged_cache.clear()
    free_memory()
    return {
        "evaluations_per_s": len(spent) / sum(spent),
        "ms": float(np.mean(spent)) * 1e3,
        "ms_of_the_first": spent[0] * 1e3,
        "evaluations": len(spent),
        "shares_layers": shares_layers,
    }


def _sampled(
    bench: Bench,
    full: FullForwards,
    correct: Callable[[Genome], Correct],
    genomes: Sequence[Genome],
    scores: dict[Genome, Correct],
    *,
    tunes: bool = False,
) -> dict[str, Any]:
    """Some of the genomes in another way. same_scores: share of examples that moe_evo scored alike."""
    if tunes:
        full.tune(lambda: correct(genomes[0]))
    chosen = genomes[-SAMPLE:]
    spent, same = [], []
    for genome in chosen:
        seconds, found = timed(partial(correct, genome), bench.device)
        spent.append(seconds)
        if genome in scores:
            same.append(float((found == scores[genome]).mean()))
    return {
        "evaluations_per_s": 1 / float(np.median(spent)),
        "ms": float(np.median(spent)) * 1e3,
        "evaluations": len(spent),
        "batch_size": full.batch_size,
        "same_scores": min(same) if same else None,
    }


def _applied(model: MoEModel, full: FullForwards, genome: Genome) -> Correct:
    with model.applied(genome):
        return full.correct()


def _rebuilt(
    bench: Bench, model: MoEModel, full: FullForwards, genomes: Sequence[Genome], scores: dict[Genome, Correct]
) -> dict[str, Any]:
    """As `_sampled`; what is merged takes as long as what is pruned, so that one family of genomes is enough."""
    rebuilt = RebuiltWeights(model, full, genomes[0])
    return _sampled(bench, full, rebuilt.correct, genomes, scores)


class FullForwards:
    """Every choice a row of its own, longest first, padded on the right, with all its logits and their softmax.

    So does lm-evaluation-harness with a causal model. language_model: what computes; it may be exchanged.
    """

    def __init__(self, language_model: Any, asked: Sequence[Question], device: torch.device) -> None:
        self.language_model = language_model
        self.batch_size = BATCH_SIZES[0]
        self._asked = asked
        self._device = device
        self._rows = [row for choices, _ in asked for row in choices]

    def tune(self, run: Callable[[], object]) -> None:
        """Take the batch size with which `run` is fastest, and which fits in memory."""
        spent: dict[int, float] = {}
        for self.batch_size in BATCH_SIZES:
            try:
                run()
                spent[self.batch_size] = seconds_of(run, self._device)
            except torch.OutOfMemoryError:
                break
        self.batch_size = min(spent, key=lambda size: spent[size])

    @torch.inference_mode()
    def correct(self) -> Correct:
        """Whether each example's most probable choice is the right one."""
        order = sorted(range(len(self._rows)), key=lambda number: -len(self._rows[number][0]))
        likelihood = np.zeros(len(order))
        for first in range(0, len(order), self.batch_size):
            numbers = order[first : first + self.batch_size]
            likelihood[numbers] = self._likelihoods([self._rows[number] for number in numbers])
        found, place = [], 0
        for choices, label in self._asked:
            found.append(float(likelihood[place : place + len(choices)].argmax() == label))
            place += len(choices)
        return np.array(found)

    def _likelihoods(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        width = max(len(tokens) for tokens, _ in rows)
        padded = [tokens + [0] * (width - len(tokens)) for tokens, _ in rows]
        input_ids = torch.tensor(padded, device=self._device)
        logits = self.language_model(input_ids=input_ids, use_cache=False).logits
        log_probs = logits.log_softmax(-1, dtype=torch.float32)
        sums = []
        for row, (tokens, start) in enumerate(rows):
            answer = torch.tensor(tokens[start:], device=self._device)
            sums.append(log_probs[row, start - 1 : len(tokens) - 1].gather(1, answer[:, None]).sum())
        return torch.stack(sums).tolist()


class RebuiltWeights:
    """A stock model with K experts whose weights are computed anew for every genome, expert by expert.

    So does the released search of EEP, from a copy on the host; here all of it is on the device, and the experts
    run as transformers runs them best.
    """

    def __init__(self, model: MoEModel, full: FullForwards, genome: Genome) -> None:
        config = copy.deepcopy(model.language_model.config)
        setattr(config, model.family.experts_field, genome.num_kept[0])
        setattr(config, model.family.top_k_field, genome.top_k[0])
        self._model = model
        self._full = full
        self._small = empty_model(config, model.device, model.dtype)
        with torch.inference_mode():
            large = model.language_model.state_dict()
            for name, tensor in self._small.state_dict().items():
                if tensor.shape == large[name].shape:
                    tensor.copy_(large[name])

    def correct(self, genome: Genome) -> Correct:
        """As `FullForwards.correct`, of the rebuilt model."""
        self._rebuild(genome)
        self._full.language_model, previous = self._small, self._full.language_model
        try:
            return self._full.correct()
        finally:
            self._full.language_model = previous

    @torch.inference_mode()
    def _rebuild(self, genome: Genome) -> None:
        family, large = self._model.family, self._model.language_model.state_dict()
        small = self._small.state_dict()
        for position, gene in zip(self._model.shape.decoder_layers, genome.layers, strict=True):
            block = f"model.layers.{position}.{family.block}"
            for matrix, tensors, part in (
                (gene.expert_merging, family.expert_tensors, "experts"),
                (gene.router_mapping, family.router_tensors, family.router),
            ):
                for tensor in tensors:
                    stacked = large[f"{block}.{part}.{tensor}"]
                    for slot, row in enumerate(matrix.tolist()):
                        mixed = sum(weight * one for weight, one in zip(row, stacked, strict=True))
                        small[f"{block}.{part}.{tensor}"][slot].copy_(mixed)
