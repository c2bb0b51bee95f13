"""Calls of `trtllm_mnnvl_allreduce` and of its fused forms as the soak makes them, and what they must give."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from mnnvl_backend.flashinfer.allreduce import trtllm_mnnvl_allreduce
from mnnvl_backend.flashinfer.fusion import (
    trtllm_mnnvl_fused_allreduce_add_rmsnorm,
    trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant,
)
from mnnvl_backend.flashinfer.mapping import Mapping
from mnnvl_backend.flashinfer.quantization import MNNVLQuantType
from mnnvl_backend.flashinfer.strategy import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace as Workspace
from mnnvl_backend.options import Options
from mnnvl_backend.tools.soak_calls import Memory, Seat, Works
from mnnvl_backend.tools.soak_operations import MOST_OFFSET, piece
from mnnvl_backend.tools.soak_reference import CANONICAL_NAN, canonical, reduced

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HIDDEN = (1, 7, 8, 48, 128, 256, 1000, 1024, 2880, 4096, 7168)
ROWS = (1, 2, 3, 5, 16, 33, 130)
MOST_ELEMENTS = 1 << 18
EPSILON = 1e-5
LANES = 1024  # of a row's sum of squares: csrc/protocol/fused_row.h
OTHER = 1000  # stands for a rank where a tensor is the same on all ranks


def norms(r: torch.Tensor, gamma: torch.Tensor, epsilon: float, weight_bias: float) -> torch.Tensor:
    """What the fused all-reduce makes of its rows: csrc/protocol/fused_row.h in other words.

    Args:
        r: [rows, hidden], float32, float16 or bfloat16, on the CPU.
        gamma: [hidden], r's dtype or float32.

    Returns:
        [rows, hidden] of r's dtype; the sum of squares was made in its one order.
    """
    wide = torch.float64 if r.dtype == torch.float32 else torch.float32

    def number(x: float) -> torch.Tensor:  # a kernel is given a float
        return torch.tensor(x, dtype=torch.float32).to(wide)

    v, weight = r.to(wide), gamma.float().to(wide)
    rows, hidden = v.shape
    elements = 16 // r.itemsize
    rounds = -(-hidden // (elements * LANES))
    squares = torch.zeros(rows, rounds * LANES * elements, dtype=wide)
    squares[:, :hidden] = v * v
    packed = squares.view(rows, rounds, LANES, elements)
    sums = packed[..., 0].clone()
    for e in range(1, elements):
        sums += packed[..., e]
    lanes = sums[:, 0].clone()
    for i in range(1, rounds):
        lanes += sums[:, i]
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    means = (lanes / hidden + number(epsilon)).flatten().tolist()
    # Not torch's sqrt, which may be off by one in the last place; from float64 to float32 is one rounding in effect.
    inverse = 1 / torch.tensor([math.sqrt(mean) for mean in means], dtype=wide).view(rows, 1)
    n = (v * inverse) * (number(weight_bias) + weight)
    rounded = n.float().to(r.dtype)
    integer = torch.int32 if r.itemsize == 4 else torch.int16
    rounded.view(integer)[n.isnan()] = CANONICAL_NAN[r.dtype]
    return rounded


def float8(norm: torch.Tensor, scale: float) -> torch.Tensor:
    """`norm` / `scale` as float8_e4m3fn: rounded to nearest even, saturated; NaN is 0x7f."""
    factor = 1 / torch.tensor(scale, dtype=torch.float32)
    out = (norm.float() * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
    out.view(torch.uint8)[norm.isnan()] = 0x7F
    return out


@dataclass(frozen=True)
class FunctionCase:
    """One call on every rank; tensors are [rows, hidden]."""

    seed: int
    operation: str  # function, fused or fused_fp8
    rows: int
    hidden: int
    dtype: torch.dtype
    strategy: Strategy
    payload: str
    offset: int  # as Case's
    in_place: bool
    residual: bool
    weight_bias: float
    scale: float  # of FP8

    @staticmethod
    def random(seed: int) -> FunctionCase:
        chance = random.Random(f"function {seed}")
        hidden = chance.choice(HIDDEN)
        return FunctionCase(
            seed,
            chance.choice(["function", "fused", "fused_fp8"]),
            chance.choice([rows for rows in ROWS if rows * hidden <= MOST_ELEMENTS]),
            hidden,
            chance.choice(DTYPES),
            chance.choice(list(Strategy)),
            chance.choice(["bits", "numbers", "numbers", "integers"]),
            offset=chance.choice([0, 0, 1, 2, 3, 4, 7, 8]),
            in_place=chance.random() < 0.3,
            residual=chance.random() < 0.7,
            weight_bias=chance.choice([0.0, 1.0]),
            scale=chance.choice([1.0, 0.013, 3.7]),
        )

    def tensor(self, owner: object, numel: int) -> torch.Tensor:
        return piece(self.dtype, self.payload, numel, f"{self.seed} {owner}")


def workspace(seat: Seat, options: Options) -> Workspace:
    """Of all ranks, with room for every FunctionCase. Collective."""
    size = 4 * MOST_ELEMENTS * max(2 * seat.world_size, 4)
    mapping = Mapping(world_size=seat.world_size, rank=seat.rank, tp_size=seat.world_size)
    return Workspace(mapping, buffer_size_in_bytes=size, device=seat.device, options=options)


class FunctionCall:
    """A FunctionCase on one rank."""

    def __init__(self, seat: Seat, case: FunctionCase, workspace: Workspace) -> None:
        self.case, self._workspace, self._seat = case, workspace, seat
        numel = case.rows * case.hidden
        inputs = [case.tensor(rank, numel) for rank in range(seat.world_size)]
        # Of one rank alone the sum is its input, whatever its bits.
        total = reduced("SUM", inputs) if len(inputs) > 1 else inputs[0]
        self.memories: list[Memory] = []
        self._input = self._memory(inputs[seat.rank])
        if case.operation == "function":
            self._output = self._input if case.in_place else self._memory(_garbage(total))
            self._output.wanted = [total]
            return
        residual = case.tensor("residual", numel) if case.residual else None
        gamma = case.tensor("gamma", case.hidden)
        if residual is not None:
            total = canonical((total.float() + residual.float()).to(case.dtype))
        norm = norms(total.view(case.rows, case.hidden), gamma, EPSILON, case.weight_bias).flatten()
        self._residual = self._memory(residual) if residual is not None else None
        self._gamma = self._memory(gamma)
        self._output = self._input if case.in_place else self._memory(_garbage(norm))
        self._output.wanted = [norm]
        in_place = case.in_place and self._residual is not None
        self._total = self._residual if in_place and self._residual else self._memory(_garbage(total))
        self._total.wanted = [total]
        if case.operation == "fused_fp8":
            quantized = float8(norm, case.scale)
            self._quantized = self._memory(_garbage(quantized))
            self._quantized.wanted = [quantized]

    def _memory(self, content: torch.Tensor) -> Memory:
        case = self.case
        offset = case.offset and (case.offset + len(self.memories) + self._seat.rank) % MOST_OFFSET
        self.memories.append(Memory([content], False, content.dtype, offset, self._seat.device))
        return self.memories[-1]

    def _matrix(self, memory: Memory) -> torch.Tensor:
        return memory.tensors[0].view(self.case.rows, self.case.hidden)

    def begin(self) -> Works:
        case, x, out = self.case, self._matrix(self._input), self._matrix(self._output)
        if case.operation == "function":
            trtllm_mnnvl_allreduce(x, self._workspace, False, output=out, strategy=case.strategy)
            return []
        residual = self._matrix(self._residual) if self._residual is not None else None
        gamma, total = self._gamma.tensors[0], self._matrix(self._total)
        if case.operation == "fused":
            trtllm_mnnvl_fused_allreduce_add_rmsnorm(
                x, residual, gamma, self._workspace, EPSILON, out, total, strategy=case.strategy,
                weight_bias=case.weight_bias,
            )  # fmt: skip
            return []
        trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
            x, residual, gamma, self._workspace, EPSILON, out, total, self._matrix(self._quantized),
            output_scale=case.scale, quant_type=MNNVLQuantType.FP8, strategy=case.strategy,
            weight_bias=case.weight_bias,
        )  # fmt: skip
        return []

    def check(self) -> None:
        for memory in self.memories:
            memory.check()


def _garbage(x: torch.Tensor) -> torch.Tensor:
    """Other bits than x's in every byte."""
    return (x.view(torch.uint8) ^ 0xFF).view(x.dtype)
