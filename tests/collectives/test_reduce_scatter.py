"""reduce_scatter of lists and of one tensor: layouts, and outputs that lie in the inputs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from layouts import check, empty, finish, lay, layouts, values
from reference import all_reduce_works


def total(n: int, destination: int) -> torch.Tensor:
    return sum((values(r, destination) for r in range(1, n)), values(0, destination))


def layouts_body(rank: Rank) -> None:
    n, me, device = rank.world_size, rank.rank, rank.device
    for given, wanted, async_op in layouts():
        what = f"{given} to {wanted}, async {async_op}"
        inputs, out = [lay(values(me, d), given, device) for d in range(n)], empty(wanted, device)
        finish(dist.reduce_scatter(out, inputs, async_op=async_op))
        check([out], [total(n, me)], what)
        whole = lay(torch.cat([values(me, d) for d in range(n)]), given, device)
        out = empty(wanted, device)
        finish(dist.reduce_scatter_tensor(out, whole, async_op=async_op))
        check([out], [total(n, me)], f"tensor, {what}")
    all_reduce_works(rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_layouts(ranks, device, world_size):
    ranks(layouts_body, world_size, device)


def aliases_body(rank: Rank) -> None:
    """The output is an input, its own or another's, lies across two, or all inputs are one tensor, the output too."""
    n, me, device = rank.world_size, rank.rank, rank.device
    for async_op in (False, True):
        for place in [0, 12 * me, 12 * (n - 1), 6 if n > 1 else 0]:
            storage = torch.cat([values(me, d) for d in range(n)]).flatten().to(device)
            for whole in (False, True):
                x = storage.clone()
                out = x[place : place + 12]
                inputs = list(x.chunk(n))
                if whole:
                    finish(dist.reduce_scatter_tensor(out, x, async_op=async_op))
                else:
                    finish(dist.reduce_scatter(out, inputs, async_op=async_op))
                assert out.tolist() == total(n, me).flatten().tolist(), (place, whole)
        x = values(me).to(device)
        finish(dist.reduce_scatter(x, [x] * n, async_op=async_op))
        assert x.tolist() == total(n, 0).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_outputs_that_lie_in_the_inputs(ranks, device, world_size):
    ranks(aliases_body, world_size, device)


def coalesced_body(rank: Rank) -> None:
    """Called by itself; nothing in, nothing out."""
    n, me, device = rank.world_size, rank.rank, rank.device
    backend = dist.group.WORLD._get_backend(device)
    opts = dist.distributed_c10d.ReduceScatterOptions()
    group = dist.group.WORLD
    wholes = [torch.cat([values(me, d) * (i + 1) for d in range(n)]).to(device) for i in range(3)]
    outs = [empty("contiguous", device) for _ in wholes]
    group.reduce_scatter_tensor_coalesced(outs, wholes, opts).wait()
    check(outs, [total(n, me) * (i + 1) for i in range(3)], "coalesced")
    with pytest.raises(ValueError, match="mnnvl reduce_scatter_tensor_coalesced: outputs: expected 3.*got 2"):
        group.reduce_scatter_tensor_coalesced(outs[:2], wholes, opts)
    before = backend._get_sequence_number_for_group()
    for numel in (0, 3):
        out = torch.full((numel,), 1.0, device=device)
        dist.reduce_scatter_tensor(out, torch.ones(numel * n, device=device))
        assert out.tolist() == [float(n)] * numel
    assert backend._get_sequence_number_for_group() == before + (n > 1), "what has no elements isn't sent"


@pytest.mark.parametrize("world_size", [1, 2])
def test_coalesced_and_empty(ranks, device, world_size):
    ranks(coalesced_body, world_size, device)
