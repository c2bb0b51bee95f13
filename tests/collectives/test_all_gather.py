"""all_gather into a list and into one tensor; the object collectives that stand on it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import (
    EVERY_DTYPE,
    all_reduce_works,
    gather_body,
    in_the_middle,
    random_input,
    raw_bytes,
    uneven_objects_body,
    values,
)


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


def gather_into(rank: Rank, outs: list[torch.Tensor], x: torch.Tensor, async_op: bool = False) -> None:
    work = dist.all_gather(outs, x, async_op=async_op)
    if work is not None:
        work.wait()
    if rank.device.type == "cuda":
        torch.cuda.synchronize()


def uneven_body(rank: Rank, factors: list[int]) -> None:
    """Rank r gives r * factor + 1 elements, and then, the other way round, 0 and more."""
    n = rank.world_size
    for seed, factor in enumerate(factors):
        for numels in ([r * factor + 1 for r in range(n)], [(n - 1 - r) * factor for r in range(n)]):
            for dtype in (torch.uint8, torch.bfloat16, torch.complex64):
                expected = [values(r, numels[r], dtype, seed) for r in range(n)]
                x, check_input = in_the_middle(expected[rank.rank], seed % 4, rank.device)
                for async_op in (False, True):
                    empty = [values(n, numel, dtype, seed) for numel in numels]
                    places = [in_the_middle(e, (seed + r) % 4, rank.device) for r, e in enumerate(empty)]
                    gather_into(rank, [out for out, _ in places], x, async_op)
                    for r, (out, check) in enumerate(places):
                        assert torch.equal(raw_bytes(out), raw_bytes(expected[r])), f"{numels} x {dtype}, rank {r}'s"
                        check()
                check_input()
    all_reduce_works(rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_uneven_lists(ranks, device, world_size):
    """Every rank's contribution has a size of its own, as with NCCL; nothing, on some."""
    ranks(uneven_body, world_size, device, args=([1, 7, 1000, 70_001],), timeout=120)


def test_large_uneven_lists(ranks, device):
    """One rank gives what takes many steps, the others nothing or little."""
    ranks(uneven_body, 3, device, args=([2_500_001],), options={"workspace_bytes": 1 << 20})


def uneven_layouts_body(rank: Rank) -> None:
    """Outputs and inputs of several dimensions, transposed and strided, of another size from each rank."""
    n, device = rank.world_size, rank.device
    contributions = [torch.arange(5.0 * (r + 1)).view(5, r + 1) + 100 * r for r in range(n)]
    wide = torch.zeros(5, 2 * n, device=device)
    outs = [torch.zeros(r + 1, 5, device=device).t() for r in range(n)]
    outs[-1] = wide[:, ::2]
    gather_into(rank, outs, contributions[rank.rank].to(device))
    for r in range(n):
        assert torch.equal(outs[r].cpu(), contributions[r])
    assert torch.equal(wide[:, 1::2].cpu(), torch.zeros(5, n)), "wrote between the columns"


def test_uneven_lists_that_are_not_contiguous(ranks, device):
    ranks(uneven_layouts_body, 3, device)


def modes_body(rank: Rank) -> None:
    """Outputs that have to be copied to at the end: in the caller's modes, whichever thread does it."""
    n, device = rank.world_size, rank.device
    contributions = [torch.arange(12.0).view(3, 4) + 100 * r for r in range(n)]
    for async_op in (False, True):
        with torch.inference_mode():
            outs = [torch.empty(4, 3, device=device).t() for _ in range(n)]
            gather_into(rank, outs, contributions[rank.rank].to(device), async_op)
            assert all(torch.equal(o.cpu(), c) for o, c in zip(outs, contributions, strict=True))
        parameters = [torch.nn.Parameter(torch.zeros(4, 3, device=device)) for _ in range(n)]
        with torch.no_grad():
            gather_into(rank, [p.t() for p in parameters], contributions[rank.rank].to(device), async_op)
        assert all(torch.equal(p.detach().t().cpu(), c) for p, c in zip(parameters, contributions, strict=True))
        all_reduce_works(rank)


def test_outputs_written_in_the_callers_modes(ranks, device):
    """Inference mode; parameters under no_grad. All of them transposed."""
    ranks(modes_body, 2, device)


