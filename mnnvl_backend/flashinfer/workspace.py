"""The memory behind trtllm_mnnvl_allreduce and its fused forms, under FlashInfer's name and arguments."""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from datetime import timedelta
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from mnnvl_backend import arguments, config
from mnnvl_backend.compiled import load_compiled
from mnnvl_backend.flashinfer.control import BytesComm, CommBackend, check_comm, leave, telling_peers
from mnnvl_backend.flashinfer.strategy import (
    MNNVL_ONE_SHOT_THRESHOLD,
    MNNVLAllreduceFusionStrategy,
    check_problem,
    check_strategy,
    required_bytes,
    strategy_for,
    strategy_of,
)
from mnnvl_backend.flashinfer.workspace_base import AllReduceFusionWorkspace
from mnnvl_backend.options import MAX_WORLD_SIZE, Options

if TYPE_CHECKING:
    from mnnvl_backend.flashinfer.mapping import Mapping

MAX_BUFFER_BYTES = 2**32 - 1  # FlashInfer's limit, kept so that the same program works with both
TOKENS = "mc_ptr, uc_ptrs_dev or uc_ptr_local"
MAPPING_SIZES = {"tp_size": 1, "cp_size": 1, "tp_rank": 0, "cp_rank": 0, "pp_rank": 0}  # and their least values

# A custom op takes tensors and numbers only, so it names its workspace by number. Weak: an op never keeps one alive.
_by_handle: weakref.WeakValueDictionary[int, MNNVLAllReduceFusionWorkspace] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


