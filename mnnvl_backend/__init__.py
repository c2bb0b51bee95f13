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
    "MNNVLAllReduceFusionWorkspace": "flashinfer.workspace",
    "MNNVLAllreduceFusionStrategy": "flashinfer.strategy",
    "Mapping": "flashinfer.mapping",
    "Options": "options",
    "last_operations": "flight_recorder",
    "release_memory": "sleep",
    "restore_memory": "sleep",
    "trtllm_mnnvl_allreduce": "flashinfer.allreduce",
}

if TYPE_CHECKING:
    __version__: str
    from mnnvl_backend.flashinfer.allreduce import trtllm_mnnvl_allreduce
    from mnnvl_backend.flashinfer.mapping import Mapping
    from mnnvl_backend.flashinfer.strategy import MNNVLAllreduceFusionStrategy
    from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace
    from mnnvl_backend.flight_recorder import last_operations
    from mnnvl_backend.options import Options
    from mnnvl_backend.sleep import release_memory, restore_memory

__all__ = [
    "MNNVLAllReduceFusionWorkspace",
    "MNNVLAllreduceFusionStrategy",
    "Mapping",
    "Options",
    "last_operations",
    "release_memory",
    "restore_memory",
    "trtllm_mnnvl_allreduce",
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
