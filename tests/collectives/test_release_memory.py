"""A group's memory given back and made anew: release_memory() and restore_memory()."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only, want_gpus
from reference import assert_bits, random_input, rank_order_sum

import mnnvl_backend


def check(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if expected.dtype.is_floating_point:
        assert_bits(actual, expected, what)
    else:
        assert torch.equal(actual.cpu(), expected), what


def check_values(rank: Rank, seed: int) -> None:
    """Something of every kind: Lamport sums, channels, messages, asynchronous ones."""
    n, after, before = rank.world_size, (rank.rank + 1) % rank.world_size, (rank.rank - 1) % rank.world_size
    for numel, dtype in ((100, torch.float32), (70_001, torch.bfloat16), (300, torch.int64)):
        inputs = [random_input(r, numel, dtype, seed) for r in range(n)]
        mine = inputs[rank.rank].to(rank.device)
        x, y = mine.clone(), torch.empty_like(mine)
        works = [dist.all_reduce(x, async_op=seed % 2 == 1)]
        gathered = [torch.empty_like(mine) for _ in range(n)]
        works.append(dist.all_gather(gathered, mine, async_op=seed % 2 == 1))
        if n > 1:
            works += [dist.isend(mine, after, tag=seed), dist.irecv(y, before, tag=seed)]
        for work in works:
            if work is not None:
                work.wait()
        expected = rank_order_sum(inputs) if dtype.is_floating_point else torch.stack(inputs).sum(0)
        check(x, expected.to(dtype), f"{dtype}, seed {seed}")
        for r in range(n):
            check(gathered[r], inputs[r], f"gathered {dtype}, seed {seed}")
        if n > 1:
            check(y, inputs[before], f"received {dtype}, seed {seed}")


def segments() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:mnnvl-segment")


def refused_calls(rank: Rank) -> list[Callable[[], object]]:
    x = torch.ones(5, device=rank.device)
    peer = (rank.rank + 1) % rank.world_size

    def coalesced() -> None:
        with dist._coalescing_manager(device=rank.device, async_ops=True):
            dist.all_reduce(x)
            dist.all_reduce(x)

    return [
        lambda: dist.all_reduce(x),
        lambda: dist.all_reduce(x, async_op=True),
        lambda: dist.isend(x, peer),
        lambda: dist.irecv(x, peer),
        lambda: dist.broadcast(x, 0),
        lambda: dist.barrier(device_ids=[rank.device.index] if rank.device.type == "cuda" else None),
        coalesced,
    ]


def sleeping_body(rank: Rank) -> None:
    before = segments()
    assert mnnvl_backend.release_memory() == 0  # of a group that isn't set up
    mnnvl_backend.restore_memory()
    for seed in range(3):
        check_values(rank, seed)
        freed = mnnvl_backend.release_memory()
        assert segments() == before
        assert freed >= 1 << 20 if rank.world_size > 1 else freed == 0
        assert mnnvl_backend.release_memory() == 0
        if rank.world_size > 1:
            for call in refused_calls(rank):
                with pytest.raises(RuntimeError, match="not attached"):
                    call()
        mnnvl_backend.restore_memory()
        mnnvl_backend.restore_memory()
    check_values(rank, 3)
    mnnvl_backend.release_memory()  # destroyed while asleep


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sleeps_and_wakes(ranks, device, world_size):
    ranks(sleeping_body, world_size, device)


def outstanding_body(rank: Rank) -> None:
    """What was begun before the release ends well, and its work can be asked afterwards."""
    x = [torch.full((100_000,), float(i), device=rank.device) for i in range(10)]
    works = [dist.all_reduce(one, async_op=True) for one in x]
    y = torch.empty(300_000, device=rank.device)
    works += [dist.irecv(y, 1 - rank.rank), dist.isend(torch.full_like(y, rank.rank), 1 - rank.rank)]
    assert mnnvl_backend.release_memory() > 0
    for work in works:
        work.wait()
        assert work.is_completed()
    for i, one in enumerate(x):
        assert (one == 2 * i).all()
    assert (y == 1 - rank.rank).all()
    del works
    mnnvl_backend.restore_memory()
    check_values(rank, 0)


def test_waits_for_what_is_under_way(ranks, device):
    ranks(outstanding_body, 2, device)


def aborted_body(rank: Rank) -> None:
    """abort() while there is no memory to tell the peers through: they hear of it when they want theirs back."""
    check_values(rank, 0)
    mnnvl_backend.release_memory()
    if rank.rank == 1:
        dist.group.WORLD._get_backend(rank.device).abort()
        with pytest.raises(dist.DistBackendError, match="abort"):
            dist.all_reduce(torch.ones(3, device=rank.device))
    with pytest.raises(RuntimeError, match=r"rank 1\b"):
        mnnvl_backend.restore_memory()
    if rank.rank == 0:
        with pytest.raises(RuntimeError, match="not attached"):
            dist.all_reduce(torch.ones(3, device=rank.device))


def test_aborted_meanwhile(ranks, device):
    ranks(aborted_body, 2, device, group_timeout=10)


def other_groups_body(rank: Rank) -> None:
    """A group of its own sleeps by itself, and a gloo one has nothing to give."""
    part = dist.new_group([0, 1])
    gloo = dist.new_group([0, 1, 2], backend="gloo")
    check_values(rank, 0)
    if rank.rank < 2:
        x = torch.ones(3, device=rank.device)
        dist.all_reduce(x, group=part)
        assert mnnvl_backend.release_memory(part) > 0
        with pytest.raises(RuntimeError, match="not attached"):
            dist.all_reduce(x, group=part)
    check_values(rank, 1)
    if rank.rank < 2:
        mnnvl_backend.restore_memory(part)
        dist.all_reduce(x, group=part)
        assert (x == 4).all()
    for call in (mnnvl_backend.release_memory, mnnvl_backend.restore_memory):
        with pytest.raises(ValueError, match=rf"{call.__name__}: group: expected a backend 'mnnvl'"):
            call(gloo)


def test_other_groups(ranks, device):
    ranks(other_groups_body, 3, device)


def late_body(rank: Rank) -> None:
    """A rank that doesn't come: named by the others, who keep their memory."""
    check_values(rank, 0)
    if rank.rank == 0:
        backend = dist.group.WORLD._get_backend(rank.device)
        backend.set_timeout(timedelta(seconds=1))
        with pytest.raises(RuntimeError, match=r"rank 1\b|rank\(s\) 1\b"):
            mnnvl_backend.release_memory()
        backend.set_timeout(rank.group_timeout)
    rank.meet()
    check_values(rank, 1)
    assert mnnvl_backend.release_memory() > 0
    mnnvl_backend.restore_memory()
    check_values(rank, 2)


