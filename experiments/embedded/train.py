"""Train an embedded model from scratch on the nine embedded tasks, within a wall-clock budget.

    python experiments/embedded/train.py --tasks build/tasks --out build/model --minutes 45

writes a checkpoint that stock `transformers` loads and a learning curve (JSON lines).
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from architecture import SHAPES, Row, check_tokenizer, fixed_labels, new_model, save, train_tokenizer
from scoring import Question, accuracy, read_questions
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# How often a task is drawn. arith and sentiment learn slowly beside the others.
SAMPLING = {
    "arith": 2.0,
    "city": 1.2,
    "gloss": 1.3,
    "infl": 0.8,
    "langid": 0.8,
    "nli": 1.0,
    "sarcasm": 1.2,
    "sentiment": 2.0,
    "syll": 1.0,
}
PROMPT_WEIGHT = 0.1  # loss weight of prompt and <eos> tokens; an answer's token has 1
AUX_COEFFICIENT = 0.005  # small: balanced enough to use all experts, free to specialise
WARMUP_STEPS = 150
EMA_EVERY, EMA_DECAY = 5, 0.98


@dataclass(frozen=True)
class Example:
    """A training row: token ids and the loss weight of each."""

    ids: list[int]
    weights: list[float]


def read_rows(folder: Path, task: str, split: str) -> list[Row]:
    """The rows of one task's split."""
    text = (folder / task / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def encode(row: Row, tokenizer: PreTrainedTokenizerFast) -> Example:
    """<bos> prompt answer <eos>."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["choices"][row["label"]], add_special_tokens=False)["input_ids"]
    weights = [PROMPT_WEIGHT] * len(prompt) + [1.0] * len(answer) + [PROMPT_WEIGHT]
    return Example([*prompt, *answer, tokenizer.eos_token_id], weights)


def batches(data: dict[str, list[Example]], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Endless mixed batches of rows of similar length."""
    tasks = sorted(data)
    weights = [SAMPLING[task] for task in tasks]
    unread: dict[str, list[Example]] = {task: [] for task in tasks}

    def draw(task: str) -> Example:
        if not unread[task]:
            unread[task] = rng.sample(data[task], len(data[task]))
        return unread[task].pop()

    while True:
        pool = [draw(task) for task in rng.choices(tasks, weights, k=16 * size)]
        pool.sort(key=lambda example: len(example.ids))
        slices = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(slices)
        yield from slices


def collate(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (N, T), padded with 0 on the right, and loss weights (N, T), 0 at the padding."""
    width = max(len(s.ids) for s in batch)
    ids = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in batch])
    weights = torch.tensor([s.weights + [0.0] * (width - len(s.ids)) for s in batch])
    return ids, weights


def balance_loss(router_logits: Sequence[torch.Tensor], real: torch.Tensor, top_k: int) -> torch.Tensor:
    """Switch Transformer's load-balancing loss (arXiv 2101.03961, eq. 4), mean over layers.

    Computed for each layer by itself and without the padding.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.reshape(-1, logits.shape[-1])[real].softmax(-1)
        chosen = probabilities.topk(top_k, -1).indices
        load = F.one_hot(chosen, logits.shape[-1]).float().sum(1).mean(0)
        losses.append(logits.shape[-1] * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def loss_of(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross entropy and load-balancing loss of a batch.

    Causal attention never looks at the padding, which stands on the right: no mask is needed.
    """
    output = model.model(input_ids=ids, output_router_logits=True, use_cache=False)
    target_weights = weights[:, 1:]
    real = target_weights > 0
    logits = model.lm_head(output.last_hidden_state[:, :-1][real])
    losses = F.cross_entropy(logits, ids[:, 1:][real], reduction="none")
    cross_entropy = (losses * target_weights[real]).sum() / target_weights.sum()
    top_k = model.config.num_experts_per_tok
    return cross_entropy, balance_loss(output.router_logits, (weights > 0).reshape(-1), top_k)


def new_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate_factor(step: int, progress: float) -> float:
    """Linear warm-up in steps, then cosine to 1 % over the share of the budget that is spent."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * cosine)


@dataclass
class Run:
    """What the training loop holds."""

    model: PreTrainedModel
    average: PreTrainedModel  # exponential moving average of the weights; this is what ships
    tokenizer: PreTrainedTokenizerFast
    validation: dict[str, list[Question]]
    curve: Path
    out: Path
    stored: str


def update_average(run: Run, step: int) -> None:
    """One EMA update; the decay grows with the steps, so that the start is forgotten soon."""
    decay = min(EMA_DECAY, step / EMA_EVERY / (step / EMA_EVERY + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(run.average.parameters()), list(run.model.parameters()), 1 - decay)


def report(run: Run, record: dict[str, Any]) -> None:
    """Score the average on validation, append to the learning curve, write the checkpoint."""
    scores = {task: accuracy(run.average, q) for task, q in run.validation.items()}
    record["mean_accuracy"] = sum(scores.values()) / len(scores)
    record["accuracy"] = {task: round(score, 4) for task, score in scores.items()}
    with run.curve.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)
    save(run.average, run.tokenizer, run.out, run.stored)


def train(run: Run, data: dict[str, list[Example]], args: argparse.Namespace) -> None:
    """Until the budget of steps or minutes is spent; scoring and saving count as part of the minutes."""
    optimizer = new_optimizer(run.model, args.learning_rate)
    start, next_report, step, tokens = time.monotonic(), args.report_minutes, 0, 0
    for batch in batches(data, args.batch_size, random.Random(args.seed)):
        minutes = (time.monotonic() - start) / 60
        progress = step / args.steps if args.steps else minutes / args.minutes
        factor = learning_rate_factor(step, progress)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        ids, weights = collate(batch)
        cross_entropy, balance = loss_of(run.model, ids, weights)
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy + AUX_COEFFICIENT * balance
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + sum(len(s.ids) for s in batch)
        if step % EMA_EVERY == 0:
            update_average(run, step)
        record = {"minutes": round(minutes, 2), "step": step, "tokens": tokens}
        record |= {"loss": round(cross_entropy.item(), 4), "balance": round(balance.item(), 3)}
        if step % 100 == 0:
            print(json.dumps(record), flush=True)
        if step == args.steps or (not args.steps and minutes >= args.minutes):
            break
        if minutes >= next_report:
            report(run, record)
            next_report += args.report_minutes
    report(run, record)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=Path, required=True, help="folder of build_tasks.py")
    parser.add_argument("--shape", choices=SHAPES, default="coarse", help="8 experts in 4 layers, or 32 in 6")
    parser.add_argument("--store", choices=("float32", "bfloat16"), default="float32", help="weights in the file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--curve", type=Path, default=Path("learning_curve.jsonl"))
    parser.add_argument("--minutes", type=float, default=45.0, help="wall-clock budget")
    parser.add_argument("--report-minutes", type=float, default=2.5)
    parser.add_argument("--steps", type=int, default=0, help="schedule by steps, repeatably, in place of minutes")
    parser.add_argument("--batch-size", type=int, default=128, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--experts", default="grouped_mm", help="experts implementation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = {task: read_rows(args.tasks, task, "train") for task in SAMPLING}
    tokenizer = train_tokenizer(rows)
    for task in SAMPLING:
        check_tokenizer(tokenizer, read_rows(args.tasks, task, "test"))
    for label in fixed_labels(rows):
        if len(tokenizer(label, add_special_tokens=False)["input_ids"]) != 1:
            raise ValueError(f"the label {label!r} is more than one token")
    data = {task: [encode(row, tokenizer) for row in rows[task]] for task in SAMPLING}
    validation = {task: read_questions(args.tasks / task / "validation.jsonl", tokenizer) for task in SAMPLING}
    model, average = (new_model(args.shape, AUX_COEFFICIENT) for _ in range(2))
    average.load_state_dict(model.state_dict())
    model.set_experts_implementation(args.experts)
    average.eval()  # type: ignore[no-untyped-call]
    run = Run(model, average, tokenizer, validation, args.curve, args.out, args.store)
    args.curve.unlink(missing_ok=True)
    train(run, data, args)


if __name__ == "__main__":
    main()
