"""Which of the two Lamport algorithms an all-reduce takes."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# FlashInfer's threshold, on num_tokens * hidden_dim * tp_size * element size: callers size their buffers by it.
ONESHOT_THRESHOLD_BYTES = 64 * 1024 * 8 * 2


class MNNVLAllreduceFusionStrategy(Enum):
    """FlashInfer's names and values; the compiled module knows the values.

    ONESHOT: every rank sends its whole tensor to every peer; lowest latency. TWOSHOT: each rank reduces its share and
    sends the result to all; less traffic. AUTO: by size. All give the same bits.
    """

    ONESHOT = 0
    TWOSHOT = 1
    AUTO = 99

    @staticmethod
    def select_strategy(
        tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype
    ) -> MNNVLAllreduceFusionStrategy:
        """The strategy that AUTO stands for: ONESHOT up to 1 MiB of num_tokens * hidden_dim * tp_size elements."""
        oneshot_bytes = num_tokens * hidden_dim * tp_size * dtype.itemsize
        if oneshot_bytes <= ONESHOT_THRESHOLD_BYTES:
            return MNNVLAllreduceFusionStrategy.ONESHOT
        return MNNVLAllreduceFusionStrategy.TWOSHOT


STRATEGY_NAMES = {s.name.lower(): s for s in MNNVLAllreduceFusionStrategy}
