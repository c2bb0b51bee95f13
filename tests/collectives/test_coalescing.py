"""Calls between startCoalescing and endCoalescing, as torch's _coalescing_manager and batch_isend_irecv make them: one work for
all of them, and results as if they had been called alone."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only
from reference import all_reduce_works, assert_bits, random_input, rank_order_sum

Check = Callable[[], None]


@contextmanager
def coalesced(rank: Rank, asynchronous: bool, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """The manager, and its wait."""
    with dist._coalescing_manager(group=group, device=rank.device, async_ops=asynchronous) as manager:
        yield
    if asynchronous:
        assert len(manager.works) == 1
        manager.wait()


# What can be coalesced: makes the call, and returns what checks it once the work has ended.


def messages(rank: Rank, numel: int, seed: int) -> Check:
    """To the next, from the one before; listed in other orders on even and odd ranks."""
    n, me = rank.world_size, rank.rank
    x, y = random_input(me, numel, torch.float32, seed).to(rank.device), torch.zeros(numel, device=rank.device)
    calls = [lambda: dist.isend(x, (me + 1) % n), lambda: dist.irecv(y, (me - 1) % n)]
    for call in calls if me % 2 else reversed(calls):
        call()
    return lambda: assert_bits(y, random_input((me - 1) % n, numel, torch.float32, seed), "message")


def broadcast(rank: Rank, numel: int, seed: int) -> Check:
    root = seed % rank.world_size
    x = random_input(rank.rank, numel, torch.float32, seed).to(rank.device)
    dist.broadcast(x, root)
    return lambda: assert_bits(x, random_input(root, numel, torch.float32, seed), "broadcast")


def all_gather(rank: Rank, numel: int, seed: int) -> Check:
    """Transposed outputs: something is left to do at the end."""
    inputs = [random_input(r, 2 * numel, torch.float32, seed).view(2, numel) for r in range(rank.world_size)]
    outs = [torch.zeros(numel, 2, device=rank.device).t() for _ in inputs]
    dist.all_gather(outs, inputs[rank.rank].to(rank.device))

    def check() -> None:
        for out, expected in zip(outs, inputs, strict=True):
            assert_bits(out, expected, "all_gather")

    return check


def uneven_all_gather(rank: Rank, numel: int, seed: int) -> Check:
    inputs = [random_input(r, numel * r, torch.float32, seed) for r in range(rank.world_size)]
    outs = [torch.zeros(x.numel(), device=rank.device) for x in inputs]
    dist.all_gather(outs, inputs[rank.rank].to(rank.device))
    return lambda: assert_bits(torch.cat(outs), torch.cat(inputs), "uneven all_gather")


def all_gather_into_tensor(rank: Rank, numel: int, seed: int) -> Check:
    inputs = [random_input(r, numel, torch.float32, seed) for r in range(rank.world_size)]
    out = torch.zeros(numel * rank.world_size, device=rank.device)
    dist.all_gather_into_tensor(out, inputs[rank.rank].to(rank.device))
    return lambda: assert_bits(out, torch.cat(inputs), "all_gather_into_tensor")


def all_reduce(rank: Rank, numel: int, seed: int) -> Check:
    inputs = [random_input(r, numel, torch.float32, seed) for r in range(rank.world_size)]
    x = inputs[rank.rank].clone().to(rank.device)
    dist.all_reduce(x)
    return lambda: assert_bits(x, rank_order_sum(inputs), "all_reduce")


def reduce_scatter_tensor(rank: Rank, numel: int, seed: int) -> Check:
    n, me = rank.world_size, rank.rank
    inputs = [random_input(r, numel * n, torch.float32, seed) for r in range(n)]
    out = torch.zeros(numel, device=rank.device)
    dist.reduce_scatter_tensor(out, inputs[me].to(rank.device))
    return lambda: assert_bits(out, rank_order_sum([x.chunk(n)[me] for x in inputs]), "reduce_scatter_tensor")


def reduce_scatter(rank: Rank, numel: int, seed: int) -> Check:
    """A transposed output."""
    n, me = rank.world_size, rank.rank
    inputs = [random_input(r, 2 * numel * n, torch.float32, seed) for r in range(n)]
    out = torch.zeros(numel, 2, device=rank.device).t()
    dist.reduce_scatter(out, [part.view(2, numel).to(rank.device) for part in inputs[me].chunk(n)])
    expected = rank_order_sum([x.chunk(n)[me] for x in inputs])
    return lambda: assert_bits(out, expected.view(2, numel), "reduce_scatter")


def reduce(rank: Rank, numel: int, seed: int) -> Check:
    inputs = [random_input(r, numel, torch.float32, seed) for r in range(rank.world_size)]
    x, root = inputs[rank.rank].clone().to(rank.device), seed % rank.world_size
    dist.reduce(x, root)
    expected = rank_order_sum(inputs) if rank.rank == root else inputs[rank.rank]
    return lambda: assert_bits(x, expected, "reduce")


def gather(rank: Rank, numel: int, seed: int) -> Check:
    inputs = [random_input(r, numel, torch.float32, seed) for r in range(rank.world_size)]
    root = seed % rank.world_size
    outs = [torch.zeros(numel, device=rank.device) for _ in inputs] if rank.rank == root else []
    dist.gather(inputs[rank.rank].to(rank.device), outs or None, root)
    return lambda: assert_bits(torch.cat(outs), torch.cat(inputs), "gather") if outs else None


def scatter(rank: Rank, numel: int, seed: int) -> Check:
    root, n = seed % rank.world_size, rank.world_size
    parts = [random_input(d, numel, torch.float32, seed) for d in range(n)]
    out = torch.zeros(numel, device=rank.device)
    dist.scatter(out, [part.to(rank.device) for part in parts] if rank.rank == root else None, root)
    return lambda: assert_bits(out, parts[rank.rank], "scatter")


def all_to_all(rank: Rank, numel: int, seed: int) -> Check:
    n, me = rank.world_size, rank.rank
    inputs = [random_input(r, numel * n, torch.float32, seed).chunk(n) for r in range(n)]
    outs = [torch.zeros(numel, device=rank.device) for _ in range(n)]
    dist.all_to_all(outs, [part.to(rank.device) for part in inputs[me]])
    return lambda: assert_bits(torch.cat(outs), torch.cat([inputs[r][me] for r in range(n)]), "all_to_all")


def barrier(rank: Rank, numel: int, seed: int) -> Check:
    dist.barrier(device_ids=[rank.device.index] if rank.device.type == "cuda" else None)
    return lambda: None


# Of those that torch itself collects, a manager takes one kind: all_reduce, all_gather_into_tensor or
# reduce_scatter_tensor.
KINDS: dict[str, list[Callable[[Rank, int, int], Check]]] = {
    "messages": [messages] * 3,
    "broadcast": [broadcast] * 4,
    "all_gather": [all_gather, uneven_all_gather, all_gather],
    "all_gather_into_tensor": [all_gather_into_tensor] * 3,
    "all_reduce": [all_reduce] * 3,
    "reduce_scatter_tensor": [reduce_scatter_tensor] * 3,
    "rooted": [reduce, gather, scatter] * 2,
    "all to all": [reduce_scatter, all_to_all, reduce_scatter, all_to_all],
    "barrier": [barrier, barrier],
    "mixed": [messages, broadcast, all_gather, barrier, messages, uneven_all_gather, broadcast, messages],
    "mixed with all_reduce": [all_reduce, broadcast, messages, all_reduce],
    "mixed with reduce_scatter_tensor": [reduce, reduce_scatter_tensor, all_to_all, messages, reduce_scatter_tensor],
    "mixed with all_gather_into_tensor": [messages, all_gather_into_tensor, all_gather, all_gather_into_tensor],
}


def kinds_body(rank: Rank, kind: str) -> None:
    seed = 0
    for asynchronous in (False, True):
        for numel in (1, 1001, 300_001):
            checks = []
            with coalesced(rank, asynchronous):
                for call in KINDS[kind]:
                    seed += 1
                    checks.append(call(rank, numel + seed % 3, seed))
            for check in checks:
                check()
            all_reduce_works(rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_coalesced_calls(ranks, device, world_size, kind):
    ranks(kinds_body, world_size, device, args=(kind,))


def one_rank_body(rank: Rank) -> None:
    for kind in ("broadcast", "all_gather", "all_reduce", "reduce_scatter_tensor", "rooted", "all to all", "barrier"):
        kinds_body(rank, kind)


def test_a_group_of_one(ranks, device):
    ranks(one_rank_body, 1, device)


def nothing_body(rank: Rank) -> None:
    for asynchronous in (False, True):
        with dist._coalescing_manager(device=rank.device, async_ops=asynchronous) as manager:
            pass
        assert manager.works == []
        manager.wait()
        all_reduce_works(rank)


def test_nothing_is_no_work(ranks, device):
    ranks(nothing_body, 2, device)


def pair_body(rank: Rank) -> None:
    """Ranks 0 and 2 coalesce messages; rank 1 knows nothing of it."""
    all_reduce_works(rank)
    if rank.rank != 1:
        peer = 2 - rank.rank
        x = [torch.full((numel,), float(rank.rank), device=rank.device) for numel in (3, 70_000)]
        y = [torch.zeros_like(part) for part in x]
        with coalesced(rank, True):
            for i in range(2):
                dist.isend(x[i], peer)
                dist.irecv(y[i], peer)
        assert all(bool((part == peer).all()) for part in y)
    all_reduce_works(rank)


def test_messages_of_a_pair_alone(ranks, device):
    ranks(pair_body, 3, device)


def one_work_body(rank: Rank) -> None:
    """Its work has not ended before the last of its messages."""
    peer = 1 - rank.rank
    x = torch.ones(5, device=rank.device)
    parts = [torch.zeros(5, device=rank.device) for _ in range(3)]
    all_reduce_works(rank)
    if rank.rank == 0:
        works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, part, peer) for part in parts])
        assert len(works) == 1
        rank.meet("posted")
        rank.meet("two sent")
        assert not works[0].is_completed()
        rank.meet("looked")
        works[0].wait()
        assert [part.tolist() for part in parts] == [[1.0 * i] * 5 for i in range(3)]
        assert works[0].is_completed()
    else:
        rank.meet("posted")
        for i in range(3):
            if i == 2:
                rank.meet("two sent")
                rank.meet("looked")
            dist.send(x * i, peer)
            if rank.device.type == "cuda":
                torch.cuda.synchronize()


def test_one_work_for_a_batch(ranks, device):
    ranks(one_work_body, 2, device)


class Mistake(Exception):
    pass


def abandoned_body(rank: Rank) -> None:
    """An exception inside, of the caller's or of a call that is refused, on all ranks. torch leaves its own list of the group's calls
    behind then, which has to be dropped; nothing of what had been called is left in the backend."""
    peer, group = (rank.rank + 1) % rank.world_size, dist.group.WORLD
    x, grid = torch.full((9,), 5.0, device=rank.device), torch.ones(4, 6, device=rank.device)
    refused: list[tuple[type[Exception], Callable[[], object]]] = [
        (Mistake, lambda: (_ for _ in ()).throw(Mistake)),
        (ValueError, lambda: dist.isend(grid[:, ::2], peer)),
        (ValueError, lambda: dist.broadcast(x, 17)),
        (ValueError, lambda: dist.irecv(x, rank.rank)),
    ]
    if "mixed types" in inspect.getsource(dist._coalescing_manager):  # torch 2.11 runs the first kind's
        # Two kinds of those that torch collects: it refuses them at the end, and never ends what it began.
        refused.append(
            (
                RuntimeError,
                lambda: (dist.all_reduce(x), dist.all_gather_into_tensor(torch.empty(18, device=rank.device), x)),
            )
        )
    seed = 0
    for kind, mistake in refused:
        for asynchronous in (False, True):
            with (
                pytest.raises(kind),
                dist._coalescing_manager(group=group, device=rank.device, async_ops=asynchronous),
            ):
                dist.isend(x, peer)
                dist.irecv(x, peer)
                dist.broadcast(x, 0)
                mistake()
            dist.distributed_c10d._world.pg_coalesce_state.pop(group, None)
            for call in (messages, broadcast, all_gather):
                seed += 1
                with coalesced(rank, asynchronous):
                    check = call(rank, 1001, seed)
                check()
            all_reduce_works(rank)
            assert x.tolist() == [5.0] * 9, "an abandoned call was made"


def test_an_exception_inside(ranks, device):
    ranks(abandoned_body, 2, device)


def refused_batch_body(rank: Rank) -> None:
    """A batch with a bad message sends none of the good ones."""
    peer = 1 - rank.rank
    x, y = torch.full((4,), 1.0, device=rank.device), torch.zeros(4, device=rank.device)
    bad = [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.isend, torch.ones(4, 6, device=rank.device)[:, ::2], peer)]
    with pytest.raises(ValueError, match="mnnvl send"):
        dist.batch_isend_irecv(bad)
    dist.distributed_c10d._world.pg_coalesce_state.pop(dist.group.WORLD, None)
    good = [dist.P2POp(dist.isend, x + 10 + rank.rank, peer), dist.P2POp(dist.irecv, y, peer)]
    for work in dist.batch_isend_irecv(good):
        work.wait()
    assert y.tolist() == [11.0 + peer] * 4
    all_reduce_works(rank)


def test_a_batch_with_a_bad_message(ranks, device):
    ranks(refused_batch_body, 2, device)


def unfinished_body(rank: Rank) -> None:
    """A group that is destroyed while it collects."""
    all_reduce_works(rank)
    group = dist.new_group()
    all_reduce_works(rank, group)
    group._start_coalescing(rank.device)
    dist.isend(torch.ones(3, device=rank.device), (rank.rank + 1) % rank.world_size, group)
    dist.destroy_process_group(group)
    all_reduce_works(rank)


def test_destroyed_while_it_collects(ranks, device):
    ranks(unfinished_body, 2, device)


def two_groups_body(rank: Rank) -> None:
    """Nested managers of two groups: each collects its own."""
    first, second = dist.new_group(), dist.new_group()
    peer = 1 - rank.rank
    x, y, z = (torch.full((5,), float(rank.rank + i), device=rank.device) for i in range(3))
    with coalesced(rank, True, first):
        dist.isend(x, peer, first)
        with coalesced(rank, False, second):
            dist.broadcast(z, 1, second)
        assert z.tolist() == [3.0] * 5
        dist.irecv(y, peer, first)
    assert y.tolist() == [float(peer)] * 5
    all_reduce_works(rank)


def test_managers_of_two_groups(ranks, device):
    ranks(two_groups_body, 2, device)


def graph_body(rank: Rank) -> None:
    """A coalesced group in a CUDA graph."""
    n, me = rank.world_size, rank.rank
    x, y, z = (torch.zeros(5000, device=rank.device) for _ in range(3))

    def call() -> None:
        with coalesced(rank, True):
            dist.isend(x, (me + 1) % n)
            dist.irecv(y, (me - 1) % n)
            dist.broadcast(z, 0)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for replay in range(50):
        x.fill_(replay + me)
        z.fill_(replay + 100 * me)
        graph.replay()
        assert bool((y == replay + (me - 1) % n).all())
        assert bool((z == replay).all())


@cuda_only
def test_in_a_cuda_graph(ranks):
    ranks(graph_body, 2, "cuda")


def beside_body(rank: Rank) -> None:
    """Asynchronous ones begin and don't wait: rank 0 is in its group of calls before rank 1 has got what it waits for first."""
    x, y = torch.full((1001,), float(rank.rank)), torch.ones(3)
    all_reduce_works(rank)
    if rank.rank == 0:
        with dist._coalescing_manager(device=rank.device, async_ops=True) as manager:
            dist.broadcast(x, 1)
            dist.barrier()
        dist.send(y + 1, 1)
        manager.wait()
    else:
        dist.recv(y, 0)
        assert y.tolist() == [2.0] * 3
        dist.broadcast(x, 1)
        dist.barrier()
    assert x.tolist() == [1.0] * 1001


