"""Processes that mean harm beside a group, while it is set up and while it runs: one of another user, and one of the
same user in another job, who knows all that can be read on the host but no token. They get nothing and change nothing,
and the group's results stay right."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank, run_ranks
from strangers import Held, as_root, become_nobody, names, processes

PIDFD_OPEN, PIDFD_GETFD, PTRACE_SEIZE = 434, 438, 0x4206
SILENT = 600  # connections to each socket that say nothing: more than a rank may have files
SET_UPS, CALLS = 2, 200


# --- The hostile process.


class Hostile:
    def __init__(self, port: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False)
        self.random = random.Random(os.getpid())
        self.held: dict[str, list[socket.socket]] = {}
        self.memory = os.memfd_create("mnnvl-hostile")
        os.ftruncate(self.memory, 1 << 20)
        self.report: dict[str, Any] = {"attacks": 0, "descriptors": 0, "names taken": 0, "denied": 0, "opened": []}

    def run(self) -> None:
        self.store.add("strangers", 1)
        while True:
            found = names()
            for name in set(self.held) - set(found):
                for connection in self.held.pop(name):
                    self.look(connection)
                    connection.close()
            for name in found:
                if name not in self.held:
                    self.attack(name, [*found, *self.held])
                    self.store.add(f"done {name}", 1)
                    if self.store.add(f"done {name}", 0) >= self.store.add("strangers", 0):
                        self.store.set(f"full {name}", "1")
            self.pry()
            self.store.set(f"report {os.getpid()}", json.dumps(self.report))
            time.sleep(0.002)

    def attack(self, name: str, known: list[str]) -> None:
        connections = self.held[name] = []
        for turn in range(SILENT + 200):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            with suppress(OSError):  # its queue is full
                connection.connect(f"\0mnnvl-{name}")
                connections.append(connection)
                if turn >= SILENT:
                    self.say(connection, known)
                    self.report["attacks"] += 1
        # A name that is in use can't be taken, nor was it free before its rank had it.
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other, suppress(OSError):
            other.bind(f"\0mnnvl-{name}")
            self.report["names taken"] += 1

    def say(self, connection: socket.socket, known: list[str]) -> None:
        """Rubbish, or what ranks say, of any rank, with anything but the token, and descriptors."""
        other = self.random.randbytes(16).hex()  # the token of another group
        token = self.random.choice([*known, other, "0" * 32, "", "\0" * 32]).encode()
        message = b"mnnvlfd2" + struct.pack("ii", self.random.randrange(-1, 3), self.random.randrange(0, 2)) + token
        message = self.random.choice(
            [message] * 4 + [message[:-1], message + b"x", b"", self.random.randbytes(48), message * 1000]
        )
        with suppress(OSError):
            socket.send_fds(connection, [message], [self.memory] * self.random.randrange(4))

    def look(self, connection: socket.socket) -> None:
        """Whether anything came: nothing must."""
        with suppress(OSError):
            data, fds, _flags, _address = socket.recv_fds(connection, 1000, 10)
            self.report["descriptors"] += len(data) + len(fds)

    def pry(self) -> None:
        """For another user, all doors of the kernel to a rank's memory are closed."""
        if os.geteuid() == 0:
            return
        for rank in range(2):
            if self.store.check([f"pid {rank}"]):
                pid = int(self.store.get(f"pid {rank}"))
                for folder in ("fd", "map_files"):
                    self.try_door(pid, folder, partial(os.listdir, f"/proc/{pid}/{folder}"))
                for file in ("mem", "maps"):
                    self.try_door(pid, file, partial(read_one, f"/proc/{pid}/{file}"))
                self.try_door(pid, "ptrace", partial(system_call, "ptrace", PTRACE_SEIZE, pid, 0, 0))
                for fd in self.random.sample(range(100), 5):  # the numbers of descriptors can be guessed
                    self.try_door(pid, "descriptor", partial(os.open, f"/proc/{pid}/fd/{fd}", os.O_RDWR))
                    self.try_door(pid, "pidfd_getfd", partial(copy_descriptor, pid, fd))

    def try_door(self, pid: int, name: str, attempt: Callable[[], Any]) -> None:
        try:
            if attempt() != b"":  # of a process that ends there is nothing to be read
                self.report["opened"].append(name)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                self.report["denied"] += 1
            elif os.path.exists(f"/proc/{pid}"):
                self.report["opened"].append(f"{name}: {error}")


def read_one(file: str) -> bytes:
    with open(file, "rb", buffering=0) as opened:
        return opened.read(1)


def copy_descriptor(pid: int, fd: int) -> None:
    process = system_call(PIDFD_OPEN, pid, 0)
    try:
        system_call(PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)


def system_call(number: int | str, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, number) if isinstance(number, str) else lambda *a: libc.syscall(number, *a)
    result: int = function(*map(ctypes.c_long, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# --- The group.


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def body(rank: Rank, port: int, few_files: bool) -> float:
    """Seconds of the slowest set-up, from the moment when the hostile processes were through with this rank."""
    strangers = dist.TCPStore("127.0.0.1", port, is_master=False)
    strangers.set(f"pid {rank.rank}", str(os.getpid()))
    if few_files:  # the silent connections would take them all
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 60, limits[1]))
    slowest, counts = 0.0, []
    for turn in range(SET_UPS):
        store = Held(dist.PrefixStore(f"held {turn}", rank.store), strangers)
        dist.init_process_group(
            "mnnvl", store=store, rank=rank.rank, world_size=rank.world_size, timeout=timedelta(seconds=30),
            pg_options=rank.options(),
        )  # fmt: skip
        for step in range(CALLS):
            x = torch.full((1001,), float(rank.rank + step), device=rank.device)
            dist.all_reduce(x)
            n = rank.world_size
            assert x.eq(n * step + n * (n - 1) / 2).all(), (turn, step)
            if step == 0:
                assert store.released > 0
                slowest = max(slowest, time.monotonic() - store.released)
        dist.destroy_process_group()
        counts.append(descriptors())
    assert counts == [counts[0]] * SET_UPS, f"descriptors after each set-up: {counts}"
    assert not [file for file in Path("/dev/shm").iterdir() if "mnnvl" in file.name]
    return slowest


def hostile(*who: str) -> list[list[str]]:
    return [[__file__, one] for one in who]


@pytest.mark.parametrize(
    ("who", "few_files"), [(("same",), True), pytest.param(("other", "same"), False, marks=as_root)],
    ids=["same user, few files left", "both users"],
)  # fmt: skip
def test_hostile_processes_get_and_change_nothing(who: tuple[str, ...], few_files: bool) -> None:
    with processes(hostile(*who)) as store:
        pids = store.add("strangers", 0)
        for seconds in run_ranks(body, 2, "cpu", backend=None, args=(store.port, few_files)):
            assert seconds < 8
        reports = [json.loads(store.get(key)) for key in (f"report {pid}" for pid in pids_of(store))]
    assert len(reports) == pids
    for report in reports:
        assert report["attacks"] >= 200
        assert (report["descriptors"], report["names taken"], report["opened"]) == (0, 0, [])
    assert any(report["denied"] > 100 for report in reports) == ("other" in who)


def pids_of(store: dist.Store) -> list[str]:
    return store.get("pids").decode().split()


if __name__ == "__main__":
    one = Hostile(int(sys.argv[2]))
    one.store.append("pids", f"{os.getpid()} ")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if sys.argv[1] == "other":
        become_nobody()
    one.run()
