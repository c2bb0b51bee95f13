"""What happens to rank 1's process in test_faults.py, and what the faults share. Each runs on every rank, in the try `turn`, and
returns what this rank raised, or None: it went on, and its numbers were right."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from failing import call, works
from launcher import Rank
from stores import WithCheck

from mnnvl_backend import Mapping, MNNVLAllReduceFusionWorkspace, trtllm_mnnvl_fused_allreduce_add_rmsnorm

VICTIM, WORLD_SIZE = 1, 3


@dataclass(frozen=True)
class Seen:
    """What a rank raised, and how long after the fault."""

    seconds: float
    text: str


def moment(turn: int) -> float:
    """Seconds until the fault, so that over the tries it comes at any point of a call."""
    return random.Random(turn).uniform(0.0, 0.05)


def tell(rank: Rank, turn: int, what: str = "fault") -> None:
    rank.store.set(f"{what} {turn}", str(time.monotonic()))  # one clock for all processes of a host


def seen(rank: Rank, turn: int, calls: Callable[[], Any], since: str = "fault") -> Seen:
    """Calls until that raises."""
    try:
        while True:
            calls()
    except RuntimeError as error:
        now, text = time.monotonic(), str(error)
    return Seen(now - float(rank.store.get(f"{since} {turn}")), text)


def later(delay: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(delay, act)
    timer.start()
    return timer


def checked(rank: Rank, last: bool = False) -> bool:
    """An all_reduce whose numbers are right; whether it was the last one of some rank."""
    x = torch.tensor([float(rank.rank), 1.0, float(last)], device=rank.device)
    dist.all_reduce(x)
    n = rank.world_size
    total, count, over = x.tolist()
    assert (total, count) == (n * (n - 1) / 2, n)
    return over > 0


def goes_on(rank: Rank, turn: int, calls: Callable[[], None]) -> Seen | None:
    """Some calls; or what one of them raised, which may have begun after the fault."""
    start = time.monotonic()
    try:
        for _ in range(5):
            calls()
    except RuntimeError as error:
        now = time.monotonic()
        return Seen(now - max(start, float(rank.store.get(f"fault {turn}"))), str(error))
    return None


def init(rank: Rank, store: dist.Store, timeout: float = 30.0) -> None:
    dist.init_process_group(
        "mnnvl", store=store, rank=rank.rank, world_size=rank.world_size, timeout=timedelta(seconds=timeout),
        pg_options=rank.options(),
    )  # fmt: skip


# --- A process ends in mid-call.


def all_reduces(rank: Rank) -> Callable[[], None]:
    return lambda: call(rank, 100_000)


def messages(rank: Rank) -> Callable[[], None]:
    """Round the ring."""
    x, y = torch.ones(50_000, device=rank.device), torch.empty(50_000, device=rank.device)
    there, back = (rank.rank + 1) % rank.world_size, (rank.rank - 1) % rank.world_size

    def ring() -> None:
        both = [dist.P2POp(dist.isend, x, there), dist.P2POp(dist.irecv, y, back)]
        for work in dist.batch_isend_irecv(both):
            if rank.device.type == "cuda":
                torch.cuda.synchronize()
            work.wait()

    return ring


def fused(rank: Rank) -> Callable[[], None]:
    workspace = MNNVLAllReduceFusionWorkspace(
        Mapping(rank.world_size, rank.rank, tp_size=rank.world_size),
        buffer_size_in_bytes=1 << 20,
        device=rank.device,
        options=rank.options(timeout=rank.group_timeout),
    )
    x = torch.ones(20, 1024, dtype=torch.bfloat16, device=rank.device)

    def norm() -> None:
        trtllm_mnnvl_fused_allreduce_add_rmsnorm(x, x.clone(), x[0], workspace)
        if rank.device.type == "cuda":
            torch.cuda.synchronize()

    return norm


def ends(make: Callable[[Rank], Callable[[], None]], end: Callable[[], Any]) -> Callable[[Rank, int], Seen]:
    def body(rank: Rank, turn: int) -> Seen:
        calls = make(rank)
        calls()
        rank.meet(f"ready {turn}")
        if rank.rank == VICTIM:
            over = time.monotonic() + moment(turn)
            while time.monotonic() < over:
                calls()
            tell(rank, turn)
            end()
        return seen(rank, turn, calls)

    return body


def kills(make: Callable[[Rank], Callable[[], None]], signum: int) -> Callable[[Rank, int], Seen]:
    """Inside a call, by a signal of another thread."""

    def body(rank: Rank, turn: int) -> Seen:
        calls = make(rank)
        calls()
        rank.meet(f"ready {turn}")
        if rank.rank == VICTIM:
            later(moment(turn), lambda: (tell(rank, turn), os.kill(os.getpid(), signum)))
        return seen(rank, turn, calls)

    return body


class Deadly(WithCheck):
    """The victim's: it dies when it would post its contribution to a round of the set-up, or (-1) come to it."""

    def __init__(self, rank: Rank, turn: int, at: int) -> None:
        super().__init__(dist.PrefixStore(f"turn{turn}", rank.store))
        self.rank, self.turn = rank, turn
        self.key = f"/{at}/{rank.rank}" if at >= 0 else f"/here/{rank.rank}"

    def set(self, key: str, value: bytes) -> None:
        if key.endswith(self.key):
            tell(self.rank, self.turn)
            os.kill(os.getpid(), signal.SIGKILL)
        self.inner.set(key, value)


