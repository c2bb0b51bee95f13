"""What follows the norm of a fused all-reduce: FlashInfer's codes of patterns, quantizations and scale layouts, and
the tensors that each quantization writes."""

from __future__ import annotations

import torch

from mnnvl_backend import arguments
from mnnvl_backend.flashinfer.checks import check_contiguous, check_device, refuse

PACKED_GROUP_FP8 = 4  # ours, after MNNVLQuantType's: FlashInfer names it by its patterns only
NVFP4_BLOCK = 16  # elements to a scale
NVFP4_DTYPES: tuple[torch.dtype, ...] = (torch.uint8, torch.float4_e2m1fn_x2)
FP8_DTYPES: tuple[torch.dtype, ...] = (torch.float8_e4m3fn,)


class AllReduceFusionPattern:
    """What allreduce_fusion computes, under FlashInfer's names: plain ints, and no enum. "Out": the norm is written in
    the input's dtype too. The two of MoE are named and not supported."""

    kAllReduce = 0
    kARResidualRMSNorm = 1
    kARResidualRMSNormFP8Quant = 2
    kARResidualRMSNormFP4Quant = 3
    kARResidualRMSNormOutFP8Quant = 4
    kARResidualRMSNormOutFP4Quant = 5
    kMoEReductionARResidualRMSNorm = 6
    kMoEFinalizeARResidualRMSNorm = 7
    kARResidualRMSNormPerTokenGroupFP8PackedQuant = 8
    kARResidualRMSNormOutPerTokenGroupFP8PackedQuant = 9
    kARResidualRMSNormDynamicFP8Quant = 10
    kARResidualRMSNormOutDynamicFP8Quant = 11


class MNNVLQuantType:
    """FP8: one scale, given. NVFP4: a scale to 16 elements, and one given. DYNAMIC_FP8: a scale to each token."""

    NONE = 0
    FP8 = 1
    NVFP4 = 2
    DYNAMIC_FP8 = 3


class QuantizationSFLayout:
    """Where NVFP4's scales stand. SWIZZLED_128x4: tiles of 128 tokens by 4 scales. SWIZZLED_8x4 is named and not
    supported."""

    SWIZZLED_128x4 = 0
    SWIZZLED_8x4 = 1
    LINEAR = 2


QUANTIZATION_NAMES = {
    MNNVLQuantType.FP8: "FP8",
    MNNVLQuantType.NVFP4: "NVFP4",
    MNNVLQuantType.DYNAMIC_FP8: "dynamic FP8",
    PACKED_GROUP_FP8: "packed group FP8",
}


