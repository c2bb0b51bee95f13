"""A timeout that a call brings in its options: it ends that call, whatever the group's own is."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from failing import works
from launcher import Rank
from torch._C import _distributed_c10d as c10d

OWN = timedelta(seconds=0.3)  # the group's is 30 s


def with_timeout(options: Any) -> Any:
    options.timeout = OWN
    options.asyncOp = True
    return options


def calls(rank: Rank) -> dict[str, Callable[[dist.ProcessGroup], dist.Work]]:
    """Calls in which rank 0 has to wait for rank 1."""
    n, device = rank.world_size, rank.device
    x, y = torch.ones(4, device=device), torch.ones(4, device=device)
    parts, whole = [torch.empty_like(x) for _ in range(n)], torch.empty(4 * n, device=device)
    integers = torch.ones(4, device=device, dtype=torch.int64)

    def broadcast(group: dist.ProcessGroup) -> dist.Work:
        options = with_timeout(dist.BroadcastOptions())
        options.rootRank = 1
        return group.broadcast([x], options)

    def barrier(group: dist.ProcessGroup) -> dist.Work:
        options = with_timeout(dist.BarrierOptions())
        options.device = device
        return group.barrier(options)

    def public_barrier(group: dist.ProcessGroup) -> dist.Work:
        ids = [device.index] if device.type == "cuda" else None
        return dist.barrier(group, async_op=True, timeout=OWN, device_ids=ids)

    made: dict[str, Callable[[dist.ProcessGroup], dist.Work]] = {
        "all_reduce": lambda group: group.allreduce([x], with_timeout(dist.AllreduceOptions())),
        "all_reduce, gathered": lambda group: group.allreduce([integers], with_timeout(dist.AllreduceOptions())),
        "all_reduce_coalesced": lambda group: group.allreduce_coalesced(
            [x, y], with_timeout(c10d.AllreduceCoalescedOptions())
        ),
        "broadcast": broadcast,
        "all_gather": lambda group: group.allgather([parts], [x], with_timeout(c10d.AllgatherOptions())),
        "all_gather_into_tensor": lambda group: group._allgather_base(whole, x, with_timeout(c10d.AllgatherOptions())),
        "barrier": barrier,
    }
    if "timeout" in inspect.signature(dist.barrier).parameters:  # not before torch 2.12
        made["dist.barrier"] = public_barrier
    return made


def own_timeout_body(rank: Rank) -> None:
    for name, call in calls(rank).items():
        group = dist.new_group(backend="mnnvl", pg_options=rank.options())
        works(rank, group)
        call(group).wait()  # in time
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        rank.meet(f"{name} together")
        if rank.rank == 0:
            start = time.monotonic()
            with pytest.raises(dist.DistBackendError, match=r"rank 1\b.*(timeout|deadline)"):
                work = call(group)
                if rank.device.type == "cuda":
                    torch.cuda.synchronize()
                work.wait()
            waited = time.monotonic() - start
            assert 0.25 < waited < 4, f"{name} raised after {waited:.1f} s"
        rank.meet(f"{name} alone")


def test_a_timeout_of_the_calls_own(ranks, device):
    ranks(own_timeout_body, 2, device, timeout=60)


def longer_body(rank: Rank) -> None:
    """A call may also be given more time than the group has."""
    rank.init(timeout=timedelta(seconds=1))
    works(rank)
    options = dist.AllreduceOptions()
    options.timeout, options.asyncOp = timedelta(seconds=20), True
    x = torch.ones(4, device=rank.device)
    if rank.rank == 0:
        work = dist.group.WORLD.allreduce([x], options)
        with pytest.raises(dist.DistBackendError, match="did not end within"):  # wait's own
            work.wait(timedelta(seconds=1.5))
        rank.store.set("waited", "1")
        work.wait()
    else:
        rank.store.wait(["waited"], rank.group_timeout)
        dist.group.WORLD.allreduce([x], options).wait()
    assert x.tolist() == [2.0] * 4


def test_a_longer_timeout_than_the_groups(ranks, device):
    ranks(longer_body, 2, device, backend=None)
