"""FlashInfer's two communicators for set-up: over a torch.distributed group, and over MPI."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from mnnvl_backend.flashinfer.control import CommBackend


class TorchDistBackend(CommBackend):
    """A CommBackend over the object collectives of a process group. Every call but Get_* is collective over it.

    Args:
        group: None: the default group.

    Raises:
        RuntimeError: torch.distributed is not initialized.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "TorchDistBackend: torch.distributed is not initialized; call torch.distributed.init_process_group() "
                "first"
            )
        self._group = group

    def Get_rank(self) -> int:
        return dist.get_rank(self._group)

    def Get_size(self) -> int:
        return dist.get_world_size(self._group)

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """Every rank's object, in rank order."""
        everybody: list[Any] = [None] * self.Get_size()
        dist.all_gather_object(everybody, data, group=self._group)
        return tuple(everybody)

    def bcast(self, data: Any, root: int) -> Any:
        """The object of `root`, a rank in the group."""
        holder = [data]
        dist.broadcast_object_list(holder, group=self._group, group_src=root)
        return holder[0]

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def Split(self, color: int, key: int) -> TorchDistBackend:
        """The ranks that gave the same color, ordered by key, then rank."""
        everybody = self.allgather((color, key))
        parts: dict[int, list[tuple[int, int]]] = {}
        for rank, (theirs, key_of_rank) in enumerate(everybody):
            parts.setdefault(theirs, []).append((key_of_rank, rank))
        members = [rank for _, rank in sorted(parts[color])]
        group = self._group or dist.distributed_c10d._get_default_group()
        ranks = [dist.get_global_rank(group, rank) for rank in members]
        # Sorting is torch's default, and the only way before 2.13.
        unsorted: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
        # Only the members take part in it: the group need not be the whole world, nor the parts be made in one order.
        return TorchDistBackend(dist.new_group(ranks, use_local_synchronization=True, **unsorted))


class MPIBackend(CommBackend):
    """A CommBackend over MPI.COMM_WORLD. Needs mpi4py.

    Raises:
        RuntimeError: mpi4py can't be imported.
    """

    def __init__(self) -> None:
        self._comm = _mpi().COMM_WORLD

    def Get_rank(self) -> int:
        return int(self._comm.Get_rank())

    def Get_size(self) -> int:
        return int(self._comm.Get_size())

    def allgather(self, data: Any) -> tuple[Any, ...]:
        return tuple(self._comm.allgather(data))

    def bcast(self, data: Any, root: int) -> Any:
        return self._comm.bcast(data, root=root)

    def barrier(self) -> None:
        self._comm.Barrier()

    def Split(self, color: int, key: int) -> MPIBackend:
        part = MPIBackend()
        part._comm = self._comm.Split(color, key)
        return part


def mpi_barrier() -> None:
    """A barrier over MPI.COMM_WORLD.

    Raises:
        RuntimeError: mpi4py can't be imported.
    """
    _mpi().COMM_WORLD.Barrier()


def _mpi() -> Any:
    """Imported on use: nothing else of this package needs MPI."""
    try:
        from mpi4py import MPI  # type: ignore[import-not-found,unused-ignore]  # stubtest knows no overrides
    except ImportError as error:
        raise RuntimeError(
            f"mpi4py could not be imported: {error}. Install it, or use TorchDistBackend, which needs only "
            "torch.distributed"
        ) from error
    return MPI
