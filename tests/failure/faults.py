"""The faults of test_faults.py, as data: what happens to rank 1 of three, and what every rank must make of it.

A body runs on every rank, in a fresh group unless the fault `makes_groups` itself. It returns what this rank raised, or None: it
went on, and its numbers were right.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from failing import call, works
from launcher import Rank

from mnnvl_backend import Mapping, MNNVLAllReduceFusionWorkspace, trtllm_mnnvl_fused_allreduce_add_rmsnorm

VICTIM, WORLD_SIZE = 1, 3
CLONE_NEWNS, CLONE_NEWNET, MS_REC_PRIVATE = 0x00020000, 0x40000000, 0x44000
VICTIM_NAMED = rf"rank {VICTIM}\b"


@dataclass(frozen=True)
class Seen:
    """What a rank raised, and how long after the fault."""

    seconds: float
    text: str


@dataclass(frozen=True)
class Fault:
    name: str
    body: Callable[[Rank, int], Seen | None]
    says: str = ""  # what every rank that raises must say; none: nobody may raise
    victim_raises: bool = True  # or goes on, or is gone
    dies: int | None = None  # the victim's exit code
    makes_groups: bool = False
    timeout: float = 30.0  # of the group, seconds
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: Callable[[], str] = lambda: ""  # why it can't be produced here
    outcome: str = ""  # for the table, where it isn't that all raise


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


class Deadly(dist.Store):
    """The victim's: it dies when it would post its contribution to a round of the set-up, or (-1) come to it."""

    def __init__(self, rank: Rank, turn: int, at: int) -> None:
        super().__init__()
        self.inner, self.rank, self.turn = dist.PrefixStore(f"turn{turn}", rank.store), rank, turn
        self.key = f"/{at}/{rank.rank}" if at >= 0 else f"/here/{rank.rank}"

    def set(self, key: str, value: bytes) -> None:
        if key.endswith(self.key):
            tell(self.rank, self.turn)
            os.kill(os.getpid(), signal.SIGKILL)
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        return self.inner.get(key)

    def add(self, key: str, value: int) -> int:
        return self.inner.add(key, value)

    def check(self, keys: list[str]) -> bool:
        return self.inner.check(keys)

    def wait(self, keys: list[str], timeout: timedelta = timedelta(seconds=30)) -> None:
        self.inner.wait(keys, timeout)


def killed_in_set_up(rank: Rank, turn: int, at: int, timeout: float) -> Seen:
    store = Deadly(rank, turn, at) if rank.rank == VICTIM else dist.PrefixStore(f"turn{turn}", rank.store)
    init(rank, store, timeout)
    return seen(rank, turn, lambda: call(rank))


def init(rank: Rank, store: dist.Store, timeout: float = 30.0) -> None:
    dist.init_process_group(
        "mnnvl", store=store, rank=rank.rank, world_size=rank.world_size, timeout=timedelta(seconds=timeout),
        pg_options=rank.options(),
    )  # fmt: skip


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


# --- A process at a limit of its own.


