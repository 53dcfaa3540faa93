"""A stand-in for the W&B service on loopback: it answers as far as wandb needs, fails, or hangs, as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"
"""A key of the right form that opens nothing."""


class StandIn(ThreadingHTTPServer):
    """behaviour: 'answers', 'hangs', or a status such as 500. history: lines that came in, by run."""

    daemon_threads = True

    def __init__(self, behaviour: str | int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.released = threading.Event()
        self.num_requests = 0
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.summary: dict[str, str] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are nothing to print."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.num_requests += 1
        behaviour = self.server.behaviour
        if behaviour == "hangs":
            self.server.released.wait(120)
            self.close_connection = True
        elif isinstance(behaviour, int):
            self._answer(behaviour, {"errors": [{"message": "stand-in"}]})
        elif self.path.startswith("/graphql"):
            request = json.loads(body)
            self._answer(*self._graphql(request["query"], request.get("variables") or {}))
        else:
            if self.path.endswith("/file_stream"):
                self._stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
            self._answer(200, {})

    def _stream(self, run: str, files: dict[str, Any]) -> None:
        if "wandb-history.jsonl" in files:
            lines = self.server.history.setdefault(run, [])
            del lines[files["wandb-history.jsonl"]["offset"] :]
            lines += [json.loads(line) for line in files["wandb-history.jsonl"]["content"]]
        if "wandb-summary.json" in files:
            self.server.summary[run] = files["wandb-summary.json"]["content"][-1]

    def _graphql(self, query: str, variables: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        run, project = variables.get("name"), {"id": "p", "name": "moe_evo", "entity": {"id": "e", "name": "someone"}}
        if "viewer" in query:
            viewer = {"id": "u", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
            return 200, {"data": {"viewer": viewer, "serverInfo": {}}}
        if "RunResumeStatus" in query:
            lines = self.server.history.get(run or "")
            bucket = lines and {
                "id": "b",
                "name": run,
                "summaryMetrics": self.server.summary.get(run or "", "{}"),
                "displayName": "name",
                "logLineCount": 0,
                "historyLineCount": len(lines),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(lines[-1])]),
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "wandbConfig": '{"t": 1}',
            }
            return 200, {"data": {"model": {**project, "bucket": bucket or None}}}
        if "upsertBucket" in query:
            bucket = {"id": "b", "name": run, "displayName": variables.get("displayName"), "config": "{}"}
            found = bool(self.server.history.get(run or ""))
            return 200, {"data": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": not found}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/{name}"} for name in variables["files"]]
            return 200, {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return 400, {"errors": [{"message": "the stand-in does not know this"}]}

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def stand_in(behaviour: str | int) -> Iterator[StandIn]:
    server = StandIn(behaviour)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
