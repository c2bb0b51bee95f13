"""What every reduction must give, bit for bit: computed by torch on the CPU, in rank order, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch

EVERY_DTYPE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
               torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32,
               torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
               torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]  # fmt: skip
CANONICAL_NAN = {torch.float32: 0x7FFFFFFF, torch.float16: 0x7FFF, torch.bfloat16: 0x7FFF,
                 torch.float64: 0x7FFFFFFFFFFFFFFF, torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7F}  # fmt: skip
# What is reduced in another type than its own, and rounded or cut off once, at the end.
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float8_e4m3fn: torch.float32,
        torch.float8_e5m2: torch.float32, torch.int8: torch.int32, torch.uint8: torch.int32,
        torch.int16: torch.int32}  # fmt: skip
PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
Fold = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FOLDS: dict[str, Fold] = {
    "SUM": torch.add, "AVG": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
    "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
}  # fmt: skip
FOLDS_OF_BOOL: dict[str, Fold] = {
    "SUM": torch.logical_or, "MAX": torch.logical_or, "BOR": torch.logical_or, "PRODUCT": torch.logical_and,
    "MIN": torch.logical_and, "BAND": torch.logical_and, "BXOR": torch.logical_xor,
}  # fmt: skip


def canonical(x: torch.Tensor) -> torch.Tensor:
    """As every reduction leaves it: -0 as +0, NaN in its canonical bits."""
    if x.dtype not in CANONICAL_NAN:
        return x
    value, out = x.to(WIDE.get(x.dtype, x.dtype)), x.clone()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    out.view(integer)[value == 0] = 0
    out.view(integer)[value.isnan()] = CANONICAL_NAN[x.dtype]
    return out


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is too large for float8_e4m3fn becomes its largest; not every torch casts so."""
    return (x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x).to(dtype)


def reduced(op: str, inputs: list[torch.Tensor], factors: list[float] | None = None) -> torch.Tensor:
    """Any reduction of `inputs` (CPU tensors of one dtype, in rank order): folded from left to right in the wide type,
    brought back once. `factors`: of PREMUL_SUM, one a rank; each product is rounded to the dtype before the sum."""
    dtype = inputs[0].dtype
    if dtype in PARTS:
        return reduced(op, [x.view(PARTS[dtype]) for x in inputs], factors).view(dtype)
    wide = WIDE.get(dtype, dtype)
    if dtype == torch.bool:
        inputs = [x.view(torch.uint8) != 0 for x in inputs]
    if op == "PREMUL_SUM":
        assert factors is not None
        inputs = [rounded(x.to(wide) * factor, dtype) for x, factor in zip(inputs, factors, strict=True)]
        op = "SUM"
    total = inputs[0].to(wide)
    for x in inputs[1:]:
        total = (FOLDS_OF_BOOL if dtype == torch.bool else FOLDS)[op](total, x.to(wide))
    if op == "AVG":
        count = len(inputs)
        total = total / count if dtype.is_floating_point else torch.div(total, count, rounding_mode="trunc")
    return canonical(rounded(total, dtype))
