"""torch.distributed.pipelining over the backend: its schedules end with the losses and weights of one process, to the bit.

Bits and no tolerance, since a stage does what one process does to the same numbers: a pipeline only moves them. Breadth first,
the micro-batches go back in another order, so that their gradients add up to other last bits of a float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

REORDERING = ("looped BFS",)
MICROBATCHES, PER_MICROBATCH, STEPS = 8, 3, 3
WIDTHS = [24, 33, 7, 64, 5, 40, 16, 90, 10]  # between stages; as many as the most stages need

# Which stages of twice as many as ranks a rank has: the schedules of one take a sequence of two as their one.
SCHEDULES: dict[str, tuple[Any, str]] = {
    "GPipe": (ScheduleGPipe, "one"),
    "1F1B": (Schedule1F1B, "one"),
    "looped BFS": (ScheduleLoopedBFS, "loop"),
    "interleaved 1F1B": (ScheduleInterleaved1F1B, "loop"),
    "interleaved zero bubble": (ScheduleInterleavedZeroBubble, "loop"),
    "ZBV": (ScheduleZBVZeroBubble, "v"),
}


def make_stages(count: int, device: torch.device) -> list[nn.Module]:
    torch.manual_seed(7)
    return [
        nn.Sequential(nn.Linear(WIDTHS[i], WIDTHS[i + 1]), nn.Tanh(), nn.Linear(WIDTHS[i + 1], WIDTHS[i + 1])).to(
            device, torch.float64
        )
        for i in range(count)
    ]


def batch(step: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = MICROBATCHES * PER_MICROBATCH
    x, y = (torch.randn(rows, w, generator=generator, dtype=torch.float64) for w in (WIDTHS[0], width))
    return x.to(device), y.to(device)


def optimizer_of(modules: list[nn.Module]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.3, momentum=0.9)


def train_alone(stages: list[nn.Module], width: int, device: torch.device) -> list[torch.Tensor]:
    """The losses of all micro-batches."""
    optimizer, losses = optimizer_of(stages), []
    for step in range(STEPS):
        for x, y in zip(*(t.chunk(MICROBATCHES) for t in batch(step, width, device)), strict=True):
            for stage in stages:
                x = stage(x)
            loss = nn.functional.mse_loss(x, y)
            loss.backward()
            losses.append(loss.detach())
        for parameter in (p for stage in stages for p in stage.parameters()):
            assert parameter.grad is not None
            parameter.grad.div_(MICROBATCHES)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def pipeline_body(rank: Rank, schedule_name: str) -> None:
    make_schedule, style = SCHEDULES[schedule_name]
    n, me, device = rank.world_size, rank.rank, rank.device
    count = 2 * n
    own = {"one": [me], "loop": [me, me + n], "v": [me, count - 1 - me]}[style]
    modules = make_stages(count, device)
    if style == "one":
        modules, count = [nn.Sequential(*modules[2 * r : 2 * r + 2]) for r in range(n)], n
    width = WIDTHS[2 * n]
    stages = [PipelineStage(modules[i], i, count, device) for i in own]
    schedule = make_schedule(stages[0] if style == "one" else stages, MICROBATCHES, loss_fn=nn.functional.mse_loss)
    optimizer = optimizer_of([modules[i] for i in own])
    losses: list[torch.Tensor] = []
    for step in range(STEPS):
        x, y = batch(step, width, device)
        of_step: list[torch.Tensor] = []
        schedule.step(*([x] if 0 in own else []), target=y if count - 1 in own else None, losses=of_step)
        losses += [loss.detach() for loss in of_step]
        optimizer.step()
        optimizer.zero_grad()

    alone = make_stages(2 * n, device)
    before = torch.cat([p.detach().flatten() for stage in alone for p in stage.parameters()])
    expected = train_alone(alone, width, device)
    after = torch.cat([p.detach().flatten() for stage in alone for p in stage.parameters()])
    assert (after - before).abs().max() > 0.01, "nothing was learned, so nothing was compared"
    if style == "one":
        alone = [nn.Sequential(*alone[2 * r : 2 * r + 2]) for r in range(n)]
    tolerance = 1e-12 if schedule_name in REORDERING else 0.0
    if count - 1 in own:
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=tolerance, atol=tolerance)
    for i in own:
        for (name, mine), theirs in zip(modules[i].named_parameters(), alone[i].parameters(), strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, at=f"stage {i}, {name}": f"{at}: {text}"
            )
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_trains_like_one_process(ranks, device, world_size, schedule):
    if device == "cuda" and torch.cuda.device_count() < world_size:
        pytest.skip("a GPU per stage")
    ranks(pipeline_body, world_size, device, args=(schedule,), timeout=100)
