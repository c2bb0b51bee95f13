"""What a rank does in one round of the soak: two threads with a group each that call in any order, and groups that are
made and destroyed meanwhile. All of it follows from the seed, so that every rank does the same."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace as Workspace
from mnnvl_backend.options import Options
from mnnvl_backend.tools import soak_calls, soak_function
from mnnvl_backend.tools.soak_calls import NO_STREAM, Call, Group, Mismatch, Places, Seat
from mnnvl_backend.tools.soak_function import FunctionCall, FunctionCase
from mnnvl_backend.tools.soak_operations import COMBINATIONS, SUPPORT, Case

CASES = 60  # of each thread in a round
FUNCTION_CASES = 12  # and of the function
BRIEF_CASES = 8  # of a group that lives for a round
MOST_TOGETHER = 5  # calls in flight at once on a group
SLEEP_CHANCE = 0.02  # that one of the ranks sleeps before a call
LONGEST_SLEEP = 0.02  # seconds
MOST_MISMATCHES = 20  # that are described; all are counted
MIB, GIB = 1 << 20, 1 << 30
APART = 10_000_019  # the lanes' seeds
ROUNDS_APART = 1000  # more than cases of a lane in a round
AnyCase = Case | FunctionCase


@dataclass
class Outcome:
    """Of a round, or of many, on one rank."""

    operations: Counter[str] = field(default_factory=Counter)
    bytes: int = 0  # compared
    mismatches: int = 0
    described: list[str] = field(default_factory=list)  # the first mismatches
    errors: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.operations += other.operations
        self.bytes += other.bytes
        self.mismatches += other.mismatches
        self.described = (self.described + other.described)[:MOST_MISMATCHES]
        self.errors += other.errors

    def checked(self, calls: Sequence[Call], found: list[tuple[Call, Mismatch]], where: str) -> None:
        self.operations.update(call.case.operation for call in calls)
        self.bytes += sum(memory.bytes for call in calls for memory in call.memories)
        self.mismatches += len(found)
        for call, mismatch in found[: MOST_MISMATCHES - len(self.described)]:
            self.described.append(f"{where}: {call.case}: {mismatch}; in flight: {[other.case for other in calls]}")


def first_case(seed: int, lane: int, round_number: int) -> int:
    """The seed of a lane's first case in a round."""
    return seed * 1_000_003 + lane * APART + round_number * ROUNDS_APART


