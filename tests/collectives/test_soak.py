"""Operations of all kinds from two threads on two groups, on a GPU on three streams, for as long as one likes. Every byte is checked, and
nothing may grow: descriptors, threads, mappings, memory of the host and of the device.

MNNVL_TEST_SECONDS: how long (default 4); MNNVL_TEST_SEED: the first case's seed. A failure shows its case and its thread.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Rank, run_ranks
from operations import COMBINATIONS, SUPPORT, Case, fill_pools
from test_every_operation import FIRST_SEED, NO_STREAM, Group, Places, cases_body

SECONDS = float(os.environ.get("MNNVL_TEST_SECONDS", "4"))
CASES = 100  # of each thread in a round
WARM_UP_ROUNDS = 3  # the first has every kind of call
APART = 10_000_019  # the threads' seeds
MIB, GIB = 1 << 20, 1 << 30
M_MMAP_THRESHOLD = -3  # malloc.h

# By how much what a rank uses may grow from the end of the warm-up to the end, however long that takes.
ALLOWED = {
    "descriptors": 0,
    "threads": 0,
    "segments": 0,  # mapped
    # To the byte, but for what malloc keeps for each thread to use again: a quarter of a MiB at most. As much again for CUDA's.
    "heap": 8 * MIB,
    # What malloc doesn't know of, too. Without GPUs it is within 3 MiB; CUDA does as it likes.
    "anonymous": 32 * MIB,
    "allocated": 0,  # tensors on the device
    "reserved": 0,  # their cache
    "device": 8 * MIB,  # everybody's
}
Usage = dict[str, int]


class Mallinfo2(ctypes.Structure):
    """malloc.h: ten numbers, the fifth hblkhd, in mappings of their own, and the eighth uordblks, in arenas."""

    _fields_ = [("numbers", ctypes.c_size_t * 10)]


def heap_in_use() -> int:
    """Of malloc, in all arenas; 0 where it can't be asked. What is free has been given back to the system."""
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
        libc.mallopt(M_MMAP_THRESHOLD, 128 << 10)


def usage(device: torch.device) -> Usage:
    """Of this process and its device, when nothing is under way."""
    gc.collect()
    heap = heap_in_use()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "segments": Path("/proc/self/maps").read_text().count("/memfd:"),
        "heap": heap,
        "anonymous": int(status.get("RssAnon", "0 kB").split()[0]) << 10,  # not every sandbox tells
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


def grown(before: Usage, after: Usage) -> list[str]:
    """What grew by more than it may."""
    return [
        f"{name}: {after[name]} after {before[name]}" for name in before if after[name] - before[name] > ALLOWED[name]
    ]


