"""The examples, each as a user starts it: under torchrun, in processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from markers import want_gpus
from torchrun import torchrun

ROOT = Path(__file__).resolve().parents[2]


def run(ranks: int, example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """But one, the examples import nothing of the package."""
    # The working directory isn't on torchrun's path, and a tree that isn't installed registers nothing by itself.
    start = (
        "import sys, runpy, mnnvl_backend; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    program = [sys.executable, "-c", start, str(ROOT / "examples" / example)]
    return torchrun(ranks, "--no-python", *program, *arguments, timeout=100)


def losses(ranks: int, example: str, told: str, *arguments: str) -> list[float]:
    """The first and the last that a training tells, behind every tenth; it has learned."""
    done = run(ranks, example, *arguments)
    assert done.returncode == 0, done.stderr
    *steps, summary = done.stdout.splitlines()
    assert [line.split(":")[0] for line in steps] == [f"step {i}" for i in range(0, 10 * len(steps), 10)], done.stdout
    match = re.fullmatch(rf"{told}: loss (\S+), then (\S+)", summary)
    assert match, done.stdout
    first, last = map(float, match.groups())
    assert last < first / 2
    return [first, last]


def test_ddp(device):
    ranks = 2 if device == "cpu" else min(4, max(2, torch.cuda.device_count()))
    losses(ranks, "ddp.py", f"{ranks} ranks on {device}, parameters equal", "--device", device)


def test_ddp_says_when_nothing_was_learned():
    """Five steps are the first and the last five at once: the examples' own check must be able to fail."""
    done = run(1, "ddp.py", "--device", "cpu", "--steps", "5")
    assert done.returncode != 0
    assert "the loss did not fall" in done.stderr


def test_pipeline(device):
    """Both ways train alike: the same numbers move."""
    told = [
        losses(2, "pipeline.py", f"2 stages on {device}, {mode}", "--device", device, "--mode", mode)
        for mode in ("1f1b", "send-recv")
    ]
    assert told[0] == pytest.approx(told[1], rel=0.01)


def test_pipeline_of_three_stages():
    """The middle one both receives and sends, either way."""
    losses(3, "pipeline.py", "3 stages on cpu, send-recv", "--device", "cpu", "--mode", "send-recv")


@pytest.mark.parametrize("example", ["fsdp2.py", "tensor_parallel.py"])
def test_parallel_over_a_mesh(device, example):
    want_gpus(device, 2)
    losses(2, example, f"2 ranks on {device}", "--device", device, "--steps", "60")


def test_expert_parallel(device):
    losses(2, "expert_parallel.py", f"4 experts on 2 ranks, {device}", "--device", device)


def test_tensor_parallel_decode(device):
    """Fused, with the plain function, and with all_reduce of torch.distributed: the same tokens."""
    other = "gloo" if device == "cpu" else "nccl"
    want_gpus(device, 2)
    first = []
    for how in (["mnnvl"], ["mnnvl", "--unfused"], [other]):
        done = run(2, "tensor_parallel_decode.py", "--device", device, "--backend", *how)
        assert done.returncode == 0, done.stderr
        sequence, summary = done.stdout.splitlines()
        captured = "CUDA graph" if device == "cuda" else "eager"
        assert summary == f"2 ranks on {device}, {captured}: 32 tokens of 4 sequences, as on one rank"
        assert len(set(sequence.split()[2:])) > 5, f"one word over and over: {sequence}"
        first.append(sequence)
    assert first[0] == first[1] == first[2]
