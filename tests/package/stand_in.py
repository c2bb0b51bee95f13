"""A workspace for what is checked before any kernel runs."""

from __future__ import annotations

import torch

from mnnvl_backend import MNNVLAllReduceFusionWorkspace


class Stand(MNNVLAllReduceFusionWorkspace):
    """Of two ranks on the CPU, without memory."""

    def __init__(self, size: int = 1 << 20) -> None:
        self._compiled = None
        self.tp_size, self.buffer_size_bytes, self.handle, self.device = 2, size, 0, torch.device("cpu")
        super(MNNVLAllReduceFusionWorkspace, self).__init__(2, 0)

    def destroy(self) -> None:
        self._destroyed = True
