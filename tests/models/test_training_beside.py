"""The training examples for 100 steps over this backend and over torch's own, NCCL or gloo: the same losses.

bash scripts/test.sh -s tests/models/test_training_beside.py      # prints the largest deviation of each
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from markers import want_gpus

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS, TOLERANCE = 100, 1e-4  # of float32; that of one step is near 1e-7, and training makes more of it


def losses_body(rank: Rank, example: str, backends: list[str]) -> list[list[float]]:
    sys.path.insert(0, str(EXAMPLES))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train = import_module(example).train
        curves = []
        for backend in backends:
            rank.init(backend, prefix=backend)
            assert dist.get_backend() == backend
            curves.append(train(rank.device, STEPS))
            dist.destroy_process_group()
    finally:
        torch.use_deterministic_algorithms(False)
        sys.path.remove(str(EXAMPLES))
    return curves


@pytest.mark.parametrize("example", ["ddp", "fsdp2", "tensor_parallel", "pipeline", "expert_parallel"])
def test_same_losses(ranks, device, example):
    want_gpus(device, 2)
    other = "gloo" if device == "cpu" else "nccl"
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what cuBLAS wants for the same bits in each run
    for curves in ranks(
        losses_body, 2, device, args=(example, ["mnnvl", other]), backend=None, env=workspace, timeout=100
    ):
        ours, theirs = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
        assert len(theirs) == STEPS
        assert theirs[-1] < theirs[0] / 2, "nothing was learned, so nothing was compared"
        deviation = ((ours - theirs).abs() / theirs).max().item()
        print(f"{example} on {device}, {STEPS} steps: largest relative deviation from {other} {deviation:.1e}")
        assert deviation < TOLERANCE
