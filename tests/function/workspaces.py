"""How the tests of this folder make a workspace."""

from __future__ import annotations

from typing import Any

from launcher import Rank

from mnnvl_backend import Mapping
from mnnvl_backend import MNNVLAllReduceFusionWorkspace as Workspace


def workspace_of(rank: Rank, **arguments: Any) -> Workspace:
    """Of all ranks of a body, on their device, with their timeout."""
    mapping = Mapping(rank.world_size, rank.rank, tp_size=rank.world_size)
    return Workspace(mapping, device=rank.device, options=rank.options(timeout=rank.group_timeout), **arguments)
