"""Whom `mnnvl bench` compares: each peer carries out the operations that it has in its own way.

A peer's time includes the copies that a user with an ordinary tensor would pay, but for NCCL's symmetric windows, where
the user's tensor has to live in a registered pool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mnnvl_backend.options import Options
from mnnvl_backend.tools.bench_operations import OPERATIONS, Operation
from mnnvl_backend.tools.launch import Place

Call = Callable[[], Any]


@dataclass(frozen=True)
class Prepared:
    """An operation at one size, ready for graphs and loops: `call` allocates nothing."""

    call: Call
    source: torch.Tensor  # what this rank contributes; to be filled before a call
    result: torch.Tensor  # what it has after one; the source itself, if the operation works in place


class Peer(Protocol):
    name: str

    def prepare(self, operation: Operation, like: torch.Tensor) -> Prepared:
        """For a contribution like this one. Collective."""

    def close(self) -> None: ...


class Group:
    """torch.distributed's own functions on a group of some backend."""

    def __init__(self, name: str, backend: str, place: Place, options: Any = None) -> None:
        self.name, self._place = name, place
        self._group = dist.new_group(backend=backend, pg_options=options)
        dist.all_reduce(torch.zeros(1, device=place.device), group=self._group)  # sets it up, on all ranks
        self._makers: dict[str, Callable[[torch.Tensor], Prepared]] = {
            "all_reduce": self._all_reduce,
            "reduce_scatter": self._reduce_scatter,
            "reduce": self._reduce,
            "all_gather": self._all_gather,
            "gather": self._gather,
            "broadcast": self._broadcast,
            "scatter": self._scatter,
            "all_to_all": self._all_to_all,
            "barrier": self._barrier,
            "send_recv": self._send_recv,
            "ping_pong": self._ping_pong,
        }

    def prepare(self, operation: Operation, like: torch.Tensor) -> Prepared:
        return self._makers[operation.name](torch.empty_like(like))

    def asynchronous(self, x: torch.Tensor) -> Callable[[], dist.Work]:
        """An all-reduce of `x` that the caller waits for."""
        return lambda: dist.all_reduce(x, group=self._group, async_op=True)

    def _all_reduce(self, x: torch.Tensor) -> Prepared:
        return Prepared(lambda: dist.all_reduce(x, group=self._group), x, x)

    def _reduce_scatter(self, x: torch.Tensor) -> Prepared:
        part = x.new_empty(x.numel() // self._place.world_size)
        return Prepared(lambda: dist.reduce_scatter_tensor(part, x, group=self._group), x, part)

    def _reduce(self, x: torch.Tensor) -> Prepared:
        """What the others' tensors hold afterwards is up to the backend."""
        return Prepared(lambda: dist.reduce(x, 0, group=self._group), x, x if self._place.rank == 0 else x[:0])

    def _all_gather(self, x: torch.Tensor) -> Prepared:
        whole = x.new_empty(self._place.world_size * x.numel())
        return Prepared(lambda: dist.all_gather_into_tensor(whole, x, group=self._group), x, whole)

    def _gather(self, x: torch.Tensor) -> Prepared:
        at_root, size = self._place.rank == 0, self._place.world_size
        whole = x.new_empty(size * x.numel() if at_root else 0)
        parts = list(whole.chunk(size)) if at_root else None
        return Prepared(lambda: dist.gather(x, parts, 0, group=self._group), x, whole)

    def _broadcast(self, x: torch.Tensor) -> Prepared:
        return Prepared(lambda: dist.broadcast(x, 0, group=self._group), x, x)

    def _scatter(self, x: torch.Tensor) -> Prepared:
        size = self._place.world_size
        part = x.new_empty(x.numel() // size)
        parts = list(x.chunk(size)) if self._place.rank == 0 else None
        return Prepared(lambda: dist.scatter(part, parts, 0, group=self._group), x, part)

    def _all_to_all(self, x: torch.Tensor) -> Prepared:
        y = torch.empty_like(x)
        return Prepared(lambda: dist.all_to_all_single(y, x, group=self._group), x, y)

    def _barrier(self, x: torch.Tensor) -> Prepared:
        ids = [self._place.device.index] if self._place.device.type == "cuda" else None
        return Prepared(lambda: dist.barrier(self._group, device_ids=ids), x, x)

    def _send_recv(self, x: torch.Tensor) -> Prepared:
        y, rank, size = torch.empty_like(x), self._place.rank, self._place.world_size

        def call() -> None:
            send = dist.P2POp(dist.isend, x, (rank + 1) % size, self._group)
            receive = dist.P2POp(dist.irecv, y, (rank - 1) % size, self._group)
            for work in dist.batch_isend_irecv([send, receive]):
                work.wait()

        return Prepared(call, x, y)

    def _ping_pong(self, x: torch.Tensor) -> Prepared:
        """Rank 1 sends back what it got; the others look on."""
        y = torch.empty_like(x)

        def begin() -> None:
            dist.send(x, 1, self._group)
            dist.recv(y, 1, self._group)

        def answer() -> None:
            dist.recv(y, 0, self._group)
            dist.send(y, 0, self._group)

        if self._place.rank == 0:
            return Prepared(begin, x, y)
        return Prepared(answer, x, y) if self._place.rank == 1 else Prepared(lambda: None, x, x)

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

    def prepare(self, operation: Operation, like: torch.Tensor) -> Prepared:
        from mnnvl_backend import trtllm_mnnvl_allreduce

        x = torch.empty_like(like)
        shaped = self._shape(x)
        output = torch.empty_like(shaped)
        return Prepared(
            lambda: trtllm_mnnvl_allreduce(shaped, self._workspace, self._pdl, output=output), x, output.view_as(x)
        )

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

    def prepare(self, operation: Operation, like: torch.Tensor) -> Prepared:
        own = self._like(like)
        return Prepared(lambda: dist.all_reduce(own, group=self._group), own, own)

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

    def prepare(self, operation: Operation, like: torch.Tensor) -> Prepared:
        tensor = torch.empty_like(like)
        buffer, name = self._like(like), self._group.group_name

        def one_shot() -> None:
            torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer, tensor, "sum", name, tensor)

        def two_shot() -> None:
            buffer.copy_(tensor)
            torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", name)
            tensor.copy_(buffer)

        return Prepared(two_shot if self._two_shot else one_shot, tensor, tensor)

    def close(self) -> None:
        self._buffers.clear()
        dist.destroy_process_group(self._group)


class Mpi:
    """mpi4py, in place; only under mpirun."""

    name = "mpi4py"

    def __init__(self, notes: dict[str, str]) -> None:
        """Notes which MPI it is."""
        from mpi4py import MPI

        self._mpi = MPI
        notes[self.name] = re.split(r"[,\s]*\n|, package", MPI.Get_library_version())[0]
        if MPI.COMM_WORLD.Get_size() != dist.get_world_size():
            raise RuntimeError(f"MPI's world has {MPI.COMM_WORLD.Get_size()} ranks; start with mpirun")

    def prepare(self, operation: Operation, like: torch.Tensor) -> Prepared:
        x = torch.empty_like(like)
        array = x.numpy()
        return Prepared(lambda: self._mpi.COMM_WORLD.Allreduce(self._mpi.IN_PLACE, array), x, x)

    def close(self) -> None:
        pass


def peers_of(
    place: Place,
    operation: Operation,
    max_bytes: int,
    only: list[str] | None,
    notes: dict[str, str],
) -> list[Peer]:
    """The peers that have the operation and can be made here; collective. Why one can't goes to `notes`."""
    every, sums = tuple(OPERATIONS), ("all_reduce",)
    makers: dict[str, tuple[Collection[str], Callable[[], Peer]]] = {
        "mnnvl": (every, lambda: Group("mnnvl", "mnnvl", place, Options())),
        "mnnvl function": (sums, lambda: Function("mnnvl function", place, max_bytes, pdl=False)),
    }
    if place.device.type == "cuda":
        makers["mnnvl function pdl"] = (sums, lambda: Function("mnnvl function pdl", place, max_bytes, pdl=True))
        if place.peer_possible:
            makers["nccl"] = (every, lambda: Group("nccl", "nccl", place))
            makers["nccl window"] = (sums, lambda: NcclWindow(place))
            for name, two_shot in (("symm_mem one-shot", False), ("symm_mem two-shot", True)):
                makers[name] = (sums, partial(SymmetricMemory, name, two_shot))
    else:
        makers["gloo"] = (every, lambda: Group("gloo", "gloo", place))
        makers["mpi4py"] = (sums, partial(Mpi, notes))
    unknown = set(only or ()) - set(makers)
    if unknown:
        raise SystemExit(f"--only: unknown here: {', '.join(sorted(unknown))}; known: {', '.join(makers)}")
    peers = []
    for name, (serves, make) in makers.items():
        if operation.name not in serves or (only and name not in only):
            continue
        try:
            peers.append(make())
        except Exception as error:
            notes[name] = f"not here: {error}"
    return peers
