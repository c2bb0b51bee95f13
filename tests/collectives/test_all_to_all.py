"""all_to_all of lists and of one tensor: layouts, inputs as outputs, splits; ranks that have nothing to send or to get."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from layouts import check, empty, finish, lay, layouts, values
from reference import all_reduce_works


def layouts_body(rank: Rank) -> None:
    n, me, device = rank.world_size, rank.rank, rank.device
    expected = [values(r, me) for r in range(n)]
    for given, wanted, async_op in layouts():
        what = f"{given} to {wanted}"
        inputs = [lay(values(me, d), given, device) for d in range(n)]
        outs = [empty(wanted, device) for _ in range(n)]
        finish(dist.all_to_all(outs, inputs, async_op=async_op))
        check(outs, expected, what)
        whole = lay(torch.cat([values(me, d) for d in range(n)]), given, device)
        out = lay(torch.full(whole.shape, -5.0), wanted, device)
        finish(dist.all_to_all_single(out, whole, async_op=async_op))
        check([out], [torch.cat(expected)], f"tensor, {what}")
    inputs = [values(me, d).to(device) for d in range(n)]
    dist.all_to_all(inputs, inputs)
    check(inputs, expected, "in place")
    whole = torch.cat([values(me, d) for d in range(n)]).to(device)
    dist.all_to_all_single(whole, whole)
    check([whole], [torch.cat(expected)], "tensor, in place")
    all_reduce_works(rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_layouts(ranks, device, world_size):
    ranks(layouts_body, world_size, device)


def one_way_body(rank: Rank) -> None:
    """Rank 0 sends to all and gets nothing; then nobody has anything, which all ranks still go through together."""
    n, me, device = rank.world_size, rank.rank, rank.device
    backend = dist.group.WORLD._get_backend(device)
    for rows in (5, 0):
        go = [rows * (d > 0) if me == 0 else 0 for d in range(n)]
        come = [rows * (r == 0 and me > 0) for r in range(n)]
        x = torch.arange(2.0 * sum(go), device=device).view(-1, 2)
        out = torch.full((sum(come), 2), -5.0, device=device)
        before = backend._get_sequence_number_for_group()
        dist.all_to_all_single(out, x, come, go)
        assert backend._get_sequence_number_for_group() == before + 1
        begin = 2 * rows * (me - 1)
        assert out.flatten().tolist() == [float(begin + i) for i in range(2 * sum(come))]
    all_reduce_works(rank)


def test_ranks_without_anything_to_send(ranks, device):
    ranks(one_way_body, 3, device)