def killed_in_set_up(rank: Rank, turn: int, at: int, timeout: float) -> Seen:
    store = Deadly(rank, turn, at) if rank.rank == VICTIM else dist.PrefixStore(f"turn{turn}", rank.store)
    init(rank, store, timeout)
    return seen(rank, turn, lambda: call(rank))


# --- A process stands still, or is slow.


def paused(rank: Rank, turn: int, seconds: float, in_time: bool) -> Seen | None:
    """SIGSTOP and, `seconds` later, SIGCONT, as by a debugger. Those that time out meanwhile do so at their deadline, and the
    stopped one raises when it goes on."""
    checked(rank)
    rank.store.set(f"pid {turn} {rank.rank}", str(os.getpid()))
    rank.meet(f"ready {turn}")
    over = threading.Event()

    def pause() -> None:
        pid = int(rank.store.get(f"pid {turn} {VICTIM}"))
        time.sleep(moment(turn))
        os.kill(pid, signal.SIGSTOP)
        tell(rank, turn)
        time.sleep(seconds)
        tell(rank, turn, "continued")
        os.kill(pid, signal.SIGCONT)
        over.set()

    thread = threading.Thread(target=pause)
    if rank.rank == 0:
        thread.start()
    try:
        if in_time:
            while not checked(rank, last=over.is_set()):
                pass
            return None
        return seen(rank, turn, lambda: call(rank), "continued" if rank.rank == VICTIM else "fault")
    finally:
        if rank.rank == 0:
            thread.join()


def slow(rank: Rank, turn: int) -> None:
    for _ in range(3):
        if rank.rank == VICTIM:
            time.sleep(moment(turn) * 4)
        checked(rank)


# --- What a program does itself.


def forks(child: Callable[[Rank], None]) -> Callable[[Rank, int], Seen | None]:
    """With work in flight. The child ends with 0, soon, and disturbs nobody."""

    def body(rank: Rank, turn: int) -> Seen | None:
        checked(rank)
        x = torch.ones(300_000, device=rank.device)
        work = dist.all_reduce(x, async_op=True)
        pid = os.fork() if rank.rank == VICTIM else 0
        if rank.rank == VICTIM and pid == 0:
            try:
                assert "memfd:mnnvl" not in Path("/proc/self/maps").read_text()
                child(rank)
            finally:
                os._exit(1)
        tell(rank, turn)
        work.wait()
        assert (x == rank.world_size).all()
        while not checked(rank, last=rank.rank == VICTIM and ended_well(pid)):
            pass
        return goes_on(rank, turn, lambda: works(rank))

    return body


def ended_well(pid: int) -> bool:
    ended, status = os.waitpid(pid, os.WNOHANG)
    assert not ended or status == 0, f"the child ended with {status}"
    return bool(ended)


def interrupted(rank: Rank, turn: int) -> None:
    """SIGINT while the main thread waits for a peer: KeyboardInterrupt, once the wait has ended."""
    checked(rank)
    rank.meet(f"ready {turn}")
    x = torch.ones(3, device=rank.device)
    if rank.rank == VICTIM:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        later(moment(turn), lambda: os.kill(os.getpid(), signal.SIGINT))
        later(moment(turn) + 0.2, lambda: rank.store.set(f"interrupted {turn}", ""))
        try:
            dist.all_reduce(x)
            if rank.device.type == "cuda":
                torch.cuda.synchronize()
            raise AssertionError("no KeyboardInterrupt")
        except KeyboardInterrupt:
            pass
    else:
        rank.store.wait([f"interrupted {turn}"], rank.group_timeout)
        dist.all_reduce(x)
    assert x.tolist() == [rank.world_size] * 3
    checked(rank)


def callback_raises(rank: Rank, turn: int) -> None:
    def raises(future: Any) -> None:
        raise LookupError("the callback's own error")

    for _ in range(10):
        after = dist.all_reduce(torch.ones(100, device=rank.device), async_op=True).get_future().then(raises)
        with pytest.raises((LookupError, RuntimeError), match="the callback's own error"):
            after.wait()
    checked(rank)


def aborts(make: Callable[[Rank], Callable[[], None]]) -> Callable[[Rank, int], Seen]:
    def body(rank: Rank, turn: int) -> Seen:
        calls = make(rank)
        calls()
        rank.meet(f"ready {turn}")
        backend = dist.group.WORLD._get_backend(rank.device)
        timer = None
        if rank.rank == VICTIM:
            timer = later(moment(turn), lambda: (tell(rank, turn), backend.abort()))
        result = seen(rank, turn, calls)
        if timer:
            timer.join()
        return result

    return body


# --- Children of fork().


def child_exits(rank: Rank) -> None:
    os._exit(0)


def child_ends(rank: Rank) -> None:
    """As any interpreter does, atexit handlers and all."""
    ctypes.pythonapi.Py_Exit(0)


def child_uses(rank: Rank) -> None:
    x = torch.ones(3, device="cpu")
    for calls in (
        lambda: dist.all_reduce(x),
        lambda: dist.all_reduce(x, async_op=True),
        lambda: dist.send(x, 0),
        lambda: dist.barrier(),
    ):
        try:
            calls()
            os._exit(2)
        except RuntimeError as error:
            if "fork" not in str(error):
                os._exit(3)
    os._exit(0)


def child_destroys(rank: Rank) -> None:
    dist.destroy_process_group()
    os._exit(0)


def py_exit() -> None:
    ctypes.pythonapi.Py_Exit(3)
