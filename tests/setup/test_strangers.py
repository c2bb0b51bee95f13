"""Any local user can read the names of abstract sockets and connect to them. That must not stop a set-up."""

from __future__ import annotations

import errno
import resource
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from launcher import Rank, run_ranks
from strangers import Held, as_root, become_nobody, names, processes

STRANGERS = 4


def fill(name: str, connections: list[socket.socket]) -> int:
    """Connects until it can't; gives the reason."""
    while True:
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            connections.append(connection)
            connection.connect(f"\0mnnvl-{name}")
        except OSError as error:
            return error.errno or 0
        if len(connections) > 8192:
            return 0


def flood(port: int) -> None:
    """A stranger: fills the queue of every set-up's socket that it finds, says so in the store, and goes on."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    become_nobody()
    held: dict[str, list[socket.socket]] = {}
    store.add("strangers", 1)
    while True:
        found = names()
        for name in set(held) - set(found):
            for connection in held.pop(name):
                connection.close()
        for name in found:
            connections = held.setdefault(name, [])
            if len(connections) > 4096:  # the rank has dropped most of them by now
                for connection in connections:
                    connection.close()
                connections.clear()
            outcome = fill(name, connections)
            if outcome == errno.EAGAIN:
                store.set(f"full {name}", "1")


@pytest.fixture
def strangers() -> Iterator[int]:
    with processes([[__file__]] * STRANGERS) as store:
        yield store.port


def set_up_body(rank: Rank, port: int) -> float:
    """Seconds from the moment when this rank's queue was full until the set-up was through."""
    store = Held(dist.PrefixStore("held", rank.store), dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group(
        "mnnvl",
        store=store,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=30),
        pg_options=rank.options(),
    )
    x = torch.ones(3)
    dist.all_reduce(x)
    assert x.tolist() == [rank.world_size] * 3
    assert store.released > 0
    return time.monotonic() - store.released


@as_root
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_flood_of_strangers_does_not_stop_a_set_up(strangers: int, world_size: int) -> None:
    """Every rank's queue is full of another user's connections before the first rank learns an address, and is filled
    again all the time. Ranks wait for room at each other, and would end by their time-out of 15 s."""
    for seconds in run_ranks(set_up_body, world_size, "cpu", backend=None, args=(strangers,)):
        assert seconds < 8


if __name__ == "__main__":
    flood(int(sys.argv[1]))