def test_a_rank_that_does_not_come(ranks, device):
    ranks(late_body, 2, device)


def graph_body(rank: Rank) -> None:
    """Collectives and messages captured before the release, replayed after the restore; device memory comes back."""
    n, after, before = rank.world_size, (rank.rank + 1) % rank.world_size, (rank.rank - 1) % rank.world_size
    numel = 70_001
    source = torch.zeros(numel, device=rank.device)
    summed, received = torch.zeros_like(source), torch.zeros_like(source)
    gathered = torch.zeros(n * numel, device=rank.device)

    def calls() -> None:
        summed.copy_(source)
        dist.all_reduce(summed)
        dist.all_gather_into_tensor(gathered, source)
        works = [dist.isend(source, after), dist.irecv(received, before)]
        for work in works:
            work.wait()

    def check(seed: int, run: Callable[[], None]) -> None:
        inputs = [random_input(r, numel, torch.float32, seed) for r in range(n)]
        source.copy_(inputs[rank.rank])
        run()
        assert_bits(summed, rank_order_sum(inputs), f"sum, seed {seed}")
        assert_bits(gathered, torch.cat(inputs), f"gathered, seed {seed}")
        assert_bits(received, inputs[before], f"received, seed {seed}")

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    for seed in range(0, 30, 10):
        for step in range(4 + seed // 10):
            check(seed + step, graph.replay if step != 1 else calls)
        torch.cuda.synchronize()
        rank.meet(f"before {seed}")
        free = torch.cuda.mem_get_info(rank.device)[0]
        rank.meet(f"seen {seed}")
        freed = mnnvl_backend.release_memory()
        assert freed >= 48 << 20
        assert torch.cuda.mem_get_info(rank.device)[0] - free >= freed
        rank.meet(f"asleep {seed}")
        mnnvl_backend.restore_memory()
        check(seed + 8, graph.replay)
        check(seed + 9, calls)


@cuda_only
@pytest.mark.parametrize("world_size", [2, 4])
def test_graphs_captured_before(ranks, world_size):
    if world_size > 2:
        want_gpus("cuda", world_size)
    ranks(graph_body, world_size, "cuda", timeout=120)


def both_devices_body(rank: Rank) -> None:
    """The transports of both device types of one group."""
    dist.all_reduce(torch.ones(3, device=rank.device))
    alone = mnnvl_backend.release_memory()
    mnnvl_backend.restore_memory()
    dist.all_reduce(torch.ones(3))
    assert mnnvl_backend.release_memory() > alone > 0
    for device in (rank.device, "cpu"):
        with pytest.raises(RuntimeError, match="not attached"):
            dist.all_reduce(torch.ones(3, device=device))
    mnnvl_backend.restore_memory()
    for device in (rank.device, "cpu"):
        x = torch.ones(3, device=device)
        dist.all_reduce(x)
        assert (x == rank.world_size).all()


@cuda_only
def test_both_device_types(ranks):
    ranks(both_devices_body, 2, "cuda")
