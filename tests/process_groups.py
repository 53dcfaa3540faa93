"""Real process groups for tests: one function, run on every rank of a gang of processes.

Nothing here can hang: ranks that do not answer in time are killed, and their test fails.
"""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from moe_evo.models.ranks import join_ranks

GROUP_TIMEOUT_S = 40.0

# forks of a server that has imported the libraries once start in milliseconds
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["moe_evo.models.load", "moe_evo.evaluation.evaluator"])


def run_gang(function: Callable[..., Any], size: int, *arguments: Any, timeout_s: float = 150.0) -> list[Any]:
    """What `function(ranks, *arguments)` returns on each of `size` ranks; the first error of a rank is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _CONTEXT.Process(target=_be_rank, args=(pipes[rank][1], function, rank, size, port, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    deadline = time.monotonic() + timeout_s
    try:
        return [_answer(receiver, rank, deadline) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(receiver: Connection, rank: int, deadline: float) -> Any:
    assert receiver.poll(max(deadline - time.monotonic(), 0)), f"rank {rank} did not answer in time"
    try:
        succeeded, value = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert succeeded, f"rank {rank} failed:\n{value}"
    return value


def _be_rank(
    sender: Connection, function: Callable[..., Any], rank: int, size: int, port: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        answer = (True, function(join_ranks(rank, size, "127.0.0.1", port, GROUP_TIMEOUT_S), *arguments))
    except Exception:  # noqa: BLE001 - the border of the process: the test raises it
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    time.sleep(600)  # until the test kills it: a rank that leaves breaks what others are still in
