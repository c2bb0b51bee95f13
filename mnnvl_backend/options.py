"""What a user passes as `pg_options`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from mnnvl_backend import arguments
from mnnvl_backend.flashinfer.strategy import STRATEGY_NAMES, MNNVLAllreduceFusionStrategy

# Smaller workspaces could not hold one pack per rank and stage at 72 ranks beside the signal area.
MIN_WORKSPACE_BYTES = 1 << 20
MAX_WORKSPACE_BYTES = 1 << 40  # more than any device has; what is computed from it stays far from overflow
MAX_WORLD_SIZE = 72  # csrc/protocol/types.h
MAX_CTAS = 1024  # more than any GPU has multiprocessors
ASYNC_MAX_CTAS = 32
BOOTSTRAPS = ("auto", "nccl", "store")


@dataclass
class Options:
    """Options of one process group or workspace. `MNNVL_*` variables, where set, override them.

    Attributes:
        timeout: deadline of every collective and of set-up; None: the group's own timeout. However long, it is never
            an error: beyond a hundred years it counts as a hundred.
        workspace_bytes: peer-mapped memory per rank and device type, 1 MiB to 1 TiB; None: the default. Larger tensors
            go in chunks, so this is about speed, never about what fits.
        strategy: "auto", "oneshot", "twoshot" or an MNNVLAllreduceFusionStrategy; forces the all-reduce algorithm.
        multicast: True or "auto": multicast stores where supported and no switch forbids them; False: never.
        bootstrap: how memory handles are exchanged. "nccl": over NCCL; "store": through the c10d store, which also
            allows several ranks on one GPU; "auto": NCCL for fabric handles, the store for file descriptors, which
            NCCL can't carry. CPU tensors always use the store.
        pdl: launch kernels as programmatic dependents of those before (CUDA), which saves the time of a launch: they
            wait for those before they touch anything. May differ between ranks.
        max_ctas: most thread blocks of a launch, so most multiprocessors that a call takes of the GPU, 1 to 1024, the
            same on every rank; None: as many as are useful. NCCL's of the same name. Reductions other than float sums
            may take more, up to one for each lane of their messages.
        async_max_ctas: the same of asynchronous all_reduces and reduce_scatters of float sums (CUDA), which run beside
            compute: so few blocks are slower than all, and keep no more multiprocessors from it. May differ between
            ranks. 1024: as many as of synchronous ones.

    Raises:
        TypeError, ValueError: naming the argument, when made and again when a group takes the options.
    """

    timeout: timedelta | None = None
    workspace_bytes: int | None = None
    strategy: str | MNNVLAllreduceFusionStrategy = "auto"
    multicast: bool | Literal["auto"] = "auto"
    bootstrap: Literal["auto", "nccl", "store"] = "auto"
    pdl: bool = True
    max_ctas: int | None = None
    async_max_ctas: int = ASYNC_MAX_CTAS

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Also called when a group takes the options: attributes may have been assigned since."""
        if self.timeout is not None:
            arguments.instance("Options.timeout", self.timeout, timedelta, "datetime.timedelta or None")
            if self.timeout <= timedelta(0):
                raise arguments.wrong_value("Options.timeout", "a positive duration", self.timeout)
        if self.workspace_bytes is not None:
            self.workspace_bytes = arguments.integer(
                "Options.workspace_bytes", self.workspace_bytes, MIN_WORKSPACE_BYTES, MAX_WORKSPACE_BYTES, "bytes"
            )
        if not isinstance(self.strategy, MNNVLAllreduceFusionStrategy):
            names = f"one of {', '.join(map(repr, STRATEGY_NAMES))} or an MNNVLAllreduceFusionStrategy"
            arguments.instance("Options.strategy", self.strategy, str, names)
            if self.strategy not in STRATEGY_NAMES:
                raise arguments.wrong_value("Options.strategy", names, self.strategy)
        if not isinstance(self.multicast, bool):
            arguments.instance("Options.multicast", self.multicast, str, "True, False or 'auto'")
            if self.multicast != "auto":
                raise arguments.wrong_value("Options.multicast", "True, False or 'auto'", self.multicast)
        expected = "'auto', 'nccl' or 'store'"
        arguments.instance("Options.bootstrap", self.bootstrap, str, expected)
        if self.bootstrap not in BOOTSTRAPS:
            raise arguments.wrong_value("Options.bootstrap", expected, self.bootstrap)
        arguments.instance("Options.pdl", self.pdl, bool, "True or False")
        if self.max_ctas is not None:
            self.max_ctas = arguments.integer("Options.max_ctas", self.max_ctas, 1, MAX_CTAS)
        self.async_max_ctas = arguments.integer("Options.async_max_ctas", self.async_max_ctas, 1, MAX_CTAS)
