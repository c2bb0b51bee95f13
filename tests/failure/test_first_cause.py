"""What broke a group is remembered on every rank for ever; what only went wrong on a rank breaks nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from failing import SHORT, call, new_default_group_works, works
from faults_of_surroundings import limited_memory
from launcher import Rank, run_ranks


def refusals(rank: Rank) -> list[str]:
    """The text of every kind of later call, and of one more of the first kind."""
    device = rank.device
    x, ids = torch.ones(4, device=device), [device.index] if device.type == "cuda" else None
    whole = torch.empty(4 * rank.world_size, device=device)
    texts = []
    kinds: list[Callable[[], object]] = [
        lambda: call(rank),
        lambda: dist.broadcast(x, 0),
        lambda: dist.all_gather_into_tensor(whole, x),
        lambda: dist.barrier(device_ids=ids),
        lambda: dist.reduce_scatter_tensor(x, whole, op=dist.ReduceOp.MAX),
        lambda: call(rank),
    ]
    for again in kinds:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError) as raised:
            again()
        assert time.monotonic() - start < 1, "a broken group must not wait again"
        texts.append(str(raised.value))
    return texts


def timeout_then_abort_body(rank: Rank) -> list[str]:
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    backend = dist.group.WORLD._get_backend(rank.device)
    texts = []
    if rank.rank == 0:
        with pytest.raises(dist.DistBackendError) as raised:
            call(rank)
        texts.append(str(raised.value))
    rank.meet("failed")
    texts += refusals(rank)
    backend.abort()  # as users do then
    texts += refusals(rank)
    rank.meet("aborted")
    texts += refusals(rank)
    new_default_group_works(rank)
    return texts


def test_a_timeout_outlives_abort(device):
    """Rank 0 waited in vain: it says so for ever, and rank 1 that rank 0 did."""
    waited, told = run_ranks(timeout_then_abort_body, 2, device, backend=None)
    assert len(set(waited)) == 1, set(waited)
    assert len(set(told)) == 1, set(told)
    assert re.search(r"rank 0 waited .* for rank 1\b", waited[0])
    assert re.search(r"rank 0\b", told[0])
    assert "abort() was called" not in waited[0] + told[0]


def abort_then_close_body(rank: Rank) -> list[str]:
    """abort() on rank 0 while rank 1 waits for it, abort() on rank 1 afterwards."""
    works(rank)
    rank.meet("ready")
    backend = dist.group.WORLD._get_backend(rank.device)
    texts = []
    if rank.rank == 0:
        backend.abort()
    else:
        with pytest.raises(dist.DistBackendError) as raised:
            call(rank)
        texts.append(str(raised.value))
    rank.meet("told")
    texts += refusals(rank)
    backend.abort()
    texts += refusals(rank)
    return texts


def test_abort_says_where_it_was_called(device):
    called, told = run_ranks(abort_then_close_body, 2, device)
    assert len(set(called)) == 1, set(called)
    assert len(set(told)) == 1, set(told)
    assert re.search(r"abort\(\) was called.*rank 0\b|rank 0\b.*abort\(\) was called", called[0])
    assert re.search(r"rank 0\b.*abort\(\) was called", told[0])


def out_of_memory_body(rank: Rank) -> None:
    """Rank 0 has no memory left for what a call needs beside its tensors. It hears before anything is sent; when there
    is memory again, it calls again and meets rank 1, which has been waiting."""
    works(rank)
    numel = 3 << 20
    x = torch.full((numel,), float(rank.rank + 1), dtype=torch.float64)
    y = torch.full((numel // 1024, 1024), float(rank.rank + 1))
    outs = [torch.zeros(1024, numel // 1024).t() for _ in range(rank.world_size)]
    for name, collective in {
        "all_reduce": lambda: dist.all_reduce(x, op=dist._make_nccl_premul_sum(2.0)),
        "all_gather": lambda: dist.all_gather(outs, y),
    }.items():
        rank.meet(name)
        if rank.rank == 0:
            with limited_memory(4 << 20), pytest.raises(RuntimeError, match="allocate") as raised:
                collective()
            assert not isinstance(raised.value, dist.DistBackendError), raised.value
        collective()
        works(rank)
    assert bool((x == 6).all())
    assert all(bool((out == r + 1).all()) for r, out in enumerate(outs))


def test_a_rank_without_memory_breaks_nothing():
    """A process of its own, whose allocator keeps nothing back from earlier tests."""
    run_ranks(out_of_memory_body, 2, group_timeout=10)
