"""The examples, each as a user starts it: under torchrun, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With the package on the path, installed or not; an example itself imports nothing of it."""
    # The working directory isn't on torchrun's path, and a tree that isn't installed registers nothing by itself.
    start = (
        "import sys, runpy, mnnvl_backend; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python",
         sys.executable, "-c", start, str(ROOT / "examples" / example), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_ddp(device):
    ranks = 2 if device == "cpu" else min(4, max(2, torch.cuda.device_count()))
    done = torchrun(ranks, "ddp.py", "--device", device)
    assert done.returncode == 0, done.stderr
    told = re.fullmatch(rf"{ranks} ranks on {device}: loss (\S+), then (\S+); parameters equal\n", done.stdout)
    assert told, done.stdout
    assert float(told[2]) < float(told[1]) / 2


def test_ddp_says_when_nothing_was_learned():
    """Five steps are the first and the last five at once: the example's own check must be able to fail."""
    done = torchrun(1, "ddp.py", "--device", "cpu", "--steps", "5")
    assert done.returncode != 0
    assert "the loss did not fall" in done.stderr


def test_pipeline(device):
    """Both ways train alike: the same numbers move."""
    told = {}
    for mode in ("1f1b", "send-recv"):
        done = torchrun(2, "pipeline.py", "--device", device, "--mode", mode)
        assert done.returncode == 0, done.stderr
        match = re.fullmatch(rf"2 stages on {device}, {mode}: loss (\S+), then (\S+)\n", done.stdout)
        assert match, done.stdout
        told[mode] = [float(loss) for loss in match.groups()]
        assert told[mode][1] < told[mode][0] / 2
    assert told["1f1b"] == pytest.approx(told["send-recv"], rel=0.01)


def test_pipeline_of_three_stages():
    """The middle one both receives and sends, either way."""
    done = torchrun(3, "pipeline.py", "--device", "cpu", "--mode", "send-recv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 stages on cpu, send-recv: loss ")
