"""torch.distributed.checkpoint on two CPU ranks: save, save in the background, and load, over mnnvl alone.

async_save wants a group that serves CPU tensors; mnnvl's does, where NCCL's needs a second backend beside it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launcher import Rank
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def values(step: int) -> torch.Tensor:
    return torch.arange(24.0).reshape(6, 4) + 100 * step


def state(rank: Rank, step: int) -> dict[str, object]:
    """A sharded tensor, a replicated one, and an object."""
    mesh = init_device_mesh("cpu", (rank.world_size,))
    assert dist.get_backend(mesh.get_group()) == "mnnvl"
    return {"sharded": distribute_tensor(values(step), mesh, [Shard(0)]), "replicated": values(step) * 2, "step": step}


def checkpoint_body(rank: Rank, folder: str, asynchronous: bool) -> None:
    saved = state(rank, 3)
    if asynchronous:
        dcp.async_save(saved, checkpoint_id=folder).result()
    else:
        dcp.save(saved, checkpoint_id=folder)
    loaded = state(rank, 0)
    dcp.load(loaded, checkpoint_id=folder)
    assert loaded["step"] == 3
    assert torch.equal(loaded["replicated"], values(3) * 2)
    sharded = loaded["sharded"]
    assert isinstance(sharded, DTensor)
    assert torch.equal(sharded.to_local(), values(3).chunk(rank.world_size)[rank.rank])
    assert torch.equal(sharded.full_tensor(), values(3))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_and_loads(ranks, tmp_path, asynchronous):
    ranks(checkpoint_body, 2, args=(str(tmp_path), asynchronous))
