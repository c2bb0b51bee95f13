"""Set-ups of groups and workspaces that failed are repaired in the same store."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank, run_ranks

from mnnvl_backend import Mapping, MNNVLAllReduceFusionWorkspace, trtllm_mnnvl_allreduce
from mnnvl_backend.flashinfer.control import StoreComm


def works(rank: Rank) -> None:
    x = torch.full((5,), rank.rank + 1.0, device=rank.device)
    dist.all_reduce(x)
    assert x.tolist() == [rank.world_size * (rank.world_size + 1) / 2] * 5


def group_again_body(rank: Rank, alone: int) -> None:
    """Rank 0 alone fails to set the group up, often; then all make the group anew, in the same store."""
    for turn in range(alone):
        rank.init(timeout=timedelta(seconds=0.3))
        if rank.rank == 0:
            for _ in range(2):
                with pytest.raises(dist.DistBackendError, match=r"rank 0 waited 0.3 s for"):
                    works(rank)
        rank.meet(f"failed {turn}")
        dist.destroy_process_group()
    for late in range(rank.world_size):  # whoever is last, the others don't take what was left for its word
        if rank.rank == late:
            time.sleep(0.3)
        rank.init(timeout=timedelta(seconds=20))
        works(rank)
        rank.meet(f"worked {late}")
        dist.destroy_process_group()


@pytest.mark.parametrize("alone", [1, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_group_made_again_in_the_same_store_works_at_once(device, world_size, alone):
    run_ranks(group_again_body, world_size, device, backend=None, args=(alone,))


def same_group_body(rank: Rank) -> None:
    """An attempt of rank 0 alone; rank 1, late, hears of it; the next attempt of the same group works."""
    rank.init(timeout=timedelta(seconds=1))
    for _ in range(2):
        if rank.rank == 0:
            with pytest.raises(dist.DistBackendError, match=r"rank 0 waited 1 s for rank 1"):
                works(rank)
    rank.meet("failed")
    if rank.rank == 1:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError, match=r"rank 0 waited 1 s for rank 1"):
            works(rank)
        assert time.monotonic() - start < 0.7
    rank.meet("told")
    works(rank)


def test_the_same_group_is_set_up_at_the_next_attempt(device):
    run_ranks(same_group_body, 2, device, backend=None)


def abort_body(rank: Rank) -> None:
    rank.init(timeout=timedelta(seconds=20))
    if rank.rank == 0:
        backend = dist.group.WORLD._get_backend(rank.device)
        timer = threading.Timer(0.3, backend.abort)
        timer.start()
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError, match="abort"):
            works(rank)
        assert time.monotonic() - start < 5
        timer.join()
    rank.meet("aborted")
    if rank.rank == 1:
        start = time.monotonic()
        with pytest.raises(dist.DistBackendError, match=r"abort\(\) was called on rank 0 during the set-up"):
            works(rank)
        assert time.monotonic() - start < 1
    rank.meet("told")
    dist.destroy_process_group()
    rank.init()
    works(rank)


def test_an_abort_while_the_ranks_meet_is_told_to_who_comes_late(device):
    run_ranks(abort_body, 2, device, backend=None)


def long_timeout_body(rank: Rank) -> None:
    for i, timeout in enumerate([timedelta(days=109500), timedelta(days=365_000_000)]):
        dist.init_process_group(
            "mnnvl",
            store=dist.PrefixStore(f"long {i}", rank.store),
            rank=rank.rank,
            world_size=rank.world_size,
            pg_options=rank.options(timeout=timeout),
            timeout=timedelta(days=1),
        )
        works(rank)
        dist.destroy_process_group()


def test_very_long_timeouts(device):
    run_ranks(long_timeout_body, 2, device, backend=None)


def workspace_body(rank: Rank, mistake: dict[str, object]) -> None:
    """Attempt 1: the last rank makes a mistake that only it makes. Its peers hear at once; the next attempts work."""
    mapping = Mapping(rank.world_size, rank.rank, tp_size=2, pp_size=rank.world_size // 2)
    good = {"buffer_size_in_bytes": 4096, "device": rank.device, "options": rank.options(timeout=timedelta(seconds=20))}
    last = rank.rank == rank.world_size - 1
    start = time.monotonic()
    with pytest.raises((TypeError, ValueError) if last else RuntimeError) as raised:
        MNNVLAllReduceFusionWorkspace(mapping, **{**good, **(mistake if last else {})})
    assert time.monotonic() - start < 5
    if not last:
        assert f"rank {rank.world_size - 1} gave it up: " in str(raised.value)
        assert next(iter(mistake)) in str(raised.value)
    rank.meet("failed")
    for _ in range(2):
        with MNNVLAllReduceFusionWorkspace(mapping, **good) as workspace:
            x = torch.ones(2, 8, device=rank.device)
            assert (trtllm_mnnvl_allreduce(x, workspace, False) == 2).all()


@pytest.mark.parametrize("mistake", [{"buffer_size_in_bytes": -1}, {"device": "meta"}])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_mistake_in_making_a_workspace_is_told_to_the_peers(device, world_size, mistake):
    run_ranks(workspace_body, world_size, device, backend="gloo", args=(mistake,))


def forked_body(rank: Rank) -> None:
    """A child of rank 1 makes a mistake, then none, and uses its parent's communicator. Nobody hears of it."""
    mapping = Mapping(2, rank.rank, tp_size=2)
    good: dict[str, Any] = {"buffer_size_in_bytes": 4096, "device": rank.device}
    own = StoreComm.of_group(None, timedelta(seconds=20))
    own.barrier()  # under way when the child comes
    pid = os.fork() if rank.rank == 1 else 0
    if rank.rank == 1 and pid == 0:
        try:
            with pytest.raises(ValueError, match="buffer_size_in_bytes"):
                MNNVLAllReduceFusionWorkspace(mapping, **{**good, "buffer_size_in_bytes": -1})
            for calls in (lambda: MNNVLAllReduceFusionWorkspace(mapping, **good), own.barrier, own.barrier):
                with pytest.raises(RuntimeError, match=f"belongs to process {os.getppid()}, .* a child by fork"):
                    calls()
            own.leave()
            os._exit(0)
        finally:
            os._exit(1)
    if rank.rank == 1:
        assert os.waitpid(pid, 0)[1] == 0
    own.barrier()
    own.leave()
    with MNNVLAllReduceFusionWorkspace(mapping, **good) as workspace:
        x = torch.ones(2, 8, device=rank.device)
        assert (trtllm_mnnvl_allreduce(x, workspace, False) == 2).all()


def test_a_forked_child_has_no_place_in_making_a_workspace():
    run_ranks(forked_body, 2, backend="gloo")
