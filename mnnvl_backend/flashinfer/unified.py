"""FlashInfer's one function for every fusion of an all-reduce, and the factory of its workspace."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from mnnvl_backend import arguments, config
from mnnvl_backend.flashinfer.allreduce import trtllm_mnnvl_allreduce
from mnnvl_backend.flashinfer.control import CommBackend, StoreComm
from mnnvl_backend.flashinfer.fusion import fused_quantized, trtllm_mnnvl_fused_allreduce_add_rmsnorm
from mnnvl_backend.flashinfer.mapping import Mapping
from mnnvl_backend.flashinfer.quantization import (
    PACKED_GROUP_FP8,
    AllReduceFusionPattern,
    MNNVLQuantType,
    QuantizationSFLayout,
    check_layout,
)
from mnnvl_backend.flashinfer.strategy import MNNVLAllreduceFusionStrategy, required_bytes, strategy_of
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace
from mnnvl_backend.flashinfer.workspace_base import AllReduceFusionWorkspace
from mnnvl_backend.options import MAX_WORLD_SIZE, Options

_Pattern = AllReduceFusionPattern
# Pattern -> quantization, and whether the norm is written too.
_QUANTIZED = {
    _Pattern.kARResidualRMSNormFP8Quant: (MNNVLQuantType.FP8, False),
    _Pattern.kARResidualRMSNormFP4Quant: (MNNVLQuantType.NVFP4, False),
    _Pattern.kARResidualRMSNormOutFP8Quant: (MNNVLQuantType.FP8, True),
    _Pattern.kARResidualRMSNormOutFP4Quant: (MNNVLQuantType.NVFP4, True),
    _Pattern.kARResidualRMSNormPerTokenGroupFP8PackedQuant: (PACKED_GROUP_FP8, False),
    _Pattern.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant: (PACKED_GROUP_FP8, True),
    _Pattern.kARResidualRMSNormDynamicFP8Quant: (MNNVLQuantType.DYNAMIC_FP8, False),
    _Pattern.kARResidualRMSNormOutDynamicFP8Quant: (MNNVLQuantType.DYNAMIC_FP8, True),
}


def create_allreduce_fusion_workspace(
    backend: str = "auto",
    world_size: int | None = None,
    rank: int | None = None,
    max_token_num: int | None = None,
    hidden_dim: int | None = None,
    dtype: torch.dtype | None = None,
    gpus_per_node: int | None = None,
    comm_backend: CommBackend | None = None,
    force_oneshot_support: bool = False,
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
    options: Options | None = None,
) -> MNNVLAllReduceFusionWorkspace:
    """A workspace of `world_size` ranks. Collective over them.

    Args:
        backend: "auto" or "mnnvl", which are the same: this kind needs no NVLink multicast.
        world_size, rank: of the ranks that share it, which are one tensor-parallel group.
        max_token_num, hidden_dim, dtype: of the largest input, [max_token_num, hidden_dim].
        gpus_per_node: None: as many as torch sees, at most world_size.
        comm_backend: where the ranks meet; None: over the store of `group`.
        force_oneshot_support: room for ONESHOT up to max_token_num, not only up to where AUTO takes it.
        group: None: the default group.
        device, options: as MNNVLAllReduceFusionWorkspace's; not FlashInfer's.

    Raises:
        RuntimeError: another backend, or set-up failed.
        TypeError, ValueError: as MNNVLAllReduceFusionWorkspace.
    """
    if not isinstance(backend, str) or backend not in ("auto", "mnnvl"):
        raise RuntimeError(
            f"backend: expected 'auto' or 'mnnvl', got {arguments.represented(backend)}; this package has one kind of "
            "workspace, for every machine, and not FlashInfer's others"
        )
    size = arguments.at_most("world_size", arguments.integer("world_size", world_size, 1), MAX_WORLD_SIZE)
    place = arguments.integer("rank", rank, 0, size - 1)
    if gpus_per_node is None:
        gpus_per_node = min(torch.cuda.device_count(), size) or size
    mapping = Mapping(size, place, gpus_per_node, tp_size=size)
    arguments.instance("force_oneshot_support", force_oneshot_support, bool, "a bool")
    buffer_size = _any_strategy_bytes(size, max_token_num, hidden_dim, dtype) if force_oneshot_support else None
    if options is not None:
        arguments.instance("options", options, Options, "mnnvl_backend.Options or None")
    if group is not None:
        arguments.instance("group", group, dist.ProcessGroup, "a process group that this rank is in, or None")
    if comm_backend is None and group is not None:
        settings = config.merge(options or Options(), config.read_environment())
        comm_backend = StoreComm.of_group(group, timedelta(milliseconds=settings.timeout_ms))
    return MNNVLAllReduceFusionWorkspace(
        mapping, max_token_num, hidden_dim, dtype, buffer_size, comm_backend, device=device, options=options
    )


def _any_strategy_bytes(tp_size: int, max_token_num: object, hidden_dim: object, dtype: object) -> int:
    """Of one buffer. Two-shot, which rounds tokens up, can need more than one-shot."""
    if not isinstance(dtype, torch.dtype):
        raise arguments.wrong_type("dtype", "a torch.dtype", dtype)
    tokens = arguments.integer("max_token_num", max_token_num, 1)
    hidden = arguments.integer("hidden_dim", hidden_dim, 1)
    return max(
        required_bytes(tp_size, tokens, hidden, dtype.itemsize, strategy)
        for strategy in (MNNVLAllreduceFusionStrategy.ONESHOT, MNNVLAllreduceFusionStrategy.TWOSHOT)
    )


def allreduce_fusion(
    input: torch.Tensor,
    workspace: AllReduceFusionWorkspace,
    pattern: int,
    launch_with_pdl: bool = False,
    trigger_completion_at_end: bool = True,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual_in: torch.Tensor | None = None,
    rms_gamma: torch.Tensor | None = None,
    rms_eps: float = 1e-6,
    scale_factor: torch.Tensor | float | None = None,
    layout_code: int | None = None,
    use_oneshot: bool | None = None,
    fp32_acc: bool = False,
    moe_reduction_device_num_experts: int | None = None,
    moe_reduction_scale_input: torch.Tensor | None = None,
    moe_reduction_active_experts_token_input: torch.Tensor | None = None,
    moe_reduction_token_input: torch.Tensor | None = None,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    expert_scale_factor: torch.Tensor | None = None,
    shared_expert_output: torch.Tensor | None = None,
    block_quant_group_size: int | None = None,
    weight_bias: float = 0.0,
) -> torch.Tensor:
    """One of AllReduceFusionPattern's computations. Collective; see trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant.

    Args:
        pattern: not the two of MoE.
        output: kAllReduce's result. norm_out: the norm; written by kARResidualRMSNorm and the "Out" patterns only.
        residual_in, rms_gamma, rms_eps: residual_in and gamma, required but for kAllReduce, and epsilon.
        residual_out, quant_out, scale_out: new tensors where None. Required: all three by the dynamic FP8 patterns (and
            norm_out, if "Out"), so that none is made under capture; scale_out by the packed ones.
        scale_factor, layout_code: output_scale and layout_code; None: SWIZZLED_128x4.
        use_oneshot: None: by size.
        block_quant_group_size: of the packed patterns, a divisor of hidden_dim. Their quant_out is [num_tokens,
            hidden_dim], float8_e4m3fn; scale_out has a byte per group, the exponent of a power of two, four to an
            int32: [num_tokens, ceil(groups / 4)] with strides (1, num_tokens rounded up to a multiple of 4).
        trigger_completion_at_end, fp32_acc, moe_*, expanded_idx_to_permuted_idx, expert_scale_factor,
            shared_expert_output: ignored.

    Returns:
        What comes last: quant_out, norm_out or output.

    Raises:
        ValueError: a pattern that is not supported, a required argument that is None, and as the functions named.
        TypeError, RuntimeError: as the functions named.
    """
    if not isinstance(workspace, MNNVLAllReduceFusionWorkspace):
        raise arguments.wrong_type("workspace", "an MNNVLAllReduceFusionWorkspace", workspace)
    pattern = arguments.integer("pattern", pattern, -(2**31), 2**31)  # below: whether it is served
    strategy = strategy_of(use_oneshot)
    if pattern == _Pattern.kAllReduce:
        return trtllm_mnnvl_allreduce(input, workspace, launch_with_pdl, output, strategy)
    if pattern != _Pattern.kARResidualRMSNorm and pattern not in _QUANTIZED:
        raise ValueError(f"pattern: MNNVLAllReduceFusionWorkspace does not support pattern {pattern!r}")
    residual_in, gamma = _given("residual_in", residual_in, pattern), _given("rms_gamma", rms_gamma, pattern)
    if pattern == _Pattern.kARResidualRMSNorm:
        return trtllm_mnnvl_fused_allreduce_add_rmsnorm(
            input, residual_in, gamma, workspace, rms_eps, norm_out, residual_out, launch_with_pdl, strategy,
            weight_bias,
        )[0]  # fmt: skip
    return _quantized(
        input, workspace, pattern, launch_with_pdl, residual_out, norm_out, quant_out, scale_out, residual_in, gamma,
        rms_eps, scale_factor, layout_code, strategy, block_quant_group_size, weight_bias,
    )  # fmt: skip


def _quantized(
    input: torch.Tensor,
    workspace: MNNVLAllReduceFusionWorkspace,
    pattern: int,
    launch_with_pdl: bool,
    residual_out: torch.Tensor | None,
    norm_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual_in: torch.Tensor,
    gamma: torch.Tensor,
    epsilon: float,
    scale: torch.Tensor | float | None,
    layout_code: int | None,
    strategy: MNNVLAllreduceFusionStrategy,
    group_size: int | None,
    weight_bias: float,
) -> torch.Tensor:
    """allreduce_fusion's patterns that quantize. Those outputs are required that FlashInfer doesn't allocate either."""
    quantization, writes_norm = _QUANTIZED[pattern]
    if quantization == MNNVLQuantType.DYNAMIC_FP8:
        _given("residual_out", residual_out, pattern)
        _given("quant_out", quant_out, pattern)
        if writes_norm:
            _given("norm_out", norm_out, pattern)
    if quantization in (MNNVLQuantType.DYNAMIC_FP8, PACKED_GROUP_FP8):
        _given("scale_out", scale_out, pattern)
    layout = QuantizationSFLayout.SWIZZLED_128x4 if layout_code is None else layout_code
    layout = check_layout(layout)
    if not writes_norm:
        norm_out = None
    elif norm_out is None:
        norm_out = torch.empty_like(input)
    return fused_quantized(
        input, residual_in, gamma, workspace, epsilon, norm_out, residual_out, quant_out, scale_out, scale, layout,
        quantization, group_size, launch_with_pdl, strategy, weight_bias,
    )[0]  # fmt: skip


def _given(name: str, tensor: torch.Tensor | None, pattern: int) -> torch.Tensor:
    if tensor is None:
        raise ValueError(f"{name}: expected a torch.Tensor for pattern {pattern}, got None")
    return tensor
