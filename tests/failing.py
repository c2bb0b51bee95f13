"""What tests of failures share: calls whose failure has shown when they return, groups made anew, deaths."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from launcher import Rank

NOTICED_WITHIN = 5.0  # seconds, of a death; the group's timeout in those tests is far longer
SHORT = timedelta(seconds=2)  # the timeout of groups that run into it


def call(rank: Rank, numel: int = 1000, group: dist.ProcessGroup | None = None) -> None:
    """One all_reduce whose failure has shown when this returns: that of a kernel is raised by the wait() after it."""
    work = dist.all_reduce(torch.ones(numel, device=rank.device), group=group, async_op=True)
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    work.wait()


def works(rank: Rank, group: dist.ProcessGroup | None = None) -> None:
    x = torch.full((1001,), float(dist.get_rank(group) + 1), device=rank.device)
    dist.all_reduce(x, group=group)
    n = dist.get_world_size(group)
    assert x.tolist() == [n * (n + 1) / 2] * 1001


def new_default_group_works(rank: Rank, prefix: str = "again") -> None:
    """After a failure: out of the old group, everybody meets elsewhere, into a new one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    rank.meet(f"before {prefix}")
    rank.init(prefix=prefix)
    works(rank)
    dist.barrier()


def die_at(moment: float, tell: Callable[[str], None]) -> None:
    def die() -> None:
        tell(str(time.monotonic()))  # one clock for all processes of a host
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Timer(moment, die).start()


def footprint() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = sum("memfd:mnnvl" in line for line in maps)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": mappings,
    }
