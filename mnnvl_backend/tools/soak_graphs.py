"""CUDA graphs in the soak: captured, replayed and forgotten each round, while no other thread calls."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from mnnvl_backend.tools.soak_calls import Call, Mismatch
from mnnvl_backend.tools.soak_function import FunctionCase
from mnnvl_backend.tools.soak_lanes import Lane, Outcome, first_case
from mnnvl_backend.tools.soak_operations import Case

CALLS, REPLAYS = 5, 3
CAPTURED = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
LANE = 3  # of seeds


def graph(lane: Lane, seed: int, round_number: int) -> Outcome:
    """A few calls of the lane's group and workspace as one graph: once without it, then replayed. Every replay is of
    the same inputs, put back, and every byte is compared."""
    outcome = Outcome()
    where = f"seed {seed}, round {round_number}, graph, rank {lane.seat.rank}"
    try:
        first = first_case(seed, LANE, round_number)
        chance = random.Random(first)
        cases: list[Case | FunctionCase] = []
        number = first
        while len(cases) < CALLS:
            number += 1
            case = Case.random(number, lane.seat.world_size)
            if chance.random() < 0.4:
                cases.append(FunctionCase.random(number))
            elif case.operation in CAPTURED and case.form == "tensor":
                cases.append(replace(case, asynchronous=False))
        with torch.cuda.stream(torch.cuda.Stream(lane.seat.device)):
            _replay([lane.prepared(case) for case in cases], outcome, where)
    except Exception as error:
        outcome.errors.append(f"{where}: {type(error).__name__}: {error}")
    return outcome


def _replay(calls: list[Call], outcome: Outcome, where: str) -> None:
    torch.cuda.synchronize()  # memory was made on the lane's streams
    stream = torch.cuda.current_stream()

    def check(what: str) -> None:
        stream.synchronize()
        found: list[tuple[Call, Mismatch]] = []
        for call in calls:
            try:
                call.check()
            except Mismatch as mismatch:
                found.append((call, mismatch))
        outcome.checked(calls, found, f"{where}, {what}")

    for call in calls:
        call.begin()
    check("before it")
    # Not torch.cuda.graph(), which empties torch's cache; the lanes count on that.
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for call in calls:
            call.begin()
    finally:
        graph.capture_end()
    for replay in range(REPLAYS):
        for call in calls:
            for memory in call.memories:
                memory.reset()
        graph.replay()
        check(f"replay {replay}")
        outcome.operations["graph replay"] += 1
    graph.reset()
