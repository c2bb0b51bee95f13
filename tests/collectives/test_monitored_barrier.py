"""monitored_barrier: tells who is missing, and leaves the group as it was. torch's own function asks for gloo; the group's
method doesn't."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from launcher import Rank
from reference import all_reduce_works


def arrive_body(rank: Rank) -> tuple[float, float]:
    group = dist.group.WORLD
    for _ in range(2):
        group.monitored_barrier(timedelta(seconds=30))
    time.sleep(0.3 * (rank.rank == 1))
    came = time.monotonic()
    group.monitored_barrier(timedelta(seconds=30), wait_all_ranks=True)
    left = time.monotonic()
    all_reduce_works(rank)
    return came, left


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_nobody_leaves_before_the_last_has_come(ranks, device, world_size):
    times = ranks(arrive_body, world_size, device)
    assert max(came for came, _ in times) <= min(left for _, left in times)


def missing_body(rank: Rank, missing: list[int], wait_all_ranks: bool) -> str:
    """Those that stay away come later, and are told what they missed; the next barrier is everybody's."""
    group = dist.group.WORLD
    all_reduce_works(rank)
    timeout = timedelta(seconds=0.7)
    if rank.rank in missing:
        rank.store.wait(["gave up"], timedelta(seconds=30))
    start = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        group.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)
    assert time.monotonic() - start < 5
    if rank.rank == 0:
        rank.store.set("gave up", "")
    rank.meet()
    group.monitored_barrier(timedelta(seconds=30))
    all_reduce_works(rank)
    return str(raised.value)


@pytest.mark.parametrize("wait_all_ranks", [False, True])
@pytest.mark.parametrize("missing", [[1], [1, 3]])
def test_who_is_missing(ranks, device, missing, wait_all_ranks):
    for text in ranks(missing_body, 4, device, args=(missing, wait_all_ranks)):
        assert text.startswith("mnnvl monitored_barrier: not all ranks came")
        assert f"(ranks {missing} of 4 did not come)" in text


def group_timeout_body(rank: Rank) -> None:
    """A barrier without a timeout of its own has the group's; one after abort() raises at once."""
    group = dist.new_group(backend="mnnvl", timeout=timedelta(seconds=0.5), pg_options=rank.options())
    backend = group._get_backend(rank.device)
    if rank.rank == 0:
        with pytest.raises(dist.DistBackendError, match="monitored_barrier.*rank 0 waited 0.5 s for rank 1"):
            backend.monitored_barrier()
        backend.abort()
        with pytest.raises(dist.DistBackendError, match="abort"):
            backend.monitored_barrier()
    all_reduce_works(rank)


def test_timeouts_and_aborts(ranks, device):
    ranks(group_timeout_body, 2, device)
