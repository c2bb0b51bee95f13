"""What a rank uses, sampled when nothing is under way, and by how much that grew since the warm-up."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

KIB, MIB = 1 << 10, 1 << 20
M_MMAP_THRESHOLD = -3  # malloc.h
PATIENCE_SECONDS = 5.0  # what has ended may let go a little later

# By how much a quantity may grow from the end of the warm-up to the end, however long that takes.
ALLOWED = {
    "descriptors": 0,
    "threads": 0,
    "segments": 0,  # shared memory that is mapped
    # All that /proc/self/maps lists: malloc's arenas and the stacks of threads that ended come and go.
    "mappings": 64,
    # To the byte, but for what malloc keeps for each thread to use again: a quarter of a MiB at most. As much again
    # for CUDA's.
    "heap": 8 * MIB,
    # What malloc doesn't know of, too. Without GPUs it is within 3 MiB; CUDA does as it likes.
    "anonymous": 32 * MIB,
    "resident": 64 * MIB,  # with the pages of files, which are read in when they are first needed
    "allocated": 0,  # tensors on the device
    # Their cache, which is empty at the end of the warm-up and at the end, but for segments that a tensor keeps.
    "reserved": 16 * MIB,
    "device": 48 * MIB,  # everybody's: the device's memory that isn't free
}
COUNTS = ("descriptors", "threads", "segments", "mappings")  # the others are bytes
Usage = dict[str, int]


class Mallinfo2(ctypes.Structure):
    """malloc.h: ten numbers, the fifth hblkhd, in mappings of their own, and the eighth uordblks, in arenas."""

    _fields_ = [("numbers", ctypes.c_size_t * 10)]


def heap_in_use() -> int:
    """Bytes of malloc, in all arenas; 0 where it can't be asked. What is free has been given back to the system."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.malloc_trim(0)
    libc.mallinfo2.restype = Mallinfo2
    numbers = libc.mallinfo2().numbers
    return int(numbers[4] + numbers[7])


def give_back_what_is_large() -> None:
    """At once, and not, as malloc learns to do, into an arena, whose end is never given back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 128 * KIB)


def usage(device: torch.device) -> Usage:
    """Of this process and its device, when nothing is under way: counts and bytes, by the names of ALLOWED."""
    gc.collect()
    heap = heap_in_use()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    maps = Path("/proc/self/maps").read_text()

    def kilobytes(name: str) -> int:  # not every sandbox tells
        return int(status.get(name, "0 kB").split()[0]) * KIB

    used = {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "segments": maps.count("/memfd:"),
        "mappings": maps.count("\n"),
        "heap": heap,
        "anonymous": kilobytes("RssAnon"),
        "resident": kilobytes("VmRSS"),
    }
    if device.type == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        used |= {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "device": total - free,
        }
    return used


@dataclass(frozen=True)
class Change:
    """One quantity on one rank; bytes, or a count."""

    before: int  # when the warm-up had ended
    after: int
    per_hour: float  # slope of the straight line through all samples; 0 of fewer than three
    allowed: int

    @property
    def grown(self) -> bool:
        return self.after - self.before > self.allowed

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"difference": self.after - self.before, "grown": self.grown}


@dataclass
class Growth:
    """Samples of one rank, of which only sums are kept, so that watching doesn't grow."""

    device: torch.device
    before: Usage = field(default_factory=dict)
    last: Usage = field(default_factory=dict)
    _start: float = 0.0
    _count: int = 0
    _times: float = 0.0
    _times_squared: float = 0.0
    _values: dict[str, float] = field(default_factory=dict)
    _products: dict[str, float] = field(default_factory=dict)

    def sample(self, warming_up: bool) -> None:
        """The last of the warm-up is what later ones are compared with."""
        self.last = usage(self.device)
        if warming_up:
            self.before, self._start = self.last, time.monotonic()
            return
        hours = (time.monotonic() - self._start) / 3600
        self._count += 1
        self._times += hours
        self._times_squared += hours * hours
        for name, value in self.last.items():
            value -= self.before[name]
            self._values[name] = self._values.get(name, 0.0) + value
            self._products[name] = self._products.get(name, 0.0) + hours * value

    def settle(self) -> None:
        """Samples again, a few seconds long while something is grown."""
        end = time.monotonic() + PATIENCE_SECONDS
        self.last = usage(self.device)
        while self.grown() and time.monotonic() < end:
            time.sleep(0.1)
            self.last = usage(self.device)

    def changes(self) -> dict[str, Change]:
        return {
            name: Change(self.before[name], value, self._per_hour(name), ALLOWED[name])
            for name, value in self.last.items()
        }

    def grown(self) -> list[str]:
        """What grew by more than it may."""
        return [f"{name}: {c.after} after {c.before}" for name, c in self.changes().items() if c.grown]

    def _per_hour(self, name: str) -> float:
        spread = self._count * self._times_squared - self._times**2
        if self._count < 3 or spread <= 0:
            return 0.0
        return (self._count * self._products[name] - self._times * self._values[name]) / spread


def amount(name: str, value: float) -> str:
    """`value` of the quantity, signed, for people."""
    if name in COUNTS:
        return f"{value:+.0f}"
    return f"{value / MIB:+.1f} MiB"