def every_kind(first: int, world_size: int) -> list[AnyCase]:
    """Each operation in each form: asynchronous, of any size; then synchronous and large."""
    some: dict[tuple[str, str], Case] = {}
    for case in (Case.random(first + i, world_size) for i in range(len(COMBINATIONS))):
        some.setdefault((case.operation, case.form), case)
    large = [replace(case, asynchronous=False, numel=MIB // case.dtype.itemsize) for case in some.values()]
    function = [FunctionCase.random(first + i) for i in range(3 * FUNCTION_CASES)]
    return [*(replace(case, asynchronous=True) for case in some.values()), *large, *function]


def cases_of(seed: int, lane: int, round_number: int, world_size: int) -> list[AnyCase]:
    """Of a round; the first has every kind. Barriers, two of all combinations, come in each."""
    first = first_case(seed, lane, round_number)
    if round_number == 0:
        return every_kind(first, world_size)
    cases: list[AnyCase] = [Case.random(first + i, world_size) for i in range(CASES)]
    cases += [FunctionCase.random(first + i) for i in range(FUNCTION_CASES)]
    for i, form in enumerate(SUPPORT["barrier"].forms, CASES):
        cases.append(Case(first + i, "barrier", form, torch.uint8, asynchronous=bool(round_number % 2)))
    random.Random(first).shuffle(cases)
    return cases


@dataclass
class Lane:
    """One of a rank's threads, with a group, a workspace and streams of its own. It ends each round it begins, whatever
    the other does."""

    number: int
    seat: Seat
    group: Group
    workspace: Workspace
    places: Places = NO_STREAM
    side: SideCopies | None = None

    def run(self, seed: int, round_number: int) -> Outcome:
        outcome = Outcome()
        where = f"seed {seed}, round {round_number}, lane {self.number}, rank {self.seat.rank}"
        try:
            if self.seat.device.type == "cuda":
                torch.cuda.set_device(self.seat.device)
            cases = cases_of(seed, self.number, round_number, self.seat.world_size)
            self.go_through(cases, random.Random(f"{seed} {self.number} {round_number}"), outcome, where)
        except Exception as error:
            outcome.errors.append(f"{where}: {type(error).__name__}: {error}")
        return outcome

    def go_through(self, cases: list[AnyCase], chance: random.Random, outcome: Outcome, where: str) -> None:
        """`chance` is the same on all ranks; each waits in an order of its own."""
        own = random.Random(f"{chance.random()} {self.seat.rank}")

        def pause(_: int) -> None:
            if chance.random() < SLEEP_CHANCE:
                sleeper, seconds = chance.randrange(self.seat.world_size), chance.random() * LONGEST_SLEEP
                if sleeper == self.seat.rank:
                    time.sleep(seconds)

        while cases:
            count = chance.randint(1, MOST_TOGETHER)
            calls = [self.prepared(case) for case in cases[:count]]
            cases = cases[count:]
            order = own.sample(range(len(calls)), len(calls))
            if self.side is not None:
                self.side.begin()
            found = soak_calls.run(calls, self.places, order, pause)
            outcome.checked(calls, found, where)
            if self.side is not None:
                outcome.operations["side copy"] += 1
                if not self.side.right():
                    outcome.mismatches += 1
                    outcome.described.append(f"{where}: a side copy, with {[call.case for call in calls]}")

    def prepared(self, case: AnyCase) -> Call:
        with self.places[case.seed % len(self.places)]:
            if isinstance(case, FunctionCase):
                return FunctionCall(self.seat, case, self.workspace)
            if self.seat.device.type == "cuda" and case.op == "PREMUL_SUM":
                # A factor is multiplied by kernels of torch, which are loaded lazily.
                case = replace(case, op="SUM")
            return soak_calls.prepared(self.seat, case, self.group)


class SideCopies:
    """Copies of a few MiB to the device, on it and back, on a stream beside the calls'; no kernels."""

    def __init__(self, device: torch.device, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        content = torch.randint(0, 256, (4 * MIB + 3,), dtype=torch.uint8, generator=generator)
        self._given, self._back = content.pin_memory(), torch.empty_like(content).pin_memory()
        self._on_device = [torch.empty_like(content, device=device) for _ in range(2)]
        self._stream = torch.cuda.Stream(device)

    def begin(self) -> None:
        first, second = self._on_device
        self._back.zero_()
        with torch.cuda.stream(self._stream):
            first.copy_(self._given, non_blocking=True)
            second.copy_(first, non_blocking=True)
            self._back.copy_(second, non_blocking=True)

    def right(self) -> bool:
        self._stream.synchronize()
        return torch.equal(self._given, self._back)


def places(device: torch.device, count: int) -> Places:
    return [torch.cuda.stream(torch.cuda.Stream()) for _ in range(count)] if device.type == "cuda" else NO_STREAM


def fill_cache(places: Places, device: torch.device) -> None:
    """All the memory that a lane will want into torch's cache. To allocate more, CUDA may wait for all that is in
    flight, also of the other thread, whose peer may wait for this one's."""
    for place in places if device.type == "cuda" else []:
        with place:
            large = torch.empty(GIB, dtype=torch.uint8, device=device)
            small = [torch.empty(MIB // 2, dtype=torch.uint8, device=device) for _ in range(128)]
        del large, small


def message_that_waits(seat: Seat, group: Group, meet: Any) -> None:
    """And a future that does: for these a group may start threads, which it then keeps. `meet` is a barrier that does
    not use the group."""
    x, y = (torch.zeros(1, dtype=torch.uint8).to(seat.device) for _ in range(2))
    receiving: Any = dist.irecv(y, (seat.rank - 1) % seat.world_size, group)
    received = receiving.get_future()
    meet()
    sending: Any = dist.isend(x, (seat.rank + 1) % seat.world_size, group)
    sending.wait()
    received.wait()


def brief_group(seat: Seat, seed: int, round_number: int, timeout: timedelta) -> Outcome:
    """A group and a workspace that live for a few calls, of other options each time."""
    outcome = Outcome()
    number = 2
    where = f"seed {seed}, round {round_number}, the brief group, rank {seat.rank}"
    chance = random.Random(f"{seed} {number} {round_number}")
    options = Options(
        timeout=timeout,
        workspace_bytes=chance.choice([1, 2, 4, 16]) * MIB,
        strategy=chance.choice(["auto", "oneshot", "twoshot"]),
    )
    try:
        group = dist.new_group(backend="mnnvl", timeout=timeout, pg_options=options)
        workspace = soak_function.workspace(seat, options)
        first = first_case(seed, number, round_number)
        cases: list[AnyCase] = [Case.random(first + i, seat.world_size) for i in range(BRIEF_CASES)]
        cases += [FunctionCase.random(first + i) for i in range(BRIEF_CASES // 2)]
        Lane(number, seat, group, workspace).go_through(cases, chance, outcome, where)
        workspace.destroy()
        dist.destroy_process_group(group)
        outcome.operations["brief group"] += 1
    except Exception as error:
        outcome.errors.append(f"{where}: {type(error).__name__}: {error}")
    return outcome
