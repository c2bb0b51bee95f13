"""all_gather into a list and into one tensor; the object collectives that stand on it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import EVERY_DTYPE, gather_body, uneven_objects_body


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_gather_of_every_dtype(ranks, device, world_size):
    ranks(gather_body, world_size, device, args=(EVERY_DTYPE, [0, 1, 3, 1001]), timeout=120)


def test_all_gather_of_large_tensors(ranks, device):
    options = {"workspace_bytes": 1 << 20}
    ranks(gather_body, 3, device, args=([torch.uint8, torch.float32], [1_500_001]), options=options)


def layouts_body(rank: Rank) -> None:
    n = rank.world_size
    contributions = [torch.arange(20.0).view(4, 5) + 100 * r for r in range(n)]
    x = contributions[rank.rank].to(rank.device)
    wide = torch.zeros(4, 10, device=rank.device)
    outs = [torch.zeros(5, 4, device=rank.device).t(), wide[:, ::2], torch.zeros(4, 5, device=rank.device)]
    dist.all_gather(outs, x)
    for r in range(n):
        assert torch.equal(outs[r].cpu(), contributions[r])
    assert torch.equal(wide[:, 1::2].cpu(), torch.zeros(4, 5)), "wrote between the columns"
    work = dist.all_gather(outs, x.t().contiguous().t() + 1, async_op=True)
    work.wait()
    assert all(torch.equal(outs[r].cpu(), contributions[r] + 1) for r in range(n))


def test_all_gather_with_outputs_that_are_not_contiguous(ranks, device):
    """Logical elements count: transposed and strided outputs, a transposed input."""
    ranks(layouts_body, 3, device)


def test_object_collectives_of_different_lengths(ranks, device):
    ranks(uneven_objects_body, 3, device)
