"""`mnnvl demo` under torchrun: (a) all-reduces of several sizes, dtypes and strategies, checked, and timed beside gloo
or NCCL; (b) data-parallel training of a small network on scikit-learn's digits.

Ends with an error if a sum is off, ranks disagree in a single bit, or the network doesn't learn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mnnvl_backend.options import Options
from mnnvl_backend.tools.launch import Place, start

SIZES = (1 << 10, 16 << 10, 256 << 10, 4 << 20)  # bytes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STRATEGIES = ("oneshot", "twoshot")
REQUIRED_ACCURACY = 0.95


class Report:
    """What rank 0 shows: with rich if it is there, else plainly. Other ranks are silent."""

    def __init__(self, rank: int) -> None:
        self._shown = rank == 0
        try:
            from rich.console import Console

            self._console: Any = Console()
        except ImportError:
            self._console = None

    def say(self, text: str) -> None:
        if self._shown and self._console:
            self._console.print(text, highlight=False, soft_wrap=True)
        elif self._shown:
            print(text, flush=True)

    @contextmanager
    def steps(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar on a terminal, a line per step elsewhere; call the result after each step."""
        if not self._shown or not self._console or not self._console.is_terminal:
            done = 0

            def plain(note: str) -> None:
                nonlocal done
                done += 1
                self.say(f"  {what} {done}/{total}  {note}")

            yield plain
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("  " + what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=total, note="")
            yield lambda note: progress.update(task, advance=1, note=note)

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
        header, body = list(columns), [list(row) for row in rows]
        if self._shown and self._console:
            from rich.table import Table

            table = Table(title=title)
            for name in header:
                table.add_column(name, justify="right")
            for row in body:
                table.add_row(*row)
            self._console.print(table)
            return
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in [header, *body]]
        self.say("\n".join([title, *lines]))


def same_bits_everywhere(tensor: torch.Tensor) -> bool:
    """Collective over the default group, through its own all_gather: has every rank the bits of this one?"""
    own = tensor.detach().contiguous().view(torch.uint8)
    everybody = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, own)
    return all(torch.equal(other, own) for other in everybody)


def check(result: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Against the float64 sum: within one rounding to the dtype and float32's error of adding world-size numbers."""
    exact = torch.stack([x.double() for x in inputs]).sum(0)
    magnitude = torch.stack([x.double().abs() for x in inputs]).sum(0)
    eps = torch.finfo(result.dtype).eps
    bound = exact.abs() * eps + magnitude * len(inputs) * torch.finfo(torch.float32).eps + 1e-7
    worst = ((result.double() - exact).abs() - bound).max().item()
    if not worst <= 0:
        raise RuntimeError(f"all_reduce of {result.dtype} is off its float64 sum by {worst:.3g} more than rounding")


def time_us(place: Place, call: Callable[[], Any], rounds: int = 20) -> float:
    """Median of `rounds` calls in microseconds, the slowest rank's."""
    samples = []
    for index in range(rounds + 3):
        place.synchronize()
        start = time.perf_counter()
        call()
        place.synchronize()
        if index >= 3:
            samples.append((time.perf_counter() - start) * 1e6)
    slowest: list[Any] = [None] * place.world_size
    dist.all_gather_object(slowest, statistics.median(samples))
    return float(max(slowest))


def all_reduces(place: Place, report: Report) -> None:
    groups = {s: dist.new_group(backend="mnnvl", pg_options=Options(strategy=s)) for s in STRATEGIES}
    peer_name = "nccl" if place.device.type == "cuda" else "gloo"
    peer = dist.new_group(backend=peer_name) if place.peer_possible else None
    rows = []
    with report.steps("all_reduce", len(SIZES) * len(DTYPES)) as step:
        for dtype in DTYPES:
            for size in SIZES:
                numel = size // dtype.itemsize
                # Every rank can make every rank's input, so each checks alone.
                inputs = [
                    torch.randn(numel, generator=torch.Generator().manual_seed(1000 + r)).to(dtype)
                    for r in range(place.world_size)
                ]
                mine = inputs[place.rank].to(place.device)
                results = {}
                for name, group in groups.items():
                    results[name] = mine.clone()
                    dist.all_reduce(results[name], group=group)
                    check(results[name].cpu(), inputs)
                bits = [r.view(torch.uint8) for r in results.values()]
                if not all(torch.equal(b, bits[0]) for b in bits) or not same_bits_everywhere(bits[0]):
                    raise RuntimeError(
                        f"all_reduce of {size} bytes of {dtype}: strategies or ranks differ in their bits"
                    )
                zeros = torch.zeros_like(mine)  # they stay zeros, however often they are summed
                timed = [*groups.values(), *([peer] if peer else [])]
                times = [time_us(place, partial(dist.all_reduce, zeros, group=group)) for group in timed]
                rows.append([str(dtype).removeprefix("torch."), f"{size >> 10} KiB", *(f"{t:.0f}" for t in times)])
                step(f"{size >> 10} KiB {dtype} matches float64; bit-equal across ranks and strategies")
    title = f"µs per all_reduce, {place.world_size} {place.device.type} ranks (median, slowest rank)"
    report.table(title, ["dtype", "size", *(f"mnnvl {s}" for s in STRATEGIES), *([peer_name] if peer else [])], rows)


def train(place: Place, report: Report, epochs: int) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        report.say("DDP training: skipped, scikit-learn is not installed")
        return
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(images, dtype=torch.float32) / 16)[order].to(place.device)
    y = torch.tensor(labels)[order].to(place.device)
    held_out = len(y) // 5
    train_x, train_y, test_x, test_y = x[held_out:], y[held_out:], x[:held_out], y[:held_out]

    torch.manual_seed(place.rank)  # different on purpose: DDP must bring the ranks together
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    on_gpu = place.device.type == "cuda"
    model = nn.parallel.DistributedDataParallel(network.to(place.device), device_ids=[place.device] if on_gpu else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = 128 // place.world_size
    generator = torch.Generator().manual_seed(1)
    with report.steps("epoch", epochs) as step:
        for _ in range(epochs):
            shuffled = torch.randperm(len(train_y), generator=generator).to(place.device)
            steps = len(shuffled) // (batch * place.world_size)
            for mine in shuffled[: steps * batch * place.world_size].view(steps, place.world_size, batch)[
                :, place.rank
            ]:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(train_x[mine]), train_y[mine])
                loss.backward()
                optimizer.step()
            step(f"loss {loss.item():.4f}")
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
    if not all(same_bits_everywhere(p) for p in model.parameters()):
        raise RuntimeError("DDP training: the ranks' weights differ")
    report.say(
        f"DDP training on digits: {accuracy:.1%} of {held_out} held-out images right; "
        f"weights bit-equal on all {place.world_size} ranks"
    )
    if accuracy < REQUIRED_ACCURACY:
        raise RuntimeError(f"DDP training: accuracy {accuracy:.1%} is below {REQUIRED_ACCURACY:.0%}")


def run(device: str, epochs: int) -> int:
    with start(device) as place:
        report = Report(place.rank)
        report.say(f"mnnvl demo: {place.world_size} ranks, {place.description}, torch {torch.__version__}")
        dist.init_process_group("mnnvl", pg_options=Options())
        all_reduces(place, report)
        train(place, report, epochs)
        report.say("demo: all checks passed")
    return 0