def expanded_body(rank: Rank) -> None:
    """One rank gives an output that can't hold what is gathered: it hears before anything is sent, and may try again."""
    n, device = rank.world_size, rank.device
    all_reduce_works(rank)
    x = torch.full((4,), float(rank.rank), device=device)
    outs = [torch.empty(4, device=device) for _ in range(n)]
    for async_op in (False, True):
        if rank.rank == 0:
            refused = [torch.empty(1, device=device).expand(4), *outs[1:]]
            with pytest.raises(ValueError, match="mnnvl all_gather: tensor_list.*expand"):
                dist.all_gather(refused, x, async_op=async_op)
        gather_into(rank, outs, x, async_op)
        assert [o.tolist() for o in outs] == [[float(r)] * 4 for r in range(n)]
    all_reduce_works(rank)


def test_expanded_outputs_are_refused_before_anything_is_sent(ranks, device):
    ranks(expanded_body, 2, device)


def aliases_body(rank: Rank, numel: int) -> None:
    """The input lies where another rank's contribution goes. All that is gathered is what the input was at the call."""
    n, device = rank.world_size, rank.device
    contributions = [random_input(r, numel, torch.float32, 3) for r in range(n)]
    expected = torch.cat(contributions)
    for async_op in (False, True):
        for place in range(n):
            outs = [torch.zeros(numel, device=device) for _ in range(n)]
            x = outs[place]
            x.copy_(contributions[rank.rank])
            gather_into(rank, outs, x, async_op)
            assert torch.equal(torch.cat(outs).cpu(), expected), f"list, input is output {place}"
        for offset in [*range(0, n * numel, numel), numel // 2]:  # the last one straddles two ranks' places
            out = torch.zeros(n * numel, device=device)
            x = out[offset : offset + numel]
            x.copy_(contributions[rank.rank])
            work = dist.all_gather_into_tensor(out, x, async_op=async_op)
            if work is not None:
                work.wait()
            assert torch.equal(out.cpu(), expected), f"one tensor, input at {offset}"


@pytest.mark.parametrize("numel", [3, 400_001])
def test_the_input_may_lie_in_any_output(ranks, device, numel):
    ranks(aliases_body, 3, device, args=(numel,))


def no_graph(t: torch.Tensor) -> bool:
    """torch itself may mark what a c10d operation returns, with a node that only raises."""
    return t.grad_fn is None or "WarnNotImplemented" in repr(t)


def requires_grad_body(rank: Rank) -> None:
    n, device = rank.world_size, rank.device
    mine = torch.full((3, 2), rank.rank + 1.0, device=device)
    expected = [[[r + 1.0] * 2] * 3 for r in range(n)]

    def whole(**kwargs) -> torch.Tensor:
        return torch.zeros(3 * n, 2, device=device, **kwargs)

    def parts(**kwargs) -> list[torch.Tensor]:
        return [torch.zeros(3, 2, device=device, **kwargs) for _ in range(n)]

    for async_op in (False, True):
        for x in (mine, mine.clone().requires_grad_(), mine.clone().requires_grad_().t().contiguous().t()):
            wide = torch.zeros(3, 2 * n, device=device)
            columns = list(wide.chunk(n, 1))
            for outs in (parts(), parts(requires_grad=True), columns):
                gather_into(rank, outs, x, async_op)
                assert [o.tolist() for o in outs] == expected
                assert all(no_graph(o) for o in outs)
                assert all(o.is_leaf for o in outs if o.requires_grad)
            assert no_graph(wide)
            for out in (whole(), whole(requires_grad=True)):
                work = dist.all_gather_into_tensor(out, x.contiguous(), async_op=async_op)
                if work is not None:
                    work.wait()
                assert out.view(n, 3, 2).tolist() == expected
                assert no_graph(out)
            outs = [whole(), whole()]
            with dist._coalescing_manager(async_ops=async_op, device=None) as manager:
                for out in outs:
                    dist.all_gather_into_tensor(out, x.contiguous())
            if async_op:
                manager.wait()
            assert all(out.view(n, 3, 2).tolist() == expected and no_graph(out) for out in outs)
        y = torch.nn.Parameter(mine.clone())
        for call in (dist.all_reduce, lambda t, **kw: dist.broadcast(t, 0, **kw)):
            work = call(y, async_op=async_op)
            if work is not None:
                work.wait()
            assert y.is_leaf
        assert y.tolist() == [[n * (n + 1) / 2] * 2] * 3


@pytest.mark.parametrize("world_size", [1, 2])
def test_tensors_that_require_grad(ranks, device, world_size):
    """Numbers and no graph, whatever requires grad, and the same with one rank."""
    ranks(requires_grad_body, world_size, device)
