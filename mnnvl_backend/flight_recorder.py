"""The last operations of a group, for whoever looks for why ranks wait for one another."""

from __future__ import annotations

import signal
import sys
from typing import Any, TextIO

import torch.distributed as dist

from mnnvl_backend import arguments
from mnnvl_backend.compiled import load_compiled
from mnnvl_backend.groups import compiled_groups


def last_operations(group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
    """The last operations, up to 64, that this rank has begun in a group (None: the default one), the oldest first.

    Each is a dict: "sequence" (of the group's collectives; a message has that of the collective before), "operation",
    "bytes" of this rank's inputs, "dtype" (None of a barrier), "device", "async", "state" and "time", seconds since the
    epoch. The state is "enqueued", then "completed" or "failed"; on a GPU "ended", well or not, or "captured" in a CUDA
    graph. What has nothing to send isn't among them. The same list goes to the error log when the group first fails.

    Raises:
        ValueError: no backend of the group is "mnnvl".
    """
    served = compiled_groups("last_operations", group)
    return sorted((one for backend in served for one in backend.last_operations()), key=lambda one: one["time"])


def dump_operations(file: TextIO | None = None) -> None:
    """Writes the last operations of all groups of this process as tables to read, in the form of the error log.

    Any thread, at any time, also while others wait in a collective. A group that made no call yet has no name.

    Args:
        file: an open text stream; None: sys.stderr.

    Raises:
        TypeError: not a stream. RuntimeError: the compiled module can't be loaded.
    """
    if file is not None and not callable(getattr(file, "write", None)):
        raise arguments.wrong_type("file", "an open text stream or None", file)
    print(load_compiled().operations_of_all(), end="", file=sys.stderr if file is None else file, flush=True)


def dump_on_signal(signum: int = signal.SIGUSR1) -> None:
    """Writes what dump_operations() does to standard error (descriptor 2) whenever this process gets a signal.

    A thread of C++ writes it, which needs neither the main thread nor the GIL: it comes while all others wait. On a
    GPU it asks the driver what has ended, so it waits where the driver does. MNNVL_DUMP_SIGNAL=USR1 does the same with
    the first group.

    A handler that the signal has now is called as well; the default action, which ends a process, isn't taken any more.
    A handler that is installed later takes the signal over, as always. Forked children don't inherit this: send the
    signal to the ranks alone, for it ends workers of a DataLoader. Again with the same signal does nothing.

    Args:
        signum: SIGUSR1, SIGUSR2, or a real-time signal.

    Raises:
        TypeError: not an integer. ValueError: another signal.
        RuntimeError: this was called for the signal before, and another handler has taken it since; or the compiled
            module can't be loaded.
    """
    load_compiled().write_on_signal(arguments.integer("signum", signum, -(2**31), 2**31 - 1))
