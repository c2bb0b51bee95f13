"""All-reduce, residual add, RMS norm and quantization as one call, under FlashInfer's names.

With T the input's dtype, every rank gets, bit for bit and whatever the strategy:

    residual_out = T(T(sum over ranks) + residual_in)              the sum in float32 and rank order
    output       = T(residual_out / rms(residual_out) * (weight_bias + gamma))        in float32
    quant_out    = output, quantized                               from the rounded output

As in allreduce.py there is one custom op underneath, so that torch.compile sees an opaque call that mutates its
outputs.
"""

from __future__ import annotations

import torch

from mnnvl_backend import arguments
from mnnvl_backend.flashinfer.checks import (
    check_contiguous,
    check_device,
    check_input,
    check_like,
    check_optional_tensor,
    check_plain,
    check_workspace,
    refuse,
)
from mnnvl_backend.flashinfer.quantization import (
    MNNVLQuantType,
    QuantizationSFLayout,
    check_quantizable,
    check_quantization,
    quant_out_of,
    scale_out_of,
)
from mnnvl_backend.flashinfer.strategy import MNNVLAllreduceFusionStrategy
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace, compiled_workspace

_library = torch.library.Library("mnnvl", "FRAGMENT")
_library.define(
    "trtllm_fused_allreduce(Tensor input, Tensor? residual_in, Tensor gamma, Tensor(a!)? output, "
    "Tensor(b!) residual_out, Tensor(c!)? quant_out, Tensor(d!)? scale_out, Tensor? scale, float scale_value, "
    "float epsilon, float weight_bias, int quantization, int layout, int group_size, int workspace, int strategy, "
    "bool launch_with_pdl) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    gamma: torch.Tensor,
    output: torch.Tensor | None,
    residual_out: torch.Tensor,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_value: float,
    epsilon: float,
    weight_bias: float,
    quantization: int,
    layout: int,
    group_size: int,
    workspace: int,
    strategy: int,
    launch_with_pdl: bool,
) -> None:
    compiled_workspace(workspace).fused_all_reduce(
        input, residual_in, gamma, output, residual_out, quant_out, scale_out, scale, scale_value, epsilon,
        weight_bias, quantization, layout, group_size, strategy, launch_with_pdl,
    )  # fmt: skip


def _fake(*arguments: object) -> None:
    return None


_library.impl("trtllm_fused_allreduce", _run, "CPU")
_library.impl("trtllm_fused_allreduce", _run, "CUDA")
for _view in ("Conjugate", "Negative"):  # refused by name, where torch would make copies, and not of absent tensors
    _library.impl("trtllm_fused_allreduce", torch.library.fallthrough_kernel, _view)
torch.library.register_fake("mnnvl::trtllm_fused_allreduce", _fake, lib=_library)


