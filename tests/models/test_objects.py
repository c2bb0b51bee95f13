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


def gradient(me: int, device: torch.device, n: int, call: Any, loss_of_mine: Any) -> torch.Tensor:
    x = (torch.arange(float(n), device=device) + me).requires_grad_()
    loss_of_mine(call(x)).backward()
    assert x.grad is not None
    return x.grad


def autograd_body(rank: Rank) -> None:
    """The gradient of the sum of all ranks' losses, which is what each collective's transpose carries back."""
    n, me, device = rank.world_size, rank.rank, rank.device
    group = {"group": dist.group.WORLD}  # torch's default is the one that was there when the module was imported
    w = [weights(n, r, device) for r in range(n)]
    total, of_mine = torch.stack(w).sum(0), torch.stack([w[r][me] for r in range(n)])
    first = torch.stack([w[r][0] for r in range(n)])

    def weighted(y: torch.Tensor) -> torch.Tensor:
        return (y * w[me]).sum()

    def weighted_parts(parts: Any) -> torch.Tensor:
        return sum(weighted(part) * (r + 1) for r, part in enumerate(parts))

    def parts_of(x: torch.Tensor) -> list[torch.Tensor]:
        return list(x.split(1))

    # What is called, the loss of this rank, and the gradient of all losses for what this rank put in.
    cases: dict[str, tuple[Any, Any, torch.Tensor]] = {
        "all_reduce": (lambda x: dnn.all_reduce(x, **group), weighted, total),
        "all_gather": (lambda x: dnn.all_gather(x, **group), weighted_parts, total * (me + 1)),
        "reduce_scatter": (
            lambda x: dnn.reduce_scatter(x.new_empty(1), parts_of(x), **group), lambda y: y.sum() * w[me][0], first,
        ),
        "all_to_all_single": (lambda x: dnn.all_to_all_single(torch.empty_like(x), x, **group), weighted, of_mine),
        "all_to_all": (
            lambda x: torch.cat(dnn.all_to_all([x.new_empty(1) for _ in range(n)], parts_of(x), **group)), weighted,
            of_mine,
        ),
    }  # fmt: skip
    for root in (0, n - 1):
        here = float(me == root)
        cases |= {
            f"broadcast from {root}": (lambda x, r=root: dnn.broadcast(x, r, **group), weighted, total * here),
            f"reduce to {root}": (
                lambda x, r=root: dnn.reduce(x, r, **group), lambda y, h=here: weighted(y) * h, w[root],
            ),
            f"gather to {root}": (
                lambda x, r=root: dnn.gather(x, r, **group), lambda ys, h=here: weighted_parts(ys) * h,
                w[root] * (me + 1),
            ),
            f"scatter from {root}": (
                lambda x, r=root: dnn.scatter(parts_of(x), r, **group), lambda y: y.sum() * w[me][0], first * here,
            ),
        }  # fmt: skip
    for what, (call, loss_of_mine, expected) in cases.items():
        assert torch.equal(gradient(me, device, n, call, loss_of_mine), expected), what


@pytest.mark.parametrize("world_size", [2, 3])
def test_autograd_collectives(ranks, device, world_size):
    ranks(autograd_body, world_size, device)


def names_body(rank: Rank) -> None:
    """The backend serves both device types; a group may name one of them, or another backend beside it."""
    assert dist.is_backend_available("mnnvl")
    assert dist.get_backend() == "mnnvl"
    assert dist.get_backend_config() == "cpu:mnnvl,cuda:mnnvl"
    assert dist.group.WORLD._get_backend(rank.device).name() == "mnnvl"
    beside = dist.new_group(backend="cpu:gloo,cuda:mnnvl")
    assert dist.get_backend_config(beside) == "cpu:gloo,cuda:mnnvl"
    assert beside._get_backend(torch.device("cpu")).name() == "gloo"
    alone = dist.new_group(backend=f"{rank.device.type}:mnnvl")
    assert dist.get_backend_config(alone) == f"{rank.device.type}:mnnvl"
    assert alone._get_backend(rank.device).name() == "mnnvl"


def test_what_torch_says(ranks, device):
    ranks(names_body, 2, device)
