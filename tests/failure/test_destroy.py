"""destroy_process_group() and groups dropped: what they end, what they wait for, what they leave behind."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from failing import NOTICED_WITHIN, SHORT, call, footprint, new_default_group_works, works
from launcher import Rank, run_ranks


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
