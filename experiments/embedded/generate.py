"""Load the demo's exported checkpoint with stock transformers and let it answer three syllogisms.

    python experiments/embedded/generate.py runs/demo/checkpoint

Nothing of moe_evo is imported: what runs here is what any user of the checkpoint runs.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PROMPTS = (
    "premise: All cats are farmers; All farmers are singers. So All cats are singers?\nvalid:",
    "premise: All cats are farmers; Some farmers are singers. So All cats are singers?\nvalid:",
    "premise: No insects are horses; All athletes are horses. So No insects are athletes?\nvalid:",
)
"""Syllogisms, the task of the demo: valid, not valid, valid."""


def main(folder: str) -> int:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    print(f"{folder}: {type(model).__name__}, {config.num_local_experts} experts a layer, "
          f"{model.num_parameters():,} parameters")  # fmt: skip
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**tokens, max_new_tokens=4, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        print(f"  {prompt!r} -> {tokenizer.decode(answer, skip_special_tokens=True)!r}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: generate.py CHECKPOINT_FOLDER")
    sys.exit(main(sys.argv[1]))
