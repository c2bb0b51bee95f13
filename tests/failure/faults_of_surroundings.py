"""What happens to what rank 1 runs in: its limits, its network, the store. As in faults_of_processes.py."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from failing import call, works
from faults_of_processes import VICTIM, Seen, checked, goes_on, init, later, moment, tell
from launcher import Rank

CLONE_NEWNS, CLONE_NEWNET, MS_REC_PRIVATE = 0x00020000, 0x40000000, 0x44000


# --- A process at a limit of its own.


@contextmanager
def limited(limit: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


def limited_memory(free: int) -> AbstractContextManager[None]:
    with open("/proc/self/statm") as text:
        return limited(resource.RLIMIT_AS, int(text.read().split()[0]) * resource.getpagesize() + free)


@contextmanager
def no_thread() -> Iterator[None]:
    """No memory for a thread's stack, and none of an ended thread's either, which the C library keeps for new ones."""
    over, started = threading.Event(), []
    with limited_memory(4 << 20):
        try:
            for _ in range(2):  # a thread that was ending may leave its stack after the first time
                with suppress(RuntimeError):
                    while True:
                        thread = threading.Thread(target=over.wait)
                        thread.start()
                        started.append(thread)
                time.sleep(0.05)
            yield
        finally:
            over.set()
            for thread in started:
                thread.join()


def limited_files(free: int) -> AbstractContextManager[None]:
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    return limited(resource.RLIMIT_NOFILE, [fd for fd in range(max(taken) + free + 2) if fd not in taken][free])


def limits(at_limit: Callable[[int], AbstractContextManager[None]], during: str) -> Callable[[Rank, int], Seen | None]:
    """During "set-up", or "async" calls after it, which need a thread of their own."""

    def body(rank: Rank, turn: int) -> Seen | None:
        def calls() -> None:
            if during == "async":
                dist.all_reduce(torch.ones(100, device=rank.device), async_op=True).wait()
            checked(rank)

        if during != "set-up":
            checked(rank)
        rank.meet(f"ready {turn}")
        if rank.rank != VICTIM:
            rank.store.wait([f"fault {turn}"], rank.group_timeout)
            return goes_on(rank, turn, calls)
        with at_limit(turn):
            tell(rank, turn)
            return goes_on(rank, turn, calls)

    return body


# --- Its surroundings.


def libc(name: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def permits(*flags: int) -> Callable[[], str]:
    def reason() -> str:
        pid = os.fork()
        if pid == 0:
            outcome = 1
            with suppress(OSError):
                for flag in flags:
                    libc("unshare", flag)
                outcome = 0
            os._exit(outcome)
        return "" if os.waitpid(pid, 0)[1] == 0 else "unshare is not permitted"

    return reason


def full_shm(rank: Rank, turn: int) -> Seen | None:
    """A /dev/shm of the victim's own, of one page, and full."""
    rank.meet(f"ready {turn}")
    tell(rank, turn)
    if rank.rank == VICTIM and turn == 0:  # for good: the process doesn't outlive the test
        libc("unshare", CLONE_NEWNS)
        libc("mount", b"none", b"/", None, MS_REC_PRIVATE, None)
        libc("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=4096")
        with open("/dev/shm/all", "wb") as file:
            file.write(bytes(4096))
    rank.meet(f"full {turn}")
    return goes_on(rank, turn, lambda: works(rank))


def another_network(rank: Rank, turn: int) -> Seen | None:
    """The victim's set-up in a network namespace of its own. They meet in a file."""
    if rank.rank == 0:
        rank.store.set(f"file {turn}", f"/tmp/mnnvl-faults-{os.getpid()}-{turn}")
    path = rank.store.get(f"file {turn}").decode()
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if rank.rank == VICTIM:
            libc("unshare", CLONE_NEWNET)
        init(rank, dist.FileStore(path, rank.world_size))
        rank.meet(f"ready {turn}")
        tell(rank, turn)
        return goes_on(rank, turn, lambda: call(rank))
    finally:
        if rank.rank == VICTIM:
            libc("setns", home, CLONE_NEWNET)
        os.close(home)


def lost_store(rank: Rank, turn: int, in_set_up: bool) -> Seen | None:
    """The server of the group's TCPStore, a process of its own, is killed. During the set-up: while rank 1 is waited for."""
    server = serve_store(rank, turn) if rank.rank == 0 else 0
    port = int(rank.store.get(f"port {turn}"))
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    init(rank, store)
    if not in_set_up:
        checked(rank)
    rank.meet(f"ready {turn}")

    def kill() -> None:
        tell(rank, turn)
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        tell(rank, turn, "killed")

    timer = later(moment(turn), kill) if rank.rank == 0 else None
    if timer and not in_set_up:
        timer.join()
    if rank.rank == VICTIM or (not in_set_up and not timer):
        rank.store.wait([f"killed {turn}"], rank.group_timeout)
    result = goes_on(rank, turn, lambda: works(rank))
    if timer:
        timer.join()
    return result


def serve_store(rank: Rank, turn: int) -> int:
    """The pid of a server, whose port is told."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writer, str(server.port).encode())
            signal.pause()
        finally:
            os._exit(1)
    rank.store.set(f"port {turn}", os.read(reader, 100).decode())
    os.close(reader)
    os.close(writer)
    return pid
