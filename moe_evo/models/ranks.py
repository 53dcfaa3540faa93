"""`Ranks`: which process of a gang this one is, and how they exchange Python values.

The ranks of a gang hold one model and run the same request in lockstep. Without a gang there is one rank, and nothing
is exchanged. The collectives of the model itself (nccl, gloo) are in torch and DeepSpeed.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """rank: number of this process, from 0. size: how many hold the model together."""

    rank: int = 0
    size: int = 1

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank; a collective where there is more than one."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Ranks()
"""The one rank of a model that one process holds."""


def join_ranks(rank: int, size: int, address: str, port: int, timeout_s: float) -> Ranks:
    """Make this process rank `rank` of a group that meets at `address`:`port`.

    Tensors on GPUs go through nccl, objects and tensors on the CPU through gloo. A collective that
    waits longer than `timeout_s` fails, and with it the group.
    """
    # Ray shows each actor its own GPU alone, so the local rank is always 0
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(size), MASTER_ADDR=address, MASTER_PORT=str(port))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return Ranks(rank, size)
