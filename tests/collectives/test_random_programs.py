"""Random programs of sends, receives, batches and collectives (tests/programs.py): every byte is checked.

MNNVL_TEST_PROGRAMS: how many for each world size (default 300, and a quarter of it on GPUs); MNNVL_TEST_SEED: the first one's
seed. A failure shows the program; its seed is enough to run it again, alone: MNNVL_TEST_PROGRAMS=1 MNNVL_TEST_SEED=<seed>.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from programs import Collective, Event, Message, Program, early_waits

PROGRAMS = int(os.environ.get("MNNVL_TEST_PROGRAMS", "300"))
FIRST_SEED = int(os.environ.get("MNNVL_TEST_SEED", "1"))
SECONDS = 60 + PROGRAMS  # more than enough
LARGEST = 16 << 20  # bytes of a message
GUARD = 32  # bytes on either side of what is received


class Runner:
    """One rank's part of a program. `pool`: random bytes, of which every message is another piece. What is on a GPU is
    only copied, and made and looked at on the CPU: CUDA loads torch's kernels when they are first used, and may then
    wait for everything that runs, messages that wait for this rank among them."""

    def __init__(self, rank: Rank, program: Program, pool: torch.Tensor) -> None:
        self.rank, self.program, self.pool = rank, program, pool
        self.outstanding: dict[int, list[dist.Work]] = {}
        self.checks: dict[int, list[Callable[[], None]]] = {}  # when these have ended

    def run(self) -> None:
        for event in self.program.of_rank(self.rank.rank):
            try:
                self.step(event)
            except Exception as error:
                raise AssertionError(f"rank {self.rank.rank}, {event}: {error}\n{self.program}") from error
        assert not self.outstanding

    def step(self, event: Event) -> None:
        if event.what in ("wait", "poll"):
            self.wait(event)
        elif event.collective is not None:
            self.collective(event.collective, event.handle)
        elif event.what == "blocking":
            (message,) = event.messages
            if message.source == self.rank.rank:
                dist.send(self.content(message), message.destination, tag=message.tag)
            else:
                x, check = self.room(message)
                source = dist.recv(x, None if message.any_source else message.source, tag=message.tag)
                assert source == message.source
                check()
        else:
            self.post(event)

    def post(self, event: Event) -> None:
        operations, checks = [], []
        for message in event.messages:
            if message.source == self.rank.rank:
                operations.append((dist.isend, self.content(message), message.destination, message))
            else:
                x, check = self.room(message)
                checks.append(check)
                operations.append((dist.irecv, x, message.source, message))
        if event.what == "batch":
            works = dist.batch_isend_irecv([dist.P2POp(f, x, peer, tag=m.tag) for f, x, peer, m in operations])
        else:
            ((f, x, peer, m),) = operations
            works = [f(x, None if f is dist.irecv and m.any_source else peer, tag=m.tag)]
        self.outstanding[event.handle], self.checks[event.handle] = works, checks

    def wait(self, event: Event) -> None:
        for work in self.outstanding.pop(event.handle):
            if event.what == "poll":
                deadline = time.monotonic() + 20
                while not work.is_completed():
                    assert time.monotonic() < deadline, "never completed"
                    time.sleep(0.0001)
            work.wait()
        for check in self.checks.pop(event.handle):
            check()

    def expected(self, message: Message) -> torch.Tensor:
        start = (message.number * 7919 + self.program.seed * 104_729) % (self.pool.numel() - message.bytes)
        return self.pool[start : start + message.bytes]

    def place(self, message: Message, storage: torch.Tensor, own: int) -> torch.Tensor:
        """Its elements in the storage: of a dtype that both ends know, at an offset that they don't share."""
        sizes = {torch.float32: 4, torch.bfloat16: 2, torch.uint8: 1}
        fitting = [dtype for dtype, size in sizes.items() if message.bytes % size == 0]
        dtype = fitting[message.number % len(fitting)]
        offset = (message.number + own) % 4 * dtype.itemsize
        return storage[offset : offset + message.bytes].view(dtype)

    def content(self, message: Message) -> torch.Tensor:
        storage = torch.empty(message.bytes + GUARD, dtype=torch.uint8)
        self.place(message, storage, 0).view(torch.uint8).copy_(self.expected(message))
        return self.place(message, storage.to(self.rank.device), 0)

    def room(self, message: Message) -> tuple[torch.Tensor, Callable[[], None]]:
        untouched = torch.full((message.bytes + GUARD,), 0xA5, dtype=torch.uint8)
        storage = untouched.to(self.rank.device, copy=True)

        def check() -> None:
            found = storage.cpu()
            x = self.place(message, found, 1).view(torch.uint8)
            assert torch.equal(x, self.expected(message)), f"{message}: wrong bytes"
            x.fill_(0xA5)
            assert torch.equal(found, untouched), f"{message}: wrote beside it"

        return self.place(message, storage, 1), check

    def collective(self, c: Collective, handle: int) -> None:
        n, me, device = self.rank.world_size, self.rank.rank, self.rank.device
        base = (torch.arange(c.numel) % 61 + c.number).float()  # small integers: sums are exact
        x = (base + me).to(device)
        if c.kind == "all_reduce":
            result, expected = x, base * n + n * (n - 1) // 2
            work = dist.all_reduce(x, async_op=c.asynchronous)
        elif c.kind == "broadcast":
            result, expected = x, base + c.root
            work = dist.broadcast(x, c.root, async_op=c.asynchronous)
        elif c.kind == "all_gather":
            result, expected = torch.empty(n * c.numel, device=device), torch.cat([base + r for r in range(n)])
            work = dist.all_gather_into_tensor(result, x, async_op=c.asynchronous)
        else:
            result, expected = x, base + me
            ids = [device.index] if device.type == "cuda" else None
            work = dist.barrier(async_op=c.asynchronous, device_ids=ids)

        def check() -> None:
            assert torch.equal(result.cpu(), expected), f"{c}: wrong result"

        if c.asynchronous:
            self.outstanding[handle], self.checks[handle] = [work], [check]
        else:
            check()