class MNNVLAllReduceFusionWorkspace(AllReduceFusionWorkspace):
    """Peer-mapped buffers of one tensor-parallel group; making one is collective over it.

    Sized either for a problem (`max_num_tokens`, `hidden_dim`, `dtype`: enough for AUTO up to that many tokens) or
    directly (`buffer_size_in_bytes`; see get_required_buffer_size_bytes). It is not bound to that problem: any call
    whose required size fits can use it.

    destroy(), and leaving a `with` block, unmap its memory: do it after the last replay of every CUDA graph that holds
    a call on it. Being garbage-collected is another thing: a workspace that was used while a graph was captured then
    leaves its memory mapped until the process ends, since that graph may still be replayed and nobody can tell. It also
    gives a ResourceWarning.

    Args:
        mapping: the rank's place, a Mapping or anything with its tp_size, tp_rank, cp_size, cp_rank and pp_rank; the
            group is mapping.tp_group.
        max_num_tokens, hidden_dim, dtype: of the largest input, [max_num_tokens, hidden_dim].
        buffer_size_in_bytes: size of one of the three Lamport buffers; goes before the other three.
        comm_backend: for set-up and checkpoint_prepare() only; of the tensor-parallel group, or of a larger one that is
            then split. None: the default process group's store.
        device: "cuda", "cpu" or a torch.device; None: the current CUDA device if there is one, else the CPU.
        options: timeout, multicast and bootstrap are used; None: defaults. MNNVL_* variables go before it.

    Attributes:
        rank, tp_size: in the tensor-parallel group; world_size is tp_size.
        buffer_size_bytes: usable bytes of one Lamport buffer, at least what was asked for.
        workspace_size_bytes: of all three.
        handle, mc_ptr, uc_ptrs_dev, uc_ptr_local, ptrs, buffer_flags: tokens by which FlashInfer's older functions find
            the workspace; no addresses, and never 0, with multicast or without.

    Raises:
        TypeError, ValueError: an argument of a wrong type, missing or out of range, by name, before anything is set up;
            mapping and comm_backend disagree; a malformed MNNVL_* variable.
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
            size_bytes, self.device = _check_arguments(
                mapping, max_num_tokens, hidden_dim, dtype, buffer_size_in_bytes, comm_backend, device, options
            )
            self.tp_size = mapping.tp_size
            settings = config.merge(options or Options(), config.read_environment())
            compiled = load_compiled()
            comm = peers.tensor_parallel_comm(timedelta(milliseconds=settings.timeout_ms))
            self._compiled = compiled.FunctionGroup(
                BytesComm(comm),
                mapping.tp_rank,
                self.tp_size,
                device_type=self.device.type,
                device_index=self.device.index or 0,
                buffer_size_bytes=size_bytes,
                **settings.fields(),
            )
        self._comm: Any = comm
        leave(comm)
        self.buffer_size_bytes: int = self._compiled.buffer_size_bytes
        self.handle = next(_handles)
        _by_handle[self.handle] = self
        super().__init__(self.tp_size, mapping.tp_rank)

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

        Raises:
            TypeError, ValueError: naming the argument.
        """
        tp_size, num_tokens, hidden_dim = check_problem(tp_size, num_tokens, hidden_dim, dtype)
        check_strategy(strategy)
        if strategy is MNNVLAllreduceFusionStrategy.AUTO:
            strategy = strategy_for(num_tokens * hidden_dim * tp_size * dtype.itemsize)
        return required_bytes(tp_size, num_tokens, hidden_dim, dtype.itemsize, strategy)

    def is_buffer_size_sufficient(
        self,
        tp_size: int,
        num_tokens: int,
        hidden_dim: int,
        dtype: torch.dtype,
        strategy: MNNVLAllreduceFusionStrategy | bool | None = None,
        *,
        use_oneshot: bool | None = None,
    ) -> bool:
        """Whether get_required_buffer_size_bytes of the problem is held. `use_oneshot` (True, False, None: by size) is
        another name of `strategy`, which takes both forms; not both of them.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if strategy is not None and use_oneshot is not None:
            raise ValueError("use_oneshot: expected None beside strategy, got both")
        if not isinstance(strategy, MNNVLAllreduceFusionStrategy):
            if strategy is not None and not isinstance(strategy, bool):
                check_strategy(strategy)
            strategy = strategy_of(use_oneshot if strategy is None else strategy)
        required = self.get_required_buffer_size_bytes(tp_size, num_tokens, hidden_dim, dtype, strategy)
        return required <= self.buffer_size_bytes

    @property
    def backend(self) -> str:
        return "mnnvl"

    @property
    def workspace_size_bytes(self) -> int:
        return self.buffer_size_bytes * self.NUM_LAMPORT_BUFFERS

    @property
    def destroyed(self) -> bool:
        return self._destroyed

    @property
    def mc_ptr(self) -> int:
        return self.handle

    @property
    def uc_ptrs_dev(self) -> int:
        return self.handle

    @property
    def uc_ptr_local(self) -> int:
        return self.handle

    @property
    def ptrs(self) -> list[int]:
        return [self.handle] * self.tp_size

    @cached_property
    def buffer_flags(self) -> torch.Tensor:
        """Of FlashInfer's size and dtype; nothing reads it."""
        return torch.full((9,), self.handle, dtype=torch.int32, device=self.device).view(torch.uint32)

    def checkpoint_prepare(self) -> int:
        """Gives the physical memory back and keeps the addresses. Collective; waits for the device on every rank.

        Until checkpoint_restore() calls on the workspace raise RuntimeError ("not attached"), and CUDA graphs that hold
        such calls must not be replayed. A second call is a no-op. Meets over the comm_backend of the set-up, or of the
        last restore.

        Returns:
            The bytes that this rank has given back, 0 if there was nothing to do.

        Raises:
            RuntimeError: on every rank, with the reason of the rank that failed; or the workspace was destroyed.
        """
        compiled = self._existing()
        return self._collectively(compiled.detach, self._comm) if compiled.attached else 0

    def checkpoint_restore(self, comm_backend: CommBackend | None = None) -> None:
        """Allocates anew, at the addresses of before, so that graphs captured before checkpoint_prepare() can be
        replayed. Collective; a no-op if the memory is there.

        Args:
            comm_backend: of the tensor-parallel group, with the same rank and size as before. None: that of before.

        Raises:
            TypeError: comm_backend lacks a method.
            ValueError: it is of another rank or size.
            RuntimeError: on every rank, with the reason of the rank that failed; the workspace then stays without
                memory, and this may be called again. Or the workspace was destroyed.
        """
        compiled = self._existing()
        if comm_backend is not None:
            check_comm(comm_backend)
            place = (comm_backend.Get_rank(), comm_backend.Get_size())
            if place != (self.rank, self.tp_size):
                raise ValueError(
                    f"comm_backend: expected rank {self.rank} of {self.tp_size}, as when the workspace was made, got "
                    f"rank {place[0]} of {place[1]}"
                )
            self._comm = comm_backend
        if not compiled.attached:
            self._collectively(compiled.attach, self._comm)

    def _existing(self) -> Any:
        if self._compiled is None:
            raise was_destroyed()
        return self._compiled

    def _collectively(self, step: Any, comm: CommBackend) -> Any:
        try:
            return step(BytesComm(comm), self.rank, self.tp_size)
        finally:
            leave(comm)

    def all_reduce_if_usual(
        self, input: torch.Tensor, output: torch.Tensor, strategy: MNNVLAllreduceFusionStrategy, pdl: bool
    ) -> bool:
        """The all-reduce of two plain tensors that fit, where nobody traces or records. False: not done, ask why."""
        limit, alive = MNNVL_ONE_SHOT_THRESHOLD, self._compiled
        return alive is not None and alive.all_reduce_if_usual(input, output, strategy.value, pdl, limit)

    def destroy(self) -> None:
        """Unmaps and frees; idempotent. Not collective, but no rank may still be in a call on this workspace."""
        compiled, self._compiled = self._compiled, None
        self._destroyed, self._comm = True, None  # which may keep a store
        if compiled is not None:
            _by_handle.pop(self.handle, None)
            compiled.destroy()

    def __del__(self) -> None:
        if not self._destroyed and not sys.is_finalizing():
            warnings.warn(
                f"{type(self).__name__} of {self.tp_size} ranks was never destroyed: call destroy(), or use it in a "
                "`with` block",
                ResourceWarning,
                stacklevel=1,
            )

    def __enter__(self) -> MNNVLAllReduceFusionWorkspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()


