"""`mnnvl bench` under torchrun: operations beside their peers in one run; each is verified, then timed.

CUDA: bf16 unless told otherwise, 40, 10 or 3 calls in a CUDA graph by size; a sample is one replay right behind another
one, so that the GPUs start together; or, on request, eager calls, up to the end of the last one. CPU: float32, eager
calls. Reported is the median over samples of the slowest rank's time, in microseconds per call.

No multicast object is made by anybody unless --multicast is given: some hosts must not make any.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mnnvl_backend.tools.bench_operations import OPERATIONS, Operation
from mnnvl_backend.tools.bench_peers import Peer, Prepared, peers_of
from mnnvl_backend.tools.bench_results import Point, Results, describe, human, usual_dtype
from mnnvl_backend.tools.demo import Report
from mnnvl_backend.tools.launch import Place, start

NO_MULTICAST = {"MNNVL_MULTICAST": "0", "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
MESSAGES = {"send_recv", "ping_pong"}
SECONDS_PER_POINT = 3.0  # slow peers get fewer samples, but never under MIN_SAMPLES
MIN_SAMPLES = 5


def everybody(value: Any) -> list[Any]:
    """Collective over the control group (gloo): every rank's value."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def verify(place: Place, peer: Peer, operation: Operation, prepared: Prepared) -> None:
    """With small integers, whose sum every dtype holds exactly.

    Raises:
        RuntimeError: on every rank, if the result is wrong on any.
    """
    source = prepared.source
    pattern = (torch.arange(source.numel(), device=place.device) % 4).to(source.dtype).view_as(source)
    source.copy_(pattern * (place.rank + 1))
    expected = operation.expected(place, lambda rank: pattern * (rank + 1))
    if prepared.result is not source:
        prepared.result.fill_(-1)
    prepared.call()
    wrong = int((prepared.result != expected).sum())
    if any(everybody(wrong)):
        of_them = f"{wrong} of {expected.numel()} elements"
        raise RuntimeError(f"{peer.name}: {operation.name} gave {of_them} wrong on rank {place.rank}")


def sample_captured(place: Place, call: Callable[[], Any], size: int) -> Callable[[], float]:
    """Captures and returns a function that takes one sample, in microseconds per call."""
    count = 40 if size <= 64 << 10 else 10 if size <= 4 << 20 else 3
    stream = torch.cuda.Stream(place.device)
    with torch.cuda.stream(stream):
        for _ in range(3):  # whatever a peer loads or allocates lazily happens before the capture
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog may query events meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(count):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / count

    return sample


def sample_eager(place: Place, call: Callable[[], Any], size: int) -> Callable[[], float]:
    count = 100 if size <= 64 << 10 else 10 if size <= 1 << 20 else 1

    def sample() -> float:
        place.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        place.synchronize()
        return (time.perf_counter() - begin) * 1e6 / count

    return sample


def times_of(
    place: Place,
    call: Callable[[], Any],
    refill: Callable[[], Any],
    size: int,
    replays: int,
    captured: bool = True,
    steps: int = 1,
) -> tuple[float, float, float, int]:
    """Collective: median, least and most of the slowest rank's microseconds per call, and the number of samples.

    Args:
        refill: run before each sample.
        size: in bytes, by which calls are counted to a sample.
        captured: in a CUDA graph, if on a GPU.
        steps: of one call; times are of one.
    """
    timed = (sample_captured if captured and place.device.type == "cuda" else sample_eager)(place, call, size)

    def sample() -> float:
        refill()
        return timed() / steps

    dist.barrier()
    begin = time.perf_counter()
    for _ in range(3):
        sample()
    each = max(everybody((time.perf_counter() - begin) / 3))
    count = max(MIN_SAMPLES, min(replays, int(SECONDS_PER_POINT / each)))
    dist.barrier()
    own = [sample() for _ in range(count)]
    slowest = [max(times) for times in zip(*everybody(own), strict=True)]
    return statistics.median(slowest), min(slowest), max(slowest), count


def measure(
    place: Place, peer: Peer, operation: Operation, size: int, dtype: torch.dtype, replays: int, captured: bool = True
) -> Point:
    # Random values (zeros can be faster than any real data), anew before each sample and so small that they stay finite
    # however often they are summed in place within it, but for float16, which has no such small numbers.
    numel = size // dtype.itemsize
    if operation.divided:
        numel -= numel % place.world_size
    small = 2.0 ** (-10 if dtype is torch.float16 else -100)
    values = (torch.randn(numel, device=place.device) * small).to(dtype)
    prepared = peer.prepare(operation, values)
    verify(place, peer, operation, prepared)
    captured = captured and operation.captured
    times = times_of(
        place, prepared.call, lambda: prepared.source.copy_(values), size, replays, captured, operation.steps
    )
    return Point(peer.name, size, *times)