def programs_body(rank: Rank, first: int, count: int, in_order: bool) -> int:
    pool = torch.randint(0, 256, (LARGEST + (1 << 20),), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    dist.barrier(device_ids=[rank.device.index] if rank.device.type == "cuda" else None)
    moved = 0
    for seed in range(first, first + count):
        program = Program(seed, rank.world_size, in_order, LARGEST)
        Runner(rank, program, pool).run()
        moved += sum(m.bytes for e in program.of_rank(rank.rank) for m in e.messages if m.source == rank.rank)
    return moved


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
def test_random_programs(ranks, device, world_size):
    """Tags out of order and any source on the CPU; in order on a GPU."""
    count = PROGRAMS if device == "cpu" else max(1, PROGRAMS // 4)
    moved = ranks(programs_body, world_size, device, args=(FIRST_SEED, count, device == "cuda"), timeout=SECONDS)
    assert count < 20 or min(moved) > 0


@pytest.mark.timeout(SECONDS + 30)
def test_random_programs_through_a_small_workspace(ranks, device):
    """Rings of few and small slots."""
    count = max(1, PROGRAMS // 4)
    args = (FIRST_SEED + 1_000_000, count, device == "cuda")
    ranks(programs_body, 3, device, args=args, timeout=SECONDS, options={"workspace_bytes": 1 << 20})


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
def test_programs_in_order_ask_for_what_is_promised(world_size):
    """Of a GPU, of which csrc/README.md says what may hold up what."""
    for seed in range(FIRST_SEED, FIRST_SEED + PROGRAMS):
        program = Program(seed, world_size, in_order=True, largest=LARGEST)
        early = early_waits(program)
        assert not early, f"{early[0]}\n{program}"
