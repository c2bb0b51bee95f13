"""Tensor- and sequence-parallel training over the backend "mnnvl", on CPU or GPUs:

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Each rank has a part of every matrix, and between them a part of every sequence: tokens are gathered before the first
matrix of a block (all_gather) and the sums after the second are scattered (reduce_scatter). At the end the loss must
have fallen.
"""

import common
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

FEATURES, HIDDEN, BATCH, TOKENS_PER_RANK = 16, 64, 8, 6
SEQUENCE = Shard(1)  # of [batch, sequence, features]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


PLAN = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=SEQUENCE),
    "down": RowwiseParallel(output_layouts=SEQUENCE),
}


def train(device: torch.device, steps: int) -> list[float]:
    """Learns y = |x|, feature by feature, from random tokens; the loss of each step, over all tokens."""
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device.type, (n,))
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(device)
    for block in model:
        parallelize_module(block, mesh, PLAN)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    points = torch.Generator().manual_seed(0)  # the same data on every rank, of which each takes its part
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, TOKENS_PER_RANK * n, FEATURES, generator=points).chunk(n, dim=1)[rank].to(device)
        loss = nn.functional.mse_loss(model(x), x.abs())
        (loss / n).backward()  # gradients add up over the ranks
        optimizer.step()
        optimizer.zero_grad()
        losses.append(common.mean_of_ranks(loss))
    return losses


def main() -> None:
    arguments = common.parser(__doc__, steps=150).parse_args()
    device = common.start(arguments)
    losses = train(device, arguments.steps)
    common.report(f"{dist.get_world_size()} ranks on {device.type}", losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
