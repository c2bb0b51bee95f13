"""What a profiler sees: each call once, by the name that torch gives the operation, asynchronous, with its inputs; and
beside it the record of what it moves in which group that tools know from NCCL's groups."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import want_gpus
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


ROOTED = ("reduce", "gather", "scatter")
NAMES_IN_RECORDS = {
    "all_reduce": "allreduce",
    "all_reduce_coalesced": "allreduce_coalesced",
    "_all_gather_base": "_allgather_base",
    "all_to_all_single": "all_to_allv",
}


def records(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """Of the trace that a tool would read."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    return [event["args"] for event in events if event.get("name") == "record_param_comms"]


def records_body(rank: Rank) -> None:
    all_reduce_works(rank)
    n = rank.world_size
    for what, (call, title, shapes) in calls(rank).items():
        (record,) = records(call)
        assert record["Collective name"] == NAMES_IN_RECORDS.get(title, title), what
        assert record["In msg nelems"] == sum(torch.Size(shape).numel() for shape in shapes), what
        assert record["Out msg nelems"] >= 0, what
        assert record["dtype"] == ("Byte" if what == "barrier" else "Int" if "gathered" in what else "Float"), what
        assert (record["Process Group Name"], record["Process Group Description"]) == ("0", "default_pg"), what
        assert (record["Group size"], record["Global rank start"], record["Global rank stride"]) == (n, 0, 1), what
        assert record["Rank"] == (1 % n if what == "broadcast" else 0 if title in ROOTED else rank.rank), what


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_call_leaves_a_record(ranks, device, world_size):
    ranks(records_body, world_size, device)


def group_records_body(rank: Rank) -> None:
    """Of a group of some ranks: the message's other end, how a tensor is cut, and which ranks they are."""
    group = dist.new_group([0, 2], group_desc="even")
    if rank.rank == 1:
        return
    peer, me = 2 - rank.rank, rank.rank // 2
    sizes = ([1, 2], [1, 3]) if me == 0 else ([3, 1], [2, 1])  # of the output, of the input
    out = torch.empty(sum(sizes[0]), device=rank.device)
    x = torch.ones(sum(sizes[1]), device=rank.device)

    def batch() -> None:
        both = [dist.P2POp(dist.isend, x, peer, group), dist.P2POp(dist.irecv, torch.empty_like(out), peer, group)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    (cut,) = records(lambda: dist.all_to_all_single(out, x, *sizes, group=group))
    assert (cut["In split size"], cut["Out split size"]) == (str(sizes[1]), str(sizes[0]))
    assert (cut["In msg nelems"], cut["Out msg nelems"]) == (x.numel(), out.numel())
    sent, received = records(batch)
    for record, name, end in ((sent, "send", "Dst Rank"), (received, "recv", "Src Rank")):
        assert record["Collective name"] == name
        assert record[end] in (1 - me, peer)  # its rank in the group, or, in newer torch, in the program
    for record in (cut, sent, received):
        assert record["Process Group Description"] == "even"
        assert (record["Group size"], record["Process Group Ranks"]) == (2, "[0, 2]")


def test_records_of_a_group_of_some_ranks(ranks, device):
    want_gpus(device, 3)
    ranks(group_records_body, 3, device)


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
