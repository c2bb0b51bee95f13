"""FlashInfer's functions from before its workspace was a class. Where they take addresses, ours take the tokens that a
workspace gives in their place. Each gives a DeprecationWarning."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from mnnvl_backend import arguments
from mnnvl_backend.flashinfer.allreduce import trtllm_mnnvl_allreduce
from mnnvl_backend.flashinfer.checks import check_matrix, check_plain, refuse
from mnnvl_backend.flashinfer.fusion import trtllm_mnnvl_fused_allreduce_add_rmsnorm
from mnnvl_backend.flashinfer.quantization import round_up
from mnnvl_backend.flashinfer.strategy import MNNVLAllreduceFusionStrategy
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace, workspace_at

if TYPE_CHECKING:
    from mnnvl_backend.flashinfer.control import CommBackend
    from mnnvl_backend.flashinfer.mapping import Mapping

DEFAULT_BYTES = 12_000_000
COMMON_HIDDEN_DIM = 286_720  # a multiple of 2048, 4096, 5120, 7168 and 8192: the buffer holds whole rows of each
TENSORS_PER_BUFFER = 6  # three buffers of two stages, in the count of elements that callers divide by hidden_dim


def get_allreduce_mnnvl_workspace(
    mapping: Mapping,
    dtype: torch.dtype,
    comm_backend_for_handle_transfer: CommBackend | None = None,
    buffer_size_in_bytes: int | None = None,
) -> tuple[MNNVLAllReduceFusionWorkspace, torch.Tensor, int]:
    """Deprecated: a workspace of at least `buffer_size_in_bytes`. Collective over the tensor-parallel group.

    Args:
        mapping, comm_backend_for_handle_transfer: as MNNVLAllReduceFusionWorkspace's mapping and comm_backend.
        dtype: of the tensors to reduce.
        buffer_size_in_bytes: 3 * 2 * dtype.itemsize * hidden_dim * max_tokens serves; None: 12,000,000. Rounded up to
            whole rows of the common hidden_dims.

    Returns:
        (workspace, its buffer_flags, max_num_elements); max_num_elements // hidden_dim is the functions' buffer_M.

    Raises:
        As MNNVLAllReduceFusionWorkspace.
    """
    _warn("get_allreduce_mnnvl_workspace", "MNNVLAllReduceFusionWorkspace")
    arguments.instance("dtype", dtype, torch.dtype, "a torch.dtype")
    wanted = DEFAULT_BYTES
    if buffer_size_in_bytes is not None:
        wanted = arguments.integer("buffer_size_in_bytes", buffer_size_in_bytes, 1)
    row = TENSORS_PER_BUFFER * dtype.itemsize
    unit = COMMON_HIDDEN_DIM * row
    workspace = MNNVLAllReduceFusionWorkspace(
        mapping,
        buffer_size_in_bytes=round_up(wanted, unit),
        comm_backend=comm_backend_for_handle_transfer,
    )
    return workspace, workspace.buffer_flags, workspace.buffer_size_bytes // row


def trtllm_mnnvl_all_reduce(
    inp: torch.Tensor,
    multicast_buffer_ptr: int,
    buffer_ptrs_dev: int,
    buffer_M: int,
    buffer_flags_mnnvl: torch.Tensor,
    nranks: int,
    rank: int,
    wait_for_results: bool,
    launch_with_pdl: bool,
    out: torch.Tensor | None = None,
) -> None:
    """Deprecated: trtllm_mnnvl_allreduce of `inp` into `out`, two-shot.

    Args:
        multicast_buffer_ptr, buffer_ptrs_dev: the workspace's mc_ptr and uc_ptrs_dev.
        buffer_M: the most tokens.
        buffer_flags_mnnvl: not read.
        nranks, rank: the workspace's tp_size and rank.
        wait_for_results: must be True.

    Raises:
        ValueError: more than buffer_M tokens, no `out`, wait_for_results False, tokens of no workspace or of two;
            and as trtllm_mnnvl_allreduce, by its names.
    """
    _warn("trtllm_mnnvl_all_reduce", "trtllm_mnnvl_allreduce")
    _check_tokens("inp", inp, buffer_M)
    if wait_for_results is not True:
        raise arguments.wrong_value("wait_for_results", "True", wait_for_results)
    if out is None:
        raise arguments.wrong_value("out", "a torch.Tensor", out)
    workspace = _workspace({"multicast_buffer_ptr": multicast_buffer_ptr, "buffer_ptrs_dev": buffer_ptrs_dev},
                           nranks, rank)  # fmt: skip
    trtllm_mnnvl_allreduce(inp, workspace, launch_with_pdl, out, MNNVLAllreduceFusionStrategy.TWOSHOT)


def trtllm_mnnvl_fused_allreduce_rmsnorm(
    prenorm_output: torch.Tensor,
    normed_output: torch.Tensor,
    shard_input: torch.Tensor,
    multicast_buffer_ptr: int,
    buffer_ptrs_dev: int,
    unicast_ptr: int,
    buffer_M: int,
    buffer_flags_mnnvl: torch.Tensor,
    nranks: int,
    rank: int,
    gamma: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor,
    launch_with_pdl: bool,
) -> None:
    """Deprecated: trtllm_mnnvl_fused_allreduce_add_rmsnorm of `shard_input` and `residual`, two-shot; the norm goes to
    `normed_output`, the row before it to `prenorm_output`.

    Args:
        multicast_buffer_ptr, buffer_ptrs_dev, unicast_ptr: the workspace's mc_ptr, uc_ptrs_dev and uc_ptr_local.
        buffer_M, buffer_flags_mnnvl, nranks, rank: see trtllm_mnnvl_all_reduce.

    Raises:
        ValueError: more than buffer_M tokens, tokens of no workspace or of two; and as
            trtllm_mnnvl_fused_allreduce_add_rmsnorm, by its names.
    """
    _warn("trtllm_mnnvl_fused_allreduce_rmsnorm", "trtllm_mnnvl_fused_allreduce_add_rmsnorm")
    _check_tokens("shard_input", shard_input, buffer_M)
    tokens = {"multicast_buffer_ptr": multicast_buffer_ptr, "buffer_ptrs_dev": buffer_ptrs_dev,
              "unicast_ptr": unicast_ptr}  # fmt: skip
    workspace = _workspace(tokens, nranks, rank)
    strategy = MNNVLAllreduceFusionStrategy.TWOSHOT
    trtllm_mnnvl_fused_allreduce_add_rmsnorm(
        shard_input, residual, gamma, workspace, epsilon, normed_output, prenorm_output, launch_with_pdl, strategy
    )


def _warn(name: str, successor: str) -> None:
    warnings.warn(f"{name} is deprecated: use {successor}", DeprecationWarning, stacklevel=3)


def _check_tokens(name: str, tensor: torch.Tensor, buffer_M: int) -> None:
    arguments.instance(name, tensor, torch.Tensor, "a torch.Tensor")
    check_plain(name, tensor)
    check_matrix(name, tensor)
    most = arguments.integer("buffer_M", buffer_M, 0)
    if tensor.shape[0] > most:
        refuse(name, f"at most buffer_M = {most} tokens", tensor.shape[0])


def _workspace(tokens: dict[str, int], nranks: int, rank: int) -> MNNVLAllReduceFusionWorkspace:
    """The one workspace of all these tokens."""
    (first, token), *others = tokens.items()
    workspace = workspace_at(first, token)
    for name, other in others:
        if workspace_at(name, other) is not workspace:
            refuse(name, f"the workspace of {first} ({token})", other)
    place = arguments.integer("nranks", nranks, 1), arguments.integer("rank", rank, 0)
    if place != (workspace.tp_size, workspace.rank):
        refuse("nranks, rank", f"the workspace's {workspace.tp_size}, {workspace.rank}", f"{place[0]}, {place[1]}")
    return workspace
