"""The works of messages, what they keep alive, and the groups they belong to."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only
from reference import all_reduce_works

LARGE = 4_000_001  # bytes that no ring holds


def pattern(numel: int, number: int) -> torch.Tensor:
    return ((torch.arange(numel) * 7 + number * 13) % 251).to(torch.uint8)


def completes(rank: Rank, work: dist.Work) -> None:
    """Whatever moves the message on, it isn't this."""
    deadline = time.monotonic() + 20
    while not work.is_completed():
        assert time.monotonic() < deadline, "never completed"
        time.sleep(0.001)


def works_body(rank: Rank, numel: int) -> None:
    """is_completed turns true without a wait(); wait() may be called again, by then or before."""
    peer = 1 - rank.rank
    all_reduce_works(rank)
    for number in range(3):
        y = torch.zeros(numel, dtype=torch.uint8, device=rank.device)
        receive = dist.irecv(y, peer)
        rank.meet(f"posted {number}")
        assert not receive.is_completed(), "nothing has been sent"
        rank.meet(f"looked {number}")
        send = dist.isend(pattern(numel, number).to(rank.device), peer)
        if number == 0:
            send.wait()
            receive.wait()
        for work in (send, receive):
            completes(rank, work)
            assert work.is_success()
            assert work.wait()
            assert work.wait()
        assert torch.equal(y.cpu(), pattern(numel, number))


@pytest.mark.parametrize("numel", [10, LARGE])
def test_works(ranks, device, numel):
    ranks(works_body, 2, device, args=(numel,))


def futures_body(rank: Rank) -> None:
    peer = 1 - rank.rank
    y = torch.zeros(100, dtype=torch.uint8, device=rank.device)
    receive, send = dist.irecv(y, peer), dist.isend(pattern(100, rank.rank).to(rank.device), peer)
    total = receive.get_future().then(lambda future: sum(t.int().sum() for t in future.value()))
    assert total.wait().item() == pattern(100, peer).int().sum().item()
    send.get_future().wait()


def test_futures(ranks, device):
    """What follows a receive sees what it received."""
    ranks(futures_body, 2, device)


def impatient_body(rank: Rank) -> None:
    """A wait() with a deadline of its own ends; the receive goes on."""
    all_reduce_works(rank)
    if rank.rank == 0:
        y = torch.zeros(100, dtype=torch.uint8, device=rank.device)
        work = dist.irecv(y, 1)
        with pytest.raises(dist.DistBackendError, match="did not end within"):
            work.wait(timedelta(seconds=0.3))
        rank.store.set("waited", "")
        work.wait()
        assert torch.equal(y.cpu(), pattern(100, 1))
    else:
        rank.store.wait(["waited"], rank.group_timeout)
        dist.send(pattern(100, 1).to(rank.device), 0)
    all_reduce_works(rank)


def test_a_wait_with_a_timeout_of_its_own(ranks, device):
    ranks(impatient_body, 2, device)


def unattended_body(rank: Rank, batch: bool) -> None:
    """The sender drops tensors and works and never looks again: all arrives, though the memory is asked for anew."""
    all_reduce_works(rank)
    if rank.rank == 0:
        for number in range(5):
            x = pattern(LARGE, number).to(rank.device)
            if batch:
                dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 1)])
            else:
                dist.isend(x, 1)
            del x
            torch.full((LARGE,), 0xA5, dtype=torch.uint8, device=rank.device)
        rank.meet("received")
    else:
        for number in range(5):
            y = torch.zeros(LARGE, dtype=torch.uint8, device=rank.device)
            dist.recv(y, 0)
            assert torch.equal(y.cpu(), pattern(LARGE, number)), f"message {number}"
        rank.meet("received")


@pytest.mark.parametrize("batch", [False, True])
def test_a_sender_that_does_not_look_back(ranks, device, batch):
    ranks(unattended_body, 2, device, args=(batch,))


def subgroup_body(rank: Rank) -> None:
    """Ranks of a group are named by their place in the world, or in the group; who isn't in it does nothing."""
    group = dist.new_group([1, 3])
    x = torch.full((7,), float(rank.rank), device=rank.device)
    if rank.rank in (0, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it isn't in the group
            assert dist.isend(x, 3, group) is None
            assert dist.irecv(x, 3, group) is None
            assert dist.recv(x, 3, group) == -1
    elif rank.rank == 1:
        dist.send(x, 3, group)
        dist.send(x + 10, group=group, group_dst=1)
        assert dist.recv(x, group=group, group_src=1) == 3
        assert x.tolist() == [13.0] * 7
    else:
        y = torch.empty_like(x)
        assert dist.recv(y, group=group, group_src=0) == 1
        assert y.tolist() == [1.0] * 7
        assert dist.recv(y, 1, group) == 1
        assert y.tolist() == [11.0] * 7
        dist.send(x + 10, 1, group)
    all_reduce_works(rank)


def test_subgroups(ranks, device):
    ranks(subgroup_body, 4, device)


def two_groups_body(rank: Rank) -> None:
    """Groups of the same ranks, received from in the other order: neither sees the other's messages."""
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    peer = 1 - rank.rank
    for numel in (8, LARGE):
        x = [pattern(numel, i).to(rank.device) for i in range(2)]
        y = [torch.zeros_like(part) for part in x]
        sends = [dist.isend(part, peer, group) for part, group in zip(x, (first, second), strict=True)]
        receives = [dist.irecv(y[i], peer, group) for i, group in ((1, second), (0, first))]
        for work in receives + sends:
            work.wait()
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_groups_of_the_same_ranks(ranks, device):
    ranks(two_groups_body, 2, device)


def objects_body(rank: Rank) -> None:
    sent = [{"tensor": torch.arange(1000)}, ["nested", {"text": "ä" * 5000}], None]
    if rank.rank == 0:
        dist.send_object_list(sent, dst=1, device=rank.device)
    elif rank.rank == 1:
        got = [None] * 3
        assert dist.recv_object_list(got, src=0, device=rank.device) == 0
        assert torch.equal(got[0]["tensor"], torch.arange(1000))
        assert got[1:] == sent[1:]


def test_lists_of_objects(ranks, device):
    ranks(objects_body, 2, device)


def first_body(rank: Rank) -> None:
    """The group's first call is a batch in which all take part."""
    n, me = rank.world_size, rank.rank
    x, y = torch.full((9,), float(me), device=rank.device), torch.empty(9, device=rank.device)
    operations = [dist.P2POp(dist.isend, x, (me + 1) % n), dist.P2POp(dist.irecv, y, (me - 1) % n)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert y.tolist() == [float((me - 1) % n)] * 9
    all_reduce_works(rank)


def test_a_batch_may_be_the_first_call(ranks, device):
    ranks(first_body, 3, device)


def streams_body(rank: Rank) -> None:
    """Messages take their place in the stream that is current: behind what was put there, before what comes."""
    peer = 1 - rank.rank
    side = torch.cuda.Stream()
    for number in range(20):
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            x = torch.full((LARGE // 4,), float(number + 100 * rank.rank), device=rank.device)
            y = torch.zeros_like(x)
            send, receive = dist.isend(x, peer), dist.irecv(y, peer)
            send.wait()
            x.zero_()  # behind the send
            receive.wait()
            doubled = y * 2
        torch.cuda.current_stream().wait_stream(side)
        assert bool((doubled == 2 * (number + 100 * peer)).all()), f"round {number}"


@cuda_only
def test_streams_of_cuda(ranks):
    ranks(streams_body, 2, "cuda")
