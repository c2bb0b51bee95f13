"""What FlashInfer's callers ask about a device before they make a workspace. Ours is made with or without."""

from __future__ import annotations

import functools
from typing import Any

from mnnvl_backend import arguments
from mnnvl_backend.compiled import load_compiled, nccl_path


def is_multicast_supported(device_idx: int) -> bool:
    """Whether the driver says that this CUDA device supports NVLink multicast; False where there is no driver.

    Raises:
        TypeError, ValueError: not an index. RuntimeError: the compiled module can't be loaded.
    """
    return bool(_device(device_idx).get("multicast"))


def is_mnnvl_fabric_supported(device_idx: int) -> bool:
    """Whether this CUDA device exports fabric handles and has joined an NVLink fabric cluster, as multi-node needs.

    Raises:
        TypeError, ValueError: not an index. RuntimeError: the compiled module can't be loaded.
    """
    device = _device(device_idx)
    return bool(device.get("fabric_handles") and device.get("cluster_uuid"))


def _device(device_idx: int) -> dict[str, Any]:
    index = arguments.integer("device_idx", device_idx, 0)
    return next((d for d in _devices() if d["ordinal"] == index), {})


@functools.cache
def _devices() -> list[dict[str, Any]]:
    """Looked up once: it neither changes nor makes a CUDA context."""
    return list(load_compiled().probe(nccl_path())["devices"])
