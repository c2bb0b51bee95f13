"""`mnnvl bench --beside-gemm`: all-reduces on one stream beside matrix products on another, as in training, of mnnvl
and of NCCL in one run.

Asynchronous calls, eager, in bfloat16. Reported are milliseconds until the last of either ends, the slowest rank's,
medians: the products alone, the all-reduces alone, and both at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mnnvl_backend.tools.bench import NO_MULTICAST, everybody, verify
from mnnvl_backend.tools.bench_operations import OPERATIONS
from mnnvl_backend.tools.bench_peers import Group, Peer, peers_of
from mnnvl_backend.tools.bench_results import describe, human, report
from mnnvl_backend.tools.demo import Report
from mnnvl_backend.tools.launch import Place, start

# (bytes, calls) of all-reduces, (size, products) of square matrices: each some 10 to 20 ms on an H100.
ALL_REDUCES = [(1 << 20, 200), (25 << 20, 100), (64 << 20, 60)]
PRODUCTS = [(2048, 600), (4096, 100), (8192, 12)]
SAMPLES = 7
PEERS = ("mnnvl", "nccl")


@dataclass(frozen=True)
class Ends:
    """Milliseconds from the common start, of the slowest rank."""

    products: float
    all_reduces: float

    @property
    def last(self) -> float:
        return max(self.products, self.all_reduces)


def timed(
    place: Place,
    product: Callable[[], object],
    products: int,
    call: Callable[[], dist.Work],
    calls: int,
    samples: int,
) -> Ends:
    """Collective. Products and calls are enqueued in turn: whatever the host takes, both have work from the start."""
    own = []
    beside = torch.cuda.Stream(place.device)
    for _ in range(samples + 1):  # the first one isn't counted
        place.synchronize()
        dist.barrier()
        begin, products_end, calls_end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record()
        beside.wait_event(begin)
        works = []
        for i in range(max(products, calls)):
            if i < products:
                product()
            if i < calls:
                with torch.cuda.stream(beside):
                    works.append(call())
        products_end.record()
        with torch.cuda.stream(beside):
            for work in works:
                work.wait()
            calls_end.record()
        place.synchronize()
        own.append((begin.elapsed_time(products_end), begin.elapsed_time(calls_end)))
    ends = [statistics.median(times) for times in zip(*own[1:], strict=True)]
    slowest = [max(times) for times in zip(*everybody(ends), strict=True)]
    return Ends(*slowest)


def measure(place: Place, peers: list[Peer], scale: int, samples: int) -> str:
    """The table, in markdown. `scale`: what all numbers of calls are divided by."""
    head = ["products", "all-reduces", "of", "products alone", "all-reduces alone", "together: products", "all-reduces",
            "last / NCCL's"]  # fmt: skip
    rows = [head, [*["---"] * 3, *["---:"] * 5]]
    with Report(place.rank).steps("beside", len(ALL_REDUCES) * len(PRODUCTS) * len(peers)) as step:
        for size, all_products in PRODUCTS:
            a, b = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
            out = torch.empty_like(a)

            def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
                torch.mm(a, b, out=out)

            products = max(1, all_products // scale)
            for size_bytes, all_calls in ALL_REDUCES:
                calls = max(1, all_calls // scale)
                ends: dict[str, tuple[Ends, Ends, Ends]] = {}
                for peer in peers:
                    assert isinstance(peer, Group)
                    values = torch.zeros(size_bytes // 2, dtype=torch.bfloat16, device=place.device)
                    prepared = peer.prepare(OPERATIONS["all_reduce"], values)
                    verify(place, peer, OPERATIONS["all_reduce"], prepared)
                    prepared.source.zero_()
                    call = peer.asynchronous(prepared.source)
                    ends[peer.name] = (
                        timed(place, product, products, call, 0, samples),
                        timed(place, product, 0, call, calls, samples),
                        timed(place, product, products, call, calls, samples),
                    )
                    step(f"{size:>5}  {human(size_bytes):>7}  {peer.name:<8} {ends[peer.name][2].last:8.2f} ms")
                for name, (alone, by_itself, both) in ends.items():
                    ratio = f"{both.last / ends['nccl'][2].last:.2f}" if "nccl" in ends else "-"
                    numbers = (alone.products, by_itself.all_reduces, both.products, both.all_reduces)
                    what = [f"{products} x {size}^3", f"{calls} x {human(size_bytes)}", name]
                    rows.append([*what, *(f"{number:.2f}" for number in numbers), ratio])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run(arguments: argparse.Namespace) -> int:
    """Of cli.parser()."""
    if arguments.only and not set(arguments.only.split(",")) <= set(PEERS):
        raise SystemExit(f"--only: expected of {', '.join(PEERS)} with --beside-gemm, got {arguments.only}")
    if not arguments.multicast:
        os.environ.update(NO_MULTICAST)
    with start(arguments.device) as place:
        if place.device.type != "cuda" or place.world_size < 2:
            raise SystemExit("--beside-gemm: expected GPUs, and two ranks or more")
        dist.init_process_group("gloo")
        notes: dict[str, str] = {}
        possible = [*PEERS] if place.peer_possible else ["mnnvl"]
        only = arguments.only.split(",") if arguments.only else possible
        peers = peers_of(place, OPERATIONS["all_reduce"], ALL_REDUCES[-1][0], only, notes)
        scale, samples = (20, 1) if arguments.smoke else (1, SAMPLES)
        with torch.inference_mode():
            table = measure(place, peers, scale, samples)
        if place.rank == 0:
            machine = describe(place, {**NO_MULTICAST, "MNNVL_MAX_CTAS": "", "NCCL_MAX_CTAS": ""})
            text = report("All-reduces beside matrix products, ms", machine, table, notes)
            print("\n" + text)
            if arguments.output:
                folder = Path(arguments.output)
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"{machine['date']}-cuda-{place.world_size}-beside-gemm.md"
                file.write_text(text)
                print(f"written: {file}")
        for peer in peers:
            peer.close()
    return 0
