"""What torch builds on a backend: functional collectives, torch.compile, DTensor, the debug wrapper."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import (
    all_reduce_works,
    assert_bits,
    broadcast_body,
    gather_body,
    random_input,
    rank_order_sum,
    uneven_objects_body,
)


def functional_body(rank: Rank) -> None:
    import torch.distributed._functional_collectives as funcol

    n, group = rank.world_size, dist.group.WORLD
    x = torch.full((3, 2), float(rank.rank + 1), device=rank.device)
    reduced = funcol.wait_tensor(funcol.all_reduce(x, "sum", group))
    assert reduced.tolist() == [[n * (n + 1) / 2] * 2] * 3
    assert funcol.wait_tensor(funcol.broadcast(x, 1, group)).tolist() == [[2.0] * 2] * 3


def functional_gather_body(rank: Rank) -> None:
    import torch.distributed._functional_collectives as funcol

    x = torch.full((3, 2), float(rank.rank + 1), device=rank.device)
    gathered = funcol.wait_tensor(funcol.all_gather_tensor(x, 0, dist.group.WORLD))
    assert gathered[:, 0].tolist() == [float(r + 1) for r in range(rank.world_size) for _ in range(3)]


def test_functional_collectives(ranks, device):
    ranks(functional_body, 2, device)


def test_functional_all_gather(ranks, device):
    """torch 2.13 takes it through allgather_into_tensor_coalesced."""
    ranks(functional_gather_body, 2, device)


def compiled_body(rank: Rank) -> None:
    def step(x):
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    inputs = [random_input(r, 50, torch.float32, 3) for r in range(rank.world_size)]
    expected = rank_order_sum([x * 2 for x in inputs]) + 1
    x = inputs[rank.rank].to(rank.device)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(2):
            assert_bits(compiled(x), expected, backend)


def test_torch_compile(ranks, device):
    ranks(compiled_body, 2, device, timeout=110)


def dtensor_body(rank: Rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    n = rank.world_size
    mesh = init_device_mesh(rank.device.type, (n,))
    local = torch.full((2, 3), float(rank.rank + 1), device=rank.device)
    reduced = DTensor.from_local(local, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()
    assert reduced.tolist() == [[n * (n + 1) / 2] * 3] * 2
    full = DTensor.from_local(local, mesh, [Shard(0)]).full_tensor()
    assert full[:, 0].tolist() == [float(r + 1) for r in range(n) for _ in range(2)]


def test_dtensor(ranks, device):
    """Partial to replicated is an all_reduce, sharded to replicated an all_gather."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("a mesh wants a GPU per rank")
    ranks(dtensor_body, 2, device)


DETAIL = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}


def detail_body(rank: Rank) -> None:
    all_reduce_works(rank)
    broadcast_body(rank, [torch.int64, torch.bfloat16], [0, 5])
    gather_body(rank, [torch.uint8, torch.float32], [3])
    dist.barrier()
    uneven_objects_body(rank)
    group = dist.new_group([0, 2], backend="mnnvl", pg_options=rank.options())
    if rank.rank != 1:
        all_reduce_works(rank, group)
    mine = torch.ones(4 + (rank.rank == 1), device=rank.device)
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        dist.all_reduce(mine)
    dtype = torch.float16 if rank.rank == 1 else torch.float32
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        dist.all_reduce(torch.ones(4, dtype=dtype, device=rank.device))
    with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives"):
        dist.barrier() if rank.rank == 1 else dist.broadcast(mine, 0)
    all_reduce_works(rank)


def test_debug_detail(ranks, device):
    """Everything works under torch's debug wrapper, which reports ranks that call different things."""
    ranks(detail_body, 3, device, env=DETAIL)
