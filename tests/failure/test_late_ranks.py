"""A rank that is late, never comes, or calls something else: an error at the timeout that names it."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from failing import SHORT, call, new_default_group_works, works
from launcher import Rank, run_ranks


def late_body(rank: Rank) -> list[str]:
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    texts = []
    if rank.rank != 1:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError) as raised:
            call(rank)
        waited = time.monotonic() - start
        assert 1.8 < waited < 4, f"raised after {waited:.1f} s"
        texts.append(str(raised.value))
        device_ids = [rank.device.index] if rank.device.type == "cuda" else None
        x = torch.ones(1, device=rank.device)
        for again in (
            lambda: call(rank),
            lambda: dist.barrier(device_ids=device_ids),
            lambda: dist.broadcast(x, 0),
        ):
            start = time.monotonic()
            with pytest.raises(dist.DistBackendError) as raised:
                again()
            assert time.monotonic() - start < 1, "a broken group must not wait again"
            texts.append(str(raised.value))
    rank.meet("failed")
    if rank.rank == 1:
        with pytest.raises(dist.DistBackendError):  # it is told, though it never waited
            call(rank)
    new_default_group_works(rank)
    return texts


def test_a_rank_that_does_not_call(device):
    """The others raise at the group's timeout and name it, later calls say the same, and a new group works."""
    texts = run_ranks(late_body, 3, device, backend=None)
    for rank in (0, 2):
        assert "rank 1" in texts[rank][0]
        assert texts[rank] == [texts[rank][0]] * 4
    assert "timeout" in texts[0][0] + texts[2][0] or "deadline" in texts[0][0] + texts[2][0]


def pending_body(rank: Rank) -> None:
    """Async calls queued behind one that fails all fail, and destroy doesn't wait for each one's timeout."""
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    if rank.rank == 0:
        start = time.monotonic()
        xs = [torch.ones(100, device=rank.device) for _ in range(5)]
        pending = [dist.all_reduce(x, async_op=True) for x in xs]
        futures = [work.get_future() for work in pending]
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        for work in pending:
            with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
                work.wait()
        if rank.device.type == "cpu":
            for future in futures:
                with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
                    future.wait()
        dist.destroy_process_group()
        assert time.monotonic() - start < 5
    rank.meet("failed")
    new_default_group_works(rank)


def test_pending_calls_fail_together(device):
    run_ranks(pending_body, 2, device, backend=None)


def blocking_wait_body(rank: Rank) -> None:
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    if rank.rank == 0:
        with pytest.raises(dist.DistBackendError, match=r"rank 1\b"):
            dist.all_reduce(torch.ones(3, device=rank.device))
    rank.meet("failed")


def test_blocking_wait_raises_where_it_happened(device):
    """MNNVL_BLOCKING_WAIT=1: without any synchronisation the call that failed raises. On the CPU it always does."""
    run_ranks(blocking_wait_body, 2, device, backend=None, env={"MNNVL_BLOCKING_WAIT": "1"})


def never_arrives_body(rank: Rank) -> str:
    rank.init(timeout=SHORT)
    text = ""
    if rank.rank != 2:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError) as raised:
            call(rank)
        assert time.monotonic() - start < 8
        text = str(raised.value)
    rank.meet("failed")
    new_default_group_works(rank)
    return text


def test_a_rank_that_never_arrives_at_set_up(device):
    texts = run_ranks(never_arrives_body, 3, device, backend=None)
    for rank in (0, 1):
        assert "rank 2" in texts[rank], texts[rank]


def disagreeing_body(rank: Rank) -> bool:
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    start = time.monotonic()
    raised = False
    try:
        for _ in range(2):
            call(rank, 10_000_000) if rank.rank == 0 else dist.barrier()
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
    except dist.DistBackendError:
        raised = True
    assert time.monotonic() - start < 10
    new_default_group_works(rank)
    return raised


def test_ranks_that_call_different_things_do_not_hang(device):
    """Outside debug mode nothing compares the calls, but an all_reduce of many chunks against barriers ends by the
    timeout at the latest, and a new group works."""
    assert any(run_ranks(disagreeing_body, 2, device, backend=None))


def late_to_set_up_body(rank: Rank) -> None:
    """Rank 1 comes when rank 0 has given up: it is told at once, and a further attempt brings them together."""
    rank.init(timeout=timedelta(seconds=2))
    if rank.rank == 0:
        with pytest.raises(dist.DistBackendError, match="waited 2 s for rank 1"):
            call(rank)
    rank.meet("given up")
    if rank.rank == 1:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError, match="rank 0 waited 2 s for rank 1"):
            call(rank)
        assert time.monotonic() - start < 1
    rank.meet("told")
    works(rank)


def test_late_to_the_set_up(device):
    run_ranks(late_to_set_up_body, 2, device, backend=None)
