"""What the backend takes and gives back on a GPU, and that NCCL is for the exchange of handles alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launcher import Rank, run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

WORKSPACE = 64 << 20  # the default
ALLOWED = 64 << 20  # beyond the workspace, per rank
KERNELS = {"lamport", "epoch"}  # parts of our kernels' names


def profiled_body(rank: Rank) -> list[str]:
    """Names of everything that ran on the device during one of each collective, several sizes each."""
    xs = [torch.ones(n, device=rank.device) for n in (10, 100_000, 5_000_000)]
    device_ids = [rank.device.index]

    def everything() -> None:
        for x in xs:
            dist.all_reduce(x)
            dist.all_reduce(x, async_op=True).wait()
            dist.broadcast(x, 0)
            outs = [torch.empty_like(x) for _ in range(rank.world_size)]
            dist.all_gather(outs, x)
            dist.all_gather_into_tensor(torch.empty(rank.world_size * x.numel(), device=rank.device), x)
        dist.barrier(device_ids=device_ids)
        torch.cuda.synchronize()

    everything()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        everything()
    device = torch.autograd.DeviceType.CUDA
    return sorted({event.name for event in profile.events() if event.device_type == device})


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_nccl_kernel_runs(ranks, world_size):
    if world_size > max(2, torch.cuda.device_count()):
        pytest.skip(f"fewer than {world_size} CUDA devices")
    for names in ranks(profiled_body, world_size, "cuda", timeout=110):
        lower = [name.lower() for name in names]
        assert all(any(part in name for name in lower) for part in KERNELS), f"the profile misses our kernels: {names}"
        assert not [name for name in lower if "nccl" in name]


def used(rank: Rank) -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(rank.device)
    return total - free


def ranks_on_this_gpu(rank: Rank) -> int:
    count = torch.cuda.device_count()
    return sum(r % count == rank.device.index for r in range(rank.world_size))


def set_up_body(rank: Rank, workspace_bytes: int | None) -> tuple[int, int]:
    """Growth of the memory in use per rank, from a context and a tensor to a group that has worked; and what stays of
    it when the group is gone."""
    x = torch.ones(1 << 20, device=rank.device) * 2
    rank.meet("before")
    before = used(rank)
    rank.meet("measured")
    rank.init(workspace_bytes=workspace_bytes)
    dist.all_reduce(x)
    rank.meet("set up")
    grown = used(rank) - before
    rank.meet("measured again")
    dist.destroy_process_group()
    rank.meet("destroyed")
    return grown // ranks_on_this_gpu(rank), (used(rank) - before) // ranks_on_this_gpu(rank)


@pytest.mark.parametrize("workspace_bytes", [None, 8 << 20])
def test_set_up_takes_little_beside_the_workspace(workspace_bytes):
    """Under 64 MiB a rank, whatever exchanged the handles; most of that (kernels) may stay with the context."""
    world_size = min(4, max(2, torch.cuda.device_count()))
    for grown, stayed in run_ranks(set_up_body, world_size, "cuda", backend=None, args=(workspace_bytes,)):
        workspace = workspace_bytes or WORKSPACE
        assert grown >= workspace // 2, "the workspace isn't in what was measured"
        assert grown - workspace < ALLOWED
        assert stayed < ALLOWED


def cycles_body(rank: Rank, cycles: int) -> list[int]:
    x = torch.ones(1000, device=rank.device)
    in_use = []
    for i in range(cycles):
        rank.init(prefix=f"cycle{i}")
        dist.all_reduce(x)
        torch.cuda.synchronize()
        dist.destroy_process_group()
        rank.meet(f"destroyed {i}")
        in_use.append(used(rank))
        rank.meet(f"measured {i}")
    return in_use


def test_20_set_ups_give_their_memory_back():
    """After the first two, which may warm something up, not a workspace's worth stays, let alone one per cycle."""
    for in_use in run_ranks(cycles_body, 2, "cuda", backend=None, args=(20,), timeout=110):
        assert in_use[-1] - in_use[1] < 8 << 20, in_use


def large_tensors_body(rank: Rank) -> int:
    """Growth while collectives run on tensors far larger than the workspace: they go in chunks, through it alone."""
    x = torch.ones(128 << 20, dtype=torch.bfloat16, device=rank.device)
    dist.all_reduce(x[:8])
    rank.meet("ready")
    before = used(rank)
    rank.meet("measured")
    dist.all_reduce(x)
    dist.broadcast(x, 0)
    rank.meet("done")
    assert x[-1].item() == rank.world_size
    return used(rank) - before


def test_large_tensors_take_no_more():
    for grown in run_ranks(large_tensors_body, 2, "cuda"):
        assert grown < 8 << 20
