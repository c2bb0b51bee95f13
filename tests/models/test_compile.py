"""torch.compile over the backend: functional collectives and a tensor-parallel layer in one graph, without a break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from launcher import Rank
from markers import cuda_only
from torch import nn
from torch._dynamo.utils import counters
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


@dataclass
class Case:
    call: Callable[[torch.Tensor], torch.Tensor]
    expected: torch.Tensor


def functional_cases(inputs: list[torch.Tensor], me: int) -> dict[str, Case]:
    """Of two ranks; `inputs` are what the calls are made with, of all ranks."""
    group, n = dist.group.WORLD, len(inputs)
    total, stacked = torch.stack(inputs).sum(0), torch.cat(inputs)
    # Row blocks and column blocks, of which the rank gets its own of a sum.
    rows, columns = total.chunk(n)[me], total.chunk(n, 1)[me]
    sent = [1, 3]  # rows to each rank, the same from both
    uneven = torch.cat([x.split(sent)[me] for x in inputs])
    return {
        "all_reduce": Case(lambda x: funcol.all_reduce(x, "sum", group), total),
        "all_reduce, average": Case(lambda x: funcol.all_reduce(x, "avg", group), total / n),
        "all_reduce, maximum": Case(lambda x: funcol.all_reduce(x, "max", group), torch.stack(inputs).amax(0)),
        "all_reduce_coalesced": Case(
            lambda x: sum(funcol.all_reduce_coalesced([x, x + 1], "sum", group)), 2 * total + n,
        ),
        "all_gather": Case(lambda x: funcol.all_gather_tensor(x, 0, group), stacked),
        "all_gather of columns": Case(lambda x: funcol.all_gather_tensor(x, 1, group), torch.cat(inputs, 1)),
        "all_gather_coalesced": Case(
            lambda x: sum(funcol.all_gather_into_tensor_coalesced([x, x + 1], group)), 2 * stacked + 1,
        ),
        "reduce_scatter": Case(lambda x: funcol.reduce_scatter_tensor(x, "sum", 0, group), rows),
        "reduce_scatter, average": Case(lambda x: funcol.reduce_scatter_tensor(x, "avg", 0, group), rows / n),
        "reduce_scatter of columns": Case(lambda x: funcol.reduce_scatter_tensor(x, "sum", 1, group), columns),
        "reduce_scatter_coalesced": Case(
            lambda x: sum(funcol.reduce_scatter_tensor_coalesced([x, x + 1], "sum", [0, 0], group)), 2 * rows + n,
        ),
        "all_to_all": Case(
            lambda x: funcol.all_to_all_single(x, None, None, group), torch.cat([x.chunk(n)[me] for x in inputs]),
        ),
        "all_to_all, uneven": Case(lambda x: funcol.all_to_all_single(x, [sent[me]] * n, sent, group), uneven),
        "broadcast": Case(lambda x: funcol.broadcast(x, n - 1, group), inputs[-1]),
    }  # fmt: skip


def functional_body(rank: Rank, compiler: str | None) -> None:
    """All of them in one graph, and with `compiler` None as they are."""

    def inputs(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(4, 8, generator=generator).to(rank.device) for _ in range(rank.world_size)]

    calls = {what: case.call for what, case in functional_cases(inputs(0), rank.rank).items()}

    def layer(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {what: call(x * 2) + 1 for what, call in calls.items()}

    torch._dynamo.reset()
    counter = GraphCounter(compiler or "")
    run = torch.compile(layer, backend=counter, fullgraph=True, dynamic=False) if compiler else layer
    for seed in range(3):
        mine = inputs(seed)
        out = run(mine[rank.rank])
        for what, case in functional_cases([2 * x for x in mine], rank.rank).items():
            torch.testing.assert_close(out[what], case.expected + 1, msg=lambda text, w=what: f"{w}: {text}")
    assert counter.graphs == (1 if compiler else 0)


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
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
    counters.clear()
    mlp = TensorParallelMLP(rank, add_up)
    model = torch.compile(nn.Sequential(mlp, mlp), fullgraph=True, dynamic=False, **how)
    with torch.no_grad():
        for seed in range(4):
            x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(rank.device)
            torch.testing.assert_close(model(x).clone(), mlp.whole(mlp.whole(x)), rtol=1e-4, atol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0, "reduce-overhead captured nothing"
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
