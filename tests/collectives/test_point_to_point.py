"""send, recv and their asynchronous forms: what arrives, in which order, and beside what else."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import EVERY_DTYPE, all_reduce_works, in_the_middle, raw_bytes, values

MIB = 1 << 20
SEND_SEED = 77


def message(source: int, destination: int, numel: int, dtype: torch.dtype = torch.uint8, number: int = 0):
    """What `source` sends: other bytes for every pair and number."""
    return values(source * 64 + destination, numel, dtype, SEND_SEED + number)


def received(x: torch.Tensor, source: int, destination: int, number: int = 0) -> bool:
    return torch.equal(raw_bytes(x), raw_bytes(message(source, destination, x.numel(), x.dtype, number)))


def ring_body(rank: Rank, dtypes: list[torch.dtype], sizes: list[int]) -> None:
    """Every rank to the next, from and into the middle of larger storages."""
    n, me = rank.world_size, rank.rank
    after, before = (me + 1) % n, (me - 1) % n
    for seed, (dtype, numel) in enumerate(itertools.product(dtypes, sizes)):
        what = f"{numel} x {dtype}"
        x, check_source = in_the_middle(message(me, after, numel, dtype), seed % 4, rank.device)
        y, check_destination = in_the_middle(message(0, 0, numel, dtype), (seed + 1) % 4, rank.device)
        work = dist.isend(x, after)
        assert dist.recv(y, before) == before
        work.wait()
        assert received(y, before, me), what
        check_source()
        check_destination()


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_dtype(ranks, device, world_size):
    ranks(ring_body, world_size, device, args=(EVERY_DTYPE, [0, 1, 3, 1001]), timeout=120)


def test_sizes_around_every_border(ranks, device):
    """Of packs, cache lines, slots and rings, whatever these are: around all powers of two."""
    sizes = [(1 << power) + more for power in range(2, 22) for more in (-1, 0, 1)]
    ranks(ring_body, 2, device, args=([torch.uint8], sizes), timeout=120)


def test_large_messages(ranks, device):
    sizes = [5_000_003, 16 * MIB, 16 * MIB + 3, 40_000_001]
    ranks(ring_body, 2, device, args=([torch.uint8], sizes), timeout=120)


def test_messages_through_a_small_workspace(ranks, device):
    options = {"workspace_bytes": MIB}
    ranks(ring_body, 3, device, args=([torch.uint8], [1, 70_000, 2_000_001]), options=options)


def layouts_body(rank: Rank) -> None:
    """Dense, of one layout at both ends: transposed; channels last; of no dimension; a parameter."""
    peer = 1 - rank.rank
    for x in (
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor(3.0),
    ):
        y = torch.empty_like(x, device=rank.device)
        assert y.stride() == x.stride()
        work = dist.isend((x + rank.rank).to(rank.device), peer)
        dist.recv(y, peer)
        work.wait()
        assert torch.equal(y.cpu(), x + peer)
    parameter = torch.nn.Parameter(torch.zeros(5, device=rank.device))
    work = dist.isend(torch.nn.Parameter(torch.full((5,), float(rank.rank), device=rank.device)), peer)
    dist.recv(parameter, peer)
    work.wait()
    assert parameter.tolist() == [float(peer)] * 5
    assert parameter.is_leaf


def test_layouts(ranks, device):
    ranks(layouts_body, 2, device)


def both_ways_body(rank: Rank, numel: int) -> None:
    """More than a ring holds, both ways at once; ranks list and wait in other orders."""
    peer = 1 - rank.rank
    x, y = message(rank.rank, peer, numel).to(rank.device), torch.zeros(numel, dtype=torch.uint8, device=rank.device)
    for receive_first, wait_first in itertools.product([False, True], repeat=2):
        y.zero_()
        if receive_first == bool(rank.rank):
            works = [dist.irecv(y, peer), dist.isend(x, peer)]
        else:
            works = [dist.isend(x, peer), dist.irecv(y, peer)]
        for work in works if wait_first else reversed(works):
            work.wait()
        assert received(y, peer, rank.rank)


def test_both_directions_larger_than_the_ring(ranks, device):
    ranks(both_ways_body, 2, device, args=(8 * MIB + 5 if device == "cpu" else 64 * MIB + 5,), timeout=120)


def everybody_body(rank: Rank, numels: list[int]) -> None:
    """isend to all, then irecv from all."""
    others = [r for r in range(rank.world_size) if r != rank.rank]
    for numel in numels:
        parts = {r: torch.zeros(numel, dtype=torch.uint8, device=rank.device) for r in others}
        works = [dist.isend(message(rank.rank, r, numel).to(rank.device), r) for r in others]
        works += [dist.irecv(parts[r], r) for r in reversed(others)]
        for work in works:
            work.wait()
        for r in others:
            assert received(parts[r], r, rank.rank), f"{numel} bytes from {r}"


@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_everybody_to_everybody(ranks, device, world_size):
    """Nobody receives before it has sent everything, whatever the size."""
    ranks(everybody_body, world_size, device, args=([0, 1, 5000, 300_001, 3_000_001],), timeout=120)


def batch_body(rank: Rank, numels: list[int]) -> None:
    """Batches whose lists are in another order on every rank, of two messages a pair and direction."""
    others = [r for r in range(rank.world_size) if r != rank.rank]
    others = others[rank.rank % len(others) :] + others[: rank.rank % len(others)]
    for numel in numels:
        parts = [(r, i, torch.zeros(numel + i, dtype=torch.uint8, device=rank.device)) for i in (0, 1) for r in others]
        receives = [dist.P2POp(dist.irecv, x, r) for r, _, x in parts]
        sends = [
            dist.P2POp(dist.isend, message(rank.rank, r, numel + i, number=i).to(rank.device), r)
            for i in (0, 1)
            for r in others
        ]
        for work in dist.batch_isend_irecv(receives + sends if rank.rank % 2 else sends + receives):
            work.wait()
        for r, i, x in parts:
            assert received(x, r, rank.rank, i), f"message {i} of {numel + i} bytes from {r}"


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_batches(ranks, device, world_size):
    ranks(batch_body, world_size, device, args=([0, 1, 5000, 1_500_001],), timeout=120)


def own_body(rank: Rank) -> None:
    """Messages to oneself in a batch, among others, as stages of a pipeline on one rank send them."""
    me, after, before = rank.rank, (rank.rank + 1) % rank.world_size, (rank.rank - 1) % rank.world_size
    all_reduce_works(rank)
    for numel in (0, 7, 100_001):
        x = [message(me, peer, numel, number=i).to(rank.device) for i, peer in enumerate((me, after, me))]
        y = [torch.zeros(numel, dtype=torch.uint8, device=rank.device) for _ in x]
        sends = [dist.P2POp(dist.isend, x[i], peer) for i, peer in enumerate((me, after, me))]
        receives = [dist.P2POp(dist.irecv, y[i], peer) for i, peer in enumerate((me, before, me))]
        for work in dist.batch_isend_irecv(receives + sends):
            work.wait()
        for i, source in enumerate((me, before, me)):
            assert received(y[i], source, me, i), f"message {i} of {numel} bytes"
    for alone in ([dist.P2POp(dist.isend, x[0], me)], [dist.P2POp(dist.irecv, y[0], me)]):
        with pytest.raises(ValueError, match="message to oneself"):
            dist.batch_isend_irecv(alone)
    short = dist.P2POp(dist.irecv, y[0][:-1], me)
    with pytest.raises(ValueError, match="100001 bytes.*got 100000"):
        dist.batch_isend_irecv([dist.P2POp(dist.isend, x[0], me), short])
    all_reduce_works(rank)


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_to_oneself_in_a_batch(ranks, device, world_size):
    ranks(own_body, world_size, device)


def one_sided_batch_body(rank: Rank) -> None:
    """A batch on one side, single calls on the other; the third rank takes no part."""
    all_reduce_works(rank)
    numels = [10, 300_000, 0, 77]
    if rank.rank == 0:
        sends = [dist.P2POp(dist.isend, message(0, 2, n, number=i).to(rank.device), 2) for i, n in enumerate(numels)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()
    elif rank.rank == 2:
        for i, n in enumerate(numels):
            x = torch.zeros(n, dtype=torch.uint8, device=rank.device)
            dist.recv(x, 0)
            assert received(x, 0, 2, i)
    all_reduce_works(rank)


def test_a_batch_meets_single_calls(ranks, device):
    ranks(one_sided_batch_body, 3, device)


def ping_pong_body(rank: Rank) -> None:
    x = torch.zeros(33, dtype=torch.int64, device=rank.device)
    peer = 1 - rank.rank
    for i in range(1000):
        if rank.rank == i % 2:
            x += 1
            dist.send(x, peer)
        else:
            dist.recv(x, peer)
    if rank.rank == 0:  # the last one to receive
        assert x.tolist() == [1000] * 33


def test_ping_pong(ranks, device):
    ranks(ping_pong_body, 2, device)


def far_ahead_body(rank: Rank, count: int) -> None:
    """All of them sent before the first is received; waited for from the last to the first."""
    all_reduce_works(rank)
    if rank.rank == 0:
        works = [dist.isend(torch.full((i % 100,), i, dtype=torch.int32, device=rank.device), 1) for i in range(count)]
        rank.meet("sent")
        for work in reversed(works):
            work.wait()
    else:
        rank.meet("sent")
        parts = [torch.empty(i % 100, dtype=torch.int32, device=rank.device) for i in range(count)]
        works = [dist.irecv(part, 0) for part in parts]
        for work in reversed(works):
            work.wait()
        for i, part in enumerate(parts):
            assert part.tolist() == [i] * (i % 100)


def test_many_small_messages_ahead_of_the_receiver(ranks, device):
    ranks(far_ahead_body, 2, device, args=(2000 if device == "cpu" else 200,))


def tags_body(rank: Rank, numel: int) -> None:
    """Each receive takes the first message with its tag, wherever it stands; posted before and after they come."""
    tags = [3, 1, 2, 1, 0, 3, 2**31 - 1, 1]
    all_reduce_works(rank)  # sets the group up, for which all ranks have to come
    for early in (False, True):
        rank.meet(f"begin {early}")
        if rank.rank == 0:
            works = [dist.isend(message(0, 1, numel + i, number=i), 1, tag=tag) for i, tag in enumerate(tags)]
            rank.meet(f"sent {early}")
            for work in works:
                work.wait()
        else:
            if not early:
                rank.meet(f"sent {early}")
            order = sorted(range(len(tags)), key=lambda i: (-tags[i], i))
            parts = {i: torch.zeros(numel + i, dtype=torch.uint8) for i in order}
            works = [dist.irecv(parts[i], 0, tag=tags[i]) for i in order]
            if early:
                rank.meet(f"sent {early}")
            for work in reversed(works):
                work.wait()
            for i, part in parts.items():
                assert received(part, 0, 1, i), f"message {i}, tag {tags[i]}"


@pytest.mark.parametrize("numel", [5, 1_200_000])
def test_tags_out_of_order(ranks, numel):
    """On the CPU, as with gloo; a GPU takes a pair's messages in order."""
    ranks(tags_body, 2, args=(numel,))


