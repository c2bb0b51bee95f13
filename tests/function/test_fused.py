"""The fused all-reduce: every dtype, quantisation, layout and strategy at random shapes, in place or not. All bytes are
compared with a reference in numpy, on all ranks, so that strategy, batch and device change no bit.

MNNVL_TEST_CASES: how many for each world size (default 40); MNNVL_TEST_SEED: the first one's seed.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass, replace

import fused_reference as reference
import pytest
import torch
from launcher import Rank
from reference import DTYPES, assert_bits, canonical, every_16_bit_pattern, float32_edges, random_input, reduced
from workspaces import workspace_of

from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace

CASES = int(os.environ.get("MNNVL_TEST_CASES", "40"))
FIRST_SEED = int(os.environ.get("MNNVL_TEST_SEED", "1"))
HIDDEN = (1, 7, 8, 16, 48, 80, 128, 256, 1000, 1024, 2880, 4096, 7168, 8200, 16384, 20000)
NONE, FP8, NVFP4, DYNAMIC, GROUP = range(5)  # csrc/protocol/types.h, Quantization
SWIZZLED, LINEAR = 0, 2
GUARD = 0xA5


@dataclass(frozen=True)
class Case:
    seed: int
    rows: int
    hidden: int
    dtype: torch.dtype
    strategy: Strategy
    residual: bool
    float_gamma: bool
    weight_bias: float
    quantization: int
    layout: int
    group: int
    scale: float
    scale_tensor: bool
    writes_norm: bool
    in_place: (
        str  # "", "norm" (over the input, residual_out over residual_in), "norm over residual", "residual" (over input)
    )
    pdl: bool

    @staticmethod
    def random(seed: int) -> Case:
        r = random.Random(seed)
        dtype, hidden = r.choice(DTYPES), r.choice(HIDDEN)
        kinds = [NONE, FP8, DYNAMIC, GROUP, *([NVFP4] if hidden % 16 == 0 and dtype.itemsize == 2 else [])]
        quantization = r.choice(kinds)
        divisors = [d for d in range(1, min(hidden, 512) + 1) if hidden % d == 0]
        return Case(
            seed=seed,
            rows=r.choice([1, 2, 3, 5, 16, 33, 130, 300]) if hidden <= 8200 else r.choice([1, 2, 5]),
            hidden=hidden,
            dtype=dtype,
            strategy=r.choice([Strategy.ONESHOT, Strategy.TWOSHOT]),
            residual=r.random() < 0.7,
            float_gamma=r.random() < 0.4,
            weight_bias=r.choice([0.0, 0.0, 1.0]),
            quantization=quantization,
            layout=r.choice([SWIZZLED, LINEAR]),
            group=r.choice([d for d in (128, 64, 32, 8) if hidden % d == 0] or divisors)
            if r.random() < 0.6
            else r.choice(divisors),
            scale=r.choice([1.0, 0.013, 3.7, 1e-3]),
            scale_tensor=r.random() < 0.5,
            writes_norm=quantization == NONE or r.random() < 0.5,
            in_place=r.choice(["", "", "norm", "norm over residual", "residual"]),
            pdl=r.random() < 0.3,
        )


def filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype)
    x.view(torch.uint8).fill_(GUARD)
    return x.to(device)


def expected_of(case: Case, sums: torch.Tensor, residual: torch.Tensor | None, gamma: torch.Tensor):
    """(residual_out, norm, quantised), on the CPU."""
    r = sums if residual is None else canonical((sums.float() + residual.float()).to(case.dtype))
    norm = reference.norms(r, gamma, 1e-5, case.weight_bias)
    match case.quantization:
        case 1:
            return r, norm, reference.float8(norm, case.scale)
        case 2:
            return r, norm, reference.nv_float4(norm, case.scale, case.layout == SWIZZLED)
        case 3:
            return r, norm, reference.dynamic_float8(norm)
        case 4:
            return r, norm, reference.group_float8(norm, case.group)
    return r, norm, None


def check_exact(case: Case, r: torch.Tensor, gamma: torch.Tensor, norm: torch.Tensor) -> None:
    """Within a unit in the last place of float64's."""
    exact = reference.exact_norms(r, gamma, 1e-5, case.weight_bias)
    exponent = torch.frexp(exact)[1].clamp(min=torch.frexp(torch.tensor(torch.finfo(case.dtype).tiny))[1].item())
    mantissa = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[case.dtype]
    assert ((norm.double() - exact).abs() <= torch.exp2((exponent - mantissa).double())).all(), case


