"""The last operations of a group, for whoever looks for why ranks wait for one another."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from mnnvl_backend.compiled import load_compiled


def last_operations(group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
    """The last operations, up to 64, that this rank has begun in a group (None: the default one), the oldest first.

    Each is a dict: "sequence" (of the group's collectives; a message has that of the collective before), "operation",
    "bytes" of this rank's inputs, "dtype" (None of a barrier), "device", "async", "state" and "time", seconds since the
    epoch. The state is "enqueued", then "completed" or "failed"; on a GPU "ended", well or not, or "captured" in a CUDA
    graph. What has nothing to send isn't among them. The same list goes to the error log when the group first fails.

    Raises:
        ValueError: no backend of the group is "mnnvl".
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"last_operations: group: expected a process group that this rank is in, got {group!r}")
    kind = load_compiled().ProcessGroupMNNVL
    backends = {group._get_backend(device) for device in group._device_types}
    served = [backend for backend in backends if isinstance(backend, kind)]
    if not served:
        raise ValueError(f"last_operations: group: expected a backend 'mnnvl', got {dist.get_backend_config(group)}")
    return sorted((one for backend in served for one in backend.last_operations()), key=lambda one: one["time"])