def any_source_body(rank: Rank, members: list[int], numel: int, early: bool) -> None:
    """One rank hears from all others, three times each; what arrives says from whom."""
    group = dist.new_group(members)
    if rank.rank not in members:
        return
    all_reduce_works(rank, group)
    receiver, senders = members[-1], members[:-1]
    if rank.rank != receiver:
        if early:
            rank.store.wait(["posted"], rank.group_timeout)
        for i in range(3):
            dist.send(message(rank.rank, 0, numel, number=i), receiver, group, tag=4)
        return
    heard: dict[int, list[int]] = {r: [] for r in senders}
    if early:
        parts = [torch.zeros(numel, dtype=torch.uint8) for _ in range(3 * len(senders))]
        works = [dist.irecv(part, group=group, tag=4) for part in parts]
        rank.store.set("posted", "")
        for work in works:
            work.wait()
        arrived = [(dist.get_global_rank(group, w._source_rank()), p) for w, p in zip(works, parts, strict=True)]
    else:
        arrived = []
        for _ in range(3 * len(senders)):
            part = torch.zeros(numel, dtype=torch.uint8)
            arrived.append((dist.recv(part, group=group, tag=4), part))
    for source, part in arrived:
        assert received(part, source, 0, len(heard[source])), f"message {len(heard[source])} of rank {source}"
        heard[source].append(1)
    assert {len(h) for h in heard.values()} == {3}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("numel", [0, 9, 700_001])
