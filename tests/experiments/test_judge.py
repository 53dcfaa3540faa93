"""The example of a metric that asks another model, against a server on loopback."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_evo.tasks.answer_metrics import ANSWER_METRICS
from moe_evo.tasks.examples import Example

PLUGIN = Path(__file__).parents[2] / "experiments" / "plugin"
TOKEN = "not-for-others"
EXAMPLE = Example("here:1", prompt="How many?", answers=("three",))


class Judge(BaseHTTPRequestHandler):
    asked: list[Any]
    replies: dict[str, str]

    def do_POST(self) -> None:
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(content)
        text = content["messages"][0]["content"].partition("marked: ")[2].partition("\n")[0]
        body = json.dumps({"choices": [{"message": {"content": self.replies[text]}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    Judge.asked, Judge.replies = [], {"three": "10", "two": "Mark: 2.5", "odd": "I cannot say"}
    with HTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
        monkeypatch.syspath_prepend(PLUGIN)
        yield importlib.import_module("moe_evo_example.judge")
        server.shutdown()


def test_a_judge_is_a_metric_by_its_path_and_is_asked_once(judge: ModuleType) -> None:
    metric = ANSWER_METRICS["moe_evo_example.judge:judged"]
    assert [metric(text, EXAMPLE) for text in ("three", "two", "three")] == [1.0, 0.25, 1.0]
    assert len(Judge.asked) == 2 and Judge.asked[0]["temperature"] == 0
    with pytest.raises(ValueError, match="the judge said 'I cannot say', expected a number"):
        metric("odd", EXAMPLE)
