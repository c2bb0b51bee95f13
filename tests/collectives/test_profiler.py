"""What a profiler sees: each call once, by the name that torch gives the operation, asynchronous, with its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import all_reduce_works


def calls(rank: Rank) -> dict[str, tuple[Callable[..., Any], str, list[list[int]]]]:
    """What is called, the event's name behind "mnnvl:", the shapes it shows."""
    n, device = rank.world_size, rank.device
    x, y = torch.ones(3, 4, device=device), torch.ones(5, device=device)
    parts, whole = [torch.empty_like(x) for _ in range(n)], torch.empty(3 * n, 4, device=device)
    others, other, root = [torch.empty_like(x) for _ in range(n)], torch.empty_like(whole), rank.rank == 0
    empty, flags = torch.ones(0, 2, device=device), torch.ones(3, 4, device=device, dtype=torch.int32)
    ids = [device.index] if device.type == "cuda" else None
    return {
        "all_reduce": (lambda **kw: dist.all_reduce(x, **kw), "all_reduce", [[3, 4]]),
        "all_reduce, gathered": (lambda **kw: dist.all_reduce(flags, **kw), "all_reduce", [[3, 4]]),
        "all_reduce of nothing": (lambda **kw: dist.all_reduce(empty, **kw), "all_reduce", [[0, 2]]),
        "all_reduce_coalesced": (
            lambda **kw: dist.all_reduce_coalesced([x, y], **kw), "all_reduce_coalesced", [[3, 4], [5]],
        ),
        "broadcast": (lambda **kw: dist.broadcast(x, 1 % n, **kw), "broadcast", [[3, 4]]),
        "all_gather": (lambda **kw: dist.all_gather(parts, x, **kw), "all_gather", [[3, 4]]),
        "all_gather_into_tensor": (
            lambda **kw: dist.all_gather_into_tensor(whole, x, **kw), "_all_gather_base", [[3, 4]],
        ),
        "reduce": (lambda **kw: dist.reduce(x, 0, **kw), "reduce", [[3, 4]]),
        "reduce_scatter": (
            lambda **kw: dist.reduce_scatter(x, parts, **kw), "reduce_scatter", [[3, 4]] * n,
        ),
        "reduce_scatter_tensor": (
            lambda **kw: dist.reduce_scatter_tensor(x, whole, **kw), "_reduce_scatter_base", [[3 * n, 4]],
        ),
        "gather": (lambda **kw: dist.gather(x, parts if root else None, **kw), "gather", [[3, 4]]),
        "scatter": (
            lambda **kw: dist.scatter(x, parts if root else None, **kw), "scatter", [[3, 4]] * n if root else [],
        ),
        "all_to_all": (lambda **kw: dist.all_to_all(others, parts, **kw), "all_to_all", [[3, 4]] * n),
        "all_to_all_single": (
            lambda **kw: dist.all_to_all_single(other, whole, **kw), "all_to_all_single", [[3 * n, 4]],
        ),
        "barrier": (lambda **kw: dist.barrier(device_ids=ids, **kw), "barrier", []),
    }  # fmt: skip


def titles_body(rank: Rank) -> None:
    all_reduce_works(rank)
    for what, (call, title, shapes) in calls(rank).items():
        for async_op in (False, True):
            with torch.autograd.profiler.profile(record_shapes=True) as profile:
                work = call(async_op=async_op)
                if async_op:
                    work.wait()
                del work
            events = [event for event in profile.function_events if event.name.startswith("mnnvl")]
            assert [event.name for event in events] == [f"mnnvl:{title}"], f"{what}, async={async_op}"
            assert events[0].is_async, what
            assert events[0].count == 1, what
            assert events[0].cpu_time >= 0, what
            assert events[0].input_shapes == shapes, what


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_call_is_one_event(ranks, device, world_size):
    """As torch's own test-suite wants of a backend: "name:operation"."""
    ranks(titles_body, world_size, device)


def messages_body(rank: Rank) -> list[list[str]]:
    """Rank 0 sends, rank 1 receives: alone, and in a batch."""
    all_reduce_works(rank)
    x, peer = torch.ones(3, 4, device=rank.device), 1 - rank.rank
    operation = dist.irecv if rank.rank else dist.isend
    seen = []
    for batch in (False, True):
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            works = dist.batch_isend_irecv([dist.P2POp(operation, x, peer)]) if batch else [operation(x, peer)]
            while works:
                works.pop().wait()
        events = [event for event in profile.function_events if event.name.startswith("mnnvl")]
        assert all(event.is_async and event.count == 1 for event in events)
        if not batch:
            assert [event.input_shapes for event in events] == [[[3, 4]]]
        seen.append([event.name for event in events])
    return seen


def test_messages_are_events(ranks, device):
    for rank, (single, batched) in enumerate(ranks(messages_body, 2, device)):
        name = f"mnnvl:{'recv' if rank else 'send'}"
        assert single == [name]
        assert name in batched


def ddp_body(rank: Rank) -> list[str]:
    """A profiler that starts in mid-training and waits for nothing: DDP's futures end on other threads."""
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(10, 10, bias=False).to(rank.device),
        device_ids=[rank.device.index] if rank.device.type == "cuda" else None,
    )
    x = torch.rand(3, 10, device=rank.device)
    model(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            model(x).sum().backward()
    return [event.name for event in profile.events() if event.name.startswith("mnnvl:all_reduce")]


def test_ddp_under_the_profiler(ranks, device):
    """One bucket, five steps."""
    for names in ranks(ddp_body, 2, device):
        assert names == ["mnnvl:all_reduce"] * 5
