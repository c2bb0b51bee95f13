"""scatter: from every root, in every layout; outputs that lie in the root's list; scatter_object_list."""

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
    for i, (given, wanted, async_op) in enumerate(layouts()):
        root = i % n
        parts = [lay(values(root, d), given, device) for d in range(n)] if me == root else None
        out = empty(wanted, device)
        finish(dist.scatter(out, parts, root, async_op=async_op))
        check([out], [values(root, me)], f"{given} to {wanted} from {root}")
    for root in range(n):
        for place in range(n):  # the root's output is one of its inputs
            parts = [values(root, d).to(device) for d in range(n)]
            out = parts[place]
            dist.scatter(out, parts if me == root else None, root)
            check([out], [values(root, me)], f"output is input {place}")
    out = torch.empty(0, device=device)
    dist.scatter(out, [out] * n if me == 0 else None, 0)
    objects: list[Any] = [None]
    dist.scatter_object_list(objects, [{"to": d} for d in range(n)] if me == n - 1 else None, src=n - 1)
    assert objects == [{"to": me}]
    all_reduce_works(rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_roots_and_layouts(ranks, device, world_size):
    ranks(layouts_body, world_size, device)
