"""Groups and workspaces that come and go in the same processes, which are afterwards as they were before.

MNNVL_TEST_CYCLES: how many (default 25; a quarter of it on GPUs).
"""

from __future__ import annotations

import gc
import os

import pytest
import torch
import torch.distributed as dist
from failing import works
from launcher import Rank, run_ranks

from mnnvl_backend import Mapping, MNNVLAllReduceFusionWorkspace, trtllm_mnnvl_allreduce
from mnnvl_backend.tools.soak_growth import Change, Growth

CYCLES = int(os.environ.get("MNNVL_TEST_CYCLES", "25"))
WARM_UP = 8
SAMPLES = 10
HEAP_PER_CYCLE = 2048  # bytes, beside 256 KiB that a short run may grow by


def cycle(rank: Rank, number: int) -> None:
    """A default group, another one beside it, and a workspace: each made, used, destroyed."""
    rank.init(prefix=f"cycle {number}")
    works(rank)
    work = dist.all_reduce(torch.ones(5, device=rank.device), async_op=True)
    work.get_future().then(lambda future: None).wait()
    group = dist.new_group(backend="mnnvl", pg_options=rank.options())
    works(rank, group)
    dist.destroy_process_group(group)
    mapping = Mapping(rank.world_size, rank.rank, tp_size=rank.world_size)
    workspace = MNNVLAllReduceFusionWorkspace(mapping, buffer_size_in_bytes=65536, device=rank.device)
    x = torch.ones(2, 64, device=rank.device)
    assert (trtllm_mnnvl_allreduce(x, workspace, False) == rank.world_size).all()
    workspace.destroy()
    dist.destroy_process_group()


def body(rank: Rank, cycles: int) -> dict[str, Change]:
    for number in range(WARM_UP):
        cycle(rank, -1 - number)
    gc.freeze()  # what is looked through for garbage is what came since
    growth = Growth(rank.device)
    growth.sample(warming_up=True)
    for number in range(cycles):
        cycle(rank, number)
        if (number + 1) % max(1, cycles // SAMPLES) == 0:
            growth.sample(warming_up=False)
    growth.settle()
    assert not growth.grown(), growth.grown()  # no descriptor, thread or segment at all
    return growth.changes()


@pytest.mark.timeout(120 + CYCLES)
def test_what_comes_and_goes_leaves_nothing(device: str) -> None:
    cycles = CYCLES if device == "cpu" else max(5, CYCLES // 4)
    for rank, changes in enumerate(run_ranks(body, 2, device, backend=None, args=(cycles,), timeout=100 + cycles)):
        differences = {name: change.after - change.before for name, change in changes.items()}
        print(f"rank {rank}, {cycles} cycles: {differences}")  # bytes, but for counts
        assert differences["heap"] < (256 << 10) + HEAP_PER_CYCLE * cycles
