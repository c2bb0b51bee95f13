"""What a command run under torchrun needs: its place, its device, and the way out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's
# Under mpirun, to bench beside MPI: Open MPI's and MPICH's.
MPI_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Place:
    """One rank of a run of one or more hosts."""

    rank: int
    world_size: int
    device: torch.device
    shared: bool  # several ranks on one GPU

    @property
    def description(self) -> str:
        if self.device.type == "cpu":
            return f"CPU, {len(os.sched_getaffinity(0))} cores"
        return torch.cuda.get_device_name(self.device) + (" (shared by several ranks)" if self.shared else "")

    @property
    def peer_possible(self) -> bool:
        """gloo always; NCCL refuses several ranks on one GPU."""
        return not self.shared

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def start(device: str) -> Iterator[Place]:
    """The place that torchrun gave this process; destroys the default group on the way out.

    Raises:
        SystemExit: not run under torchrun, or a device that isn't here.
    """
    for theirs in MPI_NAMES:
        if "RANK" not in os.environ and all(name in os.environ for name in theirs):
            os.environ.update(zip(NAMES, (os.environ[name] for name in theirs), strict=True))
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "29500")
    if "RANK" not in os.environ:
        raise SystemExit("run under torchrun, e.g.: torchrun --nproc-per-node 4 -m mnnvl_backend demo")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no CUDA device; `mnnvl doctor` says more")
        gpus = torch.cuda.device_count()
        place = Place(rank, world_size, torch.device("cuda", local_rank % gpus), shared=local_size > gpus)
        torch.cuda.set_device(place.device)
    else:
        place = Place(rank, world_size, torch.device("cpu"), shared=False)
        torch.set_num_threads(1)
    try:
        yield place
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
