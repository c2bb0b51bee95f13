"""torch.distributed.checkpoint over the backend: what is saved by some ranks is loaded by others, at once or meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launcher import Rank
from markers import want_gpus
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import batch, make_model, sgd, train


def sharded(rank: Rank, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    model = make_model(rank.device, seed)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, sgd(model.parameters())


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, momentum = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": momentum}


def trained(rank: Rank, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = sharded(rank, seed)
    train(model, optimizer, lambda step: batch(step, rank.rank, rank.device))
    return model, optimizer


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach().cpu() for p in model.parameters()]


def save_body(rank: Rank, folder: str, asynchronous: bool) -> list[torch.Tensor]:
    """Returns the weights; trains on while an asynchronous save still writes, from a copy, on a thread and so in a group of
    its own."""
    model, optimizer = trained(rank, 1)
    saved = whole(model)
    if asynchronous:
        writing = dcp.async_save(state_of(model, optimizer), checkpoint_id=folder, process_group=dist.new_group())
        train(model, optimizer, lambda step: batch(step, rank.rank, rank.device))
        writing.result()
    else:
        dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    dist.barrier()
    return saved


def load_body(rank: Rank, folder: str) -> list[torch.Tensor]:
    """Into a training that was elsewhere."""
    model, optimizer = trained(rank, 2)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return whole(model)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saved_by_two_ranks_loaded_by_three(ranks, device, tmp_path: Path, asynchronous):
    """async_save wants a group that serves CPU tensors, also of a training on GPUs: this one does."""
    want_gpus(device, 3)
    saved = ranks(save_body, 2, device, args=(str(tmp_path), asynchronous))[0]
    assert list(tmp_path.glob("*.distcp")), "nothing was saved"
    for loaded in ranks(load_body, 3, device, args=(str(tmp_path),)):
        assert all(torch.equal(a, b) for a, b in zip(saved, loaded, strict=True))


def failing_save_body(rank: Rank, folder: str) -> None:
    """One rank can't write: all are told, by the group, and the group goes on."""

    class Full(dcp.FileSystemWriter):
        def write_data(self, *arguments: Any) -> Any:
            raise OSError("no space left")

    writer = (Full if rank.rank == 1 else dcp.FileSystemWriter)(folder)
    with pytest.raises(dcp.api.CheckpointException, match="no space left"):
        dcp.save({"x": torch.ones(3)}, storage_writer=writer)
    dist.barrier()


def test_a_failed_save_is_known_to_all(ranks, device, tmp_path: Path):
    ranks(failing_save_body, 2, device, args=(str(tmp_path),))