def sizes_of(operation: Operation, on_gpu: bool, min_bytes: int | None, max_bytes: int | None) -> list[int]:
    """By powers of two; what the command line leaves open is up to the operation."""
    if not operation.sized:
        return [0]
    size = min_bytes or (2 << 10 if on_gpu and operation.name == "all_reduce" else 1 << 10)
    last = max_bytes or (256 << 20 if on_gpu and operation.name != "all_reduce" else 64 << 20)
    sizes = []
    while size <= last:
        sizes.append(size)
        size *= 2
    return sizes


def bench_operation(place: Place, results: Results, peers: list[Peer], sizes: list[int], replays: int) -> None:
    """All peers at all sizes, into `results`; a peer that fails is left out from there on."""
    operation = OPERATIONS[results.operation]
    dtype: torch.dtype = getattr(torch, results.machine["dtype"])
    captured = results.machine["calls"] == "captured"
    remaining = list(peers)
    with Report(place.rank).steps(operation.name, len(sizes) * len(peers)) as step:
        for size in sizes:
            for peer in list(remaining):
                try:
                    point = measure(place, peer, operation, size, dtype, replays, captured)
                except Exception as error:  # noted, and the others go on; who fails alone ends in the timeout
                    results.notes[peer.name] = f"stopped at {human(size)}: {error}"
                    remaining.remove(peer)
                    continue
                results.points.append(point)
                step(f"{human(size):>8}  {peer.name:<24} {point.median:10.1f} µs")


def check_alike(now: dict[str, Any], before: dict[str, Any]) -> None:
    """
    Raises:
        SystemExit: other things were timed then.
    """
    for key in ("dtype", "calls"):  # the latter is younger than the oldest results
        if before.get(key, now[key]) != now[key]:
            raise SystemExit(f"--compare: expected results of {key} {now[key]}, got {before[key]}")


def earlier_results(files: Sequence[str]) -> dict[str, Any]:
    """By operation, of which each has one file."""
    results: dict[str, Any] = {}
    try:
        for file in files:
            result = json.loads(Path(file).read_text())
            if result["operation"] in results:
                raise SystemExit(f"--compare: expected one file of {result['operation']}, got two: {', '.join(files)}")
            results[result["operation"]] = result
        return results
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--compare: expected files that mnnvl bench wrote with --output: {error}") from None


def run(arguments: argparse.Namespace) -> int:
    """Of cli.parser()."""
    if arguments.hidden or arguments.tokens:
        raise SystemExit("--hidden, --tokens: only with --fused")
    if not arguments.multicast:
        os.environ.update(NO_MULTICAST)
    operations = arguments.operation or (list(OPERATIONS) if arguments.smoke else ["all_reduce"])
    min_bytes, max_bytes, replays = arguments.min_bytes, arguments.max_bytes, arguments.replays
    if arguments.smoke:
        min_bytes, max_bytes, replays = 1 << 10, 2 << 10, MIN_SAMPLES
    only = arguments.only.split(",") if arguments.only else None
    earlier, slower = earlier_results(arguments.compare), False
    wanted = set(operations) - (MESSAGES if arguments.smoke else set())  # which one rank leaves out
    if earlier and (missing := wanted - set(earlier)):
        raise SystemExit(f"--compare: no results of {', '.join(sorted(missing))} in {', '.join(arguments.compare)}")
    with start(arguments.device) as place:
        if place.world_size < 2 and arguments.smoke:
            operations = [name for name in operations if name not in MESSAGES]
        if place.world_size < 2 and MESSAGES & set(operations):
            raise SystemExit("--operation: messages want two ranks")
        dist.init_process_group("gloo")  # control: timing must not depend on what is timed
        on_gpu = place.device.type == "cuda"
        for name in operations:
            operation = OPERATIONS[name]
            results = Results(describe(place, NO_MULTICAST), name)
            results.machine["dtype"] = arguments.dtype or usual_dtype(place)
            results.machine["calls"] = "captured" if on_gpu and not arguments.eager else "eager"
            if name in earlier:
                check_alike(results.machine, earlier[name]["machine"])
            results.machine["operation"] = operation.meaning
            sizes = sizes_of(operation, on_gpu, min_bytes, max_bytes)
            peers = peers_of(place, operation, sizes[-1], only, results.notes)
            with torch.inference_mode() if on_gpu else nullcontext():
                bench_operation(place, results, peers, sizes, replays)
            if place.rank == 0:
                print("\n" + results.markdown())
                if arguments.output:
                    results.write(Path(arguments.output), place, arguments.limit)
                if name in earlier:
                    text, worse = results.compare(earlier[name])
                    print("\n" + text)
                    slower = slower or worse
            for peer in peers:
                peer.close()
    return 1 if slower else 0
