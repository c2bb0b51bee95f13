"""trtllm_mnnvl_allreduce: the kernels as a function of a tensor and a workspace, under FlashInfer's name.

A call with nothing unusual about it goes to the compiled module at once, which looks at everything in one go. Any other
takes the long way: checks that say what is wrong, then the custom op mnnvl::trtllm_allreduce, so that torch.compile and
fake tensors see one opaque call that mutates `output`.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from mnnvl_backend import arguments
from mnnvl_backend.flashinfer.checks import check_input, check_like, check_workspace
from mnnvl_backend.flashinfer.strategy import MNNVLAllreduceFusionStrategy, check_strategy
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace, compiled_workspace

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
for _view in ("Conjugate", "Negative"):  # refused by name, where torch would make copies
    _library.impl("trtllm_allreduce", torch.library.fallthrough_kernel, _view)
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
    given = output is not None
    if output is None:
        check_input(input)
        output = torch.empty_like(input)
    if (
        type(input) is torch.Tensor
        and type(output) is torch.Tensor
        and not torch.compiler.is_compiling()
        and workspace.all_reduce_if_usual(input, output, strategy, launch_with_pdl)
    ):
        return output
    if given:
        check_input(input)
        check_like("output", output, input)
    strategy = check_workspace(workspace, input, strategy)
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
