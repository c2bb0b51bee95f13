"""Sharded training over the backend, FSDP1, FSDP2 and ZeroRedundancyOptimizer: the losses and weights of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import want_gpus
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import Block, assert_like_alone, batch, make_model, sgd, train

BF16 = 1e-2  # tolerance of a training whose activations and gradients are bfloat16


def fsdp1_body(rank: Rank, strategy: ShardingStrategy, mixed: bool) -> None:
    """Half the ranks share a copy of the weights where the strategy is hybrid."""
    device = rank.device
    hybrid = strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
    model = FullyShardedDataParallel(
        make_model(device),
        device_mesh=init_device_mesh(device.type, (2, rank.world_size // 2) if hybrid else (rank.world_size,)),
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=device,
        use_orig_params=True,
        mixed_precision=MixedPrecision(torch.bfloat16, torch.bfloat16) if mixed else None,
    )
    norms: list[torch.Tensor] = []
    optimizer = sgd(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: norms.append(model.clip_grad_norm_(1e6)))  # clips nothing
    losses = train(model, optimizer, lambda step: batch(step, rank.rank, device))
    assert all(norm.isfinite() and norm > 0 for norm in norms)
    with FullyShardedDataParallel.summon_full_params(model):
        whole = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}
        assert_like_alone(rank, losses, whole, BF16 if mixed else 1e-5)


FSDP1 = {
    "full shard": (2, ShardingStrategy.FULL_SHARD, False),
    "gradients and optimizer": (3, ShardingStrategy.SHARD_GRAD_OP, False),
    "hybrid": (4, ShardingStrategy.HYBRID_SHARD, False),
    "bfloat16": (2, ShardingStrategy.FULL_SHARD, True),
}


@pytest.mark.parametrize("variant", FSDP1)
def test_fsdp1(ranks, device, variant):
    world_size, *arguments = FSDP1[variant]
    want_gpus(device, world_size)
    ranks(fsdp1_body, world_size, device, args=arguments)


def fsdp2_body(rank: Rank, shape: tuple[int, ...], options: dict[str, Any], divide_by_hand: bool) -> None:
    """Also with what a group of its own kind does: a gradient divided by a factor is a ReduceOp of NCCL's."""
    device = rank.device
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model = make_model(device)
    for block in model:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    if divide_by_hand:
        model.set_gradient_divide_factor(float(rank.world_size))
        for block in model:
            block.set_gradient_divide_factor(float(rank.world_size))
    losses = train(model, sgd(model.parameters()), lambda step: batch(step, rank.rank, device))
    whole = {name: p.full_tensor().to(device) for name, p in model.named_parameters()}
    assert_like_alone(rank, losses, whole, BF16 if "mp_policy" in options else 1e-5)


BFLOAT16 = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
FSDP2: dict[str, tuple[tuple[int, ...], dict[str, Any], bool]] = {
    "one dimension": ((2,), {}, False),
    "uneven shards": ((3,), {}, False),
    "no resharding": ((2,), {"reshard_after_forward": False}, False),
    "hybrid": ((2, 2), {}, False),
    "hybrid, bfloat16": ((2, 2), BFLOAT16, False),
    "bfloat16 reduced too": ((2,), {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)}, False),
    "divided by a factor": ((2,), {}, True),
}


@pytest.mark.parametrize("variant", FSDP2)
def test_fsdp2(ranks, device, variant):
    shape, options, divide_by_hand = FSDP2[variant]
    world_size = int(torch.tensor(shape).prod())
    want_gpus(device, world_size)
    ranks(fsdp2_body, world_size, device, args=(shape, options, divide_by_hand))


def test_fsdp2_under_the_debug_wrapper(ranks, device):
    want_gpus(device, 4)
    ranks(fsdp2_body, 4, device, args=((2, 2), {}, False), env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"})


def offload_body(rank: Rank) -> None:
    """Parameters and optimizer live on the CPU, collectives run on the GPU."""
    fsdp2_body(rank, (rank.world_size,), {"offload_policy": CPUOffloadPolicy()}, False)


def test_fsdp2_offloaded_to_the_cpu(ranks):
    want_gpus("cuda", 2)
    ranks(offload_body, 2, "cuda")


def zero_body(rank: Rank, bucketed: bool) -> None:
    """Each rank steps its share of the parameters and broadcasts it; the state comes together on one rank."""
    device = rank.device
    net = make_model(device)
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=bucketed)
    optimizer = ZeroRedundancyOptimizer(
        net.parameters(), torch.optim.SGD, parameters_as_bucket_view=bucketed, lr=0.3, momentum=0.9
    )
    losses = train(model, optimizer, lambda step: batch(step, rank.rank, device))
    assert_like_alone(rank, losses, dict(net.named_parameters()))
    optimizer.consolidate_state_dict(to=1)
    if rank.rank == 1:
        state = optimizer.state_dict()["state"]
        assert len(state) == len(list(net.parameters()))
        assert all(isinstance(of["momentum_buffer"], torch.Tensor) for of in state.values())


@pytest.mark.parametrize("bucketed", [False, True])
def test_zero_redundancy_optimizer(ranks, device, bucketed):
    ranks(zero_body, 2, device, args=(bucketed,))


def state_dict_body(rank: Rank) -> None:
    """A training goes on from a state dict that was gathered on rank 0 and is handed out again."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    device = rank.device
    mesh = init_device_mesh(device.type, (rank.world_size,))

    def sharded(seed: int) -> nn.Module:
        model = make_model(device, seed)
        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    options = StateDictOptions(full_state_dict=True, cpu_offload=device.type == "cpu", broadcast_from_rank0=True)
    state = get_model_state_dict(sharded(1), options=options)
    other = sharded(2)
    set_model_state_dict(other, state if rank.rank == 0 else {}, options=options)
    for name, value in make_model(device, 1).named_parameters():
        assert torch.equal(other.get_parameter(name).full_tensor(), value), name
    dist.barrier()


def test_full_state_dict(ranks, device):
    want_gpus(device, 2)
    ranks(state_dict_body, 2, device)