@pytest.mark.parametrize(("world_size", "members"), [(2, [0, 1]), (4, [0, 1, 2, 3]), (4, [1, 3])])
def test_recv_from_any_source(ranks, world_size, members, numel, early):
    """recv returns the sender's rank in the world, whatever the group; each sender's messages keep their order."""
    ranks(any_source_body, world_size, args=(members, numel, early))


def beside_collectives_body(rank: Rank, numel: int) -> None:
    """A receive and a send are under way while all ranks go through collectives; the peers' halves come after them."""
    n, me = rank.world_size, rank.rank

    def collectives(root: int) -> None:
        all_reduce_works(rank)
        z = torch.full((70_001,), float(me), device=rank.device)
        dist.broadcast(z, root)
        assert bool((z == root).all())
        parts = [torch.empty(1001, device=rank.device) for _ in range(n)]
        dist.all_gather(parts, z[:1001] + me)
        assert [part[-1].item() for part in parts] == [float(root + r) for r in range(n)]
        dist.barrier(device_ids=[rank.device.index] if rank.device.type == "cuda" else None)

    # CUDA loads torch's kernels when they are first used, and may wait for everything that runs then.
    collectives(0)
    x = message(me, 1 - me, numel).to(rank.device) if me < 2 else None
    y = torch.zeros(numel, dtype=torch.uint8, device=rank.device)
    outstanding = []
    if me == 0:
        outstanding = [dist.irecv(y, 1)]
    elif me == 1:
        outstanding = [dist.irecv(y, 0)]
    for root in range(n):
        collectives(root)
    if me < 2:
        outstanding.append(dist.isend(x, 1 - me))
    all_reduce_works(rank)
    for work in outstanding:
        work.wait()
    if me < 2:
        assert received(y, 1 - me, me)


@pytest.mark.parametrize("numel", [100, 3_000_001])
@pytest.mark.parametrize("world_size", [2, 3])
def test_receives_outstanding_across_collectives(ranks, device, world_size, numel):
    ranks(beside_collectives_body, world_size, device, args=(numel,))


def sends_across_body(rank: Rank) -> None:
    """A send that doesn't fit anywhere waits for its receiver while both are in collectives."""
    numel = 4_000_001
    all_reduce_works(rank)
    work = dist.isend(message(0, 1, numel).to(rank.device), 1) if rank.rank == 0 else None
    for _ in range(3):
        all_reduce_works(rank)
        dist.barrier(device_ids=[rank.device.index] if rank.device.type == "cuda" else None)
    if work is None:
        y = torch.zeros(numel, dtype=torch.uint8, device=rank.device)
        dist.recv(y, 0)
        assert received(y, 0, 1)
    else:
        work.wait()


def test_sends_outstanding_across_collectives(ranks, device):
    ranks(sends_across_body, 2, device)
