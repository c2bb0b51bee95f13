"""Meshes of one, two and three dimensions: collectives along each, and along several that cross, in flight at once."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import want_gpus
from reference import all_reduce_works
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NAMES = ("plane", "row", "column")


def members(mesh: DeviceMesh) -> list[int]:
    return mesh.mesh.flatten().tolist()


def collectives_work(rank: Rank, group: dist.ProcessGroup, ranks: list[int]) -> None:
    """Each says who takes part: the numbers are those of `ranks`, in their order."""
    device, n = rank.device, len(ranks)
    x = torch.tensor([float(1 << rank.rank), 1.0], device=device)
    total = x.clone()
    dist.all_reduce(total, group=group)
    assert total.tolist() == [float(sum(1 << r for r in ranks)), float(n)]
    gathered = torch.empty(2 * n, device=device)
    dist.all_gather_into_tensor(gathered, x, group=group)
    assert gathered.view(n, 2)[:, 0].tolist() == [float(1 << r) for r in ranks]
    scattered = torch.empty(1, device=device)
    dist.reduce_scatter_tensor(scattered, torch.arange(n, dtype=torch.float32, device=device) * x[0], group=group)
    assert scattered.item() == sum(1 << r for r in ranks) * dist.get_rank(group)
    swapped = torch.empty(n, device=device)
    dist.all_to_all_single(swapped, x[:1].repeat(n), group=group)
    assert swapped.tolist() == [float(1 << r) for r in ranks]
    root = ranks[-1]
    dist.broadcast(x, root, group=group)
    assert x[0].item() == 1 << root


def mesh_body(rank: Rank, shape: tuple[int, ...]) -> None:
    """Along every dimension and every flattened pair, then the whole."""
    names = NAMES[-len(shape) :]
    mesh = init_device_mesh(rank.device.type, shape, mesh_dim_names=names)
    assert list(mesh.get_coordinate()) == (mesh.mesh == rank.rank).nonzero()[0].tolist()
    for name in names:
        assert rank.rank in members(mesh[name])
        collectives_work(rank, mesh.get_group(name), members(mesh[name]))
    for pair in itertools.combinations(names, 2) if len(shape) > 2 else ():
        flat = mesh[pair]._flatten("_".join(pair))
        collectives_work(rank, flat.get_group(), members(flat))
    collectives_work(rank, dist.group.WORLD, list(range(rank.world_size)))


@pytest.mark.parametrize("shape", [(2,), (2, 2), (2, 2, 2)])
def test_collectives_along_dimensions(ranks, device, shape):
    world_size = int(torch.tensor(shape).prod())
    want_gpus(device, world_size)
    ranks(mesh_body, world_size, device, args=(shape,))


def crossed_body(rank: Rank, shape: tuple[int, ...], seed: int) -> None:
    """Asynchronous calls on groups that cross, begun in another order on each rank: within a group the order is the same, as
    torch demands, between groups it is anybody's, since every group has a queue of its own."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=NAMES[-len(shape) :])
    for name in mesh.mesh_dim_names:  # a group's first call is its set-up, for which its ranks meet
        dist.barrier(group=mesh.get_group(name))
    calls = [(name, i) for name in mesh.mesh_dim_names or () for i in range(5)]
    draw = random.Random(seed * 100 + rank.rank)
    order = [name for name, _ in calls]
    draw.shuffle(order)  # of the dimensions; their own calls stay in order
    numbers = dict.fromkeys(order, 0)
    works, results = [], []
    for name in order:
        number = numbers[name]
        numbers[name] += 1
        x = torch.full((1000 * number + 1,), float((1 << rank.rank) * (number + 1)))
        works.append(dist.all_reduce(x, group=mesh.get_group(name), async_op=True))
        results.append((x, name, number))
    draw.shuffle(works)
    for work in works:
        work.wait()
    for x, name, number in results:
        expected = sum(1 << r for r in members(mesh[name])) * (number + 1)
        assert (x == expected).all(), f"call {number} along {name}"
    all_reduce_works(rank)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 2)])
def test_crossed_groups_in_any_order(ranks, shape):
    """On GPUs more than two groups in flight want one order on all ranks (README, "Limits, plainly")."""
    for seed in range(3):
        ranks(crossed_body, int(torch.tensor(shape).prod()), "cpu", args=(shape, seed))


def first_calls_body(rank: Rank) -> None:
    """Each of four ranks begins with the one of its two groups with which its neighbour doesn't: if an asynchronous call waited
    for the others of its group to come, all would wait in a circle."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES[1:])
    order = NAMES[1:] if rank.rank in (0, 3) else NAMES[:0:-1]
    calls = []
    for name in order:
        x = torch.full((3,), float(1 << rank.rank))
        calls.append((dist.all_reduce(x, group=mesh.get_group(name), async_op=True), x, name))
    for work, x, name in calls:
        work.wait()
        assert x.tolist() == [float(sum(1 << r for r in members(mesh[name])))] * 3


def test_first_calls_of_crossed_groups(ranks):
    """As on gloo, whose groups are connected when they are made. On GPUs a group's first call takes its ranks, as NCCL's does."""
    ranks(first_calls_body, 4, "cpu", timeout=15)


def odd_mesh_body(rank: Rank) -> None:
    """Ranks in an order of their own, and one that is in no part: its mesh is of the others."""
    mesh = DeviceMesh(rank.device.type, [[3, 1], [0, 2]], mesh_dim_names=("row", "column"))
    if rank.rank < 4:
        at = (mesh.mesh == rank.rank).nonzero()[0].tolist()
        assert members(mesh["column"]) == mesh.mesh[at[0]].tolist()
        # Groups of a mesh have their ranks in ascending order, whatever theirs in the mesh.
        collectives_work(rank, mesh.get_group("row"), sorted(members(mesh["row"])))
        collectives_work(rank, mesh.get_group("column"), sorted(members(mesh["column"])))
    else:
        assert mesh.get_coordinate() is None
    all_reduce_works(rank)


def test_mesh_of_some_ranks_in_another_order(ranks, device):
    want_gpus(device, 5)
    ranks(odd_mesh_body, 5, device)
