"""DTensor and what is built on it, over the backend: redistribution, tensor and sequence parallelism, parallel loss, context
parallelism; each against the same numbers on one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import two_gpus, want_gpus
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel, implicit_replication
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from training import batch, make_model, sgd, train, train_alone


def redistribute_body(rank: Rank, rows: int) -> None:
    """Shard to another Shard is an all_to_all, Partial to Shard a reduce_scatter, Partial to Replicate an all_reduce, Shard to
    Replicate an all_gather; odd sizes are padded. Then back through autograd."""
    n, device = rank.world_size, rank.device
    mesh = init_device_mesh(device.type, (n,))
    whole = torch.randn(rows, 7, 5, generator=torch.Generator().manual_seed(3)).to(device)
    placements = [Replicate(), Shard(0), Shard(1), Shard(2)]
    for source, target in itertools.product([*placements, Partial(), Partial("max"), Partial("avg")], placements):
        what = f"{rows} rows, {source} to {target}"
        if isinstance(source, Partial):
            part = whole if source.reduce_op != "sum" else whole * (rank.rank + 1)
            start = DTensor.from_local(part, mesh, [source])
            expected = whole if source.reduce_op != "sum" else whole * (n * (n + 1) / 2)
        else:
            start, expected = distribute_tensor(whole, mesh, [source]), whole
        moved = start.redistribute(mesh, [target])
        assert moved.placements == (target,), what
        torch.testing.assert_close(moved.full_tensor(), expected, msg=lambda text, w=what: f"{w}: {text}")
        if isinstance(source, Shard):
            leaf = start.detach().requires_grad_()
            (leaf.redistribute(mesh, [target]) * 3).sum().backward()
            assert torch.equal(leaf.grad.full_tensor(), torch.full_like(whole, 3)), what


@pytest.mark.parametrize(("world_size", "rows"), [(2, 8), (3, 4)])
def test_redistribute(ranks, device, world_size, rows):
    want_gpus(device, world_size)
    ranks(redistribute_body, world_size, device, args=(rows,))


def matmul_body(rank: Rank) -> None:
    """On a mesh of two dimensions, with operands laid out otherwise than the result."""
    device = rank.device
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("rows", "columns"))
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(shape, generator=generator).to(device) for shape in ((6, 9), (9, 4)))
    for left, right in itertools.product([Replicate(), Shard(0), Shard(1)], repeat=2):
        product = distribute_tensor(a, mesh, [left, right]) @ distribute_tensor(b, mesh, [right, left])
        torch.testing.assert_close(product.full_tensor(), a @ b, msg=lambda text, w=(left, right): f"{w}: {text}")


def test_matmul_on_two_dimensions(ranks, device):
    want_gpus(device, 4)
    ranks(matmul_body, 4, device)


class Net(nn.Module):
    """As a transformer's block without attention: norms run on a share of the sequence, the rest on one of the features."""

    WIDTH, HIDDEN, WORDS = 16, 24, 12

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.WORDS, self.WIDTH)
        self.norm, self.up, self.down = (
            nn.LayerNorm(self.WIDTH), nn.Linear(self.WIDTH, self.HIDDEN), nn.Linear(self.HIDDEN, self.WIDTH),
        )  # fmt: skip
        self.head = nn.Linear(self.WIDTH, self.WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        return self.head(self.down(torch.tanh(self.up(self.norm(x)))))


SEQUENCE = Shard(1)
PLAN: dict[str, Any] = {
    "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=SEQUENCE),
    "down": RowwiseParallel(output_layouts=SEQUENCE),
}
WHOLE_HEAD = ColwiseParallel(input_layouts=SEQUENCE, output_layouts=Replicate())
SPLIT_HEAD = ColwiseParallel(input_layouts=SEQUENCE, output_layouts=Shard(-1), use_local_output=False)


def net_losses(net: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """Of four steps that learn the next word."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.5), []
    for step in range(4):
        words = torch.randint(0, Net.WORDS, (3, 9), generator=torch.Generator().manual_seed(step)).to(device)
        loss = nn.functional.cross_entropy(net(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.full_tensor() if isinstance(loss, DTensor) else loss)
    return [loss.detach() for loss in losses]


def tensor_parallel_body(rank: Rank, split_loss: bool) -> None:
    device = rank.device
    mesh = init_device_mesh(device.type, (rank.world_size,))
    torch.manual_seed(1)
    alone = Net().to(device)
    torch.manual_seed(1)
    net = parallelize_module(Net().to(device), mesh, {**PLAN, "head": SPLIT_HEAD if split_loss else WHOLE_HEAD})
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    if split_loss:
        with loss_parallel():
            losses = net_losses(net, device)
    else:
        losses = net_losses(net, device)
    torch.testing.assert_close(losses, net_losses(alone, device))
    for name, parameter in net.named_parameters():
        expected = alone.get_parameter(name)
        torch.testing.assert_close(parameter.full_tensor(), expected, msg=lambda text, n=name: f"{n}: {text}")
        assert (expected - before[name]).abs().max() > 1e-3, f"{name} was not trained, so nothing was compared"


@pytest.mark.parametrize("split_loss", [False, True])
def test_tensor_and_sequence_parallel(ranks, device, split_loss):
    """With the whole loss on each rank, and with one that never puts the logits together."""
    want_gpus(device, 2)
    ranks(tensor_parallel_body, 2, device, args=(split_loss,))


def two_dimensional_body(rank: Rank) -> None:
    """FSDP2 over tensor parallelism, a mesh of 2x2."""
    device = rank.device
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("data", "tensor"))
    model = make_model(device)
    for block in model:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    losses = train(model, sgd(model.parameters()), lambda step: batch(step, mesh["data"].get_local_rank(), device))
    alone, expected = train_alone(range(2), device)
    dist.all_reduce(losses, group=mesh["data"].get_group())
    torch.testing.assert_close(losses / 2, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), alone.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_fsdp_over_tensor_parallel(ranks, device):
    want_gpus(device, 4)
    ranks(two_dimensional_body, 4, device)


def prepared_input_body(rank: Rank) -> None:
    """A rank's share of the rows goes in, plain tensors mix with distributed ones, and dropout draws alike."""
    device, n = rank.device, rank.world_size
    mesh = init_device_mesh(device.type, (n,))
    torch.manual_seed(2)
    layer = nn.Linear(6, 4).to(device)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    prepared = PrepareModuleInput(
        input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),), use_local_output=True
    )
    parallelize_module(layer, mesh, prepared)
    rows = [torch.full((2, 6), float(r + 1), device=device) for r in range(n)]
    torch.testing.assert_close(layer(rows[rank.rank]), torch.cat(rows) @ weight.T + bias)
    with implicit_replication():
        mixed = distribute_tensor(torch.cat(rows), mesh, [Shard(0)]) + torch.ones(6, device=device)
    assert torch.equal(mixed.full_tensor(), torch.cat(rows) + 1)


def test_inputs_are_put_together(ranks, device):
    want_gpus(device, 2)
    ranks(prepared_input_body, 2, device)


def context_parallel_body(rank: Rank, rotate: str) -> None:
    """Attention over a sequence of which each rank has a part: keys and values go around, or to everybody at once."""
    set_rotate_method(rotate)
    device, n = rank.device, rank.world_size
    mesh = init_device_mesh(device.type, (n,))
    generator = torch.Generator().manual_seed(9)
    shape = (2, 4, 64 * n, 32)
    whole = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(3)]
    mine = [x.clone() for x in whole]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        expected = nn.functional.scaled_dot_product_attention(*whole, is_causal=True)
        with context_parallel(mesh, buffers=[*mine, expected], buffer_seq_dims=[2] * 4, no_restore_buffers={expected}):
            attended = nn.functional.scaled_dot_product_attention(*mine, is_causal=True)
            torch.testing.assert_close(attended, expected, rtol=2e-2, atol=2e-2)


@two_gpus
@pytest.mark.parametrize("rotate", ["allgather", "alltoall"])
def test_context_parallel(ranks, rotate):
    """torch has its attention for GPUs only."""
    ranks(context_parallel_body, 2, "cuda", args=(rotate,))
