"""Data-parallel training over the backend "mnnvl", on CPU or GPUs:

    torchrun --nproc-per-node 2 examples/ddp.py

Every rank draws its own share of each batch; DDP averages the gradients through the backend. At the end the loss must
have fallen, and all ranks must hold the same parameters, bit for bit.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FEATURES, BATCH = 32, 64  # BATCH: of each rank


def pick_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def train(model: nn.Module, device: torch.device, steps: int) -> list[float]:
    """Learns y = |x|² / FEATURES from random points; the loss of each step, averaged over the ranks."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    points = torch.Generator().manual_seed(dist.get_rank())  # another share of the data on each rank
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, FEATURES, generator=points).to(device)
        loss = nn.functional.mse_loss(model(x).squeeze(1), x.square().mean(1))
        optimizer.zero_grad()
        loss.backward()  # DDP starts the all-reduces of the gradients while this still runs
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        losses.append(mean.item())
    return losses


def same_on_all_ranks(model: nn.Module) -> bool:
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, own)
    return all(torch.equal(own, other) for other in everybodys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()

    dist.init_process_group("mnnvl")  # installed, the package needs no import
    device = pick_device(arguments.device)
    torch.manual_seed(dist.get_rank())  # other weights on each rank: DDP begins with those of rank 0
    net = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    model = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)

    losses = train(model, device, arguments.steps)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    if not last < first / 2:
        raise SystemExit(f"the loss did not fall: {first:.4f}, then {last:.4f}")
    if not same_on_all_ranks(model):
        raise SystemExit("the ranks ended with different parameters")
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks on {device.type}: loss {first:.4f}, then {last:.4f}; parameters equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
