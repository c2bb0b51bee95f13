"""FlashInfer's own tests of its MNNVL all-reduces, run against this package. They are not in this tree:

    torchrun --nproc-per-node 2 tests/conformance/flashinfer_suite.py CHECKOUT [arguments of pytest]

CHECKOUT is FlashInfer's source tree, of which tests/ is used and nothing else. Its tests import `flashinfer`, which is a
package of re-exports here, written to a temporary folder that goes before everything else on the path, also of the
processes that tests start. What they import besides has a stand-in: pynvml, which they don't use, and mpi4py if it is
not installed (a world of one, which makes them take ranks from torchrun's variables). The folder's conftest.py files need
the whole of FlashInfer and are left out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "test_trtllm_mnnvl_allreduce.py",
    "test_trtllm_mnnvl_allreduce_dynamic_fp8_quant.py",
    "test_trtllm_mnnvl_allreduce_custom_comm.py",
)
SAME = ("allreduce", "mapping", "mnnvl", "trtllm_mnnvl_ar", "workspace_base")  # modules of flashinfer.comm

NORM = '''
import torch

def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    """In float32, rounded once."""
    x = input.float()
    result = (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()).to(input.dtype)
    return result if out is None else out.copy_(result)
'''
UTILS = """
import torch

def get_compute_capability(device):
    return torch.cuda.get_device_capability(device)

def round_up(x, multiple):
    return -(-x // multiple) * multiple
"""
FP4 = """
from mnnvl_backend import compute_fp4_swizzled_layout_sf_size as _compute_swizzled_layout_sf_size
"""
# Of the reference of another quantization, which the helpers of the tests define beside the one that is used.
NVFP4 = """
class NVFP44Over6Config: ...
class NVFP44Over6ErrMode: ...
def nvfp4_e4m3_max(config): return 448.0
"""
MPI = """
class _World:
    def Get_rank(self): return 0
    def Get_size(self): return 1
    def Barrier(self): pass

class MPI:
    COMM_WORLD = _World()
"""
NVML = """
def nvmlInit(): pass
"""


def sources() -> dict[str, str]:
    """Path -> text of each module."""
    modules = {
        "flashinfer/__init__.py": "",
        "flashinfer/comm/__init__.py": "from mnnvl_backend.flashinfer.comm import *\n",
        "flashinfer/norm.py": NORM,
        "flashinfer/utils.py": UTILS,
        "flashinfer/fp4_quantization.py": FP4,
        "flashinfer/quantization/__init__.py": "",
        "pynvml.py": NVML,
        "flashinfer/quantization/nvfp4_quantization_utils.py": NVFP4,
    }
    for name in SAME:
        modules[f"flashinfer/comm/{name}.py"] = f"from mnnvl_backend.flashinfer.comm.{name} import *\n"
    if importlib.util.find_spec("mpi4py") is None:
        modules["mpi4py.py"] = MPI
    return modules


def write(folder: Path) -> None:
    for path, text in sources().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


class Session:
    """What the tests' conftest.py does, and ranks that share GPUs: gloo takes NCCL's place then, which refuses them."""

    def pytest_configure(self) -> None:
        import torch  # loads this package, so not before the path is set
        import torch.distributed as dist

        init = dist.init_process_group
        gpus = torch.cuda.device_count()
        if 0 < gpus < int(os.environ.get("WORLD_SIZE", "1")):
            dist.init_process_group = lambda backend, **rest: init("gloo", **rest)
            os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % gpus)

    def pytest_sessionfinish(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def run(checkout: Path, arguments: list[str]) -> int:
    """pytest's exit status. `arguments` that name tests take the place of the three files."""
    with tempfile.TemporaryDirectory(prefix="flashinfer_alias") as folder:
        write(Path(folder))
        path = [folder, str(ROOT), str(checkout)]
        sys.path[:0] = path
        os.environ["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
        os.chdir(checkout)  # arguments name tests as in FlashInfer's tree
        files = [] if any(".py" in a for a in arguments) else [f"tests/comm/{name}" for name in FILES]
        options = ["--noconftest", "-p", "no:cacheprovider", f"--rootdir={checkout}", f"-c{os.devnull}"]
        return int(pytest.main([*options, *files, *arguments], plugins=[Session()]))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(run(Path(sys.argv[1]).resolve(), sys.argv[2:]))
