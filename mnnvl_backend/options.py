"""What a user passes as `pg_options`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from mnnvl_backend.flashinfer.strategy import STRATEGY_NAMES, MNNVLAllreduceFusionStrategy

# Smaller workspaces could not hold one pack per rank and stage at 72 ranks beside the signal area.
MIN_WORKSPACE_BYTES = 1 << 20


@dataclass
class Options:
    """Options of one process group or workspace. `MNNVL_*` variables, where set, override them.

    Attributes:
        timeout: deadline of every collective and of set-up; None: the group's own timeout.
        workspace_bytes: peer-mapped memory per rank and device type, at least 1 MiB; None: the default. Larger tensors
            go in chunks, so this is about speed, never about what fits.
        strategy: "auto", "oneshot", "twoshot" or an MNNVLAllreduceFusionStrategy; forces the all-reduce algorithm.
        multicast: True or "auto": multicast stores where supported and no switch forbids them; False: never.
        bootstrap: how memory handles are exchanged. "nccl": over NCCL; "store": through the c10d store, which also
            allows several ranks on one GPU; "auto": NCCL for fabric handles, the store for file descriptors, which
            NCCL can't carry. CPU tensors always use the store.

    Raises:
        TypeError, ValueError: naming the argument, when made and again when a group takes the options.
    """

    timeout: timedelta | None = None
    workspace_bytes: int | None = None
    strategy: str | MNNVLAllreduceFusionStrategy = "auto"
    multicast: bool | Literal["auto"] = "auto"
    bootstrap: Literal["auto", "nccl", "store"] = "auto"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Also called when a group takes the options: attributes may have been assigned since."""
        if self.timeout is not None:
            if not isinstance(self.timeout, timedelta):
                raise TypeError(f"Options.timeout: expected datetime.timedelta or None, got {self.timeout!r}")
            if self.timeout <= timedelta(0):
                raise ValueError(f"Options.timeout: expected a positive duration, got {self.timeout}")
        if self.workspace_bytes is not None:
            if not isinstance(self.workspace_bytes, int) or isinstance(self.workspace_bytes, bool):
                raise TypeError(f"Options.workspace_bytes: expected int or None, got {self.workspace_bytes!r}")
            if self.workspace_bytes < MIN_WORKSPACE_BYTES:
                raise ValueError(
                    f"Options.workspace_bytes: expected at least {MIN_WORKSPACE_BYTES} bytes, "
                    f"got {self.workspace_bytes}"
                )
        if not isinstance(self.strategy, MNNVLAllreduceFusionStrategy) and self.strategy not in STRATEGY_NAMES:
            raise ValueError(
                f"Options.strategy: expected one of {', '.join(map(repr, STRATEGY_NAMES))} "
                f"or an MNNVLAllreduceFusionStrategy, got {self.strategy!r}"
            )
        if not isinstance(self.multicast, bool) and self.multicast != "auto":
            raise ValueError(f"Options.multicast: expected True, False or 'auto', got {self.multicast!r}")
        if self.bootstrap not in ("auto", "nccl", "store"):
            raise ValueError(f"Options.bootstrap: expected 'auto', 'nccl' or 'store', got {self.bootstrap!r}")
