"""What every transport must give, bit for bit: the reduction in rank order, rounded once; and the bodies of tests that
more than one file runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from launcher import Rank

from mnnvl_backend.tools.soak_reference import (  # noqa: F401  also for those who import from here
    CANONICAL_NAN,
    EVERY_DTYPE,
    FOLDS,
    canonical,
    reduced,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGER_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The elements' bits as integers, on the CPU."""
    return x.detach().cpu().contiguous().view(INTEGER_OF[x.dtype])


def rank_order_sum(inputs: list[torch.Tensor], average: bool = False) -> torch.Tensor:
    """All-reduce of `inputs` by the kernels that add. One input comes back as it is."""
    return inputs[0].clone() if len(inputs) == 1 else reduced("AVG" if average else "SUM", inputs)


def assert_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Raises with the first differing elements."""
    a, e = bits(actual), bits(expected)
    assert a.shape == e.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    wrong = torch.nonzero(a.flatten() != e.flatten()).flatten()
    if wrong.numel() == 0:
        return
    at = wrong[:4].tolist()
    raise AssertionError(
        f"{what}: {wrong.numel()} of {a.numel()} elements differ, first at {at}: "
        f"got {[hex(int(a.flatten()[i]) & 0xFFFFFFFF) for i in at]}, "
        f"expected {[hex(int(e.flatten()[i]) & 0xFFFFFFFF) for i in at]}"
    )


def random_input(rank: int, numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rank's input, which every rank can make: normal values over several binades, some exact zeros of both signs."""
    generator = torch.Generator().manual_seed(seed * 1009 + rank)
    x = torch.randn(numel, generator=generator) * torch.exp2(
        torch.randint(-12, 12, (numel,), generator=generator).float()
    )
    x[torch.rand(numel, generator=generator) < 0.02] = -0.0
    x[torch.rand(numel, generator=generator) < 0.01] = 0.0
    return x.to(dtype)


def every_16_bit_pattern(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit dtype, in an order of the rank's own; rank 0 has them ascending."""
    patterns = torch.arange(65536, dtype=torch.int32)
    if rank:
        patterns = patterns[torch.randperm(65536, generator=torch.Generator().manual_seed(rank))]
    return torch.where(patterns >= 32768, patterns - 65536, patterns).to(torch.int16).view(dtype)


def float32_edges(rank: int) -> torch.Tensor:
    """Every pairing of float32 edge values: rank 0 has each value repeated, the others cycle through them shifted."""
    words = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000,
             0x3F800000, 0xBF800000, 0x3F800001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
             0xFFC00000, 0x7F800001, 0xFFBFFFFF, 0x33800000, 0xB3800000, 0x4B800000, 0xCB800000]  # fmt: skip
    values = torch.tensor([w - (1 << 32) if w >> 31 else w for w in words], dtype=torch.int32)
    if rank == 0:
        return values.repeat_interleave(len(words)).view(torch.float32)
    return values.roll(rank - 1).repeat(len(words)).view(torch.float32)


def values(rank: int, numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all (0 and 1 for bool): what is copied must not be looked at. Every rank can make any rank's."""
    generator = torch.Generator().manual_seed(seed * 1009 + rank)
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def raw_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.uint8).cpu()


def in_the_middle(x: torch.Tensor, offset: int, device: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
    """A copy of `x` on `device`, `offset` elements into a larger storage, and a check that the rest is untouched."""
    size, begin, end = x.dtype.itemsize, offset * x.dtype.itemsize, (offset + x.numel()) * x.dtype.itemsize
    storage = torch.full((end + 8 * size,), 0xA5, dtype=torch.uint8, device=device)
    storage[begin:end] = raw_bytes(x).to(device)

    def check() -> None:
        around = torch.cat([storage[:begin], storage[end:]])
        assert torch.equal(around, torch.full_like(around, 0xA5)), "wrote beside the tensor"

    return storage.view(x.dtype)[offset : offset + x.numel()], check


def all_reduce_works(rank: Rank, group: dist.ProcessGroup | None = None) -> None:
    """What every refusal must leave behind: a group that adds up."""
    world_size = dist.get_world_size(group)
    inputs = [random_input(r, 37, torch.float32, 5) for r in range(world_size)]
    x = inputs[dist.get_rank(group)].clone().to(rank.device)
    dist.all_reduce(x, group=group)
    assert_bits(x, rank_order_sum(inputs))


def broadcast_body(rank: Rank, dtypes: list[torch.dtype], sizes: list[int]) -> None:
    for seed, (dtype, numel) in enumerate(itertools.product(dtypes, sizes)):
        for root in range(rank.world_size):
            offset = (seed + root) % 4
            x, check = in_the_middle(values(rank.rank, numel, dtype, seed), offset, rank.device)
            dist.broadcast(x, root)
            expected = values(root, numel, dtype, seed)
            assert torch.equal(raw_bytes(x), raw_bytes(expected)), f"{numel} x {dtype} at {offset} from {root}"
            check()


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


def uneven_objects_body(rank: Rank) -> None:
    mine = {"tensor": torch.arange(rank.rank * 1000), "nested": [rank.rank] * rank.rank}
    gathered: list[Any] = [None] * rank.world_size
    dist.all_gather_object(gathered, mine)
    assert [len(g["tensor"]) for g in gathered] == [1000 * r for r in range(rank.world_size)]
    objects: list[Any] = [mine, rank.rank]
    dist.broadcast_object_list(objects, src=2, device=rank.device)
    assert objects[1] == 2
    assert objects[0]["nested"] == [2, 2]
