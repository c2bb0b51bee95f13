"""What a group has done so far, in numbers that are always counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist

from mnnvl_backend.groups import compiled_groups


def stats(group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Counts of what this rank has done in a group (None: the default one) since it was made, on all device types.

    "operations": by name, as last_operations() and errors have it, a dict of ints: "calls" that were begun; "failed"
    ones of them, on a GPU those that couldn't be enqueued, since how others ended is not looked at; "bytes" of this
    rank's inputs, of a receive those to be received, failed calls included. Calls that begin together at the end of a
    coalescing block or as a batch are one call "coalesced", messages and collectives apart; one alone keeps its name.

    "algorithms": how many all-reduces each has taken: "cpu_oneshot", "cpu_twoshot"; on a GPU "oneshot_lamport",
    "twoshot_lamport", and "pair_channels" for what these two don't add. A coalesced call counts once for each tensor,
    a captured one when it is captured. Those that took none are left out.

    "slept": how many collectives on CPU tensors waited so long for a peer that the thread slept.

    Not counted are calls that raise before they begin (for their arguments, or in a group that has failed), what has
    nothing to send (no elements, a group of one), replays of CUDA graphs, and monitored_barrier.

    Raises:
        ValueError: no backend of the group is "mnnvl".
    """
    operations: dict[str, Counter[str]] = {}
    algorithms: Counter[str] = Counter()
    slept = 0
    for backend in compiled_groups("stats", group):
        one = backend.stats()
        for name, counts in one["operations"].items():
            operations.setdefault(name, Counter()).update(counts)
        algorithms.update(one["algorithms"])
        slept += one["slept"]
    return {
        "operations": {name: dict(counts) for name, counts in operations.items()},
        "algorithms": {name: count for name, count in algorithms.items() if count},
        "slept": slept,
    }
