"""Fused all-reduces whose peer is late, dies, or failed before: the others raise, name it, and their device goes on. By one
shot and two, on clusters of one block and of several, also where a row has a second barrier (dynamic FP8)."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from failing import NOTICED_WITHIN, SHORT
from launcher import Died, Rank, run_ranks

from mnnvl_backend import (
    Mapping,
    MNNVLAllreduceFusionStrategy,
    MNNVLAllReduceFusionWorkspace,
    MNNVLQuantType,
    QuantizationSFLayout,
    trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant,
)

# (strategy, rows, hidden): clusters of 4 blocks, of 1, and several rows a cluster; many rows without scales go to teams
SHAPES = [("ONESHOT", 3, 8192), ("ONESHOT", 300, 512), ("TWOSHOT", 20, 8192), ("TWOSHOT", 400, 4096)]
FEW = 100


def workspace_of(rank: Rank) -> MNNVLAllReduceFusionWorkspace:
    return MNNVLAllReduceFusionWorkspace(
        Mapping(rank.world_size, rank.rank, tp_size=rank.world_size),
        buffer_size_in_bytes=16 << 20,
        device=rank.device,
        options=rank.options(timeout=SHORT),
    )


def call(rank: Rank, workspace: MNNVLAllReduceFusionWorkspace, strategy: str, rows: int, hidden: int) -> None:
    x = torch.ones(rows, hidden, dtype=torch.bfloat16).to(rank.device)
    gamma = torch.ones(hidden, dtype=torch.bfloat16).to(rank.device)
    few = {"quant_type": MNNVLQuantType.DYNAMIC_FP8}
    many = {"quant_type": MNNVLQuantType.FP8, "output_scale": 1 / 448}
    quant, _scale, residual, _norm = trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
        x, x.clone(), gamma, workspace, strategy=MNNVLAllreduceFusionStrategy[strategy],
        layout_code=QuantizationSFLayout.LINEAR, **(few if rows < FEW else many),
    )  # fmt: skip
    if rank.device.type == "cuda":
        torch.cuda.synchronize()  # it ends, whatever has happened
    residual, quant = residual.cpu(), quant.cpu().float()
    if not (residual == rank.world_size + 1).all() or not (quant == 448).all():
        call_failed(workspace)


def call_failed(workspace: MNNVLAllReduceFusionWorkspace) -> None:
    """On a GPU the next call raises what this one found."""
    one = torch.ones(1, 8, dtype=torch.bfloat16, device=workspace.device)
    trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
        one, one.clone(), one[0], workspace, quant_type=MNNVLQuantType.FP8, layout_code=QuantizationSFLayout.LINEAR
    )
    raise AssertionError("wrong numbers without a failure")


def raises(rank: Rank, workspace: MNNVLAllReduceFusionWorkspace, shape: tuple[str, int, int], limit: float) -> str:
    """The failure of the next call; and those behind it fail at once."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1\b") as raised:
        call(rank, workspace, *shape)
    assert time.monotonic() - start < limit, raised.value
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1\b"):
        call(rank, workspace, *shape)
    assert time.monotonic() - start < 1
    return str(raised.value)


def late_body(rank: Rank, shape: tuple[str, int, int]) -> str:
    workspace = workspace_of(rank)
    call(rank, workspace, *shape)
    rank.meet("ready")
    text = "fused all_reduce"
    if rank.rank != 1:
        text = raises(rank, workspace, shape, SHORT.total_seconds() + 3)
    rank.meet("failed")
    if rank.rank == 1:
        with pytest.raises(RuntimeError):
            call(rank, workspace, *shape)
    workspace.destroy()
    with workspace_of(rank) as another:
        call(rank, another, *shape)
    return text


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-{s[1]}x{s[2]}")
def test_a_rank_that_does_not_call(device, shape):
    texts = run_ranks(late_body, 3 if shape[1] == 20 else 2, device, args=(shape,))
    assert all("fused all_reduce" in text for text in texts)


def killed_body(rank: Rank, shape: tuple[str, int, int]) -> str:
    workspace = workspace_of(rank)
    for _ in range(3):
        call(rank, workspace, *shape)
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return raises(rank, workspace, shape, NOTICED_WITHIN)


@pytest.mark.parametrize("shape", SHAPES[::3], ids=lambda s: f"{s[0]}-{s[1]}x{s[2]}")
def test_a_rank_that_dies(device, shape):
    results = run_ranks(killed_body, 2, device, args=(shape,), may_die=[1])
    assert results[1] == Died(-signal.SIGKILL)
    assert "rank 1" in results[0]
