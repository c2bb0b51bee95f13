"""What a fused all-reduce must give, bit for bit, in numpy: csrc/protocol/fused_row.h in other words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from reference import CANONICAL_NAN, INTEGER_OF

LANES = 1024
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
F32 = np.float32


def norms(r: torch.Tensor, gamma: torch.Tensor, epsilon: float, weight_bias: float) -> torch.Tensor:
    """[rows, hidden], rounded to r's dtype; the sum of squares in its one order."""
    wide = np.float64 if r.dtype == torch.float32 else np.float32
    v, weight = r.float().numpy().astype(wide), gamma.float().numpy().astype(wide)
    rows, hidden = v.shape
    elements = 16 // r.itemsize
    packs = -(-hidden // elements)
    rounds = -(-packs // LANES)
    squares = np.zeros((rows, rounds * LANES * elements), wide)
    with np.errstate(all="ignore"):
        squares[:, :hidden] = v * v
        packed = squares.reshape(rows, rounds, LANES, elements)
        sums = packed[..., 0].copy()
        for e in range(1, elements):
            sums += packed[..., e]
        lanes = sums[:, 0].copy()
        for i in range(1, rounds):
            lanes += sums[:, i]
        while lanes.shape[1] > 1:
            lanes = lanes[:, 0::2] + lanes[:, 1::2]
        inverse = wide(1) / np.sqrt(lanes / wide(hidden) + wide(F32(epsilon)))
        n = (v * inverse) * (wide(F32(weight_bias)) + weight)
        rounded = torch.from_numpy(n.astype(F32)).to(r.dtype)
    rounded.view(INTEGER_OF[r.dtype])[torch.from_numpy(np.isnan(n))] = CANONICAL_NAN[r.dtype]
    return rounded


def exact_norms(r: torch.Tensor, gamma: torch.Tensor, epsilon: float, weight_bias: float) -> torch.Tensor:
    """In float64."""
    v = r.double()
    inverse = 1 / (v.square().mean(1, keepdim=True) + float(F32(epsilon))).sqrt()
    return v * inverse * (float(F32(weight_bias)) + gamma.double())


def e4m3(v: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, saturating; NaN is 0x7f."""
    bits = torch.from_numpy(np.clip(v, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.where(np.isnan(v), 0x7F, bits).astype(np.uint8)


def e4m3_value(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()


def e2m1(v: np.ndarray) -> np.ndarray:
    """Codes of four bits: the nearest value, of two the one of the even code, the sign on top; NaN is 6."""
    distance = np.abs(np.minimum(np.abs(np.nan_to_num(v, nan=6, posinf=6, neginf=6)), 6)[..., None] - E2M1)
    least = distance.min(-1, keepdims=True)
    nearest = distance == least
    code = nearest.argmax(-1)
    tie = nearest.sum(-1) == 2
    code = code + (tie & (code % 2 == 1))
    return np.where(np.isnan(v), 7, code | (np.signbit(v) << 3)).astype(np.uint8)


def amax(v: np.ndarray) -> np.ndarray:
    """Of the last axis; NaN is passed over."""
    return np.nan_to_num(np.abs(v), nan=0, posinf=np.inf).max(-1).astype(F32)


@dataclass
class Quantised:
    values: torch.Tensor  # bytes
    scales: torch.Tensor | None  # float32 or bytes, all of their memory


def float8(norm: torch.Tensor, scale: float) -> Quantised:
    factor = F32(1) / F32(scale)
    return Quantised(torch.from_numpy(e4m3(norm.float().numpy() * factor)), None)


def dynamic_float8(norm: torch.Tensor) -> Quantised:
    v = norm.float().numpy()
    scales = np.maximum(amax(v) * (F32(1) / F32(448)), F32(2.0**-9) / F32(448))
    with np.errstate(all="ignore"):
        return Quantised(torch.from_numpy(e4m3(v / scales[:, None])), torch.from_numpy(scales.reshape(-1, 1)))


def nv_float4(norm: torch.Tensor, scale: float, swizzled: bool) -> Quantised:
    v = norm.float().numpy()
    rows, blocks = v.shape[0], v.shape[1] // 16
    v = v.reshape(rows, blocks, 16)
    with np.errstate(all="ignore"):
        scales = e4m3(F32(scale) * (amax(v) * F32(1 / 6)))
        factors = np.where(scales == 0, F32(0), F32(scale) / e4m3_value(scales)).astype(F32)
        codes = e2m1(v * factors[..., None]).reshape(rows, -1)
    values = codes[:, 0::2] | codes[:, 1::2] << 4
    if not swizzled:
        return Quantised(torch.from_numpy(values), torch.from_numpy(scales))
    columns = -(-blocks // 4)
    laid = np.zeros(-(-rows // 128) * 128 * columns * 4, np.uint8)
    m, k = np.meshgrid(np.arange(rows), np.arange(blocks), indexing="ij")
    laid[(m // 128 * columns + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4] = scales
    return Quantised(torch.from_numpy(values), torch.from_numpy(laid))


def group_float8(norm: torch.Tensor, group: int) -> Quantised:
    v = norm.float().numpy()
    rows, groups = v.shape[0], v.shape[1] // group
    v = v.reshape(rows, groups, group)
    least = np.maximum(amax(v) / F32(448), F32(1e-10))
    mantissa, exponent = np.frexp(least)  # in [0.5, 1)
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    values = e4m3(v / np.ldexp(F32(1), exponent)[..., None]).reshape(rows, -1)
    words, stride = -(-groups // 4), -(-rows // 4) * 4
    laid = np.zeros(words * stride * 4, np.uint8)
    m, g = np.meshgrid(np.arange(rows), np.arange(groups), indexing="ij")
    laid[(g // 4 * stride + m) * 4 + g % 4] = exponent + 127
    return Quantised(torch.from_numpy(values), torch.from_numpy(laid[: ((words - 1) * stride + rows) * 4]))
