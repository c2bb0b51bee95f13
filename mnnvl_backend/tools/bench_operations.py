"""What `mnnvl bench` times: each operation by what every rank has in the end, whoever carries it out.

A rank's contribution has `numel` elements; a size in the tables is its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mnnvl_backend.tools.launch import Place

Contribution = Callable[[int], torch.Tensor]  # of a rank


@dataclass(frozen=True)
class Operation:
    name: str
    meaning: str
    expected: Callable[[Place, Contribution], torch.Tensor]  # what lies in the result of this rank
    steps: int = 1  # that one call makes, one after the other; times are of one
    sized: bool = True  # else it moves nothing and is timed once
    captured: bool = True  # in a CUDA graph; else eagerly, for those that wait on the host


def _sum(place: Place, of: Contribution) -> torch.Tensor:
    total = of(0)
    for rank in range(1, place.world_size):
        total = total + of(rank)
    return total


def _gathered(place: Place, of: Contribution) -> torch.Tensor:
    return torch.cat([of(rank) for rank in range(place.world_size)])


_ALL = (
    Operation("all_reduce", "SUM, in place", _sum),
    Operation("all_gather", "into one tensor of world size times the bytes", _gathered),
    Operation("broadcast", "from rank 0, in place", lambda place, of: of(0)),
    Operation("barrier", "eager calls", lambda place, of: of(place.rank), sized=False, captured=False),
    Operation(
        "send_recv",
        "to the next rank and from the one before at once, by batch_isend_irecv; of two ranks, both directions",
        lambda place, of: of((place.rank - 1) % place.world_size),
    ),
    Operation(
        "ping_pong",
        "rank 0 to rank 1 and back, by send and recv; half of the round trip",
        lambda place, of: of(0) if place.rank < 2 else of(place.rank),
        steps=2,
    ),
)
OPERATIONS = {operation.name: operation for operation in _ALL}