@contextmanager
def limited(limit: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


def address_space() -> int:
    with open("/proc/self/statm") as text:
        return int(text.read().split()[0]) * resource.getpagesize()


def free_descriptors(count: int) -> int:
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    return [fd for fd in range(max(taken) + count + 2) if fd not in taken][count]


def limits(limit: int, value: Callable[[int], int], during: str) -> Callable[[Rank, int], Seen | None]:
    """During "set-up", or "calls" after it, that are made by the caller's thread, or "async" calls, which need another."""

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
        with limited(limit, value(turn)):
            tell(rank, turn)
            return goes_on(rank, turn, calls)

    return body


def goes_on(rank: Rank, turn: int, calls: Callable[[], None]) -> Seen | None:
    """Some calls; or what one of them raised."""
    try:
        for _ in range(5):
            calls()
    except RuntimeError as error:
        return Seen(time.monotonic() - float(rank.store.get(f"fault {turn}")), str(error))
    return None


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
        try:
            after.wait()
            raise AssertionError("no LookupError")
        except LookupError:
            pass
        except RuntimeError as error:
            assert "the callback's own error" in str(error)
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
    for calls in (lambda: dist.all_reduce(x), lambda: dist.all_reduce(x, async_op=True), lambda: dist.send(x, 0)):
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


def in_operation(operation: str) -> str:
    return rf"(?s)(?=.*{operation}).*{VICTIM_NAMED}"


def py_exit() -> None:
    ctypes.pythonapi.Py_Exit(3)


FAULTS = [
    Fault("SIGKILL in all_reduce", kills(all_reduces, signal.SIGKILL), in_operation("all_reduce"), dies=-9),
    Fault("SIGKILL in send and recv", kills(messages, signal.SIGKILL), in_operation("send|recv"), dies=-9),
    Fault("SIGKILL in the fused function", kills(fused, signal.SIGKILL), in_operation("fused all_reduce"), dies=-9),
    Fault("SIGKILL before the ranks have met", lambda r, t: killed_in_set_up(r, t, -(t % 2), timeout=2.0),
          in_operation("set-up"), dies=-9, makes_groups=True, outcome="at the deadline of 2 s: another may take its place"),
    Fault("SIGKILL in set-up", lambda r, t: killed_in_set_up(r, t, 1 + t % 3, timeout=30.0), in_operation("set-up"),
          dies=-9, makes_groups=True),
    Fault("SIGTERM in all_reduce", kills(all_reduces, signal.SIGTERM), in_operation("all_reduce"), dies=-15),
    Fault("sys.exit without destroy", ends(all_reduces, py_exit), in_operation("all_reduce"), dies=3),
    Fault("os._exit without destroy", ends(messages, lambda: os._exit(3)), in_operation("send|recv"), dies=3),
    Fault("abort() by another thread in all_reduce", aborts(all_reduces), VICTIM_NAMED),
    Fault("abort() by another thread in send and recv", aborts(messages), VICTIM_NAMED),
    Fault("SIGSTOP, SIGCONT before the deadline", lambda r, t: paused(r, t, 0.3, in_time=True)),
    Fault("SIGSTOP, SIGCONT after the deadline", lambda r, t: paused(r, t, 1.5, in_time=False), in_operation("all_reduce"), timeout=1.0),
    Fault("a slow rank", slow),
    Fault("RLIMIT_FSIZE at set-up", limits(resource.RLIMIT_FSIZE, lambda t: 4096, "set-up"), in_operation("ftruncate"),
          devices=("cpu",)),
    Fault("RLIMIT_AS at set-up", limits(resource.RLIMIT_AS, lambda t: address_space() + (t % 4 << 20), "set-up"),
          VICTIM_NAMED, devices=("cpu",)),
    Fault("RLIMIT_AS in calls: no thread", limits(resource.RLIMIT_AS, lambda t: address_space() + (4 << 20), "async"),
          VICTIM_NAMED, devices=("cpu",)),
    Fault("RLIMIT_NOFILE at set-up", limits(resource.RLIMIT_NOFILE, lambda t: free_descriptors(t % 3), "set-up"),
          in_operation("open files"), devices=("cpu",)),
    Fault("RLIMIT_NOFILE in calls", limits(resource.RLIMIT_NOFILE, lambda t: free_descriptors(0), "async")),
    Fault("RLIMIT_MEMLOCK (ulimit -l) of 0", limits(resource.RLIMIT_MEMLOCK, lambda t: 0, "set-up")),
    Fault("a full /dev/shm", full_shm, needs=permits(CLONE_NEWNS)),
    Fault("a network namespace of its own", another_network, rf"(?s)hosts.*{VICTIM_NAMED}", makes_groups=True,
          devices=("cpu",), needs=permits(CLONE_NEWNET)),
    Fault("the store dies in set-up", lambda r, t: lost_store(r, t, True), r"rank \d could not use the c10d store",
          makes_groups=True),
    Fault("the store dies in calls", lambda r, t: lost_store(r, t, False), makes_groups=True),
    Fault("fork: the child exits", forks(child_exits), devices=("cpu",)),
    Fault("fork: the child ends as an interpreter", forks(child_ends), devices=("cpu",)),
    Fault("fork: the child calls", forks(child_uses), devices=("cpu",)),
    Fault("fork: the child destroys the group", forks(child_destroys), devices=("cpu",)),
    Fault("SIGINT in a wait", interrupted, outcome="KeyboardInterrupt once the wait has ended"),
    Fault("an exception in a callback", callback_raises),
]  # fmt: skip
