"""What `mnnvl bench` compares: each peer sums a tensor over all ranks in its own way.

A peer's time includes the copies that a user with an ordinary tensor would pay, but for NCCL's symmetric windows, where
the user's tensor has to live in a registered pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mnnvl_backend.options import Options
from mnnvl_backend.tools.launch import Place

Call = Callable[[], Any]


class Peer(Protocol):
    name: str

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in memory that no later call touches. May overwrite `tensor`."""

    def prepare(self, tensor: torch.Tensor) -> tuple[Call, torch.Tensor]:
        """A function that sums a tensor like this one, for graphs and loops, and the tensor that it reads; allocates
        nothing when called."""

    def close(self) -> None: ...


class Group:
    """dist.all_reduce on a group of some backend, in place."""

    def __init__(self, name: str, backend: str, options: Any = None) -> None:
        self.name = name
        self._group = dist.new_group(backend=backend, pg_options=options)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def prepare(self, tensor: torch.Tensor) -> tuple[Call, torch.Tensor]:
        return lambda: dist.all_reduce(tensor, group=self._group), tensor

    def close(self) -> None:
        dist.destroy_process_group(self._group)


class Function:
    """trtllm_mnnvl_allreduce, out of place."""

    def __init__(self, name: str, place: Place, max_bytes: int, pdl: bool) -> None:
        from mnnvl_backend import Mapping, MNNVLAllReduceFusionWorkspace

        self.name, self._pdl = name, pdl
        mapping = Mapping(place.world_size, place.rank, tp_size=place.world_size)
        # Rows of 1 KiB; two-shot rounds their number up to a multiple of the world size.
        rows = max(1, max_bytes // 1024) + place.world_size
        self._workspace = MNNVLAllReduceFusionWorkspace(
            mapping, rows, 512, torch.bfloat16, device=place.device, options=Options()
        )

    def _shape(self, tensor: torch.Tensor) -> torch.Tensor:
        hidden = 1024 // tensor.dtype.itemsize
        return tensor.view(-1, hidden) if tensor.numel() % hidden == 0 else tensor.view(1, -1)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        from mnnvl_backend import trtllm_mnnvl_allreduce

        return trtllm_mnnvl_allreduce(self._shape(tensor), self._workspace, self._pdl).view_as(tensor)

    def prepare(self, tensor: torch.Tensor) -> tuple[Call, torch.Tensor]:
        from mnnvl_backend import trtllm_mnnvl_allreduce

        shaped = self._shape(tensor)
        output = torch.empty_like(shaped)
        return lambda: trtllm_mnnvl_allreduce(shaped, self._workspace, self._pdl, output=output), tensor

    def close(self) -> None:
        self._workspace.destroy()


class NcclWindow:
    """NCCL's symmetric kernels: the tensor lives in a pool whose memory is registered as a symmetric window."""

    name = "nccl window"

    def __init__(self, place: Place) -> None:
        self._group = dist.new_group(backend="nccl")
        dist.all_reduce(torch.zeros(1, device=place.device), group=self._group)  # makes the communicator
        self._backend: Any = self._group._get_backend(place.device)
        self._pool = torch.cuda.MemPool(self._backend.mem_allocator)
        self._tensors: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.numel(), tensor.dtype)
        if key not in self._tensors:
            if self._tensors:
                self._backend.deregister_mem_pool(self._pool)
            with torch.cuda.use_mem_pool(self._pool):
                self._tensors[key] = torch.empty_like(tensor)
            self._backend.register_mem_pool(self._pool, symm=True)
        return self._tensors[key]

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        own = self._like(tensor)
        own.copy_(tensor)
        dist.all_reduce(own, group=self._group)
        return own.clone()

    def prepare(self, tensor: torch.Tensor) -> tuple[Call, torch.Tensor]:
        own = self._like(tensor)
        own.copy_(tensor)
        return lambda: dist.all_reduce(own, group=self._group), own

    def close(self) -> None:
        self._backend.deregister_mem_pool(self._pool)
        dist.destroy_process_group(self._group)


class SymmetricMemory:
    """torch's symmetric memory, one- or two-shot, without multimem, copies of the user's tensor included."""

    def __init__(self, name: str, two_shot: bool) -> None:
        self.name, self._two_shot = name, two_shot
        self._group = dist.new_group(backend="nccl")
        self._buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed import _symmetric_memory as symmetric

        key = (tensor.numel(), tensor.dtype)
        if key not in self._buffers:
            self._buffers.clear()
            self._buffers[key] = symmetric.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            symmetric.rendezvous(self._buffers[key], self._group.group_name)
        return self._buffers[key]

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.prepare(tensor)[0]()
        return tensor

    def prepare(self, tensor: torch.Tensor) -> tuple[Call, torch.Tensor]:
        buffer, name = self._like(tensor), self._group.group_name

        def one_shot() -> None:
            torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer, tensor, "sum", name, tensor)

        def two_shot() -> None:
            buffer.copy_(tensor)
            torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", name)
            tensor.copy_(buffer)

        return two_shot if self._two_shot else one_shot, tensor

    def close(self) -> None:
        self._buffers.clear()
        dist.destroy_process_group(self._group)


class Mpi:
    """mpi4py, in place; only under mpirun."""

    name = "mpi4py"

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        if MPI.COMM_WORLD.Get_size() != dist.get_world_size():
            raise RuntimeError(f"MPI's world has {MPI.COMM_WORLD.Get_size()} ranks; start with mpirun")

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.prepare(tensor)[0]()
        return tensor

    def prepare(self, tensor: torch.Tensor) -> tuple[Call, torch.Tensor]:
        array = tensor.numpy()
        return lambda: self._mpi.COMM_WORLD.Allreduce(self._mpi.IN_PLACE, array), tensor

    def close(self) -> None:
        pass


def peers_of(
    place: Place, max_bytes: int, dtype: torch.dtype, only: list[str] | None, notes: dict[str, str]
) -> list[Peer]:
    """The peers that can be made here; collective. Why one can't goes to `notes`."""
    makers: dict[str, Callable[[], Peer]] = {
        "mnnvl": lambda: Group("mnnvl", "mnnvl", Options()),
        "mnnvl function": lambda: Function("mnnvl function", place, max_bytes, pdl=False),
    }
    if place.device.type == "cuda":
        makers["mnnvl function pdl"] = lambda: Function("mnnvl function pdl", place, max_bytes, pdl=True)
        if place.peer_possible:
            makers["nccl"] = lambda: Group("nccl", "nccl")
            makers["nccl window"] = lambda: NcclWindow(place)
            makers["symm_mem one-shot"] = lambda: SymmetricMemory("symm_mem one-shot", two_shot=False)
            makers["symm_mem two-shot"] = lambda: SymmetricMemory("symm_mem two-shot", two_shot=True)
    else:
        makers["gloo"] = lambda: Group("gloo", "gloo")
        makers["mpi4py"] = Mpi
    unknown = set(only or ()) - set(makers)
    if unknown:
        raise SystemExit(f"--only: unknown here: {', '.join(sorted(unknown))}; known: {', '.join(makers)}")
    peers = []
    for name, make in makers.items():
        if only and name not in only:
            continue
        try:
            peers.append(make())
        except Exception as error:
            notes[name] = f"not here: {error}"
    return peers
