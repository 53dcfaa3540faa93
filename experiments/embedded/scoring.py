"""Score the embedded tasks with a stock `transformers` model: the choice with the highest
log-probability given the prompt is the answer. Independent of `moe_evo` on purpose, so that the
figures in README.md are not measured with the code they are meant to check.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A tokenised row: `prompt` begins with the bos token, `choices` have no special tokens."""

    prompt: list[int]
    choices: list[list[int]]
    label: int


def read_questions(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Question]:
    """The first `limit` rows of a JSONL file, tokenised."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    ids: dict[str, list[int]] = {}

    def encode(choice: str) -> list[int]:
        if choice not in ids:
            ids[choice] = tokenizer(choice, add_special_tokens=False)["input_ids"]
        return ids[choice]

    return [Question(tokenizer(r["prompt"])["input_ids"], [encode(c) for c in r["choices"]], r["label"]) for r in rows]


def pad(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (N, T) padded with 0 on the right, and their attention mask (N, T)."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return ids, mask


def batches_by_length(questions: Sequence[Question], size: int) -> Iterable[list[int]]:
    """Indices of the questions in batches of similar prompt length."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def accuracy(model: PreTrainedModel, questions: Sequence[Question], batch_size: int = 128) -> float:
    """Share of questions whose answer is the most likely choice."""
    correct = 0
    for batch in batches_by_length(questions, batch_size):
        group = [questions[i] for i in batch]
        single = all(len(choice) == 1 for question in group for choice in question.choices)
        scores = score_single(model, group) if single else score_sequences(model, group)
        correct += sum(
            int(max(range(len(s)), key=s.__getitem__) == q.label) for s, q in zip(scores, group, strict=True)
        )
    return correct / len(questions)


def score_single(model: PreTrainedModel, questions: Sequence[Question]) -> list[list[float]]:
    """Logits of one-token choices: one pass over the prompts tells them all."""
    ids, mask = pad([q.prompt for q in questions])
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    last = hidden[torch.arange(len(questions)), mask.sum(1) - 1]
    logits = model.lm_head(last).float()
    return [[logits[row, choice[0]].item() for choice in question.choices] for row, question in enumerate(questions)]


def score_sequences(model: PreTrainedModel, questions: Sequence[Question]) -> list[list[float]]:
    """Summed log-probability of each choice after its prompt."""
    pairs = [(q.prompt, choice) for q in questions for choice in q.choices]
    ids, mask = pad([prompt + choice for prompt, choice in pairs])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    log_probs = F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    sums = iter(
        log_probs[row, len(prompt) - 1 : len(prompt) + len(choice) - 1].sum().item()
        for row, (prompt, choice) in enumerate(pairs)
    )
    return [[next(sums) for _ in question.choices] for question in questions]
