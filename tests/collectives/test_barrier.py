"""barrier: nobody leaves before the last has come."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import all_reduce_works


def barrier_body(rank: Rank, late: int, async_op: bool) -> tuple[float, float]:
    all_reduce_works(rank)  # set-up is a barrier of its own
    if rank.rank == late:
        time.sleep(0.3)
    device_ids = [rank.device.index] if rank.device.type == "cuda" else None
    came = time.monotonic()  # one clock for all processes of a host
    work = dist.barrier(async_op=async_op, device_ids=device_ids)
    if async_op:
        work.wait()
    return came, time.monotonic()


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("late", [0, 2])
def test_barrier_waits_for_the_last(ranks, device, late, async_op):
    times = ranks(barrier_body, 3, device, args=(late, async_op))
    assert max(came for came, _ in times) <= min(left for _, left in times)


def device_ids_body(rank: Rank) -> None:
    all_reduce_works(rank)
    for async_op in (False, True):
        work = dist.barrier(device_ids=[rank.rank], async_op=async_op)
        if work is not None:
            work.wait()
    all_reduce_works(rank)


@pytest.mark.skipif(torch.cuda.is_available(), reason="device_ids are real here")
def test_device_ids_without_a_gpu(ranks):
    """Programs pass their local rank on any machine; without GPUs it means nothing."""
    ranks(device_ids_body, 2)
