"""Measure an embedded model: accuracy by task, and what keeping K of its experts costs when
they are chosen by the task's own use, by another task's use or at random. Nothing is retrained.

    python experiments/embedded/measure.py --tasks moe_evo/data/tasks --model moe_evo/data/model

A pruned model is a stock model with fewer experts, built by slicing the weights.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from scoring import Question, accuracy, batches_by_length, pad, read_questions
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@torch.inference_mode()
def expert_use(model: PreTrainedModel, questions: Sequence[Question]) -> torch.Tensor:
    """Summed gate of every expert (L, E) over the tokens of prompts and right answers."""
    use = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    for batch in batches_by_length(questions, 128):
        texts = [questions[i].prompt + questions[i].choices[questions[i].label] for i in batch]
        ids, mask = pad(texts)
        output = model.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            real = logits.reshape(-1, use.shape[1])[mask.reshape(-1).bool()].float()
            gates, chosen = real.softmax(-1).topk(model.config.num_experts_per_tok, -1)
            gates = gates / gates.sum(-1, keepdim=True)
            use[layer].scatter_add_(0, chosen.reshape(-1), gates.reshape(-1))
    return use / use.sum(1, keepdim=True)


def most_used(use: torch.Tensor, num_kept: int) -> list[list[int]]:
    """The `num_kept` experts of each layer with the highest use."""
    return [sorted(row.topk(num_kept).indices.tolist()) for row in use]


def pruned(model: PreTrainedModel, kept: Sequence[Sequence[int]]) -> PreTrainedModel:
    """A stock model that has the kept experts of each layer only."""
    config = copy.deepcopy(model.config)
    config.num_local_experts = len(kept[0])  # Qwen3-MoE knows it by this name, too
    state = dict(model.state_dict())
    for layer, experts in enumerate(kept):
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            key = f"model.layers.{layer}.mlp.{name}"
            state[key] = state[key][list(experts)]
    small: PreTrainedModel = type(model)(config)
    small.load_state_dict(state)
    small.eval()  # type: ignore[no-untyped-call]
    return small


def random_kept(model: PreTrainedModel, num_kept: int, seed: int) -> list[list[int]]:
    """A uniform draw of experts for every layer."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    return [
        sorted(torch.randperm(config.num_local_experts, generator=generator)[:num_kept].tolist())
        for _ in range(config.num_hidden_layers)
    ]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, rounded for the table."""
    return round(statistics.fmean(values), 4)


def specialisation(
    model: PreTrainedModel,
    questions: dict[str, list[Question]],
    uses: dict[str, torch.Tensor],
    num_kept: int,
    draws: int,
) -> dict[str, dict[str, float]]:
    """For each task the accuracy with its own, the others' (mean, best) and random experts."""
    by_use = {task: pruned(model, most_used(use, num_kept)) for task, use in uses.items()}
    by_chance = [pruned(model, random_kept(model, num_kept, seed)) for seed in range(draws)]
    table = {}
    for task, own_questions in questions.items():
        scores = {other: accuracy(small, own_questions) for other, small in by_use.items()}
        own = scores.pop(task)
        random_scores = [accuracy(small, own_questions) for small in by_chance]
        table[task] = {
            "own": round(own, 4),
            "other": mean(list(scores.values())),
            "best_other": round(max(scores.values()), 4),
            "random": mean(random_scores),
            "best_random": round(max(random_scores), 4),
        }
    columns = table[next(iter(table))]
    table["mean"] = {column: mean([row[column] for row in table.values()]) for column in columns}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--num-kept", type=int, nargs="*", default=[4, 2])
    parser.add_argument("--draws", type=int, default=10, help="random prunings")
    parser.add_argument("--limit", type=int, help="rows of the test split for the pruned models")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    names = sorted(folder.name for folder in args.tasks.iterdir() if folder.is_dir())
    splits = {
        split: {n: read_questions(args.tasks / n / f"{split}.jsonl", tokenizer) for n in names}
        for split in ("search", "validation", "test")
    }
    for split, tasks in splits.items():
        scores = {task: round(accuracy(model, rows), 4) for task, rows in tasks.items()}
        scores["mean"] = mean(list(scores.values()))
        print(json.dumps({"split": split, "accuracy": scores}), flush=True)
    uses = {task: expert_use(model, rows) for task, rows in splits["search"].items()}
    test = {task: rows[: args.limit] for task, rows in splits["test"].items()}
    for num_kept in args.num_kept:
        for task, row in specialisation(model, test, uses, num_kept, args.draws).items():
            print(json.dumps({"num_kept": num_kept, "task": task, **row}), flush=True)


if __name__ == "__main__":
    main()
