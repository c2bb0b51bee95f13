"""The runner of FlashInfer's tests, on a test of our own: its tests themselves are neither here nor for the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).with_name("flashinfer_suite.py")
TEST = """
import multiprocessing

import flashinfer.comm as comm
import flashinfer.comm.trtllm_mnnvl_ar as trtllm_mnnvl_ar
import pynvml
import torch
from flashinfer.comm.mapping import Mapping
from flashinfer.comm.mnnvl import CommBackend, TorchDistBackend
from flashinfer.fp4_quantization import _compute_swizzled_layout_sf_size
from flashinfer.norm import rmsnorm
from flashinfer.quantization.nvfp4_quantization_utils import NVFP44Over6Config, NVFP44Over6ErrMode, nvfp4_e4m3_max
from flashinfer.utils import get_compute_capability
from mpi4py import MPI
from tests.helper import in_child

import mnnvl_backend


def test_alias():
    assert comm.allreduce_fusion is mnnvl_backend.allreduce_fusion
    assert trtllm_mnnvl_ar.MNNVLAllReduceFusionWorkspace is mnnvl_backend.MNNVLAllReduceFusionWorkspace
    assert _compute_swizzled_layout_sf_size(1, 1) == 512
    x = torch.full((2, 4), 3.0, dtype=torch.bfloat16)
    assert torch.equal(rmsnorm(x, x[0], 0.0, enable_pdl=False), x)


def test_children_see_it_too():
    child = multiprocessing.get_context("spawn").Process(target=in_child)
    child.start()
    child.join()
    assert child.exitcode == 0
"""
HELPER = """
def in_child():
    from flashinfer.comm.mapping import Mapping
    assert Mapping(2, 1, tp_size=2).tp_rank == 1
"""


def test_runner_runs_a_checkouts_tests(tmp_path):
    tests = tmp_path / "tests"
    (tests / "comm").mkdir(parents=True)
    for folder in (tests, tests / "comm"):
        (folder / "__init__.py").touch()
    (tests / "conftest.py").write_text("import what_only_flashinfer_has")
    (tests / "helper.py").write_text(HELPER)
    (tests / "comm" / "test_alias.py").write_text(TEST)
    command = [sys.executable, str(RUNNER), str(tmp_path), "-q", "tests/comm/test_alias.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
