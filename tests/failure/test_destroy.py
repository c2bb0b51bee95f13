"""destroy_process_group() and groups dropped: what they end, what they wait for, what they leave behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from failing import NOTICED_WITHIN, SHORT, call, footprint, new_default_group_works, works
from launcher import Rank, run_ranks

from mnnvl_backend.registration import load_compiled


def destroy_body(rank: Rank) -> None:
    dist.destroy_process_group()  # nothing done
    rank.init(prefix="used")
    works(rank)
    backend = dist.group.WORLD._get_backend(rank.device)
    subgroup = dist.new_group([0, 1], backend="mnnvl", pg_options=rank.options())
    works(rank, subgroup)
    rank.meet("done")
    backend.shutdown()
    backend.shutdown()
    with pytest.raises(dist.DistBackendError, match="has been shut down"):
        call(rank)
    dist.destroy_process_group()
    with pytest.raises((AssertionError, ValueError)):
        dist.destroy_process_group()  # torch's own refusal
    with pytest.raises(dist.DistBackendError, match="has been shut down"):
        backend.allreduce([torch.ones(1, device=rank.device)])
    del backend, subgroup
    gc.collect()
    new_default_group_works(rank)


def test_destroy_idle_used_and_twice(ranks, device):
    ranks(destroy_body, 2, device)


def destroy_under_threads_body(rank: Rank) -> None:
    """One thread waits in a call for a rank that never comes, others have queued behind it; destroy ends them all."""
    rank.init(timeout=SHORT)
    works(rank)
    rank.meet("ready")
    if rank.rank == 0:
        backend = dist.group.WORLD._get_backend(rank.device)
        failures: list[Exception] = []

        def waits(opts: dist.AllreduceOptions) -> None:
            try:
                backend.allreduce([torch.ones(100, device=rank.device)], opts).wait()
                if rank.device.type == "cuda":
                    torch.cuda.synchronize()
                    backend.allreduce([torch.ones(100, device=rank.device)], opts).wait()
            except dist.DistBackendError as error:
                failures.append(error)

        threads = []
        for async_op in (False, True, True):
            opts = dist.AllreduceOptions()
            opts.asyncOp = async_op
            threads.append(threading.Thread(target=waits, args=(opts,)))
            threads[-1].start()
            time.sleep(0.1)  # so that each is inside its call
        start = time.monotonic()
        dist.destroy_process_group()
        for thread in threads:
            thread.join(NOTICED_WITHIN)
        assert not any(thread.is_alive() for thread in threads)
        assert time.monotonic() - start < NOTICED_WITHIN
        assert len(failures) == 3
    rank.meet("destroyed")
    new_default_group_works(rank)


def test_destroy_while_other_threads_wait(device):
    run_ranks(destroy_under_threads_body, 2, device, backend=None, timeout=20)


def destroy_beside_calls_body(rank: Rank) -> int:
    """Threads that call as fast as they can while another one destroys: each call works or raises. Returns how many
    raised."""
    refused = 0
    for turn in range(3):
        rank.init(prefix=f"turn{turn}", timeout=SHORT, workspace_bytes=1 << 20)
        works(rank)
        backend = dist.group.WORLD._get_backend(rank.device)
        ready, problems, texts = threading.Barrier(3, timeout=10), [], []

        def calls(async_op: bool, backend=backend, ready=ready, problems=problems, texts=texts) -> None:
            options = dist.AllreduceOptions()
            options.asyncOp = async_op
            ready.wait()
            try:
                while True:
                    work = backend.allreduce([torch.ones(20_000, device=rank.device)], options)
                    work.wait()
                    if rank.device.type == "cuda" and not async_op:
                        torch.cuda.current_stream().synchronize()
            except dist.DistBackendError as error:
                texts.append(str(error))
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=calls, args=(async_op,)) for async_op in (False, True)]
        for thread in threads:
            thread.start()
        ready.wait()
        # With both threads of both ranks in the group's calls: unordered between ranks, but all alike.
        rank.meet(f"calling{turn}")
        dist.destroy_process_group()
        for thread in threads:
            thread.join(2 * NOTICED_WITHIN)
        assert not any(thread.is_alive() for thread in threads), "a thread still waits"
        assert problems == []
        assert all("shut down" in text or "rank" in text for text in texts), texts
        refused += len(texts)
        rank.meet(f"destroyed{turn}")
    rank.init(prefix="after")
    works(rank)
    return refused


def test_destroy_beside_calling_threads(ranks, device):
    assert ranks(destroy_beside_calls_body, 2, device, backend=None, timeout=60) == [6, 6]


def destroy_with_work_in_flight_body(rank: Rank) -> list[float]:
    """destroy waits for what was enqueued."""
    works(rank)
    xs = [torch.full((300_000,), float(rank.rank + 1), device=rank.device) for _ in range(10)]
    works_in_flight = [dist.all_reduce(x, async_op=True) for x in xs]
    dist.destroy_process_group()
    del works_in_flight
    return [x[-1].item() for x in xs]


def test_destroy_with_work_in_flight(ranks, device):
    assert ranks(destroy_with_work_in_flight_body, 2, device) == [[3.0] * 10] * 2


def leaks_body(rank: Rank, cycles: int) -> tuple[dict[str, int], dict[str, int]]:
    def cycle(i: int) -> None:
        rank.init(prefix=f"cycle{i}", workspace_bytes=1 << 20)
        works(rank)
        work = dist.all_reduce(torch.ones(5, device=rank.device), async_op=True)
        work.wait()
        if i == 1 and rank.device.type == "cpu":
            assert footprint()["mappings"] == rank.world_size
        dist.destroy_process_group()

    for i in range(2):
        cycle(i)
    before = footprint()
    for i in range(2, cycles):
        cycle(i)
    return before, footprint()


def test_30_groups_leave_nothing(ranks, device):
    """No descriptor, thread or mapping per group that came and went."""
    for before, after in ranks(leaks_body, 2, device, args=(30,), backend=None, timeout=120):
        assert after == before
        assert after["mappings"] == 0


def failed_set_up_leaks_body(rank: Rank) -> tuple[dict[str, int], dict[str, int]]:
    def cycle(i: int) -> None:
        os.environ["MNNVL_HOST_ID"] = str(rank.rank)
        rank.init(prefix=f"cycle{i}")
        with pytest.raises(RuntimeError, match="hosts?"):
            works(rank)
        dist.destroy_process_group()

    cycle(0)
    before = footprint()
    for i in range(1, 20):
        cycle(i)
    return before, footprint()


def test_20_failed_set_ups_leave_nothing(ranks, device):
    for before, after in ranks(failed_set_up_leaks_body, 2, device, backend=None):
        assert after == before


# The backend object dropped by Python, without a word.


def backend_object(rank: Rank, prefix: str, timeout_ms: int = 8000) -> Any:
    """Held by nobody but the caller."""
    store = dist.PrefixStore(prefix, rank.store)
    make = load_compiled().ProcessGroupMNNVL
    return make(store, rank.rank, rank.world_size, timeout_ms=timeout_ms, multicast=False, bootstrap=1)


def drop_body(rank: Rank, callbacks: bool, keep_works: bool) -> None:
    """The last reference goes with the GIL held, while the queue works and callbacks want the GIL."""
    for turn in range(3):
        backend = backend_object(rank, f"turn{turn}")
        backend.allreduce([torch.ones(4, device=rank.device)]).wait()
        options = dist.AllreduceOptions()
        options.asyncOp = True
        in_flight = [backend.allreduce([torch.ones(1 << 20, device=rank.device)], options) for _ in range(4)]
        called: list[int] = []
        if callbacks:
            for i, work in enumerate(in_flight):
                work.get_future().then(lambda future, i=i, called=called: called.append(i))
            del work
        if not keep_works:
            in_flight.clear()
        start = time.monotonic()
        del backend
        gc.collect()
        assert time.monotonic() - start < 3
        if keep_works:
            for work in in_flight:
                work.wait()
            del work
        rank.meet(f"dropped{turn}")


@pytest.mark.parametrize("keep_works", [False, True], ids=["alone", "works-kept"])
@pytest.mark.parametrize("callbacks", [False, True], ids=["quiet", "callbacks"])
def test_the_backend_object_dropped_with_work_in_flight(device, callbacks, keep_works):
    run_ranks(drop_body, 2, device, backend=None, args=(callbacks, keep_works), timeout=25)


def drop_footprint_body(rank: Rank, in_flight: int) -> tuple[dict[str, int], dict[str, int]]:
    def cycle(turn: int) -> None:
        backend = backend_object(rank, f"turn{turn}")
        backend.allreduce([torch.ones(4, device=rank.device)]).wait()
        options = dist.AllreduceOptions()
        options.asyncOp = True
        for _ in range(in_flight):
            backend.allreduce([torch.ones(1 << 16, device=rank.device)], options)

    cycle(0)
    gc.collect()
    rank.meet("first")
    settled = time.monotonic() + NOTICED_WITHIN
    while footprint()["mappings"] > 0 and time.monotonic() < settled:  # threads left behind end by themselves
        time.sleep(0.01)
    before = footprint()
    cycle(1)
    while footprint() != before and time.monotonic() < settled + NOTICED_WITHIN:
        time.sleep(0.01)
    return before, footprint()


@pytest.mark.parametrize("in_flight", [0, 4])
def test_a_dropped_backend_object_leaves_nothing(in_flight):
    """Its memory, descriptors and threads go with the last reference, or behind the last work in flight: nobody has to
    make another group for that."""
    for before, after in run_ranks(drop_footprint_body, 2, backend=None, args=(in_flight,), timeout=30):
        assert before["mappings"] == 0
        assert after == before


def drop_with_waiting_callback_body(rank: Rank) -> None:
    """The object goes while a callback is to come that waits for a work queued behind its own."""
    backend = backend_object(rank, "drop", timeout_ms=20_000)
    backend.allreduce([torch.ones(4)]).wait()
    options = dist.AllreduceOptions()
    options.asyncOp = True
    if rank.rank == 1:
        rank.store.wait(["dropped"], rank.group_timeout)
    x, y = torch.ones(4), torch.ones(4)
    first, second = backend.allreduce([x], options), backend.allreduce([y], options)
    both = first.get_future().then(lambda future: (second.wait(), future.value()[0] + y)[1])
    del backend
    gc.collect()
    if rank.rank == 0:
        rank.store.set("dropped", "1")
    assert both.wait().tolist() == [4.0] * 4


def test_a_callback_that_waits_outlives_the_backend_object():
    run_ranks(drop_with_waiting_callback_body, 2, backend=None, timeout=20)


def drop_unanswered_body(rank: Rank) -> None:
    """Nobody answers what is in flight: the drop waits for it until the timeout at most."""
    backend = backend_object(rank, "drop", timeout_ms=1500)
    backend.allreduce([torch.ones(4, device=rank.device)]).wait()
    rank.meet("ready")
    if rank.rank == 0:
        options = dist.AllreduceOptions()
        options.asyncOp = True
        work = backend.allreduce([torch.ones(4, device=rank.device)], options)
        start = time.monotonic()
        del backend
        gc.collect()
        assert time.monotonic() - start < 4
        if rank.device.type == "cpu":
            with pytest.raises(dist.DistBackendError):
                work.wait()
        assert time.monotonic() - start < 5
    rank.meet("dropped")
    rank.init(prefix="after")
    works(rank)


def test_the_backend_object_dropped_without_an_answer(device):
    run_ranks(drop_unanswered_body, 2, device, backend=None, timeout=25)
