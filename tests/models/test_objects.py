"""Collectives of Python objects, those that autograd differentiates, and what torch says about the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dnn
from launcher import Rank
from reference import uneven_objects_body


def something(rank: int) -> dict[str, Any]:
    """Another size on each rank, and a tensor within."""
    return {"rank": rank, "text": "ä" * (1 + 300 * rank), "tensor": torch.arange(rank * 100)}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["rank"] == b["rank"] and a["text"] == b["text"] and torch.equal(a["tensor"], b["tensor"])


def objects_body(rank: Rank) -> None:
    n, me, device = rank.world_size, rank.rank, rank.device
    for root in range(n):
        gathered: list[Any] | None = [None] * n if me == root else None
        dist.gather_object(something(me), gathered, dst=root)
        if gathered is not None:
            assert all(same(gathered[r], something(r)) for r in range(n)), f"gathered on {root}"
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, [something(r) for r in range(n)] if me == root else None, src=root)
        assert same(mine[0], something(me)), f"scattered from {root}"
        objects: list[Any] = [something(root), None] if me == root else [None, None]
        dist.broadcast_object_list(objects, src=root, device=device)
        assert same(objects[0], something(root))
        assert objects[1] is None
    everybodys: list[Any] = [None] * n
    dist.all_gather_object(everybodys, something(me))
    assert all(same(everybodys[r], something(r)) for r in range(n))


def test_object_collectives(ranks, device):
    ranks(objects_body, 3, device)


def test_objects_of_uneven_sizes(ranks, device):
    ranks(uneven_objects_body, 3, device)


def object_messages_body(rank: Rank) -> None:
    """Around a ring, then from each to the first."""
    n, me, device = rank.world_size, rank.rank, rank.device
    received: list[Any] = [None, None]
    if me == 0:
        dist.send_object_list([something(7), "round"], dst=1, device=device)
    assert dist.recv_object_list(received, src=(me - 1) % n, device=device) == (me - 1) % n
    assert same(received[0], something(7))
    if me:
        dist.send_object_list(received, dst=(me + 1) % n, device=device)


def test_object_messages(ranks, device):
    ranks(object_messages_body, 3, device)


def weights(n: int, me: int, device: torch.device) -> torch.Tensor:
    """What a rank's loss multiplies its outputs with; every rank can make any rank's."""
    return torch.arange(1.0, n + 1, device=device) * 10**me


def autograd_body(rank: Rank) -> None:
    """The gradient of the sum of all ranks' losses, which is what each collective's transpose carries back."""
    n, me, device = rank.world_size, rank.rank, rank.device
    w = [weights(n, r, device) for r in range(n)]
    total = torch.stack(w).sum(0)

    def gradient(call: Any, loss_of_mine: Any) -> torch.Tensor:
        x = (torch.arange(float(n), device=device) + me).requires_grad_()
        loss_of_mine(call(x)).backward()
        return x.grad

    assert torch.equal(gradient(dnn.all_reduce, lambda y: (y * w[me]).sum()), total)
    assert torch.equal(gradient(lambda x: dnn.broadcast(x, 1), lambda y: (y * w[me]).sum()), total * (me == 1))
    assert torch.equal(
        gradient(lambda x: dnn.reduce(x, 1), lambda y: (y * w[me]).sum() * (me == 1)), w[1]
    ), "reduce"  # fmt: skip
    assert torch.equal(
        gradient(dnn.all_gather, lambda ys: sum((y * w[me]).sum() * (r + 1) for r, y in enumerate(ys))), total * (me + 1)
    ), "all_gather"  # fmt: skip
    for root in (0, n - 1):
        gathered = gradient(
            lambda x, to=root: dnn.gather(x, to),
            lambda ys, to=root: sum((y * w[me]).sum() * (r + 1) * (me == to) for r, y in enumerate(ys)),
        )
        assert torch.equal(gathered, w[root] * (me + 1)), f"gather to {root}"
        scattered = gradient(lambda x, of=root: dnn.scatter(list(x.split(1)), of), lambda y: (y * w[me][0]).sum())
        expected = torch.stack([w[r][0] for r in range(n)]) * (me == root)
        assert torch.equal(scattered, expected), f"scatter from {root}"
    assert torch.equal(
        gradient(lambda x: dnn.reduce_scatter(x.new_empty(1), list(x.split(1))), lambda y: y.sum() * w[me][0]),
        torch.stack([w[r][0] for r in range(n)]),
    ), "reduce_scatter"  # fmt: skip
    swapped = torch.stack([w[r][me] for r in range(n)])
    assert torch.equal(
        gradient(lambda x: dnn.all_to_all_single(torch.empty_like(x), x), lambda y: (y * w[me]).sum()), swapped
    ), "all_to_all_single"  # fmt: skip
    assert torch.equal(
        gradient(
            lambda x: torch.cat(dnn.all_to_all([x.new_empty(1) for _ in range(n)], list(x.split(1)))),
            lambda y: (y * w[me]).sum(),
        ), swapped,
    ), "all_to_all"  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
def test_autograd_collectives(ranks, device, world_size):
    ranks(autograd_body, world_size, device)


def names_body(rank: Rank) -> None:
    """As torch's own tests ask of a backend."""
    assert dist.get_backend() == "mnnvl"
    assert dist.get_backend_config() == "cpu:mnnvl,cuda:mnnvl"
    group = dist.group.WORLD
    assert group.name() == "mnnvl"
    for device in ("cpu", rank.device.type):
        assert group._get_backend(torch.device(device)).name() == "mnnvl"
    both = dist.new_group(backend="cpu:gloo,cuda:mnnvl" if rank.device.type == "cuda" else "cpu:mnnvl")
    assert dist.get_backend_config(both) in ("cpu:gloo,cuda:mnnvl", "cpu:mnnvl")
    assert dist.is_backend_available("mnnvl")


def test_what_torch_says(ranks, device):
    ranks(names_body, 2, device)
