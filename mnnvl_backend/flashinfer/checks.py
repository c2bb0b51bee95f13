"""Checks of the tensors of one call, shared by the all-reduce and its fused forms. All are pure, and raise before
anything is enqueued: ValueError naming the argument, what was expected and what was given."""

from __future__ import annotations

from typing import NoReturn

import torch

from mnnvl_backend import arguments
from mnnvl_backend.flashinfer.strategy import MNNVLAllreduceFusionStrategy, check_strategy, required_bytes, strategy_for
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace, was_destroyed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuse(name: str, expected: object, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def check_matrix(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() != 2:
        refuse(name, "2-D [num_tokens, hidden_dim]", f"{tensor.dim()}-D {tuple(tensor.shape)}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        refuse(name, "a contiguous tensor", f"strides {tensor.stride()}")


def check_device(name: str, tensor: torch.Tensor, input: torch.Tensor) -> None:
    if tensor.device != input.device:
        refuse(name, f"input's device {input.device}", tensor.device)


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """That it has sizes, strides and values in memory: what other checks, and what follows, may ask it for."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "a nested one" if tensor.is_nested else f"{tensor.layout}, {tensor.dtype}"
        refuse(name, "one dense tensor", kind)


def check_input(input: torch.Tensor) -> None:
    check_plain("input", input)
    check_matrix("input", input)
    if input.dtype not in DTYPES:
        refuse("input", "dtype float32, float16 or bfloat16", input.dtype)
    check_contiguous("input", input)


def check_like(name: str, tensor: torch.Tensor, input: torch.Tensor) -> None:
    """A tensor of input's shape, dtype and device, and contiguous. In one expression, for the sake of good calls."""
    try:
        alike = (
            isinstance(tensor, torch.Tensor)
            and tensor.shape == input.shape
            and tensor.dtype is input.dtype
            and tensor.device == input.device
            and tensor.is_contiguous()
        )
    except RuntimeError:  # a nested or sparse one
        alike = False
    if not alike:
        _refuse_unlike(name, tensor, input)


def _refuse_unlike(name: str, tensor: torch.Tensor, input: torch.Tensor) -> None:
    check_optional_tensor(name, tensor)
    assert isinstance(tensor, torch.Tensor)
    check_matrix(name, tensor)
    if tensor.shape != input.shape:
        refuse(name, f"input's shape {tuple(input.shape)}", tuple(tensor.shape))
    if tensor.dtype != input.dtype:
        refuse(name, f"input's dtype {input.dtype}", tensor.dtype)
    check_device(name, tensor, input)
    check_contiguous(name, tensor)


def check_optional_tensor(name: str, tensor: torch.Tensor | None) -> None:
    if tensor is not None:
        arguments.instance(name, tensor, torch.Tensor, "a torch.Tensor or None")
        check_plain(name, tensor)


def check_workspace(
    workspace: MNNVLAllReduceFusionWorkspace, input: torch.Tensor, strategy: MNNVLAllreduceFusionStrategy
) -> MNNVLAllreduceFusionStrategy:
    """That the workspace is one, alive, large enough and on input's device. The strategy, by size if it is AUTO.

    Raises:
        TypeError: not a workspace, or not a strategy. RuntimeError: it was destroyed. ValueError: the rest.
    """
    if not isinstance(workspace, MNNVLAllReduceFusionWorkspace):
        raise arguments.wrong_type("workspace", "an MNNVLAllReduceFusionWorkspace", workspace)
    if not isinstance(strategy, MNNVLAllreduceFusionStrategy):
        check_strategy(strategy)
    if workspace.destroyed:
        raise was_destroyed()
    strategy = check_room(workspace, input, strategy)
    if input.device != workspace.device:
        refuse("input", f"a tensor on the workspace's device {workspace.device}", input.device)
    return strategy


def check_room(
    workspace: MNNVLAllReduceFusionWorkspace, input: torch.Tensor, strategy: MNNVLAllreduceFusionStrategy
) -> MNNVLAllreduceFusionStrategy:
    """That the workspace has room for an all-reduce of `input`. The strategy, by size if it is AUTO."""
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
    return strategy