def run_case(rank: Rank, workspace: Workspace, case: Case) -> None:
    shape, numel = (case.rows, case.hidden), case.rows * case.hidden
    inputs = [
        (random_input(r, numel, case.dtype, case.seed) / 64).to(case.dtype).view(shape) for r in range(rank.world_size)
    ]
    residual = random_input(100, numel, case.dtype, case.seed).view(shape) if case.residual else None
    gamma = random_input(101, case.hidden, torch.float32, case.seed).clamp(-8, 8)
    r, norm = compare(rank, workspace, case, inputs, residual, gamma if case.float_gamma else gamma.to(case.dtype))
    check_exact(case, r, gamma if case.float_gamma else gamma.to(case.dtype), norm)


def shifted(x: torch.Tensor, case: Case, device: torch.device) -> torch.Tensor:
    """On the device, a few elements behind the beginning of its storage."""
    storage = filled((x.numel() + 16,), x.dtype, device)
    begin = case.seed % 4
    storage[begin : begin + x.numel()].copy_(x.flatten())
    return storage[begin : begin + x.numel()].view(x.shape)


def guard_is_intact(x: torch.Tensor | None) -> bool:
    """Of a tensor of shifted(): what lies around it."""
    if x is None:
        return True
    whole = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    begin = x.storage_offset() * x.itemsize
    return bool((whole[:begin] == GUARD).all() and (whole[begin + x.numel() * x.itemsize :] == GUARD).all())


