"""barrier: nobody leaves before the last has come."""

from __future__ import annotations

import time

import pytest
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
