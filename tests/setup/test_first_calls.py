"""Asynchronous first calls on CPU tensors: the set-up goes on behind them, and no caller waits for it but in wait()."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from failing import NOTICED_WITHIN, SHORT, new_default_group_works, works
from launcher import Rank, run_ranks
from torch.distributed.device_mesh import init_device_mesh


def crossed_messages_body(rank: Rank, batched: bool) -> None:
    """Neighbours in a square begin with another one of their two groups each, and in each with a message."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    works_in_flight, received = [], []
    for name in ("row", "column") if rank.rank in (0, 3) else ("column", "row"):
        group = mesh.get_group(name)
        peer = next(r for r in dist.get_process_group_ranks(group) if r != rank.rank)
        outgoing, incoming = torch.full((3,), float(rank.rank)), torch.empty(3)
        if batched:
            both = [dist.P2POp(dist.isend, outgoing, peer, group), dist.P2POp(dist.irecv, incoming, peer, group)]
            works_in_flight += dist.batch_isend_irecv(both)
        else:
            works_in_flight += [dist.isend(outgoing, peer, group), dist.irecv(incoming, peer, group)]
        received.append((incoming, peer))
    for work in works_in_flight:
        work.wait()
    for incoming, peer in received:
        assert incoming.tolist() == [peer] * 3


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
def test_messages_of_crossed_groups(ranks, batched):
    ranks(crossed_messages_body, 4, args=(batched,), timeout=20)


def order_body(rank: Rank) -> None:
    """Messages that were sent while the set-up went on, and those after it, arrive in their order; they don't wait for
    collectives that were called before them, nor these for them."""
    count = 40
    if rank.rank == 0:
        x = torch.ones(4)
        reduced = dist.all_reduce(x, async_op=True)
        sent = [dist.isend(torch.full((5,), float(i)), 1) for i in range(count)]
        for i in range(count, 2 * count):
            time.sleep(0.001)  # so that the set-up ends somewhere in between
            sent.append(dist.isend(torch.full((5,), float(i)), 1))
    else:
        time.sleep(0.02)
        y, x = torch.empty(5), torch.ones(4)
        for i in range(2 * count):
            assert dist.recv(y) == 0  # from any source
            assert y.tolist() == [i] * 5
        reduced, sent = dist.all_reduce(x, async_op=True), []
    for work in [reduced, *sent]:
        work.wait()
    assert x.tolist() == [2] * 4


def test_messages_keep_their_order_and_stand_behind_no_collective(ranks):
    ranks(order_body, 2, timeout=20)


def store_body(rank: Rank) -> None:
    """A rank waits in its only connection to the store for what a peer does after the call."""
    if rank.rank == 0:
        x = torch.ones(4)
        work = dist.all_reduce(x, async_op=True)
        rank.store.wait(["called"], timedelta(seconds=10))
        work.wait()
    else:
        x = torch.ones(4)
        dist.all_reduce(x)
        rank.store.set("called", "1")
    assert x.tolist() == [2] * 4


def test_a_wait_in_the_store_does_not_hold_the_set_up(ranks):
    ranks(store_body, 2, timeout=20)


def begin(rank: Rank) -> list[Any]:
    """Calls of every kind, none of which a peer answers."""
    peer, x = 1 - rank.rank, torch.ones(4)
    start = time.monotonic()
    begun = [
        dist.all_reduce(x.clone(), async_op=True),
        dist.isend(x.clone(), peer),
        dist.irecv(x.clone(), peer),
        *dist.batch_isend_irecv([dist.P2POp(dist.irecv, x.clone(), peer)]),
        dist.all_gather([x.clone(), x.clone()], x.clone(), async_op=True),
    ]
    assert time.monotonic() - start < 1
    return begun


def all_fail(begun: list[Any], error: type[Exception], match: str) -> None:
    for work in begun:
        with pytest.raises(error, match=match):
            work.wait()
        assert work.is_completed()


def abort_body(rank: Rank) -> None:
    if rank.rank == 0:
        begun, backend = begin(rank), dist.group.WORLD._get_backend(rank.device)
        time.sleep(0.1)
        assert not any(work.is_completed() for work in begun)
        start = time.monotonic()
        backend.abort()
        all_fail(begun, dist.DistBackendError, "abort")
        assert time.monotonic() - start < NOTICED_WITHIN / 2
        with pytest.raises(dist.DistBackendError, match="abort"):
            dist.all_reduce(torch.ones(4), async_op=True)
    rank.meet("aborted")
    new_default_group_works(rank)


def test_abort_during_a_set_up_behind_the_call():
    run_ranks(abort_body, 2, timeout=20)


def end_by_deadline(end: Callable[[], None]) -> None:
    start = time.monotonic()
    end()
    assert time.monotonic() - start < NOTICED_WITHIN


def destroy_body(rank: Rank) -> None:
    """It waits for what was begun, which all ends with the set-up: by one deadline."""
    rank.init(timeout=SHORT)
    if rank.rank == 0:
        begun = begin(rank)
        end_by_deadline(dist.destroy_process_group)
        all_fail(begun, dist.DistBackendError, "waited 2 s for rank 1")
    rank.meet("destroyed")
    new_default_group_works(rank)


def test_destroy_during_a_set_up_behind_the_call():
    run_ranks(destroy_body, 2, backend=None, timeout=20)


def late_body(rank: Rank) -> None:
    """What was called during an attempt fails with it, also what would have had time for another one: a peer that comes
    then would take it for its own first call. What is called afterwards begins anew."""
    rank.init(timeout=SHORT)
    if rank.rank == 0:
        begun = begin(rank)
        all_fail(begun, dist.DistBackendError, "waited 2 s for rank 1")
    rank.meet("failed")
    if rank.rank == 1:
        all_fail(begin(rank), dist.DistBackendError, "rank 0 waited 2 s for rank 1")
    rank.meet("told")
    x = torch.full((3,), float(rank.rank))
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert x.tolist() == [1] * 3
    works(rank)


def test_what_is_called_during_a_set_up_fails_with_it():
    run_ranks(late_body, 2, backend=None, timeout=20)


def refused_body(rank: Rank) -> None:
    """A set-up that can't succeed: its error is each call's, synchronous or not, now and later."""
    for _ in range(4):
        all_fail([dist.all_reduce(torch.ones(4), async_op=True)], ValueError, "options differ")
        with pytest.raises(ValueError, match="options differ"):
            dist.all_reduce(torch.ones(4))
        all_fail([dist.isend(torch.ones(4), 1 - rank.rank)], ValueError, "options differ")


def refused_init_body(rank: Rank) -> None:
    rank.init(workspace_bytes=(1 + rank.rank) << 20)
    refused_body(rank)


def test_a_set_up_that_fails_is_told_by_every_call(ranks):
    ranks(refused_init_body, 2, backend=None, timeout=20)


def connect_body(rank: Rank) -> None:
    backend = dist.group.WORLD._get_backend(rank.device)
    work = dist.all_reduce(torch.ones(4), async_op=True) if rank.rank else None
    backend.eager_connect_single_device(rank.device)
    (work or dist.all_reduce(torch.ones(4), async_op=True)).wait()
    works(rank)


def test_connecting_beside_a_call(ranks):
    ranks(connect_body, 2, timeout=20)
