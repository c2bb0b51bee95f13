"""mnnvl_backend.stats(): exact for a known program, whatever form its calls have, and for one that fails."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from failing import SHORT
from launcher import Rank

import mnnvl_backend

NOTHING: dict[str, Any] = {"operations": {}, "algorithms": {}, "slept": 0}


def counted(group: dist.ProcessGroup | None = None) -> dict[str, tuple[int, int, int]]:
    """(calls, failed, bytes) by operation."""
    operations = mnnvl_backend.stats(group)["operations"]
    assert all(set(one) == {"calls", "failed", "bytes"} for one in operations.values())
    return {name: (one["calls"], one["failed"], one["bytes"]) for name, one in operations.items()}


def messages(rank: Rank, x: torch.Tensor) -> None:
    """One by one, then as a batch: each rank sends to the next."""
    after, before = (rank.rank + 1) % rank.world_size, (rank.rank - 1) % rank.world_size
    y = torch.empty_like(x)
    for work in [dist.isend(x, after), dist.irecv(y, before)]:
        work.wait()
    batch = [dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, y, before)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()


def program_body(rank: Rank) -> None:
    world, device, cpu = rank.world_size, rank.device, rank.device.type == "cpu"
    assert mnnvl_backend.stats() == NOTHING
    x = torch.ones(100, device=device)
    for _ in range(5):
        dist.all_reduce(x)
    for work in [dist.all_reduce(x[:50].half(), async_op=True) for _ in range(2)]:
        work.wait()
    dist.all_reduce(torch.ones(1 << 20, device=device, dtype=torch.float32))
    dist.all_reduce(torch.ones(10, device=device, dtype=torch.int64), dist.ReduceOp.MAX)
    dist.all_reduce(x[:0])  # nothing to send
    with pytest.raises((TypeError, ValueError, RuntimeError), match="(?i)uint16"):
        dist.all_reduce(torch.ones(3, device=device, dtype=torch.uint16))  # refused for its arguments
    with dist._coalescing_manager():
        for _ in range(3):
            dist.all_reduce(x)
    dist.broadcast(x, src=world - 1)
    dist.all_gather_into_tensor(torch.empty(world * 100, device=device), x)
    dist.reduce_scatter_tensor(torch.empty(7, device=device), torch.ones(7 * world, device=device))
    messages(rank, x)
    dist.barrier(device_ids=None if cpu else [device.index])
    counts = counted()
    assert counts == {
        "all_reduce": (9, 0, 5 * 400 + 2 * 100 + (4 << 20) + 80),
        "all_reduce_coalesced": (1, 0, 1200),
        "broadcast": (1, 0, 400),
        "all_gather_into_tensor": (1, 0, 400),
        "reduce_scatter_tensor": (1, 0, 28 * world),
        "send": (1, 0, 400),
        "recv": (1, 0, 400),
        "coalesced": (1, 0, 800),
        "barrier": (1, 0, 0),
    }, counts
    algorithms = mnnvl_backend.stats()["algorithms"]
    small = 5 + 2 + 3
    if cpu:
        assert algorithms == {"cpu_oneshot": small + 1, "cpu_twoshot": 1}
    else:
        assert algorithms == {"oneshot_lamport": small, "twoshot_lamport": 1, "pair_channels": 1}


@pytest.mark.parametrize("world", [2, 3])
def test_a_known_program(ranks, world, device):
    ranks(program_body, world, device)


def groups_body(rank: Rank) -> None:
    """What an option forces counts like what is chosen; a group of one sends nothing."""
    x = torch.ones(100, device=rank.device)
    forced = dist.new_group(backend="mnnvl", pg_options=rank.options(strategy="twoshot"))
    alone = [dist.new_group([r], backend="mnnvl") for r in range(rank.world_size)][rank.rank]
    dist.all_reduce(x)
    for _ in range(2):
        dist.all_reduce(x, group=forced)
    dist.all_reduce(x, group=alone)
    names = ("cpu_oneshot", "cpu_twoshot") if rank.device.type == "cpu" else ("oneshot_lamport", "twoshot_lamport")
    assert (counted(), mnnvl_backend.stats()["algorithms"]) == ({"all_reduce": (1, 0, 400)}, {names[0]: 1})
    assert (counted(forced), mnnvl_backend.stats(forced)["algorithms"]) == ({"all_reduce": (2, 0, 800)}, {names[1]: 2})
    assert mnnvl_backend.stats(alone) == NOTHING
    # The memory of the counts isn't that which goes.
    mnnvl_backend.release_memory(forced)
    mnnvl_backend.restore_memory(forced)
    dist.all_reduce(x, group=forced)
    assert mnnvl_backend.stats(forced)["algorithms"] == {names[1]: 3}


@pytest.mark.parametrize("world", [2, 3])
def test_each_group_counts_for_itself(ranks, world, device):
    ranks(groups_body, world, device)


def failed_body(rank: Rank) -> None:
    """Rank 1 doesn't come to what follows the first call of each group."""
    group = dist.new_group(backend="mnnvl", timeout=SHORT)
    other = dist.new_group(backend="mnnvl", timeout=SHORT)
    x = torch.ones(25)
    dist.all_reduce(x, group=group)
    dist.all_reduce(x, group=other)
    if rank.rank == 0:
        # More than are remembered one by one: what becomes of the oldest counts all the same.
        in_flight = [dist.all_reduce(x, group=group, async_op=True) for _ in range(70)]
        for work in in_flight:
            with pytest.raises(dist.DistBackendError):
                work.wait()
        assert counted(group) == {"all_reduce": (71, 70, 7100)}
        with pytest.raises(dist.DistBackendError):
            dist.all_reduce(x, group=group)  # the group is broken: not begun
        assert counted(group) == {"all_reduce": (71, 70, 7100)}
        with pytest.raises(dist.DistBackendError):
            dist.irecv(x, 1, group=other).wait()
        assert counted(other) == {"all_reduce": (1, 0, 100), "recv": (1, 1, 100)}
    rank.store.set(f"failed/{rank.rank}", "")
    rank.store.wait(["failed/0", "failed/1"], timedelta(seconds=30))


def test_failed_calls(ranks):
    ranks(failed_body, 2)


def slept_body(rank: Rank) -> None:
    """Each rank is waited for until the other one is seen to sleep, though many times for the same call."""
    dist.barrier()
    x = torch.ones(25)
    for late in range(2):
        before = mnnvl_backend.stats()["slept"]
        if rank.rank == late:
            rank.store.wait([f"slept/{late}"], timedelta(seconds=30))
            dist.all_reduce(x)
        else:
            work = dist.all_reduce(x, async_op=True)
            deadline = time.monotonic() + 30
            while mnnvl_backend.stats()["slept"] == before and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.1)  # several of its naps
            assert mnnvl_backend.stats()["slept"] == before + 1
            rank.store.set(f"slept/{late}", "")
            work.wait()
            assert mnnvl_backend.stats()["slept"] == before + 1


def test_collectives_that_slept(ranks):
    ranks(slept_body, 2)


def wrong_group_body(rank: Rank) -> None:
    with pytest.raises(ValueError, match="stats: group: expected a backend 'mnnvl', got"):
        mnnvl_backend.stats(dist.new_group(backend="gloo"))


def test_groups_of_others(ranks):
    ranks(wrong_group_body, 2)
