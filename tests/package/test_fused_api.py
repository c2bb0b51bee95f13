"""What is pure in the fused family: constants, sizes, module paths, and the checks of arguments, which all come before
the workspace is looked at."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from stand_in import Stand

import mnnvl_backend
import mnnvl_backend.flashinfer.comm as comm
from mnnvl_backend import AllReduceFusionPattern as Pattern
from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import MNNVLQuantType
from mnnvl_backend import QuantizationSFLayout as Layout
from mnnvl_backend.flashinfer.comm import allreduce, mapping, mnnvl, trtllm_mnnvl_ar, workspace_base

FP8, FP4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2
NVFP4 = {"quant_type": MNNVLQuantType.NVFP4}
DYNAMIC = {"quant_type": MNNVLQuantType.DYNAMIC_FP8}
plain = mnnvl_backend.trtllm_mnnvl_fused_allreduce_add_rmsnorm
quant = mnnvl_backend.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant


# Names.


def test_codes_are_flashinfers():
    assert {k: v for k, v in vars(MNNVLQuantType).items() if k.isupper()} == {
        "NONE": 0, "FP8": 1, "NVFP4": 2, "DYNAMIC_FP8": 3}  # fmt: skip
    assert (Layout.SWIZZLED_128x4, Layout.SWIZZLED_8x4, Layout.LINEAR) == (0, 1, 2)
    assert sorted(v for k, v in vars(Pattern).items() if k.startswith("k")) == list(range(12))
    assert Pattern.kARResidualRMSNormOutFP4Quant == 5
    assert Pattern.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant == 9
    assert Pattern.kARResidualRMSNormDynamicFP8Quant == 10
    assert trtllm_mnnvl_ar.MNNVL_ONE_SHOT_THRESHOLD == 1 << 20


@pytest.mark.parametrize(
    ("rows", "columns", "expected"), [(1, 1, 512), (128, 4, 512), (129, 4, 1024), (1, 5, 1024), (0, 4, 0)]
)
def test_swizzled_scales(rows, columns, expected):
    assert comm.compute_fp4_swizzled_layout_sf_size(rows, columns) == expected


@pytest.mark.parametrize("module", [comm, allreduce, mapping, mnnvl, trtllm_mnnvl_ar, workspace_base])
def test_module_paths_give_the_package_s_own(module):
    for name in module.__all__:
        assert getattr(module, name) is getattr(mnnvl_backend, name), name


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (plain, "input residual_in gamma workspace epsilon output residual_out launch_with_pdl strategy weight_bias"),
        (quant, "input residual_in gamma workspace epsilon output residual_out quant_out scale_out output_scale layout_code quant_type launch_with_pdl strategy weight_bias"),
        (comm.create_allreduce_fusion_workspace, "backend world_size rank max_token_num hidden_dim dtype gpus_per_node comm_backend force_oneshot_support group device options"),
        (trtllm_mnnvl_ar.get_allreduce_mnnvl_workspace, "mapping dtype comm_backend_for_handle_transfer buffer_size_in_bytes"),
        (trtllm_mnnvl_ar.trtllm_mnnvl_all_reduce, "inp multicast_buffer_ptr buffer_ptrs_dev buffer_M buffer_flags_mnnvl nranks rank wait_for_results launch_with_pdl out"),
        (trtllm_mnnvl_ar.trtllm_mnnvl_fused_allreduce_rmsnorm, "prenorm_output normed_output shard_input multicast_buffer_ptr buffer_ptrs_dev unicast_ptr buffer_M buffer_flags_mnnvl nranks rank gamma epsilon residual launch_with_pdl"),
        (comm.allreduce_fusion, "input workspace pattern launch_with_pdl trigger_completion_at_end output residual_out norm_out quant_out scale_out residual_in rms_gamma rms_eps scale_factor layout_code use_oneshot fp32_acc moe_reduction_device_num_experts moe_reduction_scale_input moe_reduction_active_experts_token_input moe_reduction_token_input expanded_idx_to_permuted_idx expert_scale_factor shared_expert_output block_quant_group_size weight_bias"),
    ],
)  # fmt: skip
def test_arguments_are_in_flashinfers_order(function, names):
    assert list(inspect.signature(function).parameters) == names.split()


# Checks of the two fused functions. The workspace is no workspace, and nobody notices before the tensors are right.


def problem(**given: Any) -> dict[str, Any]:
    """Of 3 tokens of 32, in bfloat16."""
    x = torch.ones(3, 32, dtype=torch.bfloat16)
    return {"input": x, "residual_in": x, "gamma": x[0], "workspace": object(), **given}


def x_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


TRANSPOSED = x_of(32, 3).t()
BAD_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"input": x_of(32)}, r"input: expected 2-D \[num_tokens, hidden_dim\], got 1-D \(32,\)"),
    ({"input": x_of(3, 32, dtype=torch.int32)}, "input: expected dtype float32, float16 or bfloat16, got torch.int32"),
    ({"input": TRANSPOSED}, r"input: expected a contiguous tensor, got strides \(1, 3\)"),
    ({"input": x_of(3, 0), "residual_in": None}, "input: expected hidden_dim of at least 1, got 0"),
    ({"residual_in": x_of(32)}, "residual_in: expected 2-D .*got 1-D"),
    ({"residual_in": x_of(4, 32)}, r"residual_in: expected input's shape \(3, 32\), got \(4, 32\)"),
    ({"residual_in": x_of(3, 32, dtype=torch.float16)}, "residual_in: expected input's dtype torch.bfloat16, got torch.float16"),
    ({"residual_in": TRANSPOSED}, "residual_in: expected a contiguous tensor"),
    ({"residual_in": x_of(3, 32).to("meta")}, "residual_in: expected input's device cpu, got meta"),
    ({"gamma": x_of(31)}, r"gamma: expected shape \(32,\), got \(31,\)"),
    ({"gamma": x_of(1, 32)}, r"gamma: expected shape \(32,\), got \(1, 32\)"),
    ({"gamma": x_of(32, dtype=torch.float16)}, "gamma: expected input's dtype torch.bfloat16 or torch.float32, got torch.float16"),
    ({"gamma": x_of(64)[::2]}, r"gamma: expected a contiguous tensor, got strides \(2,\)"),
    ({"gamma": x_of(32).to("meta")}, "gamma: expected input's device cpu, got meta"),
    ({"output": x_of(3, 33)}, r"output: expected input's shape \(3, 32\), got \(3, 33\)"),
    ({"output": x_of(96)}, "output: expected 2-D"),
    ({"output": x_of(3, 32, dtype=torch.float32)}, "output: expected input's dtype torch.bfloat16, got torch.float32"),
    ({"residual_out": TRANSPOSED}, "residual_out: expected a contiguous tensor"),
    ({"residual_out": x_of(3, 32).to("meta")}, "residual_out: expected input's device cpu, got meta"),
    ({"output": TRANSPOSED.contiguous()} | dict.fromkeys(["output", "residual_out"], x_of(3, 32)), "residual_out: expected another tensor than output"),
]  # fmt: skip


@pytest.mark.parametrize("function", [plain, quant])
@pytest.mark.parametrize(("given", "text"), BAD_TENSORS)
def test_tensors_are_checked_before_the_workspace(function, given, text):
    if function is quant:
        given = {"quant_type": MNNVLQuantType.FP8, **given}
    with pytest.raises(ValueError, match=text):
        function(**problem(**given))


BAD_QUANTIZATIONS: list[tuple[dict[str, Any], str]] = [
    ({}, r"quant_type: expected FP8 \(1\), NVFP4 \(2\) or DYNAMIC_FP8 \(3\), got 0"),
    ({"quant_type": 4}, "quant_type: expected .*, got 4"),
    ({"quant_type": 1, "layout_code": Layout.SWIZZLED_8x4}, r"layout_code: expected SWIZZLED_128x4 \(0\) or LINEAR \(2\), got 1"),
    ({**NVFP4, "layout_code": 3}, "layout_code: .*, got 3"),
    ({"quant_type": 1, "quant_out": x_of(3, 16, dtype=FP8)}, r"quant_out: expected shape \(3, 32\) for FP8, got \(3, 16\)"),
    ({"quant_type": 1, "quant_out": x_of(3, 32, dtype=torch.uint8)}, "quant_out: expected dtype torch.float8_e4m3fn for FP8, got torch.uint8"),
    ({"quant_type": 1, "quant_out": x_of(32, 3, dtype=FP8).t()}, "quant_out: expected a contiguous tensor"),
    ({"quant_type": 1, "quant_out": x_of(3, 32, dtype=FP8).to("meta")}, "quant_out: expected input's device cpu, got meta"),
    ({"quant_type": 1, "output_scale": torch.empty(0)}, r"output_scale: expected at least one element, got shape \(0,\)"),
    ({**DYNAMIC, "scale_out": x_of(3, dtype=torch.float32)}, r"scale_out: expected shape \(3, 1\) for dynamic FP8, got \(3,\)"),
    ({**DYNAMIC, "scale_out": x_of(3, 1, dtype=torch.bfloat16)}, "scale_out: expected dtype torch.float32 for dynamic FP8, got torch.bfloat16"),
    ({**DYNAMIC, "scale_out": x_of(3, 2, dtype=torch.float32)[:, :1]}, r"scale_out: expected a contiguous tensor, got strides \(2, 1\)"),
    ({**DYNAMIC, "scale_out": x_of(3, 1, dtype=torch.float32).to("meta")}, "scale_out: expected input's device cpu, got meta"),
    ({**NVFP4, "quant_out": x_of(3, 32, dtype=torch.uint8)}, r"quant_out: expected shape \(3, 16\) for NVFP4, got \(3, 32\)"),
    ({**NVFP4, "quant_out": x_of(3, 16, dtype=FP8)}, "quant_out: expected dtype torch.uint8 or torch.float4_e2m1fn_x2 for NVFP4, got torch.float8_e4m3fn"),
    ({**NVFP4, "scale_out": x_of(511, dtype=FP8)}, "scale_out is too small for NVFP4: got 511 elements, need at least 512 in"),
    ({**NVFP4, "layout_code": Layout.LINEAR, "scale_out": x_of(3, 1, dtype=FP8)}, "scale_out is too small for NVFP4: got 3 elements, need at least 6 in"),
    ({**NVFP4, "scale_out": x_of(512, dtype=torch.uint8)}, "scale_out: expected dtype torch.float8_e4m3fn for NVFP4, got torch.uint8"),
    ({**NVFP4, "scale_out": x_of(1024, dtype=FP8)[::2]}, "scale_out: expected a contiguous tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text"), BAD_QUANTIZATIONS)
def test_quantizations_are_checked_before_the_workspace(given, text):
    with pytest.raises(ValueError, match=text):
        quant(**problem(**given))


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [((3, 32), torch.float32, "expected dtype float16 or bfloat16 for NVFP4, got torch.float32"),
     ((3, 24), torch.float16, "expected hidden_dim to be a multiple of 16 for NVFP4, got 24")],
)  # fmt: skip
def test_nvfp4_wants_16_bit_rows_of_whole_blocks(shape, dtype, text):
    x = x_of(*shape, dtype=dtype)
    with pytest.raises(ValueError, match=text):
        quant(x, None, x[0], object(), **NVFP4)


BAD_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"input": [[1.0]]}, r"input: expected a torch.Tensor, got \[\[1.0\]\] \(list\)"),
    ({"gamma": None}, "gamma: expected a torch.Tensor, got None"),
    ({"residual_in": 0}, "residual_in: expected a torch.Tensor or None, got 0"),
    ({"output": False}, "output: expected a torch.Tensor or None, got False"),
    ({"residual_out": False}, "residual_out: expected a torch.Tensor or None, got False"),
    ({"epsilon": "1e-5"}, "epsilon: expected a number or None, got '1e-5'"),
    ({"weight_bias": None}, "weight_bias: expected a number, got None"),
    ({"launch_with_pdl": 1}, r"launch_with_pdl: expected a bool, got 1 \(int\)"),
    ({}, "workspace: expected an MNNVLAllReduceFusionWorkspace, got <object object"),
    ({"workspace": None, "residual_in": None}, "workspace: expected an MNNVLAllReduceFusionWorkspace, got None"),
]  # fmt: skip


@pytest.mark.parametrize("function", [plain, quant])
@pytest.mark.parametrize(("given", "text"), BAD_TYPES)
def test_types_of_the_fused_functions(function, given, text):
    if function is quant:
        given = {"quant_type": MNNVLQuantType.FP8, **given}
    with pytest.raises(TypeError, match=text):
        function(**problem(**given))


@pytest.mark.parametrize(
    ("given", "text"),
    [({"quant_out": 1}, "quant_out: expected a torch.Tensor or None"),
     ({"scale_out": 1}, "scale_out: expected a torch.Tensor or None"),
     ({"output_scale": "1"}, "output_scale: expected a number, a torch.Tensor or None, got '1'"),
     ({"output_scale": True}, "output_scale: .*got True")],
)  # fmt: skip
def test_types_of_the_quantized_function(given, text):
    with pytest.raises(TypeError, match=text):
        quant(**problem(quant_type=MNNVLQuantType.FP8, **given))


@pytest.mark.parametrize(
    "given",
    [{}, {"residual_in": None}, {"gamma": x_of(32, dtype=torch.float32)}, {"output": x_of(3, 32)},
     {**NVFP4, "quant_out": x_of(3, 16, dtype=FP4)}, {**NVFP4, "scale_out": x_of(128, 4, dtype=FP8)},
     {**NVFP4, "scale_out": x_of(128, 1, dtype=torch.int32).view(FP8)}, {"quant_type": 1, "output_scale": 2},
     {"quant_type": 1, "scale_out": x_of(7)}, {"quant_type": 1, "output_scale": torch.ones((), dtype=torch.float64)},
     {**DYNAMIC, "output_scale": torch.empty(0)}],
)  # fmt: skip
def test_good_arguments_reach_the_workspace(given):
    function = quant if "quant_type" in given else plain
    with pytest.raises(TypeError, match="workspace: expected"):
        function(**problem(**given))


X, Y = x_of(3, 32), x_of(3, 32)


@pytest.mark.parametrize(
    "given",
    [{"input": X, "output": X, "residual_in": Y, "residual_out": Y}, {"input": X, "residual_in": None, "residual_out": X},
     {"input": X, "residual_in": Y, "residual_out": X, "output": Y}],
)  # fmt: skip
def test_in_place_is_allowed(given):
    with pytest.raises(TypeError, match="workspace: expected"):
        plain(**problem(**given))


# The unified function.


@pytest.fixture
def stand():
    workspace = Stand()
    yield workspace
    workspace.destroy()


@pytest.mark.parametrize("pattern", [6, 7, 12, -1])
def test_patterns_that_are_not_supported(stand, pattern):
    with pytest.raises(ValueError, match=f"does not support pattern {pattern}"):
        comm.allreduce_fusion(x_of(3, 32), stand, pattern)


@pytest.mark.parametrize("workspace", [object(), None, 1])
def test_another_workspace_is_a_type_error(workspace):
    with pytest.raises(TypeError, match="workspace: expected an MNNVLAllReduceFusionWorkspace, got"):
        comm.allreduce_fusion(x_of(3, 32), workspace, Pattern.kAllReduce)


QUANTIZED = [2, 3, 4, 5, 8, 9, 10, 11]
REQUIRED = {p: ["residual_in", "rms_gamma"] for p in (1, *QUANTIZED)}
for packed in (8, 9):
    REQUIRED[packed].append("scale_out")
for dynamic in (10, 11):
    REQUIRED[dynamic] += ["residual_out", "quant_out", "scale_out"]
REQUIRED[11].append("norm_out")


def unified(pattern: int, **given: Any) -> dict[str, Any]:
    x = x_of(3, 32)
    scales = {8: torch.empty_strided((3, 1), (1, 4), dtype=torch.int32), 10: x_of(3, 1, dtype=torch.float32)}
    outputs = {"residual_out": x_of(3, 32), "norm_out": x_of(3, 32), "scale_out": scales.get(pattern // 2 * 2)}
    if pattern in (10, 11):
        outputs["quant_out"] = x_of(3, 32, dtype=FP8)
    group = {"block_quant_group_size": 8} if pattern in (8, 9) else {}
    return {"input": x, "pattern": pattern, "residual_in": x, "rms_gamma": x[0], **outputs, **group, **given}


@pytest.mark.parametrize(("pattern", "name"), [(p, name) for p, names in REQUIRED.items() for name in names])
def test_required_arguments_are_named(stand, pattern, name):
    with pytest.raises(ValueError, match=f"{name}: expected a torch.Tensor for pattern {pattern}, got None"):
        comm.allreduce_fusion(workspace=stand, **unified(pattern, **{name: None}))


BAD_GROUPS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"block_quant_group_size": None}, TypeError, "block_quant_group_size: expected an integer of at least 1, got None"),
    ({"block_quant_group_size": 0}, ValueError, "block_quant_group_size: .*, got 0"),
    ({"block_quant_group_size": 5}, ValueError, "block_quant_group_size: expected a divisor of hidden_dim 32, got 5"),
    ({"scale_out": x_of(3, 2, dtype=torch.int32)}, ValueError, r"scale_out: expected shape \(3, 1\) for packed group FP8, got \(3, 2\)"),
    ({"scale_out": x_of(3, 1, dtype=torch.int64)}, ValueError, "scale_out: expected dtype torch.int32 for packed group FP8, got torch.int64"),
    ({"scale_out": x_of(3, 1, dtype=torch.int32)}, ValueError, r"scale_out: expected strides \(1, 4\) for packed group FP8, got \(1, 1\)"),
    ({"quant_out": x_of(3, 16, dtype=FP8)}, ValueError, r"quant_out: expected shape \(3, 32\) for packed group FP8"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "text"), BAD_GROUPS)
def test_packed_groups_are_checked(stand, given, error, text):
    with pytest.raises(error, match=text):
        comm.allreduce_fusion(workspace=stand, **unified(8, **given))


@pytest.mark.parametrize("pattern", QUANTIZED)
def test_layouts_and_strategies_of_the_unified_function(stand, pattern):
    with pytest.raises(ValueError, match="layout_code: expected .*, got 1"):
        comm.allreduce_fusion(workspace=stand, **unified(pattern, layout_code=Layout.SWIZZLED_8x4))
    with pytest.raises(TypeError, match="use_oneshot: expected a bool, or None"):
        comm.allreduce_fusion(workspace=stand, **unified(pattern, use_oneshot=1))


def test_the_workspace_is_checked_last():
    """Alive, then large enough, then on the same device."""
    x = x_of(64, 64)
    small = Stand(64)
    with pytest.raises(
        ValueError, match=r"workspace: its buffer of 64 bytes.*TWOSHOT of \[64, 64\].*requires 16384 bytes"
    ):
        plain(x, x, x[0], small, strategy=Strategy.TWOSHOT)
    meta = x_of(1, 8).to("meta")
    with pytest.raises(ValueError, match="input: expected a tensor on the workspace's device cpu, got meta"):
        plain(meta, None, meta[0], small)
    with pytest.raises(TypeError, match=r"strategy: expected a member of .*, got 0"):
        plain(x, x, x[0], small, strategy=0)
    small.destroy()
    with pytest.raises(RuntimeError, match="workspace: it was destroyed"):
        plain(x, x, x[0], small)


def test_no_tokens_give_empty_outputs(stand):
    """Of the right shapes; the stand has no kernel to call."""
    x = x_of(0, 32)
    output, residual = plain(x, None, x_of(32), stand)
    assert (output.shape, residual.shape) == ((0, 32), (0, 32))
    q, scales, residual, norm = quant(x, x, x_of(32), stand, **NVFP4)
    assert (q.shape, scales.shape, residual.shape, norm) == ((0, 16), (0,), (0, 32), None)
    q, scales, _, norm = quant(x, x, x_of(32), stand, output=x, **DYNAMIC)
    assert (q.shape, q.dtype, scales.shape, norm is x) == ((0, 32), FP8, (0, 1), True)
    assert quant(x, x, x_of(32), stand, quant_type=MNNVLQuantType.FP8)[1] is None
    scales = torch.empty_strided((0, 1), (1, 0), dtype=torch.int32)
    result = comm.allreduce_fusion(
        x, stand, 8, residual_in=x, rms_gamma=x_of(32), scale_out=scales, block_quant_group_size=8
    )
    assert result.shape == (0, 32)
