"""The compiled module: the only way from Python to csrc/. Timeouts are milliseconds, sizes bytes."""

from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import Backend, Store

class _Comm(Protocol):
    def all_gather(self, data: bytes) -> list[bytes]: ...

# The fields of groups, all of them keyword arguments: timeout_ms, workspace_bytes, strategy, multicast,
# multicast_forbidden, bootstrap, host_id, nccl_path, blocking_wait (config.Settings.fields()).

class ProcessGroupOptions(Backend.Options):
    def __init__(self, **fields: Any) -> None: ...
    def __copy__(self) -> ProcessGroupOptions: ...
    def __deepcopy__(self, memo: dict[int, Any], /) -> ProcessGroupOptions: ...

class ProcessGroupMNNVL(Backend):
    def __init__(self, store: Store, rank: int, size: int, **fields: Any) -> None: ...
    def _get_sequence_number_for_group(self) -> int: ...
    def last_operations(self) -> list[dict[str, Any]]: ...
    def perform_nocolor_split(self, device: object, /) -> None: ...

class FunctionGroup:
    def __init__(
        self,
        comm: _Comm,
        rank: int,
        size: int,
        device_type: str,
        device_index: int,
        buffer_size_bytes: int,
        **fields: Any,
    ) -> None: ...
    @property
    def buffer_size_bytes(self) -> int: ...
    def all_reduce(self, input: torch.Tensor, output: torch.Tensor, strategy: int, pdl: bool) -> None: ...
    def fused_all_reduce(
        self,
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
        strategy: int,
        pdl: bool,
    ) -> None: ...
    def destroy(self) -> None: ...

class StoreExchange:
    """How ranks meet and exchange over a c10d store: csrc/backend/store_exchange.h. One object a try."""

    def __init__(self, store: Store, prefix: str, rank: int, size: int, timeout_ms: int) -> None: ...
    def all_gather(self, data: bytes) -> list[bytes]: ...
    def give_up(self, reason: str) -> None: ...

def finish_groups(grace_ms: int) -> None: ...
def build_info() -> dict[str, Any]: ...
def probe(nccl_path: str) -> dict[str, Any]: ...
def choose_all_reduce(
    world_size: int, numel: int, dtype: int, strategy: int, workspace_bytes: int
) -> tuple[str, int, int, int]: ...
