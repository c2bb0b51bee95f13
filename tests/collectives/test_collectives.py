"""broadcast, gathers, barrier, other reductions; Work, futures and streams."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only
from reference import (
    DTYPES,
    all_reduce_works,
    in_the_middle,
    random_input,
    raw_bytes,
    values,
)

EVERY_DTYPE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
               torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32,
               torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
               torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]  # fmt: skip
SLEEP_CYCLES = 100_000_000  # of torch.cuda._sleep: some 50 ms, far longer than anything the host does meanwhile


def broadcast_body(rank: Rank, dtypes: list[torch.dtype], sizes: list[int]) -> None:
    for seed, (dtype, numel) in enumerate(itertools.product(dtypes, sizes)):
        for root in range(rank.world_size):
            offset = (seed + root) % 4
            x, check = in_the_middle(values(rank.rank, numel, dtype, seed), offset, rank.device)
            dist.broadcast(x, root)
            expected = values(root, numel, dtype, seed)
            assert torch.equal(raw_bytes(x), raw_bytes(expected)), f"{numel} x {dtype} at {offset} from {root}"
            check()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_broadcast_of_every_dtype_from_every_root(ranks, device, world_size):
    ranks(broadcast_body, world_size, device, args=(EVERY_DTYPE, [0, 1, 3, 1001]), timeout=120)


def test_broadcast_of_large_tensors(ranks, device):
    """More than a workspace holds, and not a multiple of anything."""
    options = {"workspace_bytes": 1 << 20}
    ranks(broadcast_body, 3, device, args=([torch.uint8, torch.bfloat16], [3_000_001]), options=options)


def gather_body(rank: Rank, dtypes: list[torch.dtype], sizes: list[int]) -> None:
    n = rank.world_size
    for seed, (dtype, numel) in enumerate(itertools.product(dtypes, sizes)):
        what = f"{numel} x {dtype}"
        expected = [raw_bytes(values(r, numel, dtype, seed)) for r in range(n)]
        offset = seed % 4
        x, check_input = in_the_middle(values(rank.rank, numel, dtype, seed), offset, rank.device)
        zero = values(0, n * numel, dtype, seed + 1)
        out, check_output = in_the_middle(zero, (offset + 1) % 4, rank.device)
        dist.all_gather_into_tensor(out, x)
        assert torch.equal(raw_bytes(out), torch.cat(expected)), f"into_tensor of {what}"
        outs, checks = zip(*[in_the_middle(zero[:numel], (offset + r) % 4, rank.device) for r in range(n)], strict=True)
        dist.all_gather(list(outs), x)
        for r in range(n):
            assert torch.equal(raw_bytes(outs[r]), expected[r]), f"all_gather of {what}, rank {r}'s"
        for check in (check_input, check_output, *checks):
            check()


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


def uneven_objects_body(rank: Rank) -> None:
    mine = {"tensor": torch.arange(rank.rank * 1000), "nested": [rank.rank] * rank.rank}
    gathered: list[Any] = [None] * rank.world_size
    dist.all_gather_object(gathered, mine)
    assert [len(g["tensor"]) for g in gathered] == [1000 * r for r in range(rank.world_size)]
    objects: list[Any] = [mine, rank.rank]
    dist.broadcast_object_list(objects, src=2, device=rank.device)
    assert objects[1] == 2
    assert objects[0]["nested"] == [2, 2]


def test_object_collectives_of_different_lengths(ranks, device):
    ranks(uneven_objects_body, 3, device)


def barrier_body(rank: Rank, late: int, async_op: bool) -> tuple[float, float]:
    all_reduce_works(rank)  # set-up is a barrier of its own
    if rank.rank == late:
        time.sleep(0.3)
    device_ids = [rank.device.index] if rank.device.type == "cuda" else None
    came = time.monotonic()  # one clock for all processes of a host
    work = dist.barrier(async_op=async_op, device_ids=device_ids)
    if async_op:
        work.wait()
    return came, time.monotonic()


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("late", [0, 2])
def test_barrier_waits_for_the_last(ranks, device, late, async_op):
    times = ranks(barrier_body, 3, device, args=(late, async_op))
    assert max(came for came, _ in times) <= min(left for _, left in times)


def work_body(rank: Rank) -> None:
    n = rank.world_size
    all_reduce_works(rank)
    x = torch.full((7,), float(rank.rank + 1), device=rank.device)
    if rank.rank == 0:
        work = dist.all_reduce(x, async_op=True)
        assert not work.is_completed(), "completed before the others began"
        rank.store.set("seen", "1")
    else:
        rank.store.wait(["seen"], rank.group_timeout)
        work = dist.all_reduce(x, async_op=True)
    doubled = work.get_future().then(lambda f: f.value()[0] * 2)
    assert work.wait()
    total = n * (n + 1) / 2
    assert x.tolist() == [total] * 7
    assert doubled.wait().tolist() == [2 * total] * 7
    assert [t.data_ptr() for t in work.result()] == [x.data_ptr()]
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    assert work.is_completed()
    # Sync calls queue behind async ones, and any order of waiting will do.
    xs = [torch.full((1000,), float(i), device=rank.device) for i in range(20)]
    works = [dist.all_reduce(xs[i], async_op=True) for i in range(19)]
    dist.all_reduce(xs[19])
    for work in reversed(works):
        work.wait()
    assert [x[0].item() for x in xs] == [float(i * n) for i in range(20)]


def test_async_work_and_its_future(ranks, device):
    ranks(work_body, 3, device)


def wait_with_timeout_body(rank: Rank) -> None:
    all_reduce_works(rank)
    x = torch.ones(3, device=rank.device)
    if rank.rank == 0:
        work = dist.all_reduce(x, async_op=True)
        with pytest.raises(dist.DistBackendError, match="did not end within 100 ms"):
            work.wait(timedelta(milliseconds=100))
        rank.store.set("waited", "1")
        work.wait()
    else:
        rank.store.wait(["waited"], rank.group_timeout)
        dist.all_reduce(x)
    assert x.tolist() == [rank.world_size] * 3


def test_wait_with_a_timeout_of_its_own(ranks, device):
    """It raises, and the collective goes on."""
    ranks(wait_with_timeout_body, 2, device)


def streams_body(rank: Rank) -> None:
    n = rank.world_size
    all_reduce_works(rank)
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    total = n * (n + 1) / 2
    for async_op in (False, True):
        x = torch.zeros(100_000, device=rank.device)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)
            x.fill_(rank.rank + 1)
            work = dist.all_reduce(x, async_op=async_op)
            assert not side.query(), "the call waited for its stream on the host"
            if async_op:
                work.wait()
            y = x + 1
        side.synchronize()
        assert torch.equal(y, torch.full_like(y, total + 1))
    # One group, several streams, nothing between the calls: they must not be in the workspace at once.
    xs = [torch.full((50_001,), float(rank.rank + 1), device=rank.device) for _ in range(30)]
    torch.cuda.synchronize()
    for i, x in enumerate(xs):
        with torch.cuda.stream((torch.cuda.default_stream(), side, other)[i % 3]):
            if i % 7 == 0:
                torch.cuda._sleep(SLEEP_CYCLES // 20)
            dist.all_reduce(x, async_op=i % 2 == 0)
    torch.cuda.synchronize()
    for i, x in enumerate(xs):
        assert torch.equal(x, torch.full_like(x, total)), f"call {i}"


@cuda_only
def test_current_stream_and_several_streams(ranks):
    ranks(streams_body, 2, "cuda")


def freed_while_in_flight_body(rank: Rank) -> None:
    """Memory of an async call's tensors must not be handed out before the call has ended."""
    all_reduce_works(rank)
    gathered = []
    for i in range(20):
        torch.cuda._sleep(SLEEP_CYCLES // 20)
        x = torch.full((1 << 18,), float(i), device=rank.device)
        out = torch.empty(rank.world_size << 18, device=rank.device)
        work = dist.all_gather_into_tensor(out, x, async_op=True)
        del x
        torch.full((1 << 18,), -1.0, device=rank.device)  # would take x's place
        work.wait()
        gathered.append(out[:: 1 << 16].clone())
        del out, work
    for i, g in enumerate(gathered):
        assert g.tolist() == [float(i)] * g.numel()


@cuda_only
def test_tensors_freed_while_in_flight(ranks):
    ranks(freed_while_in_flight_body, 2, "cuda")


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


def nested_body(rank: Rank) -> float:
    """What torch's PowerSGD hook does: a callback of one collective's future waits for another collective."""

    def then(future: torch.futures.Future) -> torch.Tensor:
        x = future.value()[0]
        return dist.all_reduce(x, async_op=True).get_future().wait()[0]

    x = torch.ones(1000, device=rank.device)
    result = dist.all_reduce(x, async_op=True).get_future().then(then).wait()
    return float(result.sum())


def test_collectives_inside_callbacks(ranks, device):
    assert ranks(nested_body, 2, device) == [4000.0] * 2
