"""The last operations of a group, for whoever looks for why ranks wait for one another."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

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