def every_kind(seed: int, world_size: int) -> list[Case]:
    """Each operation in each form: asynchronous, of any size; then synchronous and large."""
    some: dict[tuple[str, str], Case] = {}
    for case in (Case.random(seed + i, world_size) for i in range(len(COMBINATIONS))):
        some.setdefault((case.operation, case.form), case)
    large = [replace(case, asynchronous=False, numel=MIB // case.dtype.itemsize) for case in some.values()]
    return [*(replace(case, asynchronous=True) for case in some.values()), *large]


def cases_of(thread: int, number: int, world_size: int) -> list[Case]:
    """Of a round. Barriers, two of all combinations, come in each."""
    seed = FIRST_SEED + thread * APART + number * CASES
    if number == 0:
        return every_kind(seed, world_size)
    cases = [Case.random(seed + i, world_size) for i in range(CASES - 2)]
    for i, form in enumerate(SUPPORT["barrier"].forms, CASES - 2):
        case = Case(seed + i, "barrier", form, torch.uint8, asynchronous=bool(number % 2))
        cases.insert(random.Random(case.seed).randrange(len(cases)), case)
    return cases


@dataclass
class Thread:
    """One of a rank's two, with a group and streams of its own. It ends each round it begins, whatever the other does."""

    number: int
    rank: Rank
    group: Group
    places: Places

    def run(self, round_number: int) -> str:
        """What went wrong."""
        if self.rank.device.type == "cuda":
            torch.cuda.set_device(self.rank.device)
        try:
            cases = cases_of(self.number, round_number, self.rank.world_size)
            if self.rank.device.type == "cuda":  # a factor is multiplied by kernels of torch, which are loaded lazily
                cases = [replace(case, op="SUM") if case.op == "PREMUL_SUM" else case for case in cases]
            cases_body(self.rank, cases, self.group, self.places)
        except Exception as error:
            return f"thread {self.number}, round {round_number}: {error}\n"
        return ""


def all_stop(rank: Rank, wish: bool) -> bool:
    """Whether rank 0 wishes it. Nobody knows before all have asked."""
    wishes = torch.tensor([int(wish and rank.rank == 0)]).to(rank.device)
    dist.all_reduce(wishes)
    return bool(wishes.cpu().item())


def message_that_waits(rank: Rank, number: int, group: Group) -> None:
    """And a future that does: for these a group may start threads, which it then keeps."""
    x, y = (torch.zeros(1, dtype=torch.uint8).to(rank.device) for _ in range(2))
    received = dist.irecv(y, (rank.rank - 1) % rank.world_size, group).get_future()
    rank.meet(f"message {number}")
    dist.isend(x, (rank.rank + 1) % rank.world_size, group).wait()
    received.wait()


def places(rank: Rank, count: int) -> Places:
    """With all the memory they will want in torch's cache. To allocate more, CUDA may wait for all that is in flight, also of the other
    thread, whose peer may wait for this one's."""
    if rank.device.type != "cuda":
        return NO_STREAM
    made = [torch.cuda.stream(torch.cuda.Stream()) for _ in range(count)]
    for place in made:
        with place:
            large = torch.empty(GIB, dtype=torch.uint8, device=rank.device)
            small = [torch.empty(MIB // 2, dtype=torch.uint8, device=rank.device) for _ in range(128)]
        del large, small
    return made


def soak_body(rank: Rank, seconds: float) -> tuple[int, Usage, Usage]:
    """Rounds; what was in use after the warm-up, and in the end."""
    give_back_what_is_large()
    fill_pools()
    threads = [Thread(0, rank, None, places(rank, 2)), Thread(1, rank, dist.new_group(), places(rank, 1))]
    for thread in threads:
        message_that_waits(rank, thread.number, thread.group)
    before: Usage = {}
    end = 0.0
    with ThreadPoolExecutor(len(threads)) as pool:
        for number in itertools.count():
            # At first one after the other: what CUDA loads when it is first used waits for all that is in flight.
            run_all = map if number == 0 else pool.map
            errors = "".join(run_all(Thread.run, threads, itertools.repeat(number)))
            assert not errors, errors
            rank.meet(f"round {number}")  # so that no rank is in a call while another one looks
            after = usage(rank.device)
            if number < WARM_UP_ROUNDS:
                before, end = after, time.monotonic() + seconds
            if all_stop(rank, number >= WARM_UP_ROUNDS and time.monotonic() > end):
                break
        patience = time.monotonic() + 5  # what has ended may let go a little later
        while grown(before, after) and time.monotonic() < patience:
            time.sleep(0.1)
            after = usage(rank.device)
    assert not grown(before, after), f"rank {rank.rank}, after {number + 1} rounds: {grown(before, after)}"
    return number + 1, before, after


@pytest.mark.timeout(SECONDS + 150)
@pytest.mark.parametrize("world_size", [2, 3])
def test_soak(device, world_size):
    """In processes of their own, where nothing else has left anything."""
    if device == "cuda" and world_size > max(2, torch.cuda.device_count()):
        pytest.skip(f"fewer than {world_size} CUDA devices")
    for result in run_ranks(soak_body, world_size, device, args=(SECONDS,), timeout=SECONDS + 120):
        print(*result)


def test_growth_is_found():
    device, woken = torch.device("cpu"), threading.Event()
    before = usage(device)
    assert not grown(before, usage(device))
    thread = threading.Thread(target=woken.wait)
    thread.start()
    descriptor = os.memfd_create("segment")
    os.truncate(descriptor, MIB)
    segment = mmap.mmap(descriptor, MIB)
    tensors = [torch.ones(1000) for _ in range(10_000)]
    found = {text.split(":")[0] for text in grown(before, usage(device))}
    woken.set()
    thread.join()
    segment.close()
    os.close(descriptor)
    assert found == {name for name in before if before[name] or name == "segments"}
    del tensors
    assert not grown(before, usage(device))
