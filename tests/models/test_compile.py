"""torch.compile over the backend: functional collectives and a tensor-parallel layer in one graph, without a break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from launcher import Rank
from markers import cuda_only
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import assert_like_alone, batch, make_model, sgd, train

from mnnvl_backend import Mapping, MNNVLAllReduceFusionWorkspace, trtllm_mnnvl_allreduce

ROWS, WIDTH, HIDDEN = 6, 8, 12


class GraphCounter:
    """A compiler that counts what it is given: one graph means no break."""

    def __init__(self, inner: str = "aot_eager") -> None:
        self.inner, self.graphs = inner, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        self.graphs += 1
        return lookup_backend(self.inner)(graph, inputs)


def functional_calls(n: int, uneven: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    group = dist.group.WORLD
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "all_reduce": lambda x: funcol.all_reduce(x, "sum", group),
        "all_reduce, average": lambda x: funcol.all_reduce(x, "avg", group),
        "all_reduce_coalesced": lambda x: sum(funcol.all_reduce_coalesced([x, x + 1], "sum", group)),
        "all_gather": lambda x: funcol.all_gather_tensor(x, 0, group),
        "all_gather of columns": lambda x: funcol.all_gather_tensor(x, 1, group),
        "all_gather_coalesced": lambda x: sum(funcol.all_gather_into_tensor_coalesced([x, x + 1], group)),
        "reduce_scatter": lambda x: funcol.reduce_scatter_tensor(x, "sum", 0, group),
        "reduce_scatter of columns": lambda x: funcol.reduce_scatter_tensor(x, "sum", 1, group),
        "reduce_scatter_coalesced": lambda x: sum(
            funcol.reduce_scatter_tensor_coalesced([x, x + 1], "sum", [0, 0], group)
        ),
        "all_to_all": lambda x: funcol.all_to_all_single(x, None, None, group),
        "broadcast": lambda x: funcol.broadcast(x, n - 1, group),
    }
    if uneven:
        rank = dist.get_rank()  # what goes to a rank is as many rows as its number says, and the rest to the last
        calls["all_to_all, uneven"] = lambda x: funcol.all_to_all_single(x, [1 + 2 * rank] * 2, [1, 3], group)
    return calls


def functional_body(rank: Rank, compiler: str) -> None:
    """All of them in one graph; what comes out is what comes out uncompiled."""
    n = rank.world_size
    calls = functional_calls(n, n == 2)

    def layer(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {what: call(x * 2).cos() + 1 for what, call in calls.items()}

    torch._dynamo.reset()
    counter = GraphCounter(compiler)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        x = torch.randn(4, 4 * n, generator=torch.Generator().manual_seed(10 * seed + rank.rank)).to(rank.device)
        out, expected = compiled(x), layer(x)
        for what in calls:
            torch.testing.assert_close(out[what], expected[what], msg=lambda text, w=what: f"{w}: {text}")
    assert counter.graphs == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_functional_collectives(ranks, device, compiler):
    ranks(functional_body, 2, device, args=(compiler,), timeout=110)


class TensorParallelMLP(nn.Module):
    """Columns of the first layer and rows of the second: what comes out is a part of a sum, which `add_up` finishes."""

    def __init__(self, rank: Rank, add_up: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        n, device = rank.world_size, rank.device
        up, down = (torch.randn(shape, generator=generator) for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN)))
        self.whole_up, self.whole_down = up.to(device), down.to(device)
        self.up = nn.Parameter(self.whole_up.chunk(n)[rank.rank].clone())
        self.down = nn.Parameter(self.whole_down.chunk(n, dim=1)[rank.rank].clone())
        self.add_up = add_up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.add_up(nn.functional.linear(torch.relu(nn.functional.linear(x, self.up)), self.down)))

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(nn.functional.linear(torch.relu(nn.functional.linear(x, self.whole_up)), self.whole_down))


def in_place(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


def functional(x: torch.Tensor) -> torch.Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def mlp_body(rank: Rank, kind: str, how: dict[str, Any]) -> None:
    """Two layers of two, so that a collective's output is another's input, over three batches in one graph."""
    n = rank.world_size
    workspace = None
    add_up = {"in place": in_place, "functional": functional}.get(kind)
    if add_up is None:
        mapping = Mapping(n, rank.rank, tp_size=n)
        workspace = MNNVLAllReduceFusionWorkspace(
            mapping, max_num_tokens=ROWS, hidden_dim=WIDTH, dtype=torch.float32, device=rank.device
        )

        def add_up(x: torch.Tensor) -> torch.Tensor:
            return trtllm_mnnvl_allreduce(x, workspace, False)

    torch._dynamo.reset()
    mlp = TensorParallelMLP(rank, add_up)
    model = torch.compile(nn.Sequential(mlp, mlp), fullgraph=True, dynamic=False, **how)
    with torch.no_grad():
        for seed in range(4):
            x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(rank.device)
            torch.testing.assert_close(model(x).clone(), mlp.whole(mlp.whole(x)), rtol=1e-4, atol=1e-3)
    if workspace is not None:
        torch._dynamo.reset()  # graphs that hold calls on it go first
        workspace.destroy()


KINDS = ["in place", "functional", "trtllm_mnnvl_allreduce"]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallel_layers(ranks, device, kind, compiler):
    """Of the function a graph holds one opaque call."""
    ranks(mlp_body, 2, device, args=(kind, {"backend": compiler}), timeout=110)


@cuda_only
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallel_layers_in_cuda_graphs(ranks, kind):
    """reduce-overhead captures what inductor made, collectives too, and replays it."""
    ranks(mlp_body, 2, "cuda", args=(kind, {"mode": "reduce-overhead"}), timeout=110)


def ddp_body(rank: Rank) -> None:
    """DDP's hooks start all_reduces in the middle of a compiled backward pass."""
    ids = [rank.device.index] if rank.device.type == "cuda" else None
    net = make_model(rank.device)
    torch._dynamo.reset()
    model = torch.compile(DistributedDataParallel(net, device_ids=ids), backend="aot_eager")
    losses = train(model, sgd(net.parameters()), lambda step: batch(step, rank.rank, rank.device))
    assert_like_alone(rank, losses, dict(net.named_parameters()))


def test_compiled_ddp(ranks, device):
    ranks(ddp_body, 2, device, timeout=110)
