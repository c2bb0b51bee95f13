"""trtllm_mnnvl_allreduce: the kernels as a function of a tensor and a workspace, under FlashInfer's name.

Underneath is the custom op mnnvl::trtllm_allreduce, so that torch.compile and fake tensors see one opaque call that
mutates `output`. It is defined through torch.library.Library and not the custom_op decorator, whose wrappers would
cost more per call than a small all-reduce takes.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from mnnvl_backend import arguments
from mnnvl_backend.flashinfer.strategy import (
    MNNVLAllreduceFusionStrategy,
    check_strategy,
    required_bytes,
    strategy_for,
)
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace, compiled_workspace

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("mnnvl", "FRAGMENT")
_library.define(
    "trtllm_allreduce(Tensor input, Tensor(a!) output, int workspace, int strategy, bool launch_with_pdl) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(input: torch.Tensor, output: torch.Tensor, workspace: int, strategy: int, launch_with_pdl: bool) -> None:
    compiled_workspace(workspace).all_reduce(input, output, strategy, launch_with_pdl)


def _fake(input: torch.Tensor, output: torch.Tensor, workspace: int, strategy: int, launch_with_pdl: bool) -> None:
    return None


_library.impl("trtllm_allreduce", _run, "CPU")
_library.impl("trtllm_allreduce", _run, "CUDA")
torch.library.register_fake("mnnvl::trtllm_allreduce", _fake, lib=_library)


def trtllm_mnnvl_allreduce(
    input: torch.Tensor,
    workspace: MNNVLAllReduceFusionWorkspace,
    launch_with_pdl: bool,
    output: torch.Tensor | None = None,
    strategy: MNNVLAllreduceFusionStrategy = MNNVLAllreduceFusionStrategy.AUTO,
) -> torch.Tensor:
    """Sums `input` over the ranks of the workspace's tensor-parallel group. Collective; every rank gets the same bits.

    Runs on the current stream, doesn't synchronize with the host, and can be captured in a CUDA graph.

    Args:
        input: [num_tokens, hidden_dim], contiguous, float32, float16 or bfloat16, on the workspace's device.
        workspace: of the same group, with room for the problem under the strategy.
        launch_with_pdl: launch as a programmatic dependent of the kernel before (CUDA); it waits for that one's data.
        output: like `input`; may be `input` itself. None: a new tensor.
        strategy: AUTO goes by size.

    Returns:
        `output`, [num_tokens, hidden_dim]: the float32 sum in rank order, rounded once to the dtype.

    Raises:
        TypeError: an argument of a wrong type, by name.
        ValueError: a tensor that is not 2-D, not contiguous, of another shape, dtype or device than required; a
            workspace too small, with both byte counts. Nothing was enqueued then, nor after a TypeError.
        RuntimeError: the workspace was destroyed, or the group is broken.
    """
    if not (
        isinstance(input, torch.Tensor)
        and isinstance(workspace, MNNVLAllReduceFusionWorkspace)
        and isinstance(launch_with_pdl, bool)
        and (output is None or isinstance(output, torch.Tensor))
        and isinstance(strategy, MNNVLAllreduceFusionStrategy)
    ):
        _refuse_types(input, workspace, launch_with_pdl, output, strategy)
    if input.dim() != 2:
        raise ValueError(f"input: expected 2-D [num_tokens, hidden_dim], got {input.dim()}-D {tuple(input.shape)}")
    if output is not None and output.dim() != 2:
        raise ValueError(f"output: expected 2-D [num_tokens, hidden_dim], got {output.dim()}-D {tuple(output.shape)}")
    if input.dtype not in DTYPES:
        raise ValueError(f"input: expected dtype float32, float16 or bfloat16, got {input.dtype}")
    if input.device != workspace.device:
        raise ValueError(f"input: expected a tensor on the workspace's device {workspace.device}, got {input.device}")
    if not input.is_contiguous():
        raise ValueError(f"input: expected a contiguous tensor, got strides {input.stride()}")
    if output is None:
        output = torch.empty_like(input)
    else:
        _check_like(output, input)

    num_tokens, hidden_dim = input.shape
    tp_size, itemsize = workspace.tp_size, input.dtype.itemsize
    if strategy is MNNVLAllreduceFusionStrategy.AUTO:
        strategy = strategy_for(num_tokens * hidden_dim * tp_size * itemsize)
    required = required_bytes(tp_size, num_tokens, hidden_dim, itemsize, strategy)
    if required > workspace.buffer_size_bytes:
        raise ValueError(
            f"workspace: its buffer of {workspace.buffer_size_bytes} bytes is too small; {strategy.name} of "
            f"[{num_tokens}, {hidden_dim}] {input.dtype} over {tp_size} ranks requires {required} bytes"
        )
    torch.ops.mnnvl.trtllm_allreduce(input, output, workspace.handle, strategy.value, launch_with_pdl)
    return output


def _refuse_types(
    input: object, workspace: object, launch_with_pdl: object, output: object, strategy: object
) -> NoReturn:
    """Apart from the call, so that a good call pays for the checks only."""
    arguments.instance("input", input, torch.Tensor, "a torch.Tensor")
    arguments.instance("workspace", workspace, MNNVLAllReduceFusionWorkspace, "an MNNVLAllReduceFusionWorkspace")
    arguments.instance("launch_with_pdl", launch_with_pdl, bool, "a bool")
    if output is not None:
        arguments.instance("output", output, torch.Tensor, "a torch.Tensor or None")
    check_strategy(strategy)
    raise AssertionError("unreachable: one of the arguments is of a wrong type")


def _check_like(output: torch.Tensor, input: torch.Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        if getattr(output, what) != getattr(input, what):
            expected, got = getattr(input, what), getattr(output, what)
            if what == "shape":
                expected, got = tuple(expected), tuple(got)
            raise ValueError(f"output: expected input's {what} {expected}, got {got}")
    if not output.is_contiguous():
        raise ValueError(f"output: expected a contiguous tensor, got strides {output.stride()}")
