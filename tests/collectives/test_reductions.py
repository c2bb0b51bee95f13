"""all_reduce of what the all-reduce kernels don't do: other operations and other dtypes, gathered and folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import DTYPES, all_reduce_works, random_input, values

FOLDS: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: torch.add, dist.ReduceOp.AVG: torch.add, dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.BAND: torch.bitwise_and,
    dist.ReduceOp.BOR: torch.bitwise_or, dist.ReduceOp.BXOR: torch.bitwise_xor,
}  # fmt: skip
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [*DTYPES, torch.float64]
LOGICAL = {dist.ReduceOp.SUM: torch.logical_or, dist.ReduceOp.PRODUCT: torch.logical_and}


def other_reductions_body(rank: Rank, numel: int, ops: list[Any]) -> None:
    """What the all-reduce kernels don't do: folded in rank order, 16-bit floats in float32 and rounded once."""
    for op in ops:
        fold = FOLDS[op]
        bitwise = op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)
        integers = [] if op == dist.ReduceOp.AVG else [*INTEGERS, torch.bool]
        for seed, dtype in enumerate(integers + ([] if bitwise else FLOATS)):
            floating = dtype.is_floating_point
            make = random_input if floating else values
            inputs = [make(r, numel, dtype, seed) for r in range(rank.world_size)]
            x = inputs[rank.rank].clone().to(rank.device)
            dist.all_reduce(x, op=op, async_op=True).wait()
            wide = [i.float() if dtype in DTYPES else i for i in inputs]
            expected = wide[0]
            for theirs in wide[1:]:
                expected = (LOGICAL.get(op, fold) if dtype == torch.bool else fold)(expected, theirs)
            if op == dist.ReduceOp.AVG:
                expected = expected / rank.world_size
            assert x.dtype == dtype
            assert torch.equal(x.cpu(), expected.to(dtype)), f"{op} of {numel} x {dtype}"


@pytest.mark.parametrize("numel", [1, 1001])
def test_every_other_reduction(ranks, device, numel):
    ranks(other_reductions_body, 3, device, args=(numel, list(FOLDS)))


def test_other_reductions_of_large_tensors(ranks, device):
    ranks(other_reductions_body, 2, device, args=(1_100_000, [dist.ReduceOp.MAX]))


def complex_body(rank: Rank) -> None:
    for part in (torch.float32, torch.float64):
        parts = [random_input(r, 60, part, 9) for r in range(rank.world_size)]
        x = torch.view_as_complex(parts[rank.rank].view(30, 2).clone()).to(rank.device)
        dist.all_reduce(x)
        expected = sum(parts[1:], parts[0])
        assert torch.equal(torch.view_as_real(x).flatten().cpu(), expected)


def test_complex_sums_are_sums_of_their_parts(ranks, device):
    ranks(complex_body, 3, device)


def flush_denormals_body(rank: Rank, numel: int) -> bool:
    """Rank 1's main thread treats denormals as zeros, which is its own affair. Returns whether it can."""
    n, device = rank.world_size, rank.device

    def tiny(r: int, dtype: torch.dtype) -> torch.Tensor:
        """Denormals of another scale on every rank."""
        steps = torch.arange(numel, dtype=torch.float64) % 97 + 1 + r
        return (steps * torch.finfo(dtype).smallest_normal / (128 << r)).to(dtype)

    integer = {
        torch.float64: torch.int64,
        torch.float32: torch.int32,
        torch.bfloat16: torch.int16,
        torch.float16: torch.int16,
    }
    ops = {dist.ReduceOp.SUM: torch.add, dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.MAX: torch.maximum}
    cases = [(op, dtype) for op in ops for dtype in integer]
    inputs = {dtype: [tiny(r, dtype) for r in range(n)] for dtype in integer}
    expected = {}
    for op, dtype in cases:
        wide = [x.float() if dtype.itemsize == 2 else x for x in inputs[dtype]]
        total = wide[0]
        for x in wide[1:]:
            total = ops[op](total, x)
        expected[op, dtype] = total.to(dtype).view(integer[dtype])
        assert bool((expected[op, dtype] != 0).any())
    all_reduce_works(rank)
    supported = torch.set_flush_denormal(rank.rank == 1)
    try:
        for i, (op, dtype) in enumerate(cases):
            x = inputs[dtype][rank.rank].to(device, copy=True)
            work = dist.all_reduce(x, op=op, async_op=(rank.rank + i) % 2 == 0)  # on the queue's thread or on this one
            if work is not None:
                work.wait()
            differing = int((x.cpu().view(integer[dtype]) != expected[op, dtype]).sum())
            assert differing == 0, f"{differing} of {numel} elements of {op} of {dtype} on rank {rank.rank}"
    finally:
        torch.set_flush_denormal(False)
    return supported


@pytest.mark.parametrize("numel", [1, 200_001])
def test_a_rank_that_flushes_denormals(ranks, device, numel):
    """The same bits on all ranks all the same: every reduction, on whichever thread it runs."""
    if not all(ranks(flush_denormals_body, 2, device, args=(numel,))):
        pytest.skip("this processor can't flush denormals")
