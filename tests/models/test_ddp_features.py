"""What DistributedDataParallel can do beyond averaging: uneven inputs, hooks, mixed precision, SyncBatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import cuda_only
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import FEATURES, assert_like_alone, batch, make_model, sgd, train


def ddp(rank: Rank, net: nn.Module, **options: Any) -> DistributedDataParallel:
    ids = [rank.device.index] if rank.device.type == "cuda" else None
    return DistributedDataParallel(net, device_ids=ids, bucket_cap_mb=0.001, **options)


def powersgd_state() -> powerSGD_hook.PowerSGDState:
    """Of a rank so high that what is compressed is what was there, from the second step on."""
    return powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=34, start_powerSGD_iter=2,
                                       min_compression_rate=0.01, orthogonalization_epsilon=1e-8)  # fmt: skip


# The hook, what makes its state, and how close it stays to an uncompressed training.
HOOKS: dict[str, tuple[Callable[..., Any], Callable[[], Any], float]] = {
    "all-reduce": (default_hooks.allreduce_hook, lambda: None, 1e-5),
    "float16": (default_hooks.fp16_compress_hook, lambda: None, 1e-2),
    "float16 around another": (
        default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook), lambda: None, 1e-2,
    ),
    "PowerSGD": (powerSGD_hook.powerSGD_hook, powersgd_state, 1e-2),
}  # fmt: skip


def hook_body(rank: Rank, name: str) -> None:
    hook, make_state, tolerance = HOOKS[name]
    model = ddp(rank, make_model(rank.device))
    model.register_comm_hook(make_state(), hook)
    losses = train(model, sgd(model.parameters()), lambda step: batch(step, rank.rank, rank.device))
    assert_like_alone(rank, losses, dict(model.module.named_parameters()), tolerance)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(ranks, device, hook):
    """They chain futures of asynchronous all_reduces, one of them in float16."""
    ranks(hook_body, 2, device, args=(hook,))


def mixed_precision_body(rank: Rank) -> None:
    """DDP's own mixed precision: gradients are reduced in the low precision, weights kept in the high one."""
    from torch.nn.parallel.distributed import _MixedPrecision

    precision = _MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = ddp(rank, make_model(rank.device), mixed_precision=precision)
    losses = train(model, sgd(model.parameters()), lambda step: batch(step, rank.rank, rank.device))
    assert_like_alone(rank, losses, dict(model.module.named_parameters()), 1e-2)


@cuda_only
def test_mixed_precision(ranks):
    """torch casts on a stream of its own, with events: GPUs only."""
    ranks(mixed_precision_body, 2, "cuda")


def join_body(rank: Rank, throws: bool, zero: bool) -> None:
    """Rank r has 2 + r batches: the others go on while those that have no more shadow their collectives, which are also the
    optimizer's with `zero`."""
    model = ddp(rank, make_model(rank.device))
    optimizer = (
        ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.3) if zero else sgd(model.parameters())
    )
    joined = [model, optimizer] if zero else [model]
    x, y = batch(0, rank.rank, rank.device)
    steps = 0

    def go_on() -> None:
        nonlocal steps
        for _ in range(2 + rank.rank):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1

    if throws:
        with pytest.raises(RuntimeError, match="exhausted"), Join(joined, throw_on_early_termination=True):
            go_on()
    else:
        with Join(joined):
            go_on()
        assert steps == 2 + rank.rank
        everybodys: list[Any] = [None] * rank.world_size
        dist.all_gather_object(everybodys, [p.detach().cpu() for p in model.module.parameters()])
        for r, theirs in enumerate(everybodys):
            for mine, other in zip(everybodys[-1], theirs, strict=True):
                assert torch.equal(mine, other), f"rank {r} did not end with the last rank's weights"
    dist.barrier(device_ids=[rank.device.index] if rank.device.type == "cuda" else None)


@pytest.mark.parametrize(("throws", "zero"), [(False, False), (True, False), (False, True)])
def test_join_of_uneven_inputs(ranks, device, throws, zero):
    ranks(join_body, 3, device, args=(throws, zero))


def averager_body(rank: Rank) -> None:
    """Local SGD: ranks train apart and average their weights now and then."""
    net = make_model(rank.device)
    optimizer, averager = sgd(net.parameters()), PeriodicModelAverager(period=2, warmup_steps=0)
    for step in range(3):
        x, y = batch(step, rank.rank, rank.device)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        before = [p.detach().clone() for p in net.parameters()]
        averager.average_parameters(list(net.parameters()))
        for old, parameter in zip(before, net.parameters(), strict=True):
            expected = old.clone()
            if step % 2 == 0:
                dist.all_reduce(expected)
                expected /= rank.world_size
            torch.testing.assert_close(parameter.detach(), expected)


def test_model_averaging(ranks, device):
    ranks(averager_body, 2, device)


def sync_batch_norm_body(rank: Rank) -> None:
    """Statistics of everybody's batch: outputs and gradients are those of one process that has the whole of it."""
    shares = [batch(0, r, rank.device)[0] for r in range(rank.world_size)]
    alone, mine = nn.BatchNorm1d(FEATURES).to(rank.device), nn.BatchNorm1d(FEATURES).to(rank.device)
    model = ddp(rank, nn.SyncBatchNorm.convert_sync_batchnorm(mine))
    whole, share = torch.cat(shares).requires_grad_(), shares[rank.rank].clone().requires_grad_()
    expected, output = alone(whole), model(share)
    torch.testing.assert_close(output, expected.chunk(rank.world_size)[rank.rank])
    expected.pow(3).sum().backward()
    output.pow(3).sum().backward()
    torch.testing.assert_close(share.grad, whole.grad.chunk(rank.world_size)[rank.rank], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.module.running_var, alone.running_var)


@cuda_only
def test_sync_batch_norm(ranks):
    """torch has it for GPUs only."""
    ranks(sync_batch_norm_body, 2, "cuda")
