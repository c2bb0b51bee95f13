"""Where a test can run, said once."""

from __future__ import annotations

import pytest
import torch

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


def want_gpus(device: str, count: int) -> None:
    """Skips a test on CUDA for which each rank needs a GPU of its own, as a DeviceMesh does."""
    if device == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"fewer than {count} CUDA devices")