def test_asynchronous_ones_do_not_wait(ranks):
    ranks(beside_body, 2)


def other_thread_body(rank: Rank) -> None:
    """What a thread has left collecting, by an exception, is none of another thread's, even of one with the same id."""

    def abandon() -> None:
        with suppress(Mistake), dist._coalescing_manager(device=rank.device):
            raise Mistake

    all_reduce_works(rank)
    for work in (abandon, lambda: all_reduce_works(rank), lambda: check_broadcast(rank)) * 3:
        failures: list[BaseException] = []
        thread = threading.Thread(target=caught, args=(work, failures))
        thread.start()
        thread.join()
        assert not failures, failures
        dist.distributed_c10d._world.pg_coalesce_state.pop(dist.group.WORLD, None)
    check_broadcast(rank)


def caught(work: Callable[[], None], failures: list[BaseException]) -> None:
    try:
        work()
    except BaseException as error:
        failures.append(error)


def check_broadcast(rank: Rank) -> None:
    broadcast(rank, 17, 3)()


def test_another_thread_does_not_collect(ranks):
    ranks(other_thread_body, 2)


def own_body(rank: Rank) -> None:
    """Messages to oneself that can't be are found before anything begins; the work's future is as every work's."""
    me, after, before = rank.rank, (rank.rank + 1) % rank.world_size, (rank.rank - 1) % rank.world_size
    x, y, z = (torch.arange(9.0, device=rank.device) + i for i in range(3))
    all_reduce_works(rank)
    for own, expected in (((x[:5], x[2:7]), "memory of its own"), ((x[:4], x[4:6].double()), "bytes of Float as sent")):
        with pytest.raises(ValueError, match=expected):
            dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, z, after),
                    dist.P2POp(dist.isend, own[0], me),
                    dist.P2POp(dist.irecv, own[1], me),
                    dist.P2POp(dist.irecv, y, before),
                ]
            )
    assert y.tolist() == [float(i + 1) for i in range(9)]
    (work,) = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, me),
            dist.P2POp(dist.isend, z, after),
            dist.P2POp(dist.irecv, y, before),
            dist.P2POp(dist.irecv, x.new_empty(9), me),
        ]
    )
    results = work.get_future().wait()
    assert len(results) == 4
    assert all(isinstance(result, torch.Tensor) for result in results)
    work.wait()
    assert y.tolist() == [float(i + 2) for i in range(9)]


def test_messages_to_oneself(ranks, device):
    ranks(own_body, 2, device)


def streams_body(rank: Rank) -> None:
    """A call that is made on another stream waits for what that has been given before."""
    peer, side = 1 - rank.rank, torch.cuda.Stream()
    big = torch.ones(4096, 4096, device=rank.device)
    all_reduce_works(rank)
    for _ in range(5):
        x, y = torch.zeros(1001, device=rank.device), torch.zeros(1001, device=rank.device)
        torch.cuda.synchronize()
        with coalesced(rank, True):
            with torch.cuda.stream(side):
                for _ in range(4):
                    big = (big @ big).clamp_(0, 1)
                x.add_(big[0, 0] * (rank.rank + 1))
                dist.isend(x, peer)
            dist.irecv(y, peer)
        assert y.tolist() == [peer + 1.0] * 1001


@cuda_only
def test_calls_on_other_streams(ranks):
    ranks(streams_body, 2, "cuda")
