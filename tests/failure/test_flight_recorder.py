"""The last operations of a group: from Python at any time, and in the error log once it has failed."""

from __future__ import annotations

import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from failing import SHORT
from launcher import Rank

import mnnvl_backend


def listed_body(rank: Rank) -> None:
    peer, device = 1 - rank.rank, rank.device
    x, y = torch.ones(100, device=device), torch.ones(200, dtype=torch.float16, device=device)
    assert mnnvl_backend.last_operations() == []
    started = time.time()
    dist.all_reduce(x)
    dist.broadcast(y, 0, async_op=True).wait()
    for work in [dist.isend(x, peer, tag=3), dist.irecv(torch.empty_like(x), peer, tag=3)]:
        work.wait()
    dist.all_reduce(x[:0])
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    operations = mnnvl_backend.last_operations()
    ended = "ended" if device.type == "cuda" else "completed"
    rows = [(o["sequence"], o["operation"], o["bytes"], o["dtype"], o["async"], o["state"]) for o in operations]
    assert rows == [
        (1, "all_reduce", 400, torch.float32, False, ended),
        (2, "broadcast", 400, torch.float16, True, ended),
        (2, "send", 400, torch.float32, True, ended),
        (2, "recv", 400, torch.float32, True, ended),
        (3, "barrier", 0, None, False, ended),
    ]
    assert all(o["device"] == device for o in operations)
    times = [o["time"] for o in operations]
    assert times == sorted(times)
    assert started <= times[0] <= times[-1] <= time.time()
    for _ in range(100):
        dist.all_reduce(x)
    operations = mnnvl_backend.last_operations(dist.group.WORLD)
    assert [o["sequence"] for o in operations] == list(range(40, 104))


def test_the_last_operations(ranks, device):
    ranks(listed_body, 2, device)


def failed_body(rank: Rank) -> None:
    """Rank 1 doesn't come to the second group's third call."""
    group = dist.new_group(backend="mnnvl", timeout=SHORT)
    x = torch.ones(25, device=rank.device)
    dist.all_reduce(x, group=group)
    dist.broadcast(x, 0, group=group)
    if rank.rank == 0:
        with pytest.raises(dist.DistBackendError):
            dist.all_reduce(x, group=group)
            if rank.device.type == "cuda":
                torch.cuda.synchronize()
                dist.all_reduce(x, group=group)
        states = [(o["operation"], o["state"]) for o in mnnvl_backend.last_operations(group)]
        if rank.device.type == "cpu":
            assert states == [("all_reduce", "completed"), ("broadcast", "completed"), ("all_reduce", "failed")]
    rank.store.set(f"failed/{rank.rank}", "")
    rank.store.wait(["failed/0", "failed/1"], timedelta(seconds=30))


def test_a_failure_writes_them_into_the_log(ranks, device, capfd):
    ranks(failed_body, 2, device)
    log = capfd.readouterr().out
    table = re.search(r"\[rank0\].*mnnvl: the last operations of rank 0 .*\n((?:\[rank0\] +\d+ .*\n)+)", log)
    assert table, log
    rows = table[1].splitlines()
    ended = "ended" if device == "cuda" else "completed"
    expected = [("all_reduce", ended), ("broadcast", ended), ("all_reduce", "")]
    if device == "cuda" and len(rows) > len(expected):  # the call that found the failure before the watchdog did
        expected.append(("all_reduce", ""))
    for row, (operation, state) in zip(rows, expected, strict=True):
        assert re.search(rf" {operation} +100 +Float +{device}\S* +{state}.* s ago", row), row
    assert log.count("the last operations of rank 0") == 1


def wrong_group_body(rank: Rank) -> None:
    gloo = dist.new_group(backend="gloo")
    with pytest.raises(ValueError, match="last_operations: group: expected a backend 'mnnvl', got"):
        mnnvl_backend.last_operations(gloo)
    with pytest.raises(ValueError, match="last_operations: group: expected a process group"):
        mnnvl_backend.last_operations(dist.GroupMember.NON_GROUP_MEMBER)


def test_groups_of_others(ranks):
    ranks(wrong_group_body, 2)
