"""The control plane of a workspace: FlashInfer's communicator interface, an implementation over torch's store, and
the adapter that the compiled module calls."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch.distributed as dist

from mnnvl_backend import arguments, config, registration, wire
from mnnvl_backend.compiled import load_compiled

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

    from mnnvl_backend.flashinfer.mapping import Mapping

COMM_METHODS = ("Get_rank", "Get_size", "allgather", "bcast", "barrier", "Split")


@runtime_checkable
class CommBackend(Protocol):
    """What a workspace asks of `comm_backend`. mpi4py's communicators and FlashInfer's backends have it; callers may
    subclass it."""

    def Get_rank(self) -> int: ...
    def Get_size(self) -> int: ...
    def allgather(self, data: Any) -> Any: ...
    def bcast(self, data: Any, root: int) -> Any: ...
    def barrier(self) -> None: ...
    def Split(self, color: int, key: int) -> CommBackend: ...


class StoreComm:
    """A CommBackend over a c10d store: no collective, no device tensor, and every wait ends at the timeout.

    Collective calls: all ranks in the same order, one thread at a time. The ranks meet anew after a failure, so the
    same object, or a new one over the same store, serves for another attempt (csrc/backend/store_exchange.h).
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta, prefix: str = "mnnvl/workspace") -> None:
        self._store, self._rank, self._size, self._timeout, self._prefix = store, rank, size, timeout, prefix
        self._exchange: Any = None  # of the present attempt
        self._failed = False
        self._pid = os.getpid()

    @classmethod
    def of_group(cls, group: ProcessGroup | None, timeout: timedelta) -> StoreComm:
        """Over the store of a process group; None: the default group.

        Raises:
            RuntimeError: this process is a child by fork() of the one that made the group, in which it has no place.
        """
        c10d = dist.distributed_c10d
        group = group or c10d._get_default_group()
        if group in registration.inherited_groups:
            raise _of_the_parent("process group", registration.inherited_groups[group])
        return cls(c10d._get_process_group_store(group), group.rank(), group.size(), timeout)

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return self._size

    def allgather(self, data: Any) -> list[Any]:
        """Every rank's object, in rank order: numbers, text, bytes, and tuples, lists and dicts of them.

        Raises:
            TypeError: another object.
            TimeoutError: naming the ranks that did not come.
            RuntimeError: another rank gave up, with its reason, the store failed, or what a rank said is no such
                object.
        """
        mine = wire.dumps(data)
        if self._failed:
            self._exchange, self._failed = None, False
        self._failed = True
        everybody = self._opened().all_gather(mine)
        objects = [_object_of(rank, item) for rank, item in enumerate(everybody)]
        self._failed = False
        return objects

    def bcast(self, data: Any, root: int) -> Any:
        return self.allgather(data if self._rank == root else None)[root]

    def barrier(self) -> None:
        self.allgather(None)

    def Split(self, color: int, key: int) -> StoreComm:
        """The ranks that gave the same color, ordered by key, then rank."""
        everybody = self.allgather((color, key))
        members = [rank for _, rank in sorted((k, rank) for rank, (c, k) in enumerate(everybody) if c == color)]
        # Named by its members, so that ranks never read what a part of other members left under the same color.
        prefix = f"{self._prefix}/{'-'.join(map(str, members))}"
        return StoreComm(self._store, members.index(self._rank), len(members), self._timeout, prefix)

    def give_up(self, reason: str) -> None:
        """Tells the ranks that wait for this one, or come later, why it takes no part. Not collective; nothing if the
        attempt has failed already."""
        self._opened().give_up(reason)
        self._failed = True

    def leave(self) -> None:
        """Ends the attempt: another StoreComm may have the store. The next call here begins a new one."""
        self._exchange, self._failed = None, False

    def _opened(self) -> Any:
        if self._pid != os.getpid():
            raise _of_the_parent("communicator", self._pid)
        if self._exchange is None:
            exchange = load_compiled().StoreExchange
            timeout_ms = config.milliseconds(self._timeout)
            self._exchange = exchange(self._store, self._prefix, self._rank, self._size, timeout_ms)
        return self._exchange


