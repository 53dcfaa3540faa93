"""A metric that asks another model: a server with OpenAI's chat API says from 0 to 10 how good an answer is.

Set JUDGE_URL, such as http://127.0.0.1:8000/v1/chat/completions, and JUDGE_MODEL. Every new answer is a request, which
makes a search slow; equal ones are asked once. A judge can be wrong, and prefers long answers: compare it with people's
marks on a few examples before a search rests on it.
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from urllib.request import Request, urlopen

from moe_evo.tasks.examples import Example

_TIMEOUT_S = 60
_ASKED = """Question: {prompt}
A right answer: {right}
The answer to be marked: {text}

How good is it, from 0 (wrong) to 10 (right)? Reply with the number alone."""


def judged(text: str, example: Example) -> float:
    """The judge's mark, from 0 to 1; raises OSError without a server, ValueError without a mark."""
    return _mark(_ASKED.format(prompt=example.prompt, right=example.answers[0], text=text))


@lru_cache(maxsize=100_000)
def _mark(asked: str) -> float:
    content = {
        "model": os.environ.get("JUDGE_MODEL", "default"),
        "messages": [{"role": "user", "content": asked}],
        "temperature": 0,
        "max_tokens": 8,
    }
    headers = {"Content-Type": "application/json"}
    if "JUDGE_TOKEN" in os.environ:
        headers["Authorization"] = f"Bearer {os.environ['JUDGE_TOKEN']}"
    request = Request(os.environ["JUDGE_URL"], json.dumps(content).encode(), headers)
    with urlopen(request, timeout=_TIMEOUT_S) as answer:
        told = json.load(answer)["choices"][0]["message"]["content"]
    mark = re.search(r"\d+(\.\d+)?", told)
    if mark is None:
        raise ValueError(f"the judge said {told[:80]!r}, expected a number from 0 to 10")
    return min(float(mark[0]) / 10, 1.0)
