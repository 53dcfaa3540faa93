"""What the full model has to teach: the answers that it writes, what it expects after each token, its layers' outputs.

It is written to files, from which smaller models learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.config.recover import RecoverConfig
from moe_evo.recovery.prompts import Prompt
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.recovery.lessons import Reading


def teach(
    evaluator: Evaluator, prompts: Sequence[Prompt], folder: Path, name: str, recover: RecoverConfig, tracker: Tracker
) -> None:
    """Let the full model write answers to prompts, then read everything once more for its distributions.

    What it expects is kept as lessons of this name in `folder`.
    """
    from moe_evo.recovery.lessons import write_lessons

    model = evaluator.model
    readings = _readings(evaluator, prompts, name, recover.answer_tokens, tracker)

    def write() -> None:
        tracker.stage(f"reading {name} prompts", len(readings), unit="prompt")
        write_lessons(
            folder, name, readings, model.language_model, model.device,
            top_k=recover.top_k, batch_tokens=evaluator.batch_tokens, done=tracker.advanced,
        )  # fmt: skip

    evaluator.within_memory(write)


def keep_blocks(evaluator: Evaluator, folder: Path, name: str, most_tokens: int, tracker: Tracker) -> None:
    """Keep what the full model's layers put out, at about so many of the tokens of its lessons of this name."""
    from moe_evo.recovery.blocks import write_blocks
    from moe_evo.recovery.lessons import read_lessons

    tracker.message(f"keeping the outputs of {len(evaluator.model.layers)} MoE layers")
    lessons = read_lessons(folder, name)

    def write() -> None:
        write_blocks(folder, lessons, evaluator.model, most_tokens=most_tokens, batch_tokens=evaluator.batch_tokens)

    evaluator.within_memory(write)


def _readings(
    evaluator: Evaluator, prompts: Sequence[Prompt], name: str, answer_tokens: int, tracker: Tracker
) -> list[Reading]:
    """What is read for each prompt: with its right answer, or with the one that the model writes."""
    from moe_evo.recovery.lessons import Reading

    asked = {number: one for number, one in enumerate(prompts) if one.lacks_answer and answer_tokens}
    written: dict[int, tuple[int, ...]] = {}
    if asked:
        tracker.stage(f"answering {name} prompts", len(asked), unit="prompt")
        for stop in dict.fromkeys(one.stop for one in asked.values()):
            chosen = {number: one.tokens for number, one in asked.items() if one.stop == stop}
            answer = partial(_written, evaluator, chosen, answer_tokens, stop, tracker.advanced)
            written |= evaluator.within_memory(answer)
    readings = []
    for number, one in enumerate(prompts):
        answer_of = one.answer or written.get(number, ())
        start = 0 if one.is_text else len(one.tokens) - 1
        readings.append(Reading(one.tokens + answer_of[:-1], start, one.answer))
    return readings


def _written(
    evaluator: Evaluator, prompts: dict[int, tuple[int, ...]], most: int, stop: str, done: Callable[[int], None]
) -> dict[int, tuple[int, ...]]:
    """The answers that the model writes, by the number of the prompt."""
    from moe_evo.evaluation.engine.generate import generate_greedily
    from moe_evo.tasks.batches import generate_batches
    from moe_evo.tasks.rows import BatchLimits, Row

    model = evaluator.model
    rows = [Row(number, tokens, len(tokens) - 1) for number, tokens in prompts.items()]
    limits = BatchLimits(evaluator.batch_tokens, len(model.tokenizer))
    found = {}
    for batch in generate_batches(rows, limits, most, stop):
        generated = generate_greedily(model.language_model, model.tokenizer, batch.to(model.device))
        lengths = generated.num_new.tolist()
        for number, new, length in zip(batch.examples.tolist(), generated.new.tolist(), lengths, strict=True):
            found[number] = tuple(new[:length])
        done(len(lengths))
    return found
