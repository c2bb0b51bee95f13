"""A small model, its data, and its training by one process: what the ways of training in parallel are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from launcher import Rank
from torch import nn

FEATURES, CLASSES, PER_RANK, STEPS = 20, 5, 6, 4


class Block(nn.Module):
    """The last of a model has CLASSES outputs, which ranks don't divide: sharded, they are padded."""

    def __init__(self, outputs: int = FEATURES) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 34), nn.Linear(34, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def make_model(device: torch.device, seed: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), Block(CLASSES)).to(device)


def batch(step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank's share, which every rank can make."""
    generator = torch.Generator().manual_seed(step * 100 + rank)
    x = torch.randn(PER_RANK, FEATURES, generator=generator)
    return x.to(device), torch.randint(0, CLASSES, (PER_RANK,), generator=generator).to(device)


def sgd(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Callable[[int], Any]) -> torch.Tensor:
    """The losses of STEPS steps on data(step)."""
    losses = []
    for step in range(STEPS):
        x, y = data(step)
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def train_alone(ranks: Iterable[int], device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """One process that sees the shares of all `ranks` as one batch: its model and losses."""
    model = make_model(device)

    def whole(step: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat(parts) for parts in zip(*[batch(step, r, device) for r in ranks], strict=True))

    return model, train(model, sgd(model.parameters()), whole)


def assert_like_alone(
    rank: Rank, losses: torch.Tensor, parameters: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """The parameters of a data-parallel training, whole, and the mean of its losses are those of one process."""
    alone, expected = train_alone(range(rank.world_size), rank.device)
    mean = losses.clone()
    dist.all_reduce(mean)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(mean / rank.world_size, expected, **close)
    before = dict(make_model(rank.device).named_parameters())
    assert parameters.keys() == before.keys()
    for name, value in alone.named_parameters():
        torch.testing.assert_close(
            parameters[name].detach(), value.detach(), **close, msg=lambda m, n=name: f"{n}: {m}"
        )
    moved = max((value - before[name]).abs().max().item() for name, value in alone.named_parameters())
    assert moved > 10 * tolerance, "nothing was learned, so nothing was compared"
