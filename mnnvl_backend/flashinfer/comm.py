"""The control plane of a workspace: FlashInfer's communicator interface, an implementation over torch's store, and
the adapter that the compiled module calls."""

from __future__ import annotations

import pickle
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

    from mnnvl_backend.flashinfer.mapping import Mapping


class CommBackend(Protocol):
    """What a workspace asks of `comm_backend`. mpi4py's communicators and FlashInfer's backends have it."""

    def Get_rank(self) -> int: ...
    def Get_size(self) -> int: ...
    def allgather(self, data: Any) -> Any: ...
    def bcast(self, data: Any, root: int) -> Any: ...
    def barrier(self) -> None: ...
    def Split(self, color: int, key: int) -> CommBackend: ...


class StoreComm:
    """A CommBackend over a c10d store: no collective, no device tensor, and every wait ends at the timeout.

    Collective calls: all ranks in the same order, one thread at a time.
    """

    # Workspaces made so far over each group: every rank counts the same, since making one is collective.
    _made: ClassVar[weakref.WeakKeyDictionary[ProcessGroup, int]] = weakref.WeakKeyDictionary()

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._round = 0

    @classmethod
    def of_group(cls, group: ProcessGroup | None, timeout: timedelta) -> StoreComm:
        """Over the store of a process group; None: the default group."""
        c10d = dist.distributed_c10d
        group = group or c10d._get_default_group()
        number = cls._made[group] = cls._made.get(group, 0) + 1
        store = PrefixStore(f"mnnvl_workspace/{number}", c10d._get_process_group_store(group))
        return cls(store, group.rank(), group.size(), timeout)

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return self._size

    def allgather(self, data: Any) -> list[Any]:
        """Every rank's object, in rank order.

        Raises:
            TimeoutError: naming the ranks that did not come.
        """
        keys = [f"{self._round}/{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], pickle.dumps(data))  # type: ignore[arg-type]  # torch's stub forgets bytes
        try:
            self._store.wait(keys, self._timeout)
        except dist.DistError as error:
            late = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise TimeoutError(
                f"workspace set-up, rank {self._rank}: ranks {late} of {self._size} did not come within {self._timeout}"
            ) from error
        result = [pickle.loads(self._store.get(key)) for key in keys]
        # The last to read takes the keys away: a group made again later may find itself in the same store.
        if self._store.add(f"{self._round}/read", 1) == self._size:
            for key in [*keys, f"{self._round}/read"]:
                self._store.delete_key(key)
        self._round += 1
        return result

    def bcast(self, data: Any, root: int) -> Any:
        return self.allgather(data if self._rank == root else None)[root]

    def barrier(self) -> None:
        self.allgather(None)

    def Split(self, color: int, key: int) -> StoreComm:
        """The ranks that gave the same color, ordered by key, then rank."""
        everybody = self.allgather((color, key))
        members = sorted((k, rank) for rank, (c, k) in enumerate(everybody) if c == color)
        store = PrefixStore(f"{self._round}/split{color}", self._store)
        return StoreComm(store, members.index((key, self._rank)), len(members), self._timeout)


def tensor_parallel_comm(comm: CommBackend | None, mapping: Mapping, timeout: timedelta) -> CommBackend:
    """A communicator of exactly the mapping's tensor-parallel group, with rank == mapping.tp_rank. Collective.

    Raises:
        RuntimeError: no communicator given and no default process group to take one from.
        ValueError: the communicator and the mapping disagree.
    """
    if comm is None and mapping.tp_size == 1:
        return StoreComm(dist.HashStore(), 0, 1, timeout)  # type: ignore[attr-defined]  # not in torch's stubs
    if comm is None:
        if not dist.is_initialized():
            raise RuntimeError(
                f"comm_backend: none given, and torch.distributed is not initialized; a workspace of {mapping.tp_size} "
                "ranks needs one of them: call torch.distributed.init_process_group() first or pass comm_backend"
            )
        comm = StoreComm.of_group(None, timeout)
    if comm.Get_size() != mapping.tp_size:
        comm = comm.Split(mapping.pp_rank * mapping.cp_size + mapping.cp_rank, mapping.tp_rank)
    if (comm.Get_size(), comm.Get_rank()) != (mapping.tp_size, mapping.tp_rank):
        raise ValueError(
            f"comm_backend: its tensor-parallel part has rank {comm.Get_rank()} of {comm.Get_size()}, but mapping says "
            f"tp_rank {mapping.tp_rank} of tp_size {mapping.tp_size}"
        )
    return comm


class BytesComm:
    """What the compiled module calls: an all-gather of bytes over any CommBackend."""

    def __init__(self, comm: CommBackend) -> None:
        self._comm = comm

    def all_gather(self, data: bytes) -> list[bytes]:
        return list(self._comm.allgather(data))
