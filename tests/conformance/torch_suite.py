"""PyTorch's own tests of process groups ("DistributedTest", in the wheel of torch) run with BACKEND=mnnvl.

Those tests choose by the backend's name: whether they run at all, on which device, and what they expect. "mnnvl" is
treated as the backend whose place it takes (the reference): gloo on CPU, NCCL on GPUs. Two things do that, both here:

- While the module is imported, BACKEND is the reference's name. Skips are decorators, so they are decided then, and
  each test runs where the reference's would.
- Afterwards the module's BACKEND, which the tests make their groups of, is a `Stand`: "mnnvl", and equal to the
  reference's name as well, for the comparisons in bodies of tests. os.environ["BACKEND"], which bodies compare too but
  never make a group of, stays the reference's.

What a test does itself, torch's harness does around it, is done by `run_method` in ranks of tests/launcher.py, which
die on time-out and serve many tests, where torch's harness starts as many processes for each test anew.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import time
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch.distributed as dist
from launcher import Rank

MODULE = "torch.testing._internal.distributed.distributed_test"
REFERENCE = {"cpu": "gloo", "cuda": "nccl"}
ALONE = "mpi"  # torch runs some tests of CPU tensors, all_to_all's, with MPI alone
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
_suites: dict[tuple[str, str, int], ModuleType] = {}


@dataclass(frozen=True)
class Outcome:
    """Of one test, or of one rank's part in it. `reason` says why it was skipped, or how it failed."""

    status: str
    reason: str = ""
    seconds: float = 0.0


class Stand(str):
    """A backend's name that also equals the name of the backend whose place it takes. Hashed by its own."""

    reference: str

    def __new__(cls, name: str, reference: str) -> Stand:
        stand = super().__new__(cls, name)
        stand.reference = reference
        return stand

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.reference  # type: ignore[comparison-overlap]

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def stand_in_for_expecttest() -> None:
    """torch's base class of tests derives from that package's; nothing here needs more of it, nor the package."""
    if importlib.util.find_spec("expecttest") is None:
        module = ModuleType("expecttest")
        module.__spec__ = importlib.machinery.ModuleSpec("expecttest", None)
        module.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = module


def suite(backend: str, reference: str, world_size: int) -> ModuleType:
    """torch's module of tests, with `backend` in the place of `reference`.

    It reads its environment when it is imported, so there is one for each pair. The one in use stands under its name in
    sys.modules, where pickles look for its classes.
    """
    key = (backend, reference, world_size)
    if key not in _suites:
        stand_in_for_expecttest()
        os.environ.update(BACKEND=reference, WORLD_SIZE=str(world_size), INIT_METHOD="file://")
        sys.modules.pop(MODULE, None)
        _suites[key] = module = importlib.import_module(MODULE)
        module.BACKEND = Stand(backend, reference)
        for devices in ("", "CUDA_", "SEND_RECV_"):  # a plugin's calls are expected in profiles too
            getattr(module, f"{devices}PROFILING_SUPPORTED_BACKENDS").append(backend)
    sys.modules[MODULE] = _suites[key]
    return _suites[key]


def case_class(module: ModuleType) -> Any:
    """What torch's own test files make of the module's classes to run them."""

    class TestDistBackend(module.TestDistBackend, module.DistributedTest._DistTestBase):  # type: ignore[name-defined]
        pass

    return TestDistBackend


def list_methods(rank: Rank, backend: str, reference: str) -> dict[str, str | None]:
    """A body for one rank of each world size: each test's name -> why it is skipped without a look at the machine."""
    cls = case_class(suite(backend, reference, rank.world_size))
    names = unittest.TestLoader().getTestCaseNames(cls)
    return {name: getattr(getattr(cls, name), "__unittest_skip_why__", None) for name in names}


@contextmanager
def default_group(module: ModuleType, case: Any, name: str) -> Iterator[None]:
    """As torch's harness makes it. A test may destroy it, and make others."""
    timeout = timedelta(seconds=module.CUSTOM_PG_TIMEOUT.get(name, module.default_pg_timeout))
    dist.init_process_group(
        module.BACKEND, init_method=case.init_method, world_size=int(case.world_size), rank=case.rank, timeout=timeout
    )
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def skip_reason(error: unittest.SkipTest | SystemExit) -> str:
    """Tests that look at the machine skip by an exit code that stands for a reason."""
    if isinstance(error, unittest.SkipTest):
        return str(error)
    from torch.testing._internal.common_distributed import TEST_SKIPS

    reasons = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}
    if error.code not in reasons:
        raise RuntimeError(f"the test exited with {error.code!r}") from error
    return reasons[error.code]


def run_method(rank: Rank, name: str, folder: str, backend: str, reference: str) -> Outcome:
    """A body: one test on this rank, with what torch's harness gives a process: variables, an empty folder to meet in,
    a seed and a default group. A failure is raised."""
    begin = time.monotonic()
    module = suite(backend, reference, rank.world_size)
    os.environ.update(BACKEND=reference, WORLD_SIZE=str(rank.world_size), TEMP_DIR=folder)
    module.INIT_METHOD = f"file://{folder}/init_dir/shared_init_file"
    module.Barrier.barrier_id = 0
    case = case_class(module)(name)
    case.rank, case.file_name = rank.rank, f"{folder}/init_dir/default_group"
    with default_group(module, case, name):
        case._barrier()
        importlib.import_module("torch.testing._internal.common_utils").set_rng_seed()
        try:
            getattr(case, name)()
        except (unittest.SkipTest, SystemExit) as error:
            return Outcome(SKIPPED, skip_reason(error))
        case._barrier()
    return Outcome(PASSED, seconds=time.monotonic() - begin)
