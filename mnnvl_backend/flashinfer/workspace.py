"""The memory behind trtllm_mnnvl_allreduce, under FlashInfer's name and arguments."""

from __future__ import annotations

import itertools
import weakref
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from mnnvl_backend import config
from mnnvl_backend.flashinfer.comm import BytesComm, CommBackend, telling_peers
from mnnvl_backend.options import Options
from mnnvl_backend.registration import load_compiled, nccl_path
from mnnvl_backend.flashinfer.strategy import ONESHOT_THRESHOLD_BYTES, MNNVLAllreduceFusionStrategy

if TYPE_CHECKING:
    from mnnvl_backend.flashinfer.mapping import Mapping

MAX_BUFFER_BYTES = 2**32 - 1  # FlashInfer's limit, kept so that the same program works with both

# A custom op takes tensors and numbers only, so it names its workspace by number. Weak: an op never keeps one alive.
_by_handle: weakref.WeakValueDictionary[int, MNNVLAllReduceFusionWorkspace] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


class MNNVLAllReduceFusionWorkspace:
    """Peer-mapped buffers of one tensor-parallel group; making one is collective over it.

    Sized either for a problem (`max_num_tokens`, `hidden_dim`, `dtype`: enough for AUTO up to that many tokens) or
    directly (`buffer_size_in_bytes`; see get_required_buffer_size_bytes). It is not bound to that problem: any call
    whose required size fits can use it.

    Args:
        mapping: the rank's place; the group is mapping.tp_group.
        max_num_tokens, hidden_dim, dtype: of the largest input, [max_num_tokens, hidden_dim].
        buffer_size_in_bytes: size of one of the three Lamport buffers; goes before the other three.
        comm_backend: for set-up only; of the tensor-parallel group, or of a larger one that is then split. None: the
            default process group's store.
        device: "cuda", "cpu" or a torch.device; None: the current CUDA device if there is one, else the CPU.
        options: timeout, multicast and bootstrap are used; None: defaults. MNNVL_* variables go before it.

    Attributes:
        rank, tp_size: in the tensor-parallel group.
        buffer_size_bytes: usable bytes of one Lamport buffer, at least what was asked for.
        workspace_size_bytes: of all three.

    Raises:
        ValueError: sizes missing or out of range, mapping and comm_backend disagree, a malformed MNNVL_* variable.
        RuntimeError: no process group, the compiled module can't be loaded, or set-up failed on some rank (then on
            every rank, with that rank's reason).
    """

    NUM_LAMPORT_BUFFERS = 3

    def __init__(
        self,
        mapping: Mapping,
        max_num_tokens: int | None = None,
        hidden_dim: int | None = None,
        dtype: torch.dtype | None = None,
        buffer_size_in_bytes: int | None = None,
        comm_backend: CommBackend | None = None,
        *,
        device: torch.device | str | None = None,
        options: Options | None = None,
    ) -> None:
        self._compiled: Any = None
        with telling_peers(comm_backend, mapping) as peers:
            if buffer_size_in_bytes is None:
                if max_num_tokens is None or hidden_dim is None or dtype is None:
                    raise ValueError(
                        "max_num_tokens, hidden_dim and dtype must all be given unless buffer_size_in_bytes is, got "
                        f"{max_num_tokens}, {hidden_dim} and {dtype}"
                    )
                buffer_size_in_bytes = _size_for_auto(mapping.tp_size, max_num_tokens, hidden_dim, dtype)
            if not 0 <= buffer_size_in_bytes <= MAX_BUFFER_BYTES:
                raise ValueError(
                    f"buffer_size_in_bytes: expected 0 to {MAX_BUFFER_BYTES} bytes per buffer, got {buffer_size_in_bytes}"
                )
            self.rank = mapping.tp_rank
            self.tp_size = mapping.tp_size
            self.device = _resolve(device)
            settings = config.merge(options or Options(), config.read_environment())
            compiled = load_compiled()
            comm = peers.tensor_parallel_comm(timedelta(milliseconds=settings.timeout_ms))
            self._compiled = compiled.Workspace(
                BytesComm(comm),
                self.rank,
                self.tp_size,
                device_type=self.device.type,
                device_index=self.device.index or 0,
                buffer_size_bytes=buffer_size_in_bytes,
                timeout_ms=settings.timeout_ms,
                multicast=settings.multicast,
                bootstrap=settings.bootstrap_code,
                host_id=settings.host_id,
                nccl_path=nccl_path(),
            )
        self.buffer_size_bytes: int = self._compiled.buffer_size_bytes
        self.handle = next(_handles)
        _by_handle[self.handle] = self

    @staticmethod
    def get_required_buffer_size_bytes(
        tp_size: int,
        num_tokens: int,
        hidden_dim: int,
        dtype: torch.dtype,
        strategy: MNNVLAllreduceFusionStrategy = MNNVLAllreduceFusionStrategy.AUTO,
    ) -> int:
        """Bytes of one Lamport buffer that an all-reduce of [num_tokens, hidden_dim] needs.

        ONESHOT: a slot per rank. TWOSHOT: two stages, tokens rounded up to a multiple of tp_size.
        """
        if strategy == MNNVLAllreduceFusionStrategy.AUTO:
            strategy = MNNVLAllreduceFusionStrategy.select_strategy(tp_size, num_tokens, hidden_dim, dtype)
        if strategy == MNNVLAllreduceFusionStrategy.ONESHOT:
            return num_tokens * hidden_dim * tp_size * dtype.itemsize
        return 2 * ((num_tokens + tp_size - 1) // tp_size) * tp_size * hidden_dim * dtype.itemsize

    def is_buffer_size_sufficient(
        self,
        tp_size: int,
        num_tokens: int,
        hidden_dim: int,
        dtype: torch.dtype,
        strategy: MNNVLAllreduceFusionStrategy = MNNVLAllreduceFusionStrategy.AUTO,
    ) -> bool:
        required = self.get_required_buffer_size_bytes(tp_size, num_tokens, hidden_dim, dtype, strategy)
        return required <= self.buffer_size_bytes

    @property
    def backend(self) -> str:
        return "mnnvl"

    @property
    def world_size(self) -> int:
        return self.tp_size

    @property
    def workspace_size_bytes(self) -> int:
        return self.buffer_size_bytes * self.NUM_LAMPORT_BUFFERS

    @property
    def destroyed(self) -> bool:
        return self._compiled is None

    def destroy(self) -> None:
        """Unmaps and frees; idempotent. Not collective, but no rank may still be in a call on this workspace."""
        compiled, self._compiled = self._compiled, None
        if compiled is not None:
            _by_handle.pop(self.handle, None)
            compiled.destroy()

    def __enter__(self) -> MNNVLAllReduceFusionWorkspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()


def compiled_workspace(handle: int) -> Any:
    """The compiled object behind a workspace's handle.

    Raises:
        RuntimeError: the workspace was destroyed.
    """
    workspace = _by_handle.get(handle)
    if workspace is None:
        raise RuntimeError("workspace: it was destroyed; make a new MNNVLAllReduceFusionWorkspace")
    return workspace._compiled


def _size_for_auto(tp_size: int, max_num_tokens: int, hidden_dim: int, dtype: torch.dtype) -> int:
    """What AUTO needs at most up to max_num_tokens: for one-shot at its threshold, or for two-shot at the end."""
    required = MNNVLAllReduceFusionWorkspace.get_required_buffer_size_bytes
    per_token = max(1, tp_size * hidden_dim * dtype.itemsize)
    oneshot_tokens = min(ONESHOT_THRESHOLD_BYTES // per_token, max_num_tokens)
    return max(
        required(tp_size, oneshot_tokens, hidden_dim, dtype, MNNVLAllreduceFusionStrategy.ONESHOT),
        required(tp_size, max_num_tokens, hidden_dim, dtype, MNNVLAllreduceFusionStrategy.TWOSHOT),
    )


def _resolve(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {str(device)!r}")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
