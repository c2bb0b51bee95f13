"""all_reduce through the process group: the bits of the rank-order sum, on CPU and on GPUs alike."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import (
    DTYPES,
    assert_bits,
    every_16_bit_pattern,
    float32_edges,
    random_input,
    rank_order_sum,
)

WORLD_SIZES = [1, 2, 3, 4, 5, 8, 16]
SIZES = [0, 1, 2, 3, 7, 8, 9, 31, 127, 128, 1000, 4096, 65537, 300_001, 1_200_003]


def world_sizes_for(device: str, world_size: int) -> None:
    """Many ranks on one GPU take turns on it: the large worlds run, but not every test of them."""
    if device == "cuda" and world_size > 2 * torch.cuda.device_count() and world_size not in (5, 8, 16):
        pytest.skip("several ranks on one GPU: only some world sizes")


def reduce_and_check(
    rank: Rank, numel: int, dtype: torch.dtype, seed: int, offset: int = 0, op=dist.ReduceOp.SUM, async_op: bool = False
) -> None:
    inputs = [random_input(r, numel, dtype, seed) for r in range(rank.world_size)]
    buffer = torch.full((numel + offset + 8,), 3.0, dtype=dtype, device=rank.device)
    x = buffer[offset : offset + numel]
    x.copy_(inputs[rank.rank])
    work = dist.all_reduce(x, op=op, async_op=async_op)
    if async_op:
        work.wait()
    expected = rank_order_sum(inputs, average=op == dist.ReduceOp.AVG)
    assert_bits(x, expected, f"{numel} x {dtype}, offset {offset}, {op}")
    assert torch.equal(buffer[:offset].float().cpu(), torch.full((offset,), 3.0)), "wrote before the tensor"
    assert torch.equal(buffer[offset + numel :].float().cpu(), torch.full((8,), 3.0)), "wrote behind the tensor"


def sizes_body(rank: Rank, sizes: list[int]) -> None:
    for i, numel in enumerate(sizes):
        for dtype in DTYPES:
            reduce_and_check(rank, numel, dtype, seed=i)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(ranks, device, world_size):
    world_sizes_for(device, world_size)
    sizes = SIZES if world_size <= 4 else [n for n in SIZES if n <= 300_001]
    ranks(sizes_body, world_size, device, timeout=240, args=(sizes,))


@pytest.mark.parametrize("strategy", ["oneshot", "twoshot"])
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 16])
def test_forced_strategies_give_the_same_bits(ranks, device, world_size, strategy):
    """Both against the same reference, so equal to each other; sizes beyond what one launch or slot can carry."""
    world_sizes_for(device, world_size)
    sizes = [1, 9, 1000, 65537] + ([1_200_003] if world_size <= 4 else [])
    ranks(sizes_body, world_size, device, timeout=240, args=(sizes,), options={"strategy": strategy})


def small_workspace_body(rank: Rank) -> None:
    for i, numel in enumerate([5, 100_001, 700_001]):
        for dtype in DTYPES:
            reduce_and_check(rank, numel, dtype, seed=i)


@pytest.mark.parametrize("strategy", ["oneshot", "twoshot", "auto"])
def test_chunks_through_a_small_workspace(ranks, device, strategy):
    ranks(small_workspace_body, 3, device, timeout=120, options={"strategy": strategy, "workspace_bytes": 1 << 20})


def offsets_body(rank: Rank) -> None:
    for dtype in DTYPES:
        for offset in range(9):
            for numel in (1, 5, 8, 17, 1031):
                reduce_and_check(rank, numel, dtype, seed=offset, offset=offset)


@pytest.mark.parametrize("strategy", ["oneshot", "twoshot"])
def test_any_alignment(ranks, device, strategy):
    ranks(offsets_body, 3, device, timeout=120, options={"strategy": strategy})


def average_body(rank: Rank) -> None:
    for i, numel in enumerate([1, 33, 4097, 200_001]):
        for dtype in DTYPES:
            reduce_and_check(rank, numel, dtype, seed=i, op=dist.ReduceOp.AVG)


@pytest.mark.parametrize("world_size", [2, 3])
def test_average(ranks, device, world_size):
    ranks(average_body, world_size, device, timeout=120)


def patterns_body(rank: Rank) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        inputs = [every_16_bit_pattern(r, dtype) for r in range(rank.world_size)]
        x = inputs[rank.rank].to(rank.device, copy=True)
        dist.all_reduce(x)
        assert_bits(x, rank_order_sum(inputs), f"all patterns of {dtype}")
    inputs = [float32_edges(r) for r in range(rank.world_size)]
    x = inputs[rank.rank].to(rank.device, copy=True)
    dist.all_reduce(x)
    assert_bits(x, rank_order_sum(inputs), "float32 edge values")


@pytest.mark.parametrize("strategy", ["oneshot", "twoshot"])
@pytest.mark.parametrize("world_size", [2, 3, 8, 16])
def test_every_bit_pattern(ranks, device, world_size, strategy):
    """No value can be mistaken for the sentinel: every 16-bit pattern, subnormals, -0, infinities and NaNs included."""
    world_sizes_for(device, world_size)
    ranks(patterns_body, world_size, device, timeout=120, options={"strategy": strategy})


def interleaving_body(rank: Rank, calls: int, seed: int) -> None:
    """Two groups, one per strategy, and one that chooses; sync and async calls of all sizes and kinds, several in flight."""
    forced = [
        dist.new_group(backend="mnnvl", pg_options=rank.options(strategy=strategy), timeout=rank.group_timeout)
        for strategy in ("oneshot", "twoshot")
    ]
    groups = [None, *forced]
    plan = random.Random(seed)
    pending: list[tuple] = []

    def finish() -> None:
        for work, x, expected, what in pending:
            if work is not None:
                work.wait()
            assert torch.equal(x.cpu().view(torch.uint8), expected.view(torch.uint8)), what
        pending.clear()

    for call in range(calls):
        kind = plan.choice(["all_reduce"] * 6 + ["broadcast", "all_gather", "barrier"])
        group = groups[plan.randrange(3)]
        dtype = plan.choice(DTYPES)
        numel = int(2 ** plan.uniform(0, 17))
        asynchronous = plan.random() < 0.5
        inputs = [random_input(r, numel, dtype, call) for r in range(rank.world_size)]
        x = inputs[rank.rank].to(rank.device, copy=True)
        what = f"call {call}: {kind} of {numel} x {dtype}"
        if kind == "all_reduce":
            work = dist.all_reduce(x, group=group, async_op=asynchronous)
            expected = rank_order_sum(inputs)
        elif kind == "broadcast":
            root = plan.randrange(rank.world_size)
            work = dist.broadcast(x, root, group=group, async_op=asynchronous)
            expected = inputs[root]
        elif kind == "all_gather":
            gathered = torch.empty(rank.world_size * numel, dtype=dtype, device=rank.device)
            work = dist.all_gather_into_tensor(gathered, x, group=group, async_op=asynchronous)
            x, expected = gathered, torch.cat(inputs)
        else:
            finish()
            dist.barrier(group=group)
            continue
        pending.append((work, x, expected, what))
        if len(pending) > 5:
            finish()
    finish()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_random_interleavings(ranks, device, world_size):
    ranks(interleaving_body, world_size, device, timeout=240, args=(400, world_size))


def small_after_large_body(rank: Rank, calls: int, seed: int) -> None:
    """What a large call leaves in the workspace is what a small one of another strategy, dtype or kind finds there.
    Nothing waits in between: results are looked at when a handful is in flight."""
    forced = [
        dist.new_group(backend="mnnvl", pg_options=rank.options(strategy=strategy), timeout=rank.group_timeout)
        for strategy in ("oneshot", "twoshot")
    ]
    groups = [None, *forced]
    plan = random.Random(seed)
    large, small = [300_001, 1_200_003], [1, 8, 129, 4097]
    inputs: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
    for i, (numel, dtype) in enumerate((numel, dtype) for numel in large + small for dtype in DTYPES):
        inputs[numel, dtype] = [random_input(r, numel, dtype, i) for r in range(rank.world_size)]
    sums = {key: rank_order_sum(those) for key, those in inputs.items()}
    group = groups[0]
    pending: list[tuple] = []
    for call in range(calls):
        if plan.random() < 0.3:  # most calls stay in the group of the one before
            group = groups[plan.randrange(3)]
        key = plan.choice(large if call % 4 == 0 else small), plan.choice(DTYPES)
        x = inputs[key][rank.rank].to(rank.device, copy=True)
        expected, work = sums[key], None
        if call % 4 and plan.random() < 0.2:
            root = plan.randrange(rank.world_size)
            dist.broadcast(x, root, group=group)
            expected = inputs[key][root]
        else:
            work = dist.all_reduce(x, group=group, async_op=plan.random() < 0.3)
        pending.append((work, x, expected, f"call {call}: {key[0]} x {key[1]}"))
        if len(pending) == 8 or call == calls - 1:
            for work, x, expected, what in pending:
                if work is not None:
                    work.wait()
                assert torch.equal(x.cpu().view(torch.uint8), expected.view(torch.uint8)), what
            pending.clear()


@pytest.mark.parametrize("world_size", [2, 3])
def test_small_calls_right_after_large_ones(ranks, device, world_size):
    ranks(small_after_large_body, world_size, device, timeout=120, args=(80, 7 + world_size))


def layouts_body(rank: Rank) -> None:
    def check(make) -> None:
        inputs = [make(random_input(r, 2 * 3 * 4 * 5, torch.float32, 7)) for r in range(rank.world_size)]
        x = make(random_input(rank.rank, 2 * 3 * 4 * 5, torch.float32, 7).to(rank.device))
        dist.all_reduce(x)
        assert_bits(x, rank_order_sum(inputs))

    check(lambda t: t.view(2, 3, 4, 5).to(memory_format=torch.channels_last))
    check(lambda t: t.view(24, 5).t())
    check(lambda t: t.view(2, 60))


def test_dense_formats_that_are_not_contiguous(ranks, device):
    ranks(layouts_body, 2, device)
