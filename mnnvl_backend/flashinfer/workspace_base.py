"""What every workspace of the unified API has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch


class AllReduceFusionWorkspace(ABC):
    """The memory behind allreduce_fusion, under FlashInfer's name. Its class decides who computes.

    Attributes:
        world_size, rank: of the ranks that share it.
    """

    world_size: int
    rank: int
    _destroyed: bool = True  # until it is made; callers of FlashInfer read it by this name

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank, self._destroyed = world_size, rank, False

    @property
    @abstractmethod
    def backend(self) -> str:
        """The name by which create_allreduce_fusion_workspace makes one."""

    @abstractmethod
    def destroy(self) -> None:
        """Frees it; idempotent."""

    @abstractmethod
    def is_buffer_size_sufficient(
        self,
        tp_size: int,
        num_tokens: int,
        hidden_dim: int,
        dtype: torch.dtype,
        strategy: Any = None,
        *,
        use_oneshot: bool | None = None,
    ) -> bool:
        """Whether an all-reduce of [num_tokens, hidden_dim] fits."""
