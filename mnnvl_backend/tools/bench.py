"""`mnnvl bench` under torchrun: all-reduce beside its peers in one run; each is verified, then timed.

CUDA: bf16, 40, 10 or 3 all-reduces in a CUDA graph by size; a sample is one replay right behind another one, so that
the GPUs start together. CPU: float32, eager calls. Reported is the median over samples of the slowest rank's time, in
microseconds per all-reduce.

No multicast object is made by anybody unless --multicast is given: some hosts must not make any.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mnnvl_backend.tools.bench_peers import Peer, peers_of
from mnnvl_backend.tools.launch import Place, start

NO_MULTICAST = {"MNNVL_MULTICAST": "0", "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
SECONDS_PER_POINT = 3.0  # slow peers get fewer samples, but never under MIN_SAMPLES
MIN_SAMPLES = 5


@dataclass
class Point:
    """One peer at one size: microseconds per all-reduce, of the slowest rank."""

    peer: str
    size: int
    median: float
    least: float
    most: float
    samples: int


@dataclass
class Results:
    machine: dict[str, Any]
    points: list[Point] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """Markdown: a row per size; each cell is the median and, in brackets, the least and the most."""
        names = list(dict.fromkeys(p.peer for p in self.points))
        cells = {(p.size, p.peer): p for p in self.points}
        rows = [["bytes", *names, "mnnvl / best peer"], ["---:"] * (len(names) + 2)]
        for size in sorted({p.size for p in self.points}):
            row = [cells.get((size, name)) for name in names]
            texts = [f"{p.median:.1f} ({p.least:.1f}-{p.most:.1f})" if p else "-" for p in row]
            ours = [p.median for p in row if p and p.peer.startswith("mnnvl")]
            theirs = [p.median for p in row if p and not p.peer.startswith("mnnvl")]
            ratio = f"{min(ours) / min(theirs):.2f}" if ours and theirs else "-"
            rows.append([_human(size), *texts, ratio])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def markdown(self) -> str:
        machine = "\n".join(f"- {key}: {value}" for key, value in self.machine.items())
        notes = "\n".join(f"- {name}: {note}" for name, note in self.notes.items())
        return f"# all-reduce, µs: median (least-most), slowest rank\n\n{machine}\n\n{self.table()}\n\n{notes}\n"


def _human(size: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def describe(place: Place) -> dict[str, Any]:
    import mnnvl_backend

    machine: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "ranks": f"{place.world_size} x {place.description}",
        "mnnvl_backend": mnnvl_backend.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "switches": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k in NO_MULTICAST),
    }
    if place.device.type == "cuda":
        machine["CUDA"] = torch.version.cuda
        machine["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return machine


def everybody(value: Any) -> list[Any]:
    """Collective over the control group (gloo): every rank's value."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def verify(place: Place, peer: Peer, numel: int, dtype: torch.dtype) -> None:
    """With small integers, whose sum every dtype holds exactly.

    Raises:
        RuntimeError: on every rank, if it is wrong on any.
    """
    pattern = (torch.arange(numel, device=place.device) % 4).to(dtype)
    n = place.world_size
    result = peer.reduce(pattern * (place.rank + 1))
    wrong = int((result != pattern * (n * (n + 1) // 2)).sum())
    if any(everybody(wrong)):
        raise RuntimeError(f"{peer.name}: wrong sum in {wrong} of {numel} elements on rank {place.rank}")


def sample_cuda(place: Place, call: Callable[[], Any], size: int) -> Callable[[], float]:
    """Captures and returns a function that takes one sample in microseconds."""
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


def sample_cpu(call: Callable[[], Any], size: int) -> Callable[[], float]:
    count = 100 if size <= 64 << 10 else 10 if size <= 1 << 20 else 1

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) * 1e6 / count

    return sample


def measure(place: Place, peer: Peer, size: int, dtype: torch.dtype, replays: int) -> Point:
    verify(place, peer, size // dtype.itemsize, dtype)
    # Random values (zeros can be faster than any real data), anew before each sample and so small that they stay finite
    # however often they are summed in place within it.
    values = (torch.randn(size // dtype.itemsize, device=place.device) * 2.0**-100).to(dtype)
    call, payload = peer.prepare(values.clone())
    timed = sample_cuda(place, call, size) if place.device.type == "cuda" else sample_cpu(call, size)

    def sample() -> float:
        payload.view(-1).copy_(values)
        return timed()

    dist.barrier()
    begin = time.perf_counter()
    for _ in range(3):
        sample()
    each = max(everybody((time.perf_counter() - begin) / 3))
    count = max(MIN_SAMPLES, min(replays, int(SECONDS_PER_POINT / each)))
    dist.barrier()
    own = [sample() for _ in range(count)]
    slowest = [max(times) for times in zip(*everybody(own), strict=True)]
    return Point(peer.name, size, statistics.median(slowest), min(slowest), max(slowest), count)


def run(
    device: str,
    min_bytes: int | None,
    max_bytes: int,
    replays: int,
    only: list[str] | None = None,
    output: str | None = None,
    multicast: bool = False,
) -> int:
    if not multicast:
        os.environ.update(NO_MULTICAST)
    with start(device) as place:
        dist.init_process_group("gloo")  # control: timing must not depend on what is timed
        on_gpu = place.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        results = Results(describe(place))
        results.machine["dtype"] = str(dtype).removeprefix("torch.")
        peers = peers_of(place, max_bytes, dtype, only, results.notes)
        size = min_bytes or (2 << 10 if on_gpu else 1 << 10)
        with torch.inference_mode() if on_gpu else nullcontext():
            while size <= max_bytes:
                for peer in list(peers):
                    try:
                        point = measure(place, peer, size, dtype, replays)
                    except Exception as error:  # noted, and the others go on; who fails alone ends in the timeout
                        results.notes[peer.name] = f"stopped at {_human(size)}: {error}"
                        peers.remove(peer)
                        continue
                    results.points.append(point)
                    if place.rank == 0:
                        print(f"{_human(size):>8}  {peer.name:<24} {point.median:10.1f} µs", flush=True)
                size *= 2
        if place.rank == 0:
            print("\n" + results.markdown())
            if output:
                _write(results, Path(output), place)
        for peer in peers:
            peer.close()
    return 0


def _write(results: Results, folder: Path, place: Place) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{results.machine['date']}-{place.device.type}-{place.world_size}"
    stem.with_suffix(".md").write_text(results.markdown())
    stem.with_suffix(".json").write_text(json.dumps(asdict(results), indent=1))
    print(f"written: {stem}.md, {stem}.json")
