"""Pipeline-parallel training over the backend "mnnvl", on CPU or GPUs, one stage of the model a rank:

    torchrun --nproc-per-node 2 examples/pipeline.py                    # 1F1B, by torch.distributed.pipelining
    torchrun --nproc-per-node 2 examples/pipeline.py --mode send-recv   # the same numbers by plain send and recv

Activations go to the next rank, their gradients back to the one before. At the end the loss must have fallen.
"""

import common
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

FEATURES, HIDDEN, BATCH, MICROBATCHES = 32, 64, 128, 8


def make_stage(rank: int, world_size: int) -> nn.Module:
    """Rank's part of the model: in from FEATURES at the first, out to one number at the last."""
    torch.manual_seed(rank)
    inputs, outputs = (FEATURES if rank == 0 else HIDDEN), (1 if rank == world_size - 1 else HIDDEN)
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


def batches(steps: int, device: torch.device):
    """y = |x|² / FEATURES of random points; the same on every rank, of which the first needs x and the last y."""
    points = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(BATCH, FEATURES, generator=points).to(device)
        yield x, x.square().mean(1, keepdim=True)


class Schedule1F1BTrainer:
    """torch.distributed.pipelining finds out what is sent, and when."""

    def __init__(self, stage: nn.Module, device: torch.device) -> None:
        rank, self.last = dist.get_rank(), dist.get_world_size() - 1
        self.rank = rank
        pipeline_stage = PipelineStage(stage, rank, self.last + 1, device)
        self.schedule = Schedule1F1B(pipeline_stage, MICROBATCHES, loss_fn=nn.functional.mse_loss)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Gradients of the whole batch; returns its loss, which only the last rank knows."""
        losses: list[torch.Tensor] = []
        self.schedule.step(
            *([x] if self.rank == 0 else []), target=y if self.rank == self.last else None, losses=losses
        )
        return torch.stack(losses).mean() if losses else torch.zeros((), device=x.device)


class SendRecvTrainer:
    """All micro-batches forward, then all backward. Messages of a pair arrive in order, so they need no names."""

    def __init__(self, stage: nn.Module, device: torch.device) -> None:
        self.stage, self.rank, self.last = stage, dist.get_rank(), dist.get_world_size() - 1

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inputs, outputs, sends = [], [], []
        for part in x.chunk(MICROBATCHES):
            if self.rank > 0:
                part = torch.empty(len(part), HIDDEN, device=x.device)
                dist.recv(part, self.rank - 1)
                part.requires_grad_()
            inputs.append(part)
            outputs.append(self.stage(part))
            if self.rank < self.last:  # the next micro-batch is computed while this is on its way
                sends.append(dist.isend(outputs[-1].detach(), self.rank + 1))
        loss = torch.zeros((), device=x.device)
        for part, output, target in zip(inputs, outputs, y.chunk(MICROBATCHES), strict=True):
            if self.rank == self.last:
                share = nn.functional.mse_loss(output, target) / MICROBATCHES
                share.backward()
                loss += share.detach()
            else:
                gradient = torch.empty_like(output)
                dist.recv(gradient, self.rank + 1)
                output.backward(gradient)
            if self.rank > 0:
                sends.append(dist.isend(part.grad, self.rank - 1))
        for work in sends:
            work.wait()
        return loss


def train(device: torch.device, steps: int, mode: str = "1f1b") -> list[float]:
    """The loss of each step, on every rank."""
    stage = make_stage(dist.get_rank(), dist.get_world_size()).to(device)
    trainer = (Schedule1F1BTrainer if mode == "1f1b" else SendRecvTrainer)(stage, device)
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
    losses = []
    for x, y in batches(steps, device):
        losses.append(trainer.step(x, y))
        optimizer.step()
        optimizer.zero_grad()
    curve = torch.stack(losses)
    dist.broadcast(curve, dist.get_world_size() - 1)  # from the rank that has them
    return curve.tolist()


def main() -> None:
    parser = common.parser(__doc__, steps=150)
    parser.add_argument("--mode", choices=["1f1b", "send-recv"], default="1f1b")
    arguments = parser.parse_args()
    device = common.start(arguments)
    losses = train(device, arguments.steps, arguments.mode)
    common.report(f"{dist.get_world_size()} stages on {device.type}, {arguments.mode}", losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
