"""What reductions compute, on all_reduce; that the other operations compute the same is test_every_operation.py's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import CANONICAL_NAN, FOLDS, all_reduce_works, random_input, raw_bytes, reduced, values

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def every_reduction_body(rank: Rank, numel: int) -> None:
    """All that README's table lists, of any bits at all."""
    for op in FOLDS:
        floats = [] if op in ("BAND", "BOR", "BXOR") else CANONICAL_NAN
        flags = [] if op == "AVG" else [torch.bool]
        for seed, dtype in enumerate([*INTEGERS, *flags, *floats]):
            inputs = [values(r, numel, dtype, seed) for r in range(rank.world_size)]
            x = inputs[rank.rank].clone().to(rank.device)
            dist.all_reduce(x, op=getattr(dist.ReduceOp, op), async_op=True).wait()
            assert torch.equal(raw_bytes(x), raw_bytes(reduced(op, inputs))), f"{op} of {numel} x {dtype}"


@pytest.mark.parametrize("numel", [1, 1001])
def test_every_reduction(ranks, device, numel):
    ranks(every_reduction_body, 3, device, args=(numel,))


def edges_body(rank: Rank) -> None:
    nan, inf = float("nan"), float("inf")

    def all_reduced(op: str, dtype: torch.dtype, *pairs: tuple[float, float]) -> list[float]:
        x = torch.tensor([pair[rank.rank] for pair in pairs], dtype=torch.float64).to(dtype).to(rank.device)
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
        zeros = x.cpu().double()
        assert not bool(torch.signbit(zeros[zeros == 0]).any()), f"{op} of {dtype} gives -0"
        return [repr(value) for value in x.double().tolist()]

    for dtype in CANONICAL_NAN:
        for op in ("MIN", "MAX", "SUM", "PRODUCT", "AVG"):
            for pair in ((nan, 1.0), (1.0, nan)):
                assert all_reduced(op, dtype, pair) == ["nan"], f"{op} of {dtype}"
            assert all_reduced(op, dtype, (-0.0, -0.0)) == ["0.0"]
        assert all_reduced("MIN", dtype, (-0.0, 0.0), (0.0, -0.0)) == ["0.0", "0.0"]
    assert all_reduced("SUM", torch.float8_e4m3fn, (448.0, 448.0), (-448.0, -32.0)) == ["448.0", "-448.0"]
    assert all_reduced("PRODUCT", torch.float8_e5m2, (57344.0, 2.0), (-57344.0, 2.0)) == [repr(inf), repr(-inf)]
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        assert all_reduced("AVG", dtype, (-1.0, -2.0), (1.0, 2.0), (-4.0, 1.0)) == ["-1.0", "1.0", "-1.0"]


def test_edges(ranks, device):
    """Signs of zero, NaN, what is too large; averages of integers are cut off."""
    ranks(edges_body, 2, device)


def complex_body(rank: Rank) -> None:
    backend = dist.group.WORLD._get_backend(rank.device)  # torch's own functions make real numbers of them
    for part, whole in ((torch.float32, torch.complex64), (torch.float64, torch.complex128)):
        for op in ("SUM", "AVG"):
            parts = [random_input(r, 60, part, 9) for r in range(rank.world_size)]
            expected = raw_bytes(reduced(op, parts))
            x = parts[rank.rank].clone().view(whole).to(rank.device)
            dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
            assert torch.equal(raw_bytes(x), expected)
            x = parts[rank.rank].clone().view(whole).to(rank.device)
            opts = dist.AllreduceOptions()
            opts.reduceOp = getattr(dist.ReduceOp, op)
            backend.allreduce([x], opts).wait()
            assert torch.equal(raw_bytes(x), expected)


def test_complex_sums_are_sums_of_their_parts(ranks, device):
    ranks(complex_body, 3, device)


def premultiplied_body(rank: Rank) -> None:
    """By a number and by a tensor of any float type; the products are rounded, and another on every rank."""
    n, factors = rank.world_size, [0.1, -3.0, 7.5]
    for seed, dtype in enumerate(CANONICAL_NAN):
        inputs = [random_input(r, 1001, dtype, seed) for r in range(n)]
        expected = raw_bytes(reduced("PREMUL_SUM", inputs, factors[:n]))
        factor = factors[rank.rank]
        wide = torch.tensor([factor], dtype=torch.float64)
        for by in (factor, wide, wide.float().to(rank.device) if dtype.itemsize < 8 else wide.to(rank.device)):
            x = inputs[rank.rank].clone().to(rank.device)
            dist.all_reduce(x, op=dist._make_nccl_premul_sum(by))
            if n > 1:
                assert torch.equal(raw_bytes(x), expected), f"{dtype} by {by}"
            else:
                assert torch.equal(x.cpu().double() == inputs[0].double(), inputs[0].double() == 0), dtype
    all_reduce_works(rank)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_premultiplied_sums(ranks, device, world_size):
    ranks(premultiplied_body, world_size, device)


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