def workspace_at(name: str, token: int) -> MNNVLAllReduceFusionWorkspace:
    """The workspace that handed out `token`, which argument `name` gives.

    Raises:
        TypeError: not an integer. ValueError: no workspace's that is alive.
    """
    workspace = _by_handle.get(arguments.integer(name, token, 1))
    if workspace is None:
        wanted = f"the {TOKENS} of a workspace that was not destroyed"
        raise arguments.wrong_value(name, wanted, token)
    return workspace


def was_destroyed() -> RuntimeError:
    return RuntimeError("workspace: it was destroyed; make a new MNNVLAllReduceFusionWorkspace")


def compiled_workspace(handle: int) -> Any:
    """The compiled object behind a workspace's handle.

    Raises:
        RuntimeError: the workspace was destroyed.
    """
    workspace = _by_handle.get(handle)
    if workspace is None:
        raise was_destroyed()
    return workspace._compiled


def _check_arguments(
    mapping: Any,
    max_num_tokens: object,
    hidden_dim: object,
    dtype: object,
    buffer_size_in_bytes: object,
    comm_backend: object,
    device: object,
    options: object,
) -> tuple[int, torch.device]:
    """Of MNNVLAllReduceFusionWorkspace: the bytes of one buffer and the device. Looks, and does nothing else.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
    """
    _check_mapping(mapping)
    if comm_backend is not None:
        check_comm(comm_backend)
    if options is not None:
        arguments.instance("options", options, Options, "mnnvl_backend.Options or None")
    size = _buffer_size(mapping.tp_size, max_num_tokens, hidden_dim, dtype, buffer_size_in_bytes)
    return size, _resolve(device)


def _check_mapping(mapping: Any) -> None:
    for name, least in MAPPING_SIZES.items():
        try:
            value = getattr(mapping, name)
        except AttributeError:
            wanted = f"a Mapping, or an object with its {', '.join(MAPPING_SIZES)}"
            raise TypeError(f"mapping: expected {wanted}, got {arguments.shown(mapping)}, without {name}") from None
        arguments.integer(f"mapping.{name}", value, least)
    arguments.integer("mapping.tp_size", mapping.tp_size, 1, MAX_WORLD_SIZE, "ranks")
    arguments.integer("mapping.tp_rank", mapping.tp_rank, 0, mapping.tp_size - 1)


def _buffer_size(
    tp_size: int, max_num_tokens: object, hidden_dim: object, dtype: object, buffer_size_in_bytes: object
) -> int:
    """Bytes of one Lamport buffer, as asked for or for the problem."""
    # What is given is checked, needed or not: a wrong type is a mistake in the program either way.
    if dtype is not None:
        arguments.instance("dtype", dtype, torch.dtype, "a torch.dtype or None")
    tokens, hidden = (
        None if value is None else arguments.integer(name, value, 1)
        for name, value in (("max_num_tokens", max_num_tokens), ("hidden_dim", hidden_dim))
    )
    if buffer_size_in_bytes is not None:
        return arguments.integer("buffer_size_in_bytes", buffer_size_in_bytes, 1, MAX_BUFFER_BYTES, "bytes per buffer")
    if tokens is None or hidden is None or not isinstance(dtype, torch.dtype):
        raise ValueError(
            "max_num_tokens, hidden_dim and dtype must all be given unless buffer_size_in_bytes is, got "
            f"{max_num_tokens}, {hidden_dim} and {dtype}"
        )
    size = _size_for_auto(tp_size, tokens, hidden, dtype)
    if size > MAX_BUFFER_BYTES:
        raise ValueError(
            f"max_num_tokens, hidden_dim: [{tokens}, {hidden}] of {dtype} over {tp_size} ranks needs {size} bytes per "
            f"buffer, expected at most {MAX_BUFFER_BYTES}"
        )
    return size


def _size_for_auto(tp_size: int, max_num_tokens: int, hidden_dim: int, dtype: torch.dtype) -> int:
    """What AUTO needs at most up to max_num_tokens: for one-shot at its threshold, or for two-shot at the end."""
    oneshot_tokens = min(MNNVL_ONE_SHOT_THRESHOLD // (tp_size * hidden_dim * dtype.itemsize), max_num_tokens)
    return max(
        required_bytes(tp_size, oneshot_tokens, hidden_dim, dtype.itemsize, MNNVLAllreduceFusionStrategy.ONESHOT),
        required_bytes(tp_size, max_num_tokens, hidden_dim, dtype.itemsize, MNNVLAllreduceFusionStrategy.TWOSHOT),
    )


def _resolve(given: Any) -> torch.device:
    expected = "'cpu' or 'cuda'"
    if given is None:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.instance("device", given, (str, torch.device), f"a torch.device, {expected}, or None")
    try:
        device = torch.device(given)
    except RuntimeError:
        raise arguments.wrong_value("device", expected, given) from None
    if device.type not in ("cpu", "cuda"):
        raise arguments.wrong_value("device", expected, str(device))
    if device.type == "cpu":
        return torch.device("cpu")  # tensors say "cpu", never "cpu:0"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"device: expected one of the {count} CUDA devices that torch sees, got {str(device)!r}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
