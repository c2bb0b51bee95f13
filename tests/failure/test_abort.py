"""abort(): ends every wait of this rank and of its peers."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from failing import call, new_default_group_works, works
from launcher import Rank, run_ranks


def abort_body(rank: Rank) -> None:
    works(rank)
    rank.meet("ready")
    backend = dist.group.WORLD._get_backend(rank.device)
    start = time.monotonic()
    if rank.rank == 0:
        timer = threading.Timer(0.3, backend.abort)
        timer.start()
        with pytest.raises(dist.DistBackendError, match="abort"):
            call(rank)
        timer.join()
    elif rank.rank == 1:
        with pytest.raises(dist.DistBackendError, match=r"rank 0\b"):  # waits too, and is told
            call(rank)
    assert time.monotonic() - start < 5
    rank.meet("told")
    backend.abort()
    backend.abort()
    with pytest.raises(dist.DistBackendError):
        call(rank)
    new_default_group_works(rank)


def test_abort_from_another_thread_ends_waits_everywhere(device):
    """Of this rank and of its peers, long before the timeout; rank 2 never calls."""
    run_ranks(abort_body, 3, device)


def abort_in_set_up_body(rank: Rank) -> None:
    rank.init(timeout=timedelta(seconds=4))
    if rank.rank == 0:
        backend = dist.group.WORLD._get_backend(rank.device)
        returned: list[float] = []
        start = time.monotonic()

        def abort() -> None:
            backend.abort()
            returned.append(time.monotonic() - start)

        timer = threading.Timer(0.3, abort)
        timer.start()
        with pytest.raises(dist.DistBackendError):
            call(rank)
        timer.join()
        assert returned[0] < 2, f"abort() itself took {returned[0]:.1f} s"
    rank.meet("failed")
    new_default_group_works(rank)


def test_abort_during_set_up_does_not_wait_for_it(device):
    """Rank 1 never comes to the set-up; abort() from another thread returns at once all the same."""
    run_ranks(abort_in_set_up_body, 2, device, backend=None)


def abort_idle_body(rank: Rank) -> None:
    dist.group.WORLD._get_backend(rank.device).abort()
    dist.destroy_process_group()
    new_default_group_works(rank)


def test_abort_before_any_collective(device):
    run_ranks(abort_idle_body, 2, device)
