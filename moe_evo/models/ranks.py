"""`Ranks`: which process of a gang this one is, and how they exchange Python values.

The ranks of a gang hold one model and run the same request in lockstep. Without a gang there is one rank, and nothing
is exchanged. The collectives of the model itself (nccl, gloo) are in torch and DeepSpeed.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_LOOPBACKS = ("lo", "lo0")
"""The loopback's interface on Linux and on macOS."""


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
    """Make this process rank `rank` of a group that meets at `address`:`port`, an address of rank 0's machine.

    Tensors on GPUs go through nccl, objects and tensors on the CPU through gloo. A collective that
    waits longer than `timeout_s` fails, and with it the group. No message of a group is authenticated, so it listens
    on that address alone, and a group on one machine that meets on loopback stays there.
    """
    if _is_loopback(address):
        interface = next(name for _, name in socket.if_nameindex() if name in _LOOPBACKS)
        os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    timeout = datetime.timedelta(seconds=timeout_s)
    # Ray shows each actor its own GPU alone, so the local rank is always 0
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(size), MASTER_ADDR=address, MASTER_PORT=str(port))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=_store(rank, size, address, port, timeout),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    return Ranks(rank, size)


def _store(rank: int, size: int, address: str, port: int, timeout: datetime.timedelta) -> Any:
    """Where ranks tell each other how they are reached; torch's own would listen on every interface."""
    listener = _listener(address, port) if rank == 0 else None
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    return store(address, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=listener)


def _listener(address: str, port: int) -> int:
    """A socket that listens at `address` only; at every address where this machine does not know it as its own."""
    family = socket.getaddrinfo(address, port)[0][0]
    try:
        return socket.create_server((address, port), family=family).detach()
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:  # as behind a translation of addresses
            raise
        return socket.create_server(("", port), family=family).detach()


def _is_loopback(address: str) -> bool:
    found = socket.getaddrinfo(address, None)
    return all(ipaddress.ip_address(where[0]).is_loopback for *_, where in found)
