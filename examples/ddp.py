"""Data-parallel training over the backend "mnnvl", on CPU or GPUs:

    torchrun --nproc-per-node 2 examples/ddp.py

Every rank draws its own share of each batch; DDP averages the gradients through the backend. At the end the loss must
have fallen, and all ranks must hold the same parameters, bit for bit.
"""

import common
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FEATURES, BATCH = 32, 64  # BATCH: of each rank


def same_on_all_ranks(model: nn.Module) -> bool:
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, own)
    return all(torch.equal(own, other) for other in everybodys)


def train(device: torch.device, steps: int) -> list[float]:
    """Learns y = |x|² / FEATURES from random points; the loss of each step, averaged over the ranks."""
    torch.manual_seed(dist.get_rank())  # other weights on each rank: DDP begins with those of rank 0
    net = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    model = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    points = torch.Generator().manual_seed(dist.get_rank())  # another share of the data on each rank
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, FEATURES, generator=points).to(device)
        loss = nn.functional.mse_loss(model(x).squeeze(1), x.square().mean(1))
        optimizer.zero_grad()
        loss.backward()  # DDP starts the all-reduces of the gradients while this still runs
        optimizer.step()
        losses.append(common.mean_of_ranks(loss))
    if not same_on_all_ranks(model):
        raise SystemExit("the ranks ended with different parameters")
    return losses


def main() -> None:
    arguments = common.parser(__doc__, steps=200).parse_args()
    device = common.start(arguments)
    losses = train(device, arguments.steps)
    common.report(f"{dist.get_world_size()} ranks on {device.type}, parameters equal", losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
