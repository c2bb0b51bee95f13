"""gather: to every root, in every layout; inputs that lie in the root's list; gather_object."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from layouts import check, empty, finish, lay, layouts, values
from reference import all_reduce_works


def layouts_body(rank: Rank) -> None:
    n, me, device = rank.world_size, rank.rank, rank.device
    everybody = [values(r) for r in range(n)]
    for i, (given, wanted, async_op) in enumerate(layouts()):
        root = i % n
        outs = [empty(wanted, device) for _ in range(n)] if me == root else []
        finish(dist.gather(lay(values(me), given, device), outs or None, root, async_op=async_op))
        check(outs, everybody if me == root else [], f"{given} to {wanted} at {root}")
    for root in range(n):
        for place in range(n):  # the root's input is one of its outputs
            outs = [empty("contiguous", device) for _ in range(n)]
            x = outs[place].copy_(values(me))
            dist.gather(x, outs if me == root else None, root)
            if me == root:
                check(outs, everybody, f"input is output {place}")
    x = torch.empty(0, device=device)
    dist.gather(x, [x] * n if me == 0 else None, 0)
    objects: list[Any] = [None] * n
    dist.gather_object({"from": "x" * me}, objects if me == n - 1 else None, dst=n - 1)
    assert me != n - 1 or objects == [{"from": "x" * r} for r in range(n)]
    all_reduce_works(rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_roots_and_layouts(ranks, device, world_size):
    ranks(layouts_body, world_size, device)
