"""`mnnvl tune` under torchrun: at which size two shots begin to win over one, on this machine and with so many ranks.

The two are forced by options of their groups and timed as `mnnvl bench` does, in turn at each size, with AUTO as it is
beside them. Several runs, of CPU and CUDA tensors and of several world sizes, may write to one file.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from mnnvl_backend import tuning
from mnnvl_backend.options import Options
from mnnvl_backend.tools.bench import NO_MULTICAST, measure
from mnnvl_backend.tools.bench_operations import OPERATIONS
from mnnvl_backend.tools.bench_peers import Group
from mnnvl_backend.tools.bench_results import describe, human, report, usual_dtype
from mnnvl_backend.tools.launch import Place, start

FORCED = ("oneshot", "twoshot")
LEAST = 1 << 10  # bytes; what is best for them is so for fewer


def sizes_between(least: int, most: int) -> list[int]:
    """Powers of two and the middles between them."""
    powers = [1 << i for i in range(10, 40)]
    return [size for power in powers for size in (power, power * 3 // 2) if least <= size <= most]


def best_limit(times: Sequence[tuple[int, float, float]]) -> int:
    """The largest size that one shot should serve, 0 if none: where what AUTO then takes, over the better of the two,
    has the least product over all sizes. So no single noisy point decides.

    Args:
        times: ascending (bytes, by one shot, by two shots).
    """

    def loss(limit: int) -> float:
        return sum(math.log((one if size <= limit else two) / min(one, two)) for size, one, two in times)

    return min([0, *(size for size, _, _ in times)], key=loss)


def table(times: dict[str, dict[int, float]], limit: int) -> str:
    """Markdown."""
    rows = [["bytes", *times, "auto / best", "auto with this limit"], ["---:"] * (len(times) + 3)]
    for size in times["auto"]:
        best = min(times[name][size] for name in FORCED)
        chosen = FORCED[0] if size <= limit else FORCED[1]
        cells = [f"{times[name][size]:.1f}" for name in times]
        rows.append(
            [human(size), *cells, f"{times['auto'][size] / best:.2f}", f"{chosen} {times[chosen][size] / best:.2f}"]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measure_all(place: Place, sizes: Sequence[int], replays: int) -> dict[str, dict[int, float]]:
    """Microseconds by strategy and size. Collective."""
    groups = {name: Group(name, "mnnvl", place, Options(strategy=name)) for name in (*FORCED, "auto")}
    dtype: torch.dtype = getattr(torch, usual_dtype(place))
    times: dict[str, dict[int, float]] = {name: {} for name in groups}
    for size in sizes:
        for name, group in groups.items():
            times[name][size] = measure(place, group, OPERATIONS["all_reduce"], size, dtype, replays).median
        if place.rank == 0:
            print(human(size), *(f"{name} {times[name][size]:.1f} µs" for name in times), sep="  ", flush=True)
    for group in groups.values():
        group.close()
    return times


def check_output(path: str | None) -> None:
    """
    Raises:
        SystemExit: nothing could be written there; better now than after minutes.
    """
    if path is None:
        return
    try:
        if Path(path).exists():
            tuning.read(path)
        elif not os.access(Path(path).parent, os.W_OK):
            raise SystemExit(f"--output: expected a file in a folder that can be written to, got {path}")
    except tuning.BadFile as error:
        raise SystemExit(f"--output: expected a file that mnnvl tune wrote, or none, got {path}: {error}") from None


def check_range(limit: int, sizes: Sequence[int]) -> None:
    """
    Raises:
        SystemExit: what is best below the sizes measured is not known.
    """
    if limit == 0 and sizes[0] > LEAST:
        raise SystemExit(f"two shots win from {sizes[0]} bytes on: measure smaller tensors too (--min-bytes)")


def run(arguments: argparse.Namespace) -> int:
    """Of cli.parser()."""
    if os.environ.get("MNNVL_STRATEGY"):
        raise SystemExit("MNNVL_STRATEGY forces one strategy on all groups: unset it to compare both")
    os.environ.update(NO_MULTICAST)
    with start(arguments.device) as place:
        if place.world_size < 2:
            raise SystemExit("a group of one has no strategy: run with two ranks or more")
        on_gpu = place.device.type == "cuda"
        least, most = arguments.min_bytes or LEAST, arguments.max_bytes or (16 << 20 if on_gpu else 4 << 20)
        sizes = sizes_between(least, most)
        if not sizes:
            raise SystemExit(f"--min-bytes, --max-bytes: expected a size between them, got {least} and {most}")
        check_output(arguments.output)
        dist.init_process_group("gloo")
        with torch.inference_mode(on_gpu):
            times = measure_all(place, sizes, arguments.replays)
        limit = best_limit([(size, times["oneshot"][size], times["twoshot"][size]) for size in sizes])
        check_range(limit, sizes)
        if place.rank != 0:
            return 0
        machine = describe(place, {**NO_MULTICAST, "MNNVL_TUNING": ""})
        note = {"one shot": f"up to {limit} bytes with {place.world_size} ranks on {place.device.type}"}
        print("\n" + report("One shot or two, µs", machine, table(times, limit), note))
        if arguments.output:
            measured = {"machine": machine, "microseconds": times}
            tuning.add(arguments.output, place.device.type, place.world_size, limit, measured)
            print(f"written: {arguments.output}; MNNVL_TUNING={arguments.output} makes AUTO follow it")
        return 0
