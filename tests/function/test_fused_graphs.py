"""The fused all-reduce as an engine calls it: one workspace, batches of many sizes, in place, each size captured in a CUDA
graph (on the CPU: called), replayed in random order. Every result is compared bit by bit.

MNNVL_TEST_REPLAYS: how many (default 60).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import fused_reference as reference
import pytest
import torch
from launcher import Rank, run_ranks
from reference import random_input, reduced
from workspaces import workspace_of

import mnnvl_backend.flashinfer.comm as comm

REPLAYS = int(os.environ.get("MNNVL_TEST_REPLAYS", "60"))
TOKENS = (1, 2, 4, 8, 16, 33, 64, 67, 128, 256, 1024, 2048)  # one shot and two, clusters of each size
HIDDEN, DTYPE, EPSILON, SCALE, VARIANTS = 1024, torch.bfloat16, 1e-6, 0.05, 2
Pattern = comm.AllReduceFusionPattern


@dataclass
class Batch:
    """One size: static tensors as an engine has them, inputs by variant, and what must come of each."""

    x: torch.Tensor
    residual: torch.Tensor
    quant: torch.Tensor
    inputs: list[torch.Tensor]
    residuals: list[torch.Tensor]
    expected: list[tuple[torch.Tensor, ...]]  # norm, residual_out, and of the call without a residual quant and sum
    second: torch.Tensor
    replay: Callable[[], None] = lambda: None

    @staticmethod
    def make(rank: Rank, tokens: int, gamma: torch.Tensor) -> Batch:
        shape, n = (tokens, HIDDEN), rank.world_size
        expected, mine, residuals = [], [], []
        for variant in range(VARIANTS):
            seed = tokens * 10 + variant
            all_inputs = [random_input(r, tokens * HIDDEN, DTYPE, seed).view(shape) for r in range(n)]
            residual = random_input(n, tokens * HIDDEN, DTYPE, seed).view(shape)
            total = reduced("SUM", all_inputs)
            after = (total.float() + residual.float()).to(DTYPE)
            norm = reference.norms(after, gamma, EPSILON, 0.0)
            quant = reference.float8(reference.norms(total, gamma, EPSILON, 1.0), SCALE).values
            expected.append(tuple(t.to(rank.device) for t in (norm, after, quant, total)))
            mine.append(all_inputs[rank.rank].to(rank.device))
            residuals.append(residual.to(rank.device))
        empty = torch.empty(shape, dtype=DTYPE, device=rank.device)
        quant = torch.empty(shape, dtype=torch.float8_e4m3fn, device=rank.device)
        return Batch(empty, empty.clone(), quant, mine, residuals, expected, empty.clone())

    def fill(self, variant: int) -> None:
        self.x.copy_(self.inputs[variant])
        self.second.copy_(self.inputs[variant])
        self.residual.copy_(self.residuals[variant])

    def check(self, variant: int) -> None:
        got = (self.x, self.residual, self.quant.view(torch.uint8), self.second)
        for name, one, wanted in zip(("norm", "residual", "quant", "sum"), got, self.expected[variant], strict=True):
            assert torch.equal(one, wanted), f"{name} of {tuple(self.x.shape)}, variant {variant}"


def engine_body(rank: Rank, replays: int) -> None:
    gamma = random_input(50, HIDDEN, DTYPE, 1)
    on_device, scale = gamma.to(rank.device), torch.full((1,), SCALE, device=rank.device)
    with workspace_of(rank, max_num_tokens=max(TOKENS), hidden_dim=HIDDEN, dtype=DTYPE) as workspace:
        batches = [Batch.make(rank, tokens, gamma) for tokens in TOKENS]

        def run(batch: Batch) -> None:
            comm.allreduce_fusion(
                batch.x, workspace, Pattern.kARResidualRMSNorm, launch_with_pdl=True, norm_out=batch.x,
                residual_in=batch.residual, residual_out=batch.residual, rms_gamma=on_device, rms_eps=EPSILON,
            )  # fmt: skip
            comm.allreduce_fusion(
                batch.second, workspace, Pattern.kARResidualRMSNormFP8Quant, launch_with_pdl=True,
                residual_in=torch.zeros_like(batch.second), residual_out=batch.second, quant_out=batch.quant,
                rms_gamma=on_device, rms_eps=EPSILON, scale_factor=scale, weight_bias=1.0,
            )  # fmt: skip

        for batch in batches:
            batch.fill(0)
            run(batch)
            batch.check(0)
            batch.replay = lambda batch=batch: run(batch)
            if rank.device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                rank.meet(f"before {batch.x.shape[0]}")  # a capture waits for the device
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    run(batch)
                rank.meet(f"after {batch.x.shape[0]}")
                batch.replay = graph.replay
        chance = random.Random(1)
        for _ in range(replays):
            batch, variant = chance.choice(batches), chance.randrange(VARIANTS)
            batch.fill(variant)
            batch.replay()
            batch.check(variant)
        for batch in batches:
            batch.replay = lambda: None  # no graph may outlive the workspace
        if rank.device.type == "cuda":
            torch.cuda.synchronize()


@pytest.mark.timeout(90 + REPLAYS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_in_random_order(device, world_size):
    run_ranks(engine_body, world_size, device, args=(REPLAYS,), timeout=60 + REPLAYS)
