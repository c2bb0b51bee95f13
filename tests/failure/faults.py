"""The faults of test_faults.py, as data: what happens to rank 1 of three, and what every rank must make of it."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

from faults_of_processes import (
    VICTIM,
    Seen,
    aborts,
    all_reduces,
    callback_raises,
    child_destroys,
    child_ends,
    child_exits,
    child_uses,
    ends,
    forks,
    fused,
    interrupted,
    killed_in_set_up,
    kills,
    messages,
    paused,
    py_exit,
    slow,
)
from faults_of_surroundings import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    another_network,
    full_shm,
    limited,
    limited_files,
    limited_memory,
    limits,
    lost_store,
    no_thread,
    permits,
)
from launcher import Rank

VICTIM_NAMED = rf"rank {VICTIM}\b"


@dataclass(frozen=True)
class Fault:
    name: str
    body: Callable[[Rank, int], Seen | None]
    says: str = ""  # what every rank that raises must say; none: nobody may raise
    dies: int | None = None  # the victim's exit code
    makes_groups: bool = False
    timeout: float = 30.0  # of the group, seconds
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: Callable[[], str] = lambda: ""  # why it can't be produced here
    outcome: str = ""  # for the table, where it isn't that all raise


def in_operation(operation: str) -> str:
    return rf"(?s)(?=.*{operation}).*{VICTIM_NAMED}"


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
    Fault("SIGSTOP, SIGCONT after the deadline", lambda r, t: paused(r, t, 1.5, in_time=False), in_operation("all_reduce"),
          timeout=1.0, outcome="at the deadline of 1 s, and the stopped one when it goes on"),
    Fault("a slow rank", slow),
    Fault("RLIMIT_FSIZE at set-up", limits(lambda t: limited(resource.RLIMIT_FSIZE, 4096), "set-up"),
          in_operation("ftruncate"), devices=("cpu",)),
    Fault("RLIMIT_AS at set-up", limits(lambda t: limited_memory(t % 4 << 20), "set-up"), VICTIM_NAMED,
          devices=("cpu",)),
    Fault("RLIMIT_AS in calls: no thread", limits(lambda t: no_thread(), "async"), VICTIM_NAMED, devices=("cpu",)),
    Fault("RLIMIT_NOFILE at set-up", limits(lambda t: limited_files(t % 3), "set-up"), in_operation("open files"),
          devices=("cpu",)),
    Fault("RLIMIT_NOFILE in calls", limits(lambda t: limited_files(0), "async")),
    Fault("RLIMIT_MEMLOCK (ulimit -l) of 0", limits(lambda t: limited(resource.RLIMIT_MEMLOCK, 0), "set-up")),
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
