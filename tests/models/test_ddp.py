"""DistributedDataParallel over the backend: the same weights on every rank, and those of one process that saw it all."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

FEATURES, CLASSES, PER_RANK, STEPS = 20, 5, 6, 4


class Net(nn.Module):
    """Parameters of odd sizes, in several buckets; buffers of two dtypes, which DDP broadcasts from rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 33), nn.Tanh(), nn.Linear(33, 17))
        self.norm = nn.BatchNorm1d(17)
        self.head = nn.Linear(17, CLASSES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


def make_net(rank: int, device: torch.device, train_norm: bool) -> Net:
    """Rank's own initial weights and buffers: DDP must begin by making them rank 0's. A norm in training has the
    statistics of its rank's share of the batch, so for a comparison with one process it stays in evaluation mode."""
    torch.manual_seed(100 + rank)
    net = Net()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-1, 1)
        net.norm.running_var.uniform_(0.5, 2)
        net.norm.num_batches_tracked.fill_(10 * rank)
    net.norm.train(train_norm)
    return net.to(device)


def batch(step: int, part: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step * 100 + part * 50 + rank)
    x = torch.randn(PER_RANK, FEATURES, generator=generator)
    return x.to(device), torch.randint(0, CLASSES, (PER_RANK,), generator=generator).to(device)


def train(model: nn.Module, batches: Any, accumulate: bool, no_sync: Any = contextlib.nullcontext) -> None:
    """`batches(step, part)`; with `accumulate` two parts to a step, the first without communication."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for step in range(STEPS):
        for part in range(1 + accumulate):
            x, y = batches(step, part)
            with no_sync() if part < accumulate else contextlib.nullcontext():
                nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten().cpu() for t in model.state_dict().values()])


def same_on_every_rank(rank: Rank, tensor: torch.Tensor) -> None:
    mine = tensor.to(rank.device)
    all_of_them = [torch.empty_like(mine) for _ in range(rank.world_size)]
    dist.all_gather(all_of_them, mine)
    for r, theirs in enumerate(all_of_them):
        assert torch.equal(theirs, mine), f"ranks {rank.rank} and {r} ended differently"


def compress(state, bucket):  # DDP looks at annotations, and refuses these as strings
    """Under its own name DDP refuses the hook where there is no NCCL."""
    return bf16_compress_hook(state, bucket)


def ddp_body(rank: Rank, ddp: dict[str, Any], accumulate: bool, train_norm: bool, compressed: bool) -> None:
    device = rank.device
    net = make_net(rank.rank, device, train_norm)
    model = DistributedDataParallel(
        net, device_ids=[device.index] if device.type == "cuda" else None, bucket_cap_mb=0.001, **ddp
    )
    assert net.norm.num_batches_tracked == 0, "not rank 0's buffer"
    if compressed:
        model.register_comm_hook(None, compress)
    with torch.no_grad():
        net.norm.running_mean += rank.rank  # undone by the broadcast before the next forward
    train(model, lambda step, part: batch(step, part, rank.rank, device), accumulate, model.no_sync)
    same_on_every_rank(rank, torch.cat([p.detach().flatten() for p in net.parameters()]))
    if train_norm:
        return

    def whole(step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        shares = [batch(step, part, r, device) for r in range(rank.world_size)]
        return torch.cat([x for x, _ in shares]), torch.cat([y for _, y in shares])

    alone = make_net(0, device, train_norm)
    before = flat(alone)
    train(alone, whole, accumulate)
    tolerance = 3e-2 if compressed else 1e-5
    torch.testing.assert_close(flat(net), flat(alone), rtol=tolerance, atol=tolerance)
    assert (flat(alone) - before).abs().max() > 10 * tolerance, "nothing was learned, so nothing was compared"


# The last three make DDP all_reduce an int32 map of the parameters used.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "views, static graph": {"gradient_as_bucket_view": True, "static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_like_one_process(ranks, device, variant):
    """Final weights bit-equal on all ranks, and close to training on the concatenated batch."""
    ranks(ddp_body, 3, device, args=(VARIANTS[variant], False, False, False))


@pytest.mark.parametrize("variant", ["plain", "views"])
def test_no_sync_accumulates(ranks, device, variant):
    ranks(ddp_body, 2, device, args=(VARIANTS[variant], True, False, False))


def test_batch_norm_in_training(ranks, device):
    """Buffers change in every forward pass and are broadcast before the next; weights stay the same everywhere."""
    ranks(ddp_body, 3, device, args=({}, False, True, False))


def test_bf16_compression_hook(ranks, device):
    """A hook that works on the future of an async all_reduce."""
    ranks(ddp_body, 2, device, args=({}, False, False, True))


def mixed_backend_body(rank: Rank) -> None:
    rank.init("cpu:gloo,cuda:mnnvl")
    ddp_body(rank, {}, False, False, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_beside_gloo(ranks):
    ranks(mixed_backend_body, 2, "cuda", backend=None)