def compute_fp4_swizzled_layout_sf_size(total_row: int, total_column: int) -> int:
    """Scales in the layout SWIZZLED_128x4 of [total_row, total_column] scales, padding included.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    rows = arguments.integer("total_row", total_row, 0)
    return round_up(rows, 128) * round_up(arguments.integer("total_column", total_column, 0), 4)


def check_quantization(quant_type: object, layout_code: object) -> tuple[int, int]:
    """Both as ints.

    Raises:
        ValueError: naming the argument; not a member of MNNVLQuantType or QuantizationSFLayout, or not supported.
    """
    kinds = (MNNVLQuantType.FP8, MNNVLQuantType.NVFP4, MNNVLQuantType.DYNAMIC_FP8)
    kind = arguments.code("quant_type", quant_type, kinds, "FP8 (1), NVFP4 (2) or DYNAMIC_FP8 (3)")
    return kind, check_layout(layout_code)


def check_layout(layout_code: object) -> int:
    layouts = (QuantizationSFLayout.SWIZZLED_128x4, QuantizationSFLayout.LINEAR)
    return arguments.code("layout_code", layout_code, layouts, "SWIZZLED_128x4 (0) or LINEAR (2)")


def check_quantizable(input: torch.Tensor, quantization: int, group_size: object) -> int:
    """That rows of `input` divide as the quantization wants. The group size, 0 where there is none."""
    hidden_dim = input.shape[1]
    if quantization == MNNVLQuantType.NVFP4:
        if input.dtype is torch.float32:
            raise ValueError("input: expected dtype float16 or bfloat16 for NVFP4, got torch.float32")
        if hidden_dim % NVFP4_BLOCK:
            raise ValueError(f"input: expected hidden_dim to be a multiple of 16 for NVFP4, got {hidden_dim}")
    if quantization != PACKED_GROUP_FP8:
        return 0
    size = arguments.integer("block_quant_group_size", group_size, 1)
    if hidden_dim % size:
        raise ValueError(f"block_quant_group_size: expected a divisor of hidden_dim {hidden_dim}, got {size}")
    return size


def quant_out_of(input: torch.Tensor, quantization: int, quant_out: torch.Tensor | None) -> torch.Tensor:
    """`quant_out`, checked, or a new one."""
    num_tokens, hidden_dim = input.shape
    if quantization == MNNVLQuantType.NVFP4:
        shape, dtypes = (num_tokens, hidden_dim // 2), NVFP4_DTYPES
    else:
        shape, dtypes = (num_tokens, hidden_dim), FP8_DTYPES
    if quant_out is None:
        return torch.empty(shape, dtype=dtypes[0], device=input.device)
    _check_output("quant_out", quant_out, quantization, shape, dtypes)
    check_contiguous("quant_out", quant_out)
    check_device("quant_out", quant_out, input)
    return quant_out


def scale_out_of(
    input: torch.Tensor, quantization: int, layout: int, group_size: int, scale_out: torch.Tensor | None
) -> torch.Tensor | None:
    """`scale_out`, checked, or a new one; None for static FP8, which writes none."""
    if quantization == MNNVLQuantType.FP8:
        return None
    if scale_out is not None:
        check_device("scale_out", scale_out, input)
    if quantization == MNNVLQuantType.NVFP4:
        return _nvfp4_scales(input, layout, scale_out)
    if quantization == PACKED_GROUP_FP8:
        return _packed_scales(input, group_size, scale_out)
    shape = (input.shape[0], 1)
    if scale_out is None:
        return torch.empty(shape, dtype=torch.float32, device=input.device)
    _check_output("scale_out", scale_out, quantization, shape, (torch.float32,))
    check_contiguous("scale_out", scale_out)
    return scale_out


def _nvfp4_scales(input: torch.Tensor, layout: int, scale_out: torch.Tensor | None) -> torch.Tensor:
    rows, columns = input.shape[0], input.shape[1] // NVFP4_BLOCK
    linear = layout == QuantizationSFLayout.LINEAR
    needed = rows * columns if linear else compute_fp4_swizzled_layout_sf_size(rows, columns)
    if scale_out is None:
        shape = (rows, columns) if linear else (needed,)
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device=input.device)
    if scale_out.numel() < needed:
        # FlashInfer's words, which its tests look for.
        raise ValueError(
            f"scale_out is too small for NVFP4: got {scale_out.numel()} elements, need at least {needed} in the layout "
            f"{'LINEAR' if linear else 'SWIZZLED_128x4'} of {rows} x {columns} scales"
        )
    if scale_out.dtype is not torch.float8_e4m3fn:
        raise ValueError(f"scale_out: expected dtype torch.float8_e4m3fn for NVFP4, got {scale_out.dtype}")
    check_contiguous("scale_out", scale_out)
    return scale_out


def _packed_scales(input: torch.Tensor, group_size: int, scale_out: torch.Tensor | None) -> torch.Tensor:
    """int32 words of four scales (biased exponents) each, columns aligned to four tokens as TMA wants them."""
    num_tokens, hidden_dim = input.shape
    shape = (num_tokens, (hidden_dim // group_size + 3) // 4)
    strides = (1, round_up(num_tokens, 4))
    if scale_out is None:
        return torch.empty_strided(shape, strides, dtype=torch.int32, device=input.device)
    _check_output("scale_out", scale_out, PACKED_GROUP_FP8, shape, (torch.int32,))
    if scale_out.stride() != strides:
        raise ValueError(f"scale_out: expected strides {strides} for packed group FP8, got {scale_out.stride()}")
    return scale_out


def _check_output(
    name: str, tensor: torch.Tensor, quantization: int, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Its shape and dtype."""
    what = QUANTIZATION_NAMES[quantization]
    if tensor.shape != shape:
        refuse(name, f"shape {tuple(shape)} for {what}", tuple(tensor.shape))
    if tensor.dtype not in dtypes:
        refuse(name, f"dtype {' or '.join(map(str, dtypes))} for {what}", tensor.dtype)


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
