"""Training with sharded parameters, gradients and optimizer state (FSDP2) over the backend "mnnvl", on CPU or GPUs:

    torchrun --nproc-per-node 2 examples/fsdp2.py

Parameters are gathered before a layer runs (all_gather), and gradients go to the ranks that own them (reduce_scatter).
At the end the loss must have fallen.
"""

import common
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

FEATURES, HIDDEN, BATCH = 32, 96, 64  # BATCH: of each rank


def train(device: torch.device, steps: int) -> list[float]:
    """Learns y = |x|² / FEATURES from random points; the loss of each step, averaged over the ranks."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU()),
        nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
        nn.Linear(HIDDEN, 1),
    ).to(device)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    points = torch.Generator().manual_seed(dist.get_rank())  # another share of the data on each rank
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, FEATURES, generator=points).to(device)
        loss = nn.functional.mse_loss(model(x).squeeze(1), x.square().mean(1))
        loss.backward()
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
