"""A group's memory given back for a while: for engines that lend their GPU, and keep their CUDA graphs."""

from __future__ import annotations

import torch.distributed as dist

from mnnvl_backend.groups import compiled_groups


def release_memory(group: dist.ProcessGroup | None = None) -> int:
    """Gives the memory of a group's workspaces back to the device, and keeps their addresses. Collective.

    Waits on every rank for what was enqueued. Every message sent must have been received, since what lies in a
    workspace is gone. Until restore_memory() calls on the group raise RuntimeError ("not attached") and break nothing;
    CUDA graphs that hold its calls must not be replayed. Nothing for a device type on which the group made no call yet,
    nor for memory that was given back before.

    Args:
        group: None: the default one. Its subgroups have workspaces of their own.

    Returns:
        The bytes that this rank has given back, of device memory and, for CPU tensors, of shared memory.

    Raises:
        ValueError: no backend of the group is "mnnvl".
        RuntimeError: on every rank, with the reason of the rank that failed.
    """
    return sum(one.release_memory() for one in compiled_groups("release_memory", group))


def restore_memory(group: dist.ProcessGroup | None = None) -> None:
    """Allocates anew what release_memory() gave back, at the same addresses. Collective; nothing if nothing was.

    CUDA graphs that were captured before can be replayed again.

    Raises:
        ValueError: no backend of the group is "mnnvl".
        RuntimeError: on every rank, with the reason of the rank that failed (out of memory, say); the group then stays
            without, and this may be called again.
    """
    for one in compiled_groups("restore_memory", group):
        one.restore_memory()
