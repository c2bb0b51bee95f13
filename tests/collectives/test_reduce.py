"""reduce: to every root, whose tensor alone is written."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from layouts import check, finish, lay, values
from reference import all_reduce_works


def layouts_body(rank: Rank) -> None:
    n, me = rank.world_size, rank.rank
    total = sum((values(r) for r in range(1, n)), values(0))
    for root in range(n):
        for layout in ("contiguous", "transposed"):
            for async_op in (False, True):
                x = lay(values(me), layout, rank.device)
                finish(dist.reduce(x, root, async_op=async_op))
                check([x], [total if me == root else values(me)], f"{layout} to {root}")
    dist.reduce(torch.empty(0, device=rank.device), 0)
    all_reduce_works(rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_roots_and_layouts(ranks, device, world_size):
    ranks(layouts_body, world_size, device)
