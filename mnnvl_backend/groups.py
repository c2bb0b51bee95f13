"""From a process group to the compiled groups behind it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from mnnvl_backend import arguments
from mnnvl_backend.compiled import load_compiled


def compiled_groups(function: str, group: dist.ProcessGroup | None) -> list[Any]:
    """The "mnnvl" backends of a group (None: the default one), in the same order on every rank.

    Raises:
        ValueError: naming `function`; there is none.
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"{function}: group: expected a process group that this rank is in, got {arguments.shown(group)}"
        )
    kind = load_compiled().ProcessGroupMNNVL
    backends = [group._get_backend(device) for device in sorted(group._device_types, key=str)]
    served = [backend for backend in dict.fromkeys(backends) if isinstance(backend, kind)]
    if not served:
        raise ValueError(f"{function}: group: expected a backend 'mnnvl', got {dist.get_backend_config(group)}")
    return served
