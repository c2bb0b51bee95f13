"""User callbacks of CPU collectives: they may call, wait and chain without an end, beside calls of other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from failing import NOTICED_WITHIN, SHORT, new_default_group_works, works
from launcher import Rank, run_ranks

PATIENCE = 20.0  # seconds that a test waits for what should take milliseconds


@contextmanager
def held_back(rank: Rank, first: int, name: str) -> Iterator[None]:
    """Rank `first` goes through the block before any other enters it: its collectives in there are not complete at the
    end of the block, so a callback added there is not run by the adding thread."""
    if rank.rank != first:
        rank.store.wait([f"{name}/{first}"], rank.group_timeout)
    yield
    if rank.rank == first:
        rank.store.set(f"{name}/{first}", "1")


# Two threads of a rank call at once.


def two_threads_body(rank: Rank, rounds: int) -> int:
    """A callback starts an all_reduce while the main thread is inside a synchronous all_gather, which it knows from
    what has arrived of it. Returns in how many rounds both were in flight on two threads."""
    n, main, numel, overlapped = rank.world_size, threading.get_ident(), 1_000_000, 0
    works(rank)
    for turn in range(rounds):
        mine = torch.full((numel,), float(10 * turn + rank.rank + 1))
        gathered, reduced = torch.zeros(n * numel), torch.full((4,), float(turn + 1))
        theirs = gathered[(1 - rank.rank) * numel]
        left, done, problems = threading.Event(), threading.Event(), []

        def reduce_meanwhile(theirs=theirs, left=left, done=done, problems=problems, reduced=reduced) -> None:
            try:
                while theirs.item() == 0 and not left.is_set():
                    time.sleep(0)
                dist.all_reduce(reduced)
            except BaseException as error:
                problems.append(error)
            finally:
                done.set()

        inline = threading.Event()

        def callback(future: Any, inline=inline, reduce_meanwhile=reduce_meanwhile) -> None:
            if threading.get_ident() == main:
                inline.set()
            else:
                reduce_meanwhile()

        with held_back(rank, turn % n, f"turn{turn}"):
            first = dist.all_reduce(torch.ones(1000), async_op=True)
            first.get_future().then(callback)
        dist.all_gather_into_tensor(gathered, mine)
        left.set()
        if inline.is_set():
            reduce_meanwhile()
        assert done.wait(PATIENCE), f"round {turn}: the callback's all_reduce did not end"
        assert problems == [], f"round {turn}"
        overlapped += not inline.is_set()
        for r in range(n):
            part = gathered[r * numel : (r + 1) * numel]
            wrong = int((part != 10 * turn + r + 1).sum())
            assert wrong == 0, f"round {turn}: {wrong} elements of rank {r} are wrong"
        assert reduced.tolist() == [n * (turn + 1.0)] * 4, f"round {turn}"
    return overlapped


def test_a_callback_calls_while_the_main_thread_does(ranks):
    overlapped = ranks(two_threads_body, 2, args=(12,), group_timeout=10, timeout=1.5 * PATIENCE)
    assert min(overlapped) > 0, "no callback ran beside the main thread: nothing was tested"


# A callback starts the next collective, whose callback starts the next one.


def chain_body(rank: Rank, depth: int, add: str) -> int:
    works(rank)
    x, done, problems, steps = torch.ones(4), threading.Event(), [], 0

    def step(future: Any) -> None:
        nonlocal steps
        steps += 1
        try:
            if steps < depth:
                getattr(dist.all_reduce(x, async_op=True).get_future(), add)(step)
                return
        except BaseException as error:  # a RecursionError, in a thread that would only print it
            problems.append(error)
        done.set()

    getattr(dist.all_reduce(x, async_op=True).get_future(), add)(step)
    assert done.wait(3 * PATIENCE), f"stands still after {steps} steps"
    assert problems == [], f"after {steps} steps"
    works(rank)
    return steps


@pytest.mark.parametrize(("add", "depth"), [("then", 20_000), ("add_done_callback", 3_000)])
def test_a_chain_of_callbacks_does_not_recurse(ranks, add, depth):
    assert ranks(chain_body, 2, args=(depth, add), timeout=90) == [depth] * 2


# A callback waits for a collective that is queued behind the one it belongs to.


def waits_for_the_next(rank: Rank, group: dist.ProcessGroup, first: int, name: str, by_future: bool) -> None:
    a, b = torch.ones(1000), torch.ones(1000)
    with held_back(rank, first, name):
        work_a = dist.all_reduce(a, group=group, async_op=True)
        work_b = dist.all_reduce(b, group=group, async_op=True)
        future_b = work_b.get_future()

        def both(future: Any) -> torch.Tensor:
            future_b.wait() if by_future else work_b.wait()
            return future.value()[0] + b

        total = work_a.get_future().then(both)
    assert total.wait().eq(2 * rank.world_size).all()


def waits_for_its_own(rank: Rank, group: dist.ProcessGroup, first: int, name: str, by_future: bool) -> None:
    def again(future: Any) -> torch.Tensor:
        b = torch.ones(1000)
        work = dist.all_reduce(b, group=group, async_op=True)
        work.get_future().wait() if by_future else work.wait()
        dist.all_reduce(b, group=group)
        return future.value()[0] + b

    with held_back(rank, first, name):
        total = dist.all_reduce(torch.ones(1000), group=group, async_op=True).get_future().then(again)
    n = rank.world_size
    assert total.wait().eq(n + n * n).all()


def waits_for_all(rank: Rank, group: dist.ProcessGroup, first: int, name: str, by_future: bool) -> None:
    """Every callback of many waits for all of them, and the last result is a sum over all."""
    with held_back(rank, first, name):
        works_in_flight = [dist.all_reduce(torch.ones(100), group=group, async_op=True) for _ in range(6)]
        futures = [work.get_future() for work in works_in_flight]

        def value(future: Any) -> float:
            for work, other in zip(works_in_flight, futures, strict=True):
                other.wait() if by_future else work.wait()
            return float(future.value()[0].sum())

        sums = torch.futures.collect_all([future.then(value) for future in futures])
        total = sums.then(lambda f: sum(one.value() for one in f.value()))
    assert total.wait() == 600 * rank.world_size


def waits_for_another_group(rank: Rank, group: dist.ProcessGroup, first: int, name: str, by_future: bool) -> None:
    a, b = torch.ones(1000), torch.ones(1000)
    with held_back(rank, first, name):
        work_b = dist.all_reduce(b, async_op=True)  # of the default group
        future_b = work_b.get_future()

        def both(future: Any) -> torch.Tensor:
            future_b.wait() if by_future else work_b.wait()
            return future.value()[0] + b

        total = dist.all_reduce(a, group=group, async_op=True).get_future().then(both)
    assert total.wait().eq(2 * rank.world_size).all()


def waiting_body(rank: Rank, case: Callable[..., None], by_future: bool) -> None:
    group = dist.new_group(timeout=SHORT)
    works(rank)
    works(rank, group)
    for first in range(rank.world_size):
        case(rank, group, first, f"case{first}", by_future)
    works(rank, group)
    works(rank)


@pytest.mark.parametrize("by_future", [False, True], ids=["work", "future"])
@pytest.mark.parametrize(
    "case", [waits_for_the_next, waits_for_its_own, waits_for_all, waits_for_another_group], ids=lambda f: f.__name__
)
def test_a_callback_waits(ranks, case, by_future):
    """For what was started before it or inside it, in its own group or in another one, by Work or by Future."""
    ranks(waiting_body, 2, args=(case, by_future), timeout=PATIENCE)


# What ends a callback that waits for a collective nobody joins.


def stuck_callback_body(rank: Rank, end: str, inside: bool) -> None:
    """Rank 0's callback waits for a collective that rank 1 never enters, started `inside` it or before it."""
    rank.init(timeout=timedelta(seconds=60 if end == "abort" else 1))
    works(rank)
    if rank.rank == 0:
        backend = dist.group.WORLD._get_backend(rank.device)
        entered, ended, raised = threading.Event(), threading.Event(), []
        options = dist.AllreduceOptions()
        options.asyncOp = True
        x = torch.ones(10)
        first = dist.all_reduce(torch.ones(10), async_op=True)
        second = None if inside else dist.all_reduce(x, async_op=True)

        def callback(future: Any) -> None:
            entered.set()
            try:
                (backend.allreduce([x], options) if second is None else second).wait()
            except BaseException as error:
                raised.append(error)
            finally:
                ended.set()

        first.get_future().then(callback)
        rank.store.set("added", "1")
        assert entered.wait(PATIENCE)
        start = time.monotonic()
        if end == "abort":
            backend.abort()
        elif end == "destroy":
            dist.destroy_process_group()
        assert ended.wait(PATIENCE / 2), f"the callback still waits {PATIENCE / 2:g} s after {end}"
        assert time.monotonic() - start < NOTICED_WITHIN
        assert [type(error) for error in raised] == [dist.DistBackendError], raised
    else:
        rank.store.wait(["added"], rank.group_timeout)
        dist.all_reduce(torch.ones(10))
    rank.meet("ended")
    new_default_group_works(rank)


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
@pytest.mark.parametrize("end", ["abort", "destroy", "timeout"])
def test_what_ends_a_callback_that_waits(ranks, end, inside):
    ranks(stuck_callback_body, 2, backend=None, args=(end, inside), timeout=1.5 * PATIENCE)


# A profiler looks on.


def profiled_body(rank: Rank, profiles: int, rounds: int) -> float:
    """Whoever waits for the future lets the work go at once, and soon the profiler too, which the queue must be done
    with by then."""
    works(rank)
    total = 0.0
    for _ in range(profiles):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            for _ in range(rounds):
                x = torch.ones(8)
                total += float(dist.all_reduce(x, async_op=True).get_future().wait()[0][0])
    return total


def test_futures_under_the_profiler():
    """In processes of their own: it used to crash them."""
    assert run_ranks(profiled_body, 2, args=(25, 10)) == [500.0] * 2
