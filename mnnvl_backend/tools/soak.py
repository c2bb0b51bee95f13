"""`mnnvl soak` under torchrun: random programs of all that is served, for minutes or days; every byte is compared with
what the seed says must come, and nothing that a rank uses may grow.

Rounds are agreed on through the store: all ranks end the same one, whoever fails, and a rank that comes no more ends
the others at a deadline.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from mnnvl_backend.options import Options
from mnnvl_backend.tools import soak_function, soak_graphs
from mnnvl_backend.tools.launch import start
from mnnvl_backend.tools.soak_calls import Seat
from mnnvl_backend.tools.soak_growth import Change, Growth, give_back_what_is_large
from mnnvl_backend.tools.soak_lanes import (
    Lane,
    Outcome,
    SideCopies,
    brief_group,
    fill_cache,
    message_that_waits,
    places,
)
from mnnvl_backend.tools.soak_operations import fill_pools

WARM_UP_ROUNDS = 3  # the first has every kind of call


@dataclass(frozen=True)
class Plan:
    """What to do; the same on all ranks."""

    seconds: float  # after the warm-up
    seed: int
    first_round: int = 1  # after round 0, which has every kind of call
    timeout: timedelta = timedelta(seconds=60)  # of every call; a round that takes five of them ends the process


@dataclass
class Progress:
    """What rank 0 shows after each round; of all ranks."""

    round: int
    rounds: int
    outcome: Outcome  # of this rank
    mismatches: int
    changes: dict[str, Change]  # of this rank
    seconds_left: float


@dataclass
class Summary:
    """The end; the same on all ranks."""

    plan: Plan
    rounds: int
    last_round: int
    seconds: float
    interrupted: bool
    operations: dict[str, int]  # on each rank
    bytes: int  # compared, on all ranks together
    mismatches: int  # of all ranks; described: the first of each
    described: list[str]
    errors: list[str]
    growth: list[dict[str, Change]] = field(default_factory=list)  # by rank

    @property
    def grown(self) -> list[str]:
        return [
            f"rank {rank}: {name}: {change.after} after {change.before}, allowed {change.allowed} more"
            for rank, changes in enumerate(self.growth)
            for name, change in changes.items()
            if change.grown
        ]

    @property
    def watched(self) -> bool:
        """Whether it went on beyond the warm-up; else nothing is known of growth."""
        return self.rounds > WARM_UP_ROUNDS

    @property
    def passed(self) -> bool:
        return not (self.mismatches or self.errors or self.grown)


class Control:
    """How ranks agree, whatever the groups under test do: through the store. Not a gloo group, which keeps some KiB of
    every object that it gathers, for good."""

    _made = itertools.count()

    def __init__(self, seat: Seat, timeout: timedelta) -> None:
        self._store: Any = c10d.PrefixStore(f"soak/{next(self._made)}", c10d._get_default_store())
        self._seat, self._timeout, self._meeting = seat, timeout, 0

    def everyone(self, mine: Any) -> list[Any]:
        """What each rank says, by rank. Raises RuntimeError when one has said nothing for `timeout`."""
        self._meeting += 1
        keys = [f"{self._meeting}/{rank}" for rank in range(self._seat.world_size)]
        self._store.set(keys[self._seat.rank], pickle.dumps(mine))
        self._store.wait(keys, self._timeout)
        said = [pickle.loads(self._store.get(key)) for key in keys]
        if self._meeting > 1:  # all have come here, so they have read that one
            self._store.delete_key(f"{self._meeting - 1}/{self._seat.rank}")
        return said


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Beyond it the process ends with the stacks of all its threads: no rank may wait for one that hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Soak:
    """One rank's part. Making it is collective over the default group, which is mnnvl's; so is run()."""

    def __init__(self, seat: Seat, plan: Plan) -> None:
        self._seat, self._plan = seat, plan
        give_back_what_is_large()
        fill_pools()
        # Longer than any call, so that ranks whose calls end at their deadline still come to agree.
        self._control = Control(seat, 3 * plan.timeout)
        options = Options(timeout=plan.timeout)
        groups = [None, dist.new_group(backend="mnnvl", timeout=plan.timeout, pg_options=Options())]
        self._workspaces = [soak_function.workspace(seat, options) for _ in groups]
        self._lanes = [
            Lane(number, seat, group, workspace, places(seat.device, 2 - number))
            for number, (group, workspace) in enumerate(zip(groups, self._workspaces, strict=True))
        ]
        if seat.device.type == "cuda":
            for lane in self._lanes:
                lane.side = SideCopies(seat.device, plan.seed + lane.number)
        self._fill_caches()
        for group in groups:
            message_that_waits(seat, group, lambda: self._control.everyone(None))
        self._growth = Growth(seat.device)

    def run(self, show: Callable[[Progress], None], stop: threading.Event) -> Summary:
        """Rounds until the time is over, something failed on any rank, or `stop` is set on any.

        Raises:
            RuntimeError: a rank is gone.
        """
        total, begun = Outcome(), time.monotonic()
        end, rounds, number, mismatches = 0.0, 0, 0, 0
        numbers = [0, max(1, self._plan.first_round)]
        with ThreadPoolExecutor(len(self._lanes) + 1) as pool:
            while True:
                number = numbers[0] if rounds == 0 else numbers[1] + rounds - 1
                with deadline(5 * self._plan.timeout.total_seconds()):
                    total.add(self._round(number, pool))
                    # So that no rank is in a call while another one looks.
                    everyone = self._control.everyone((total.mismatches, total.errors))
                    mismatches = sum(count for count, _ in everyone)
                    rounds += 1
                    warming_up = rounds <= WARM_UP_ROUNDS
                    if rounds == WARM_UP_ROUNDS:
                        self._empty_caches()
                    self._growth.sample(warming_up)
                    if warming_up:
                        end = time.monotonic() + self._plan.seconds
                    changes, left = self._growth.changes(), end - time.monotonic()
                    over = self._seat.rank == 0 and not warming_up and left <= 0
                    wishes = self._control.everyone((over, stop.is_set()))
                    if rounds == WARM_UP_ROUNDS:
                        self._fill_caches()
                show(Progress(number, rounds, total, mismatches, changes, left))
                if any(map(any, wishes)) or any(errors for _, errors in everyone):
                    break
            # A run that was too short to warm up says nothing about growth.
            if rounds > WARM_UP_ROUNDS:
                self._empty_caches()
                self._growth.settle()
        interrupted = any(interrupt for _, interrupt in wishes)
        return self._summary(total, rounds, number, time.monotonic() - begun, interrupted)

    def _round(self, number: int, pool: ThreadPoolExecutor) -> Outcome:
        seed, total = self._plan.seed, Outcome()
        brief = (self._seat, seed, number, self._plan.timeout)
        on_gpu = self._seat.device.type == "cuda"
        if number == 0:  # one after the other: what CUDA loads when it is first used waits for all that is in flight
            outcomes = [lane.run(seed, number) for lane in self._lanes] + [brief_group(*brief)]
        else:
            running = [pool.submit(lane.run, seed, number) for lane in self._lanes]
            if not on_gpu:
                running.append(pool.submit(brief_group, *brief))
            outcomes = [future.result() for future in running]
            if on_gpu and not any(outcome.errors for outcome in outcomes):
                # To map memory, CUDA may wait for all that is in flight: not while the lanes' calls wait for peers.
                outcomes.append(brief_group(*brief))
        if on_gpu and not any(outcome.errors for outcome in outcomes):
            outcomes.append(soak_graphs.graph(self._lanes[0], seed, number))
        for outcome in outcomes:
            total.add(outcome)
        return total

    def _fill_caches(self) -> None:
        for lane in self._lanes:
            fill_cache(lane.places, self._seat.device)

    def _empty_caches(self) -> None:
        """Of all ranks, which may share a GPU: how large torch's grow depends on how the lanes' calls interleave."""
        if self._seat.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.meet()

    def _summary(self, total: Outcome, rounds: int, last: int, seconds: float, interrupted: bool) -> Summary:
        mine = (total.bytes, total.mismatches, total.described, total.errors, self._growth.changes())
        with deadline(5 * self._plan.timeout.total_seconds()):
            everyone = self._control.everyone(mine)
        return Summary(
            self._plan, rounds, last, seconds, interrupted, dict(sorted(total.operations.items())),
            bytes=sum(said[0] for said in everyone),
            mismatches=sum(said[1] for said in everyone),
            described=[text for said in everyone for text in said[2]],
            errors=[text for said in everyone for text in said[3]],
            growth=[said[4] for said in everyone],
        )  # fmt: skip

    def meet(self) -> None:
        """A barrier that uses no group under test."""
        self._control.everyone(None)

    def close(self) -> None:
        for workspace in self._workspaces:
            workspace.destroy()


@contextmanager
def stopped_by_interrupt() -> Iterator[threading.Event]:
    """SIGINT, however often it comes, sets the event: the round is gone through to its end. SIGTERM ends the process as
    ever: torchrun sends it to all when one has died, and then there is nobody to agree with."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def run(arguments: argparse.Namespace) -> int:
    """0 if every byte was right and nothing grew, else 1, on every rank."""
    from mnnvl_backend.tools.soak_report import Report

    plan = Plan(arguments.minutes * 60, arguments.seed, arguments.first_round)
    # torch says of half of its calls that they have newer names; it would tear the live line.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with start(arguments.device) as place:
        if place.world_size < 2:
            raise SystemExit(
                "mnnvl soak needs 2 ranks or more, e.g.: torchrun --nproc-per-node 4 -m mnnvl_backend soak"
            )
        report = Report(place)
        dist.init_process_group("mnnvl", timeout=plan.timeout, pg_options=Options())
        with deadline(5 * plan.timeout.total_seconds()):
            soak = Soak(place, plan)
        with stopped_by_interrupt() as stop:
            report.begin(plan)
            try:
                summary = soak.run(report.show, stop)
            except RuntimeError as error:
                report.lost(plan, error)
                return 1
            report.end(summary, arguments.json)
            with deadline(5 * plan.timeout.total_seconds()):
                soak.meet()  # torchrun ends all when one fails: not before rank 0 has told
                if summary.passed:
                    soak.close()
    return 0 if summary.passed else 1