def _of_the_parent(made: str, pid: int) -> RuntimeError:
    return RuntimeError(
        f"mnnvl: this {made} belongs to process {pid}, of which process {os.getpid()} is a child by fork(): a child "
        "takes no part in its parent's, and makes its own"
    )


def _object_of(rank: int, item: bytes) -> Any:
    try:
        return wire.loads(item)
    except ValueError as error:
        raise RuntimeError(f"mnnvl set-up: what rank {rank} said, {len(item)} bytes, is malformed: {error}") from None


class telling_peers:
    """Where a workspace is made: an error in the block is told to the group's other ranks, which would otherwise wait
    for this one until the timeout; if they meet over a StoreComm, that is, or over the default process group.

    >>> with telling_peers(comm_backend, mapping) as peers:
    ...     check_arguments()
    ...     comm = peers.tensor_parallel_comm(timeout)
    """

    def __init__(self, comm: CommBackend | None, mapping: Mapping) -> None:
        self._comm, self._mapping = comm, mapping

    def __enter__(self) -> telling_peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        with suppress(Exception):  # `error` is what matters
            comm = self._comm
            if comm is None and self._mapping.tp_size > 1 and dist.is_initialized():
                comm = StoreComm.of_group(None, timedelta(seconds=1))
            if isinstance(comm, StoreComm):
                comm.give_up(f"{type(error).__name__}: {error}")

    def tensor_parallel_comm(self, timeout: timedelta) -> CommBackend:
        """A communicator of exactly the mapping's tensor-parallel group, with rank == mapping.tp_rank. Collective.

        Raises:
            RuntimeError: no communicator given and no default process group to take one from.
            ValueError: the communicator and the mapping disagree.
        """
        mapping = self._mapping
        if self._comm is None and mapping.tp_size == 1:
            return StoreComm(dist.HashStore(), 0, 1, timeout)  # type: ignore[attr-defined]  # not in torch's stubs
        if self._comm is None:
            if not dist.is_initialized():
                raise RuntimeError(
                    "comm_backend: none given, and torch.distributed is not initialized; a workspace of "
                    f"{mapping.tp_size} ranks needs one of them: call torch.distributed.init_process_group() first or "
                    "pass comm_backend"
                )
            self._comm = StoreComm.of_group(None, timeout)
        if self._comm.Get_size() != mapping.tp_size:
            self._comm = self._comm.Split(mapping.pp_rank * mapping.cp_size + mapping.cp_rank, mapping.tp_rank)
        place = (self._comm.Get_size(), self._comm.Get_rank())
        if place != (mapping.tp_size, mapping.tp_rank):
            raise ValueError(
                f"comm_backend: its tensor-parallel part has rank {place[1]} of {place[0]}, but mapping says "
                f"tp_rank {mapping.tp_rank} of tp_size {mapping.tp_size}"
            )
        return self._comm


class BytesComm:
    """What the compiled module calls: an all-gather of bytes over any CommBackend."""

    def __init__(self, comm: CommBackend) -> None:
        self._comm = comm

    def all_gather(self, data: bytes) -> list[bytes]:
        return list(self._comm.allgather(data))


def leave(comm: CommBackend) -> None:
    """The meeting of one collective step ends with it: other workspaces use the same store."""
    if isinstance(comm, StoreComm):
        comm.leave()


def check_comm(comm_backend: object) -> None:
    missing = [m for m in COMM_METHODS if not callable(getattr(comm_backend, m, None))]
    if missing or isinstance(comm_backend, type):
        wanted = f"an object with the methods {', '.join(COMM_METHODS)}"
        got = f"{arguments.shown(comm_backend)}, without {', '.join(missing)}" if missing else "a class"
        raise TypeError(f"comm_backend: expected {wanted}, or None, got {got}")