def compare(
    rank: Rank,
    workspace: Workspace,
    case: Case,
    inputs: list[torch.Tensor],
    residual: torch.Tensor | None,
    gamma: torch.Tensor,
    flush: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls, by a thread that may flush denormals, and holds every byte to the reference: (residual_out, norm)."""
    device = rank.device
    r, norm, quantised = expected_of(case, reduced("SUM", inputs), residual, gamma)

    def place(like: torch.Tensor) -> torch.Tensor:
        return shifted(filled(tuple(like.shape), like.dtype, torch.device("cpu")), case, device)

    x = shifted(inputs[rank.rank], case, device)
    residual_in = None if residual is None else shifted(residual, case, device)
    in_place = case.in_place
    output = x if in_place == "norm" and case.writes_norm else None
    if in_place == "norm over residual" and case.writes_norm:
        output = residual_in
    residual_out = x if in_place == "residual" else residual_in if in_place == "norm" else None
    if residual_out is None:
        residual_out = place(r)
    if output is None and case.writes_norm:
        output = place(norm)
    quant_out = scale_out = scale = None
    if quantised is not None:
        quant_out = place(quantised.values)
        if quantised.scales is not None:  # int32 words, of groups: aligned
            scale_out = filled(tuple(quantised.scales.shape), quantised.scales.dtype, device)
    if case.scale_tensor and case.quantization in (FP8, NVFP4):
        scale = torch.tensor([case.scale, 99.0]).to(device)
    torch.set_flush_denormal(flush)
    workspace._compiled.fused_all_reduce(
        x, residual_in, shifted(gamma, case, device), output, residual_out, quant_out, scale_out, scale,
        1e9 if scale is not None else case.scale, 1e-5, case.weight_bias, case.quantization, case.layout, case.group,
        case.strategy.value, case.pdl,
    )  # fmt: skip
    torch.set_flush_denormal(False)
    assert_bits(residual_out, r, f"residual_out of {case}")
    if output is not None:
        assert_bits(output, norm, f"norm of {case}")
    if quantised is not None:
        wrong = (quant_out.cpu() != quantised.values).nonzero()
        assert wrong.numel() == 0, f"{len(wrong)} quantised bytes differ, first {wrong[:4].tolist()}: {case}"
    if quantised is not None and quantised.scales is not None:
        assert scale_out.cpu().numpy().tobytes() == quantised.scales.numpy().tobytes(), f"scales: {case}"
    for name, tensor in (("residual_out", residual_out), ("output", output), ("quant_out", quant_out)):
        assert guard_is_intact(tensor), f"behind {name}: {case}"
    return r, norm


def cases_body(rank: Rank, cases: list[Case]) -> None:
    with workspace_of(rank, buffer_size_in_bytes=2 << 20) as workspace:
        for case in cases:
            try:
                run_case(rank, workspace, case)
            except Exception as error:
                raise AssertionError(f"rank {rank.rank}: {error}; {case}") from error


@pytest.mark.timeout(60 + CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 16])
def test_random_cases(ranks, device, world_size):
    """The workspace is small, so that larger cases take several launches."""
    if device == "cuda":
        world_size = min(world_size, 9 * torch.cuda.device_count())  # a GPU has contexts for few more processes
    cases = [Case.random(FIRST_SEED + i) for i in range(CASES)]
    ranks(cases_body, world_size, device, args=(cases,), timeout=50 + CASES)


def many_rows_body(rank: Rank) -> None:
    """More than a GPU has multiprocessors, in one launch and by each strategy: teams of a block's warps take them."""
    base = Case.random(0)
    with workspace_of(rank, buffer_size_in_bytes=64 << 20) as workspace:
        for seed, (rows, hidden) in enumerate([(150, 5120), (301, 1024), (301 * rank.world_size, 4096)]):
            for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
                for kind, in_place in ((NONE, "norm"), (FP8, "")):
                    case = replace(
                        base, seed=seed, rows=rows, hidden=hidden, dtype=torch.bfloat16, strategy=strategy,
                        residual=True, quantization=kind, writes_norm=True, in_place=in_place,
                    )  # fmt: skip
                    run_case(rank, workspace, case)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_many_rows(ranks, device, world_size):
    if device == "cpu" and world_size != 2:
        pytest.skip("on the CPU rows are rows")
    ranks(many_rows_body, world_size, device, timeout=60)


def edge_cases(dtype: torch.dtype, hidden: int, rows: int) -> list[Case]:
    """Every quantisation, by each strategy."""
    base = Case(
        0, rows, hidden, dtype, Strategy.ONESHOT, False, False, 0.0, NONE, SWIZZLED, 1, 0.37, False, True, "", False
    )
    kinds = [NONE, FP8, DYNAMIC, GROUP, *([NVFP4] if hidden % 16 == 0 and dtype.itemsize == 2 else [])]
    return [replace(base, quantization=kind, strategy=strategy, group=min(hidden, 8))
            for kind in kinds for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT)[: 1 if hidden == 1 else 2]]  # fmt: skip


def edges_body(rank: Rank, flush: bool) -> None:
    """NaN, infinity, subnormals and what overflows: all values of the 16-bit dtypes in rows of neighbours, some alone in
    a row, and pairs of float32 edges. Other ranks than the first bring zeros of both signs to the 16-bit ones."""
    with workspace_of(rank, buffer_size_in_bytes=2 << 20) as workspace:
        for dtype, hidden in itertools.product((torch.float16, torch.bfloat16), (1, 1024)):
            # Alone every fourth, infinity and NaN among them.
            first = every_16_bit_pattern(0, dtype)[:: 4 if hidden == 1 else 1].view(-1, hidden)
            zeros = [torch.full_like(first, -0.0 if r % 2 else 0.0) for r in range(1, rank.world_size)]
            gamma = torch.tensor([1.0, -0.0, 3.5, -2.0]).repeat(hidden)[:hidden].to(dtype)
            for case in edge_cases(dtype, hidden, first.shape[0]):
                compare(rank, workspace, case, [first, *zeros], None, gamma, flush)
        edges = [float32_edges(r).view(-1, 1) for r in range(rank.world_size)]
        for case in edge_cases(torch.float32, 1, edges[0].shape[0]):
            compare(rank, workspace, case, edges, float32_edges(3).view(-1, 1), torch.ones(1), flush)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("world_size", "flush"), [(1, False), (2, True)])
def test_every_value(ranks, device, world_size, flush):
    ranks(edges_body, world_size, device, args=(flush,), timeout=170)
