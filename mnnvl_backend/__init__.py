"""A torch.distributed backend named "mnnvl": collectives as kernels over peer-mapped NVLink memory, and the same
protocols over shared host memory for CPU tensors.

    torch.distributed.init_process_group("mnnvl")        # after a plain `import torch`, or after importing this package

Importing registers a creator and nothing else: no CUDA call, no compiled module, no NCCL. The compiled module loads
with the first group or workspace, and if it can't, that is that group's error and nobody else's.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any


def _autoload() -> None:
    """Entry point of the group "torch.backends": torch calls it at the end of every `import torch`.

    Defined before this file imports anything of torch: when this package is imported first, `import torch` below us
    looks this name up in the half-initialised module. Must be fast and must never raise.
    """
    try:
        # First of all, so that the call from within this import finds `registration` not yet begun, not half done.
        import torch  # noqa: F401

        from mnnvl_backend import registration

        registration.register()
    except Exception as error:  # whatever it is: `import torch` must work for everybody
        warnings.warn(f'mnnvl_backend could not register the backend "mnnvl": {error!r}', stacklevel=2)


# Name -> module that defines it; loaded on first use, so that importing the package stays cheap.
_LAZY = {
    "MNNVL_ONE_SHOT_THRESHOLD": "flashinfer.strategy",
    "AllReduceFusionPattern": "flashinfer.quantization",
    "AllReduceFusionWorkspace": "flashinfer.workspace_base",
    "CommBackend": "flashinfer.control",
    "MNNVLAllReduceFusionWorkspace": "flashinfer.workspace",
    "MNNVLAllreduceFusionStrategy": "flashinfer.strategy",
    "MNNVLQuantType": "flashinfer.quantization",
    "MPIBackend": "flashinfer.backends",
    "Mapping": "flashinfer.mapping",
    "Options": "options",
    "QuantizationSFLayout": "flashinfer.quantization",
    "TorchDistBackend": "flashinfer.backends",
    "allreduce_fusion": "flashinfer.unified",
    "compute_fp4_swizzled_layout_sf_size": "flashinfer.quantization",
    "create_allreduce_fusion_workspace": "flashinfer.unified",
    "dump_on_signal": "flight_recorder",
    "dump_operations": "flight_recorder",
    "get_allreduce_mnnvl_workspace": "flashinfer.legacy",
    "is_mnnvl_fabric_supported": "flashinfer.hardware",
    "is_multicast_supported": "flashinfer.hardware",
    "last_operations": "flight_recorder",
    "mpi_barrier": "flashinfer.backends",
    "release_memory": "sleep",
    "restore_memory": "sleep",
    "stats": "counts",
    "trtllm_mnnvl_all_reduce": "flashinfer.legacy",
    "trtllm_mnnvl_allreduce": "flashinfer.allreduce",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm": "flashinfer.fusion",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant": "flashinfer.fusion",
    "trtllm_mnnvl_fused_allreduce_rmsnorm": "flashinfer.legacy",
}

if TYPE_CHECKING:
    __version__: str
    from mnnvl_backend.counts import stats
    from mnnvl_backend.flashinfer.allreduce import trtllm_mnnvl_allreduce
    from mnnvl_backend.flashinfer.backends import MPIBackend, TorchDistBackend, mpi_barrier
    from mnnvl_backend.flashinfer.control import CommBackend
    from mnnvl_backend.flashinfer.fusion import (
        trtllm_mnnvl_fused_allreduce_add_rmsnorm,
        trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant,
    )
    from mnnvl_backend.flashinfer.hardware import is_mnnvl_fabric_supported, is_multicast_supported
    from mnnvl_backend.flashinfer.legacy import (
        get_allreduce_mnnvl_workspace,
        trtllm_mnnvl_all_reduce,
        trtllm_mnnvl_fused_allreduce_rmsnorm,
    )
    from mnnvl_backend.flashinfer.mapping import Mapping
    from mnnvl_backend.flashinfer.quantization import (
        AllReduceFusionPattern,
        MNNVLQuantType,
        QuantizationSFLayout,
        compute_fp4_swizzled_layout_sf_size,
    )
    from mnnvl_backend.flashinfer.strategy import MNNVL_ONE_SHOT_THRESHOLD, MNNVLAllreduceFusionStrategy
    from mnnvl_backend.flashinfer.unified import allreduce_fusion, create_allreduce_fusion_workspace
    from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace
    from mnnvl_backend.flashinfer.workspace_base import AllReduceFusionWorkspace
    from mnnvl_backend.flight_recorder import dump_on_signal, dump_operations, last_operations
    from mnnvl_backend.options import Options
    from mnnvl_backend.sleep import release_memory, restore_memory

__all__ = [
    "MNNVL_ONE_SHOT_THRESHOLD",
    "AllReduceFusionPattern",
    "AllReduceFusionWorkspace",
    "CommBackend",
    "MNNVLAllReduceFusionWorkspace",
    "MNNVLAllreduceFusionStrategy",
    "MNNVLQuantType",
    "MPIBackend",
    "Mapping",
    "Options",
    "QuantizationSFLayout",
    "TorchDistBackend",
    "allreduce_fusion",
    "compute_fp4_swizzled_layout_sf_size",
    "create_allreduce_fusion_workspace",
    "dump_on_signal",
    "dump_operations",
    "get_allreduce_mnnvl_workspace",
    "is_mnnvl_fabric_supported",
    "is_multicast_supported",
    "last_operations",
    "mpi_barrier",
    "release_memory",
    "restore_memory",
    "stats",
    "trtllm_mnnvl_all_reduce",
    "trtllm_mnnvl_allreduce",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant",
    "trtllm_mnnvl_fused_allreduce_rmsnorm",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looked up in files, so not at import
        value: Any = importlib.import_module(f"{__name__}.version").version()
    elif name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__"})


_autoload()
