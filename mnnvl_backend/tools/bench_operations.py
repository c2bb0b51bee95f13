"""What `mnnvl bench` times: each operation by what every rank has in the end, whoever carries it out.

A size in the tables is the bytes of what one rank puts in: of all_gather and gather its one part; of reduce_scatter,
all_to_all and (rank 0) scatter its parts for all ranks together, in whole elements each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mnnvl_backend.tools.launch import Place

Contribution = Callable[[int], torch.Tensor]  # of a rank
Expected = Callable[[Place, Contribution], torch.Tensor]


@dataclass(frozen=True)
class Operation:
    name: str
    meaning: str
    expected: Expected  # what lies in the result of this rank
    # Of the bytes that a rank puts in, by world size: how much passes through the busiest rank's link in one direction,
    # as nccl-tests count "bus bandwidth".
    carried: Callable[[int], float]
    divided: bool = False  # what a rank puts in is a part for each rank
    steps: int = 1  # that one call makes, one after the other; times are of one
    sized: bool = True  # else it moves nothing and is timed once
    captured: bool = True  # in a CUDA graph; else eagerly, for those that wait on the host


def _once(world_size: int) -> float:
    return 1.0


def _to_others(world_size: int) -> float:
    return (world_size - 1) / world_size


def _from_others(world_size: int) -> float:
    return world_size - 1.0


def _sum(place: Place, of: Contribution) -> torch.Tensor:
    total = of(0)
    for rank in range(1, place.world_size):
        total = total + of(rank)
    return total


def _gathered(place: Place, of: Contribution) -> torch.Tensor:
    return torch.cat([of(rank) for rank in range(place.world_size)])


def _part(place: Place, whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(place.world_size)[place.rank]


def _exchanged(place: Place, of: Contribution) -> torch.Tensor:
    return torch.cat([_part(place, of(rank)) for rank in range(place.world_size)])


def _at_root(expected: Expected) -> Expected:
    """Rank 0; the others have nothing of it."""
    return lambda place, of: expected(place, of) if place.rank == 0 else of(place.rank)[:0]


_ALL = (
    Operation("all_reduce", "SUM, in place", _sum, lambda world_size: 2 * _to_others(world_size)),
    Operation(
        "reduce_scatter",
        "SUM, reduce_scatter_tensor of bytes / world size to each rank",
        lambda place, of: _part(place, _sum(place, of)),
        _to_others,
        divided=True,
    ),
    Operation("reduce", "SUM, to rank 0, in place", _at_root(_sum), _once),
    Operation("all_gather", "into one tensor of world size times the bytes", _gathered, _from_others),
    Operation("gather", "to rank 0, world size times the bytes", _at_root(_gathered), _from_others),
    Operation("broadcast", "from rank 0, in place", lambda place, of: of(0), _once),
    Operation(
        "scatter",
        "from rank 0, bytes / world size to each rank",
        lambda place, of: _part(place, of(0)),
        _to_others,
        divided=True,
    ),
    Operation("all_to_all", "all_to_all_single, bytes / world size to each rank", _exchanged, _to_others, divided=True),
    Operation(
        "barrier", "eager calls", lambda place, of: of(place.rank), lambda world_size: 0.0, sized=False, captured=False
    ),
    Operation(
        "send_recv",
        "to the next rank and from the one before at once, by batch_isend_irecv; of two ranks, both directions",
        lambda place, of: of((place.rank - 1) % place.world_size),
        _once,
    ),
    Operation(
        "ping_pong",
        "rank 0 to rank 1 and back, by send and recv; half of the round trip",
        lambda place, of: of(0) if place.rank < 2 else of(place.rank),
        _once,
        steps=2,
    ),
)
OPERATIONS = {operation.name: operation for operation in _ALL}
