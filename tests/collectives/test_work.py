"""Work, futures and streams: what every collective hands back, whatever it does."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only
from reference import all_reduce_works

SLEEP_CYCLES = 100_000_000  # of torch.cuda._sleep: some 50 ms, far longer than anything the host does meanwhile


def work_body(rank: Rank) -> None:
    n = rank.world_size
    all_reduce_works(rank)
    x = torch.full((7,), float(rank.rank + 1), device=rank.device)
    if rank.rank == 0:
        work = dist.all_reduce(x, async_op=True)
        assert not work.is_completed(), "completed before the others began"
        rank.store.set("seen", "1")
    else:
        rank.store.wait(["seen"], rank.group_timeout)
        work = dist.all_reduce(x, async_op=True)
    doubled = work.get_future().then(lambda f: f.value()[0] * 2)
    assert work.wait()
    total = n * (n + 1) / 2
    assert x.tolist() == [total] * 7
    assert doubled.wait().tolist() == [2 * total] * 7
    assert [t.data_ptr() for t in work.result()] == [x.data_ptr()]
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    assert work.is_completed()
    # Sync calls queue behind async ones, and any order of waiting will do.
    xs = [torch.full((1000,), float(i), device=rank.device) for i in range(20)]
    works = [dist.all_reduce(xs[i], async_op=True) for i in range(19)]
    dist.all_reduce(xs[19])
    for work in reversed(works):
        work.wait()
    assert [x[0].item() for x in xs] == [float(i * n) for i in range(20)]


def test_async_work_and_its_future(ranks, device):
    ranks(work_body, 3, device)


def forked_body(rank: Rank) -> None:
    all_reduce_works(rank)
    x = torch.ones(1000, device=rank.device)
    work = dist.all_reduce(x, async_op=True)
    pid = os.fork() if rank.rank == 1 else 0
    if rank.rank == 1 and pid == 0:
        try:
            with pytest.raises(RuntimeError, match=f"work belongs to process {os.getppid()}, .* a child by fork"):
                work.wait()
            del work
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if rank.rank == 1:
        assert os.waitpid(pid, 0)[1] == 0
    work.wait()
    assert (x == rank.world_size).all()
    all_reduce_works(rank)


def test_a_work_in_a_forked_child(ranks, device):
    """wait() raises there, and nothing that the child does to it reaches the parent."""
    ranks(forked_body, 2, device)


def wait_with_timeout_body(rank: Rank) -> None:
    all_reduce_works(rank)
    x = torch.ones(3, device=rank.device)
    if rank.rank == 0:
        work = dist.all_reduce(x, async_op=True)
        with pytest.raises(dist.DistBackendError, match="did not end within 100 ms"):
            work.wait(timedelta(milliseconds=100))
        rank.store.set("waited", "1")
        work.wait()
    else:
        rank.store.wait(["waited"], rank.group_timeout)
        dist.all_reduce(x)
    assert x.tolist() == [rank.world_size] * 3


def test_wait_with_a_timeout_of_its_own(ranks, device):
    """It raises, and the collective goes on."""
    ranks(wait_with_timeout_body, 2, device)


def streams_body(rank: Rank) -> None:
    n = rank.world_size
    all_reduce_works(rank)
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    total = n * (n + 1) / 2
    for async_op in (False, True):
        x = torch.zeros(100_000, device=rank.device)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)
            x.fill_(rank.rank + 1)
            work = dist.all_reduce(x, async_op=async_op)
            assert not side.query(), "the call waited for its stream on the host"
            if async_op:
                work.wait()
            y = x + 1
        side.synchronize()
        assert torch.equal(y, torch.full_like(y, total + 1))
    # One group, several streams, nothing between the calls: they must not be in the workspace at once.
    xs = [torch.full((50_001,), float(rank.rank + 1), device=rank.device) for _ in range(30)]
    torch.cuda.synchronize()
    for i, x in enumerate(xs):
        with torch.cuda.stream((torch.cuda.default_stream(), side, other)[i % 3]):
            if i % 7 == 0:
                torch.cuda._sleep(SLEEP_CYCLES // 20)
            dist.all_reduce(x, async_op=i % 2 == 0)
    torch.cuda.synchronize()
    for i, x in enumerate(xs):
        assert torch.equal(x, torch.full_like(x, total)), f"call {i}"


@cuda_only
def test_current_stream_and_several_streams(ranks):
    ranks(streams_body, 2, "cuda")


def freed_while_in_flight_body(rank: Rank) -> None:
    """Memory of an async call's tensors must not be handed out before the call has ended."""
    all_reduce_works(rank)
    gathered = []
    for i in range(20):
        torch.cuda._sleep(SLEEP_CYCLES // 20)
        x = torch.full((1 << 18,), float(i), device=rank.device)
        out = torch.empty(rank.world_size << 18, device=rank.device)
        work = dist.all_gather_into_tensor(out, x, async_op=True)
        del x
        torch.full((1 << 18,), -1.0, device=rank.device)  # would take x's place
        work.wait()
        gathered.append(out[:: 1 << 16].clone())
        del out, work
    for i, g in enumerate(gathered):
        assert g.tolist() == [float(i)] * g.numel()


@cuda_only
def test_tensors_freed_while_in_flight(ranks):
    ranks(freed_while_in_flight_body, 2, "cuda")


def nested_body(rank: Rank) -> float:
    """What torch's PowerSGD hook does: a callback of one collective's future waits for another collective."""

    def then(future: torch.futures.Future) -> torch.Tensor:
        x = future.value()[0]
        return dist.all_reduce(x, async_op=True).get_future().wait()[0]

    x = torch.ones(1000, device=rank.device)
    result = dist.all_reduce(x, async_op=True).get_future().then(then).wait()
    return float(result.sum())


def test_collectives_inside_callbacks(ranks, device):
    assert ranks(nested_body, 2, device) == [4000.0] * 2
