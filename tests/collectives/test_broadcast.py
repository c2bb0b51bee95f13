"""broadcast: every byte as the root has it."""

from __future__ import annotations

import pytest
import torch
from reference import EVERY_DTYPE, broadcast_body


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_broadcast_of_every_dtype_from_every_root(ranks, device, world_size):
    ranks(broadcast_body, world_size, device, args=(EVERY_DTYPE, [0, 1, 3, 1001]), timeout=120)


def test_broadcast_of_large_tensors(ranks, device):
    """More than a workspace holds, and not a multiple of anything."""
    options = {"workspace_bytes": 1 << 20}
    ranks(broadcast_body, 3, device, args=([torch.uint8, torch.bfloat16], [3_000_001]), options=options)