def trtllm_mnnvl_fused_allreduce_add_rmsnorm(
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    gamma: torch.Tensor,
    workspace: MNNVLAllReduceFusionWorkspace,
    epsilon: float | None = None,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    launch_with_pdl: bool = False,
    strategy: MNNVLAllreduceFusionStrategy = MNNVLAllreduceFusionStrategy.AUTO,
    weight_bias: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums `input` over the ranks, adds `residual_in` and norms each row. Collective, like trtllm_mnnvl_allreduce.

    Args:
        input: [num_tokens, hidden_dim], float32, float16 or bfloat16; this and every other tensor is contiguous and on
            the workspace's device. With no tokens nothing is enqueued.
        residual_in: like `input`; None: nothing is added.
        gamma: [hidden_dim], input's dtype or float32.
        workspace: with room for an all-reduce of `input` under the strategy; fusion needs no more.
        epsilon: added to the mean square; None: torch.finfo(input.dtype).eps.
        output, residual_out: like `input`; None: new tensors. Each may be `input` or `residual_in`; what is written may
            overlap nothing else (ValueError).
        launch_with_pdl, strategy: see trtllm_mnnvl_allreduce.
        weight_bias: added to gamma; 1.0 for Gemma and Qwen3.5.

    Returns:
        (output, residual_out): the norm, and the row before it.

    Raises:
        TypeError, ValueError, RuntimeError: as trtllm_mnnvl_allreduce. The tensors are checked before the workspace.
    """
    _check_inputs(input, residual_in, gamma)
    if output is None:
        output = torch.empty_like(input)
    else:
        check_like("output", output, input)
    residual_out = _residual_out_of(input, residual_out, output)
    epsilon = _checked_numbers(input, epsilon, weight_bias, launch_with_pdl)
    strategy = check_workspace(workspace, input, strategy)
    if input.shape[0]:
        torch.ops.mnnvl.trtllm_fused_allreduce(
            input, residual_in, gamma, output, residual_out, None, None, None, 1.0, epsilon, weight_bias,
            MNNVLQuantType.NONE, QuantizationSFLayout.SWIZZLED_128x4, 0, workspace.handle, strategy.value,
            launch_with_pdl,
        )  # fmt: skip
    return output, residual_out


def trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    gamma: torch.Tensor,
    workspace: MNNVLAllReduceFusionWorkspace,
    epsilon: float | None = None,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    output_scale: torch.Tensor | float | None = None,
    layout_code: int = QuantizationSFLayout.SWIZZLED_128x4,
    quant_type: int = MNNVLQuantType.NONE,
    launch_with_pdl: bool = False,
    strategy: MNNVLAllreduceFusionStrategy = MNNVLAllreduceFusionStrategy.AUTO,
    weight_bias: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """trtllm_mnnvl_fused_allreduce_add_rmsnorm, and the norm quantized.

    Args:
        output: the norm itself is written there; None: it is not kept.
        quant_out: FP8, dynamic FP8: [num_tokens, hidden_dim], float8_e4m3fn. NVFP4: [num_tokens, hidden_dim / 2], uint8
            or float4_e2m1fn_x2, the even element in the low half. None: a new tensor (NVFP4: uint8).
        scale_out: dynamic FP8: [num_tokens, 1], float32. NVFP4: float8_e4m3fn, LINEAR: at least num_tokens * hidden_dim
            / 16 elements; SWIZZLED_128x4: at least compute_fp4_swizzled_layout_sf_size(num_tokens, hidden_dim / 16).
            Padding is made zero. None: a new tensor. FP8 ignores it.
        output_scale: FP8 divides by it, NVFP4's scales are multiplied by it, dynamic FP8 ignores it. A tensor's first
            element is read when the kernel runs, and is copied before if it isn't float32 on input's device; a number
            goes by value, which can be captured. None: 1.0.
        layout_code: NVFP4's scales: SWIZZLED_128x4 or LINEAR of QuantizationSFLayout.
        quant_type: FP8, NVFP4 or DYNAMIC_FP8 of MNNVLQuantType. NVFP4 wants 16-bit input and hidden_dim % 16 == 0.
        input, residual_in, gamma, workspace, epsilon, residual_out, launch_with_pdl, strategy, weight_bias: see
            trtllm_mnnvl_fused_allreduce_add_rmsnorm.

    Returns:
        (quant_out, scale_out, residual_out, output); scale_out is None for FP8, output unless it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as trtllm_mnnvl_allreduce. The tensors are checked before the workspace.
    """
    quant_type, layout_code = check_quantization(quant_type, layout_code)
    return fused_quantized(
        input, residual_in, gamma, workspace, epsilon, output, residual_out, quant_out, scale_out, output_scale,
        layout_code, quant_type, None, launch_with_pdl, strategy, weight_bias,
    )  # fmt: skip


def fused_quantized(
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    gamma: torch.Tensor,
    workspace: MNNVLAllReduceFusionWorkspace,
    epsilon: float | None,
    output: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    output_scale: torch.Tensor | float | None,
    layout: int,
    quantization: int,
    group_size: int | None,
    launch_with_pdl: bool,
    strategy: MNNVLAllreduceFusionStrategy,
    weight_bias: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """For any quantization; `group_size` is the packed group FP8's. Layout and quantization are checked already."""
    _check_inputs(input, residual_in, gamma)
    group = check_quantizable(input, quantization, group_size)
    if output is not None:
        check_like("output", output, input)
    residual_out = _residual_out_of(input, residual_out, output)
    check_optional_tensor("quant_out", quant_out)
    check_optional_tensor("scale_out", scale_out)
    quant_out = quant_out_of(input, quantization, quant_out)
    scale_out = scale_out_of(input, quantization, layout, group, scale_out)
    scale, scale_value = _scale_of(input, quantization, output_scale)
    epsilon = _checked_numbers(input, epsilon, weight_bias, launch_with_pdl)
    strategy = check_workspace(workspace, input, strategy)
    if input.shape[0]:
        torch.ops.mnnvl.trtllm_fused_allreduce(
            input, residual_in, gamma, output, residual_out, quant_out, scale_out, scale, scale_value, epsilon,
            weight_bias, quantization, layout, group, workspace.handle, strategy.value, launch_with_pdl,
        )  # fmt: skip
    return quant_out, scale_out, residual_out, output


def _check_inputs(input: torch.Tensor, residual_in: torch.Tensor | None, gamma: torch.Tensor) -> None:
    if not isinstance(input, torch.Tensor):
        raise arguments.wrong_type("input", "a torch.Tensor", input)
    check_input(input)
    hidden_dim = input.shape[1]
    if hidden_dim < 1:
        refuse("input", "hidden_dim of at least 1", hidden_dim)
    if residual_in is not None:
        check_like("residual_in", residual_in, input)
    if not isinstance(gamma, torch.Tensor):
        raise arguments.wrong_type("gamma", "a torch.Tensor", gamma)
    check_plain("gamma", gamma)
    if gamma.dim() != 1 or gamma.shape[0] != hidden_dim:
        refuse("gamma", f"shape ({hidden_dim},)", tuple(gamma.shape))
    if gamma.dtype is not input.dtype and gamma.dtype is not torch.float32:
        refuse("gamma", f"input's dtype {input.dtype} or torch.float32", gamma.dtype)
    check_device("gamma", gamma, input)
    check_contiguous("gamma", gamma)


def _residual_out_of(
    input: torch.Tensor, residual_out: torch.Tensor | None, output: torch.Tensor | None
) -> torch.Tensor:
    """`residual_out`, checked, or a new one."""
    if residual_out is None:
        return torch.empty_like(input)
    if residual_out is output:
        refuse("residual_out", "another tensor than output", "the same")
    check_like("residual_out", residual_out, input)
    return residual_out


def _scale_of(
    input: torch.Tensor, quantization: int, output_scale: torch.Tensor | float | None
) -> tuple[torch.Tensor | None, float]:
    """The scale as a tensor that the kernel reads, or as a number; a copy only where the tensor can't be read as is."""
    if output_scale is None or quantization not in (MNNVLQuantType.FP8, MNNVLQuantType.NVFP4):
        return None, 1.0
    if not isinstance(output_scale, torch.Tensor):
        return None, arguments.number("output_scale", output_scale, "a number, a torch.Tensor or None")
    check_plain("output_scale", output_scale)
    if output_scale.numel() < 1:
        refuse("output_scale", "at least one element", f"shape {tuple(output_scale.shape)}")
    if output_scale.is_meta:
        refuse("output_scale", "a tensor with values", "one on meta")
    return output_scale.to(device=input.device, dtype=torch.float32), 1.0


def _checked_numbers(input: torch.Tensor, epsilon: float | None, weight_bias: float, launch_with_pdl: bool) -> float:
    """The epsilon."""
    arguments.number("weight_bias", weight_bias, "a number")
    arguments.instance("launch_with_pdl", launch_with_pdl, bool, "a bool")
    if epsilon is None:
        return torch.finfo(input.dtype).eps
    return arguments.number("epsilon", epsilon, "a number or None")
