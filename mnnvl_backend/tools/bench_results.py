"""What `mnnvl bench` leaves behind: a table in markdown, and the same as JSON, for each operation."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mnnvl_backend.tools.launch import Place


@dataclass
class Point:
    """One peer at one size: microseconds per call, of the slowest rank."""

    peer: str
    size: int
    median: float
    least: float
    most: float
    samples: int


@dataclass
class Results:
    machine: dict[str, Any]
    operation: str
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
            rows.append([human(size), *texts, ratio])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def markdown(self) -> str:
        title = f"{self.operation}, µs: median (least-most), slowest rank"
        return report(title, self.machine, self.table(), self.notes)

    def compare(self, old: dict[str, Any]) -> tuple[str, bool]:
        """Markdown: ours beside what `old`, the JSON of an earlier run, has of ours; and whether anything is slower: by
        over 5 %, and than the slowest sample then."""
        before = {(p["peer"], p["size"]): p for p in old["points"]}
        lines = ["| bytes | of | before, µs | now, µs | now / before | |", "| ---: | --- | ---: | ---: | ---: | --- |"]
        slower = False
        for p in self.points:
            was = before.get((p.peer, p.size))
            if was is None or not p.peer.startswith("mnnvl"):
                continue
            ratio = p.median / was["median"]
            worse = ratio > 1.05 and p.median > was["most"]
            slower = slower or worse
            times = f"{was['median']:.1f} | {p.median:.1f} | {ratio:.2f}"
            lines.append(f"| {human(p.size)} | {p.peer} | {times} | {'slower' if worse else ''} |")
        title = f"# {self.operation}, beside {old['machine']['date']}, {old['machine']['ranks']}"
        return "\n".join([title, "", *lines, ""]), slower

    def write(self, folder: Path, place: Place, limit: float | None = None) -> None:
        """The file's name has what isn't usual: the operation but for all_reduce, the dtype, eager calls on a GPU."""
        folder.mkdir(parents=True, exist_ok=True)
        on_gpu = place.device.type == "cuda"
        unusual = [
            self.operation if self.operation != "all_reduce" else "",
            self.machine["dtype"] if self.machine["dtype"] != usual_dtype(place) else "",
            self.machine["calls"] if on_gpu and self.machine["calls"] != "captured" else "",
        ]
        suffix = "".join(f"-{part}" for part in unusual if part)
        stem = folder / f"{self.machine['date']}-{place.device.type}-{place.world_size}{suffix}"
        stem.with_suffix(".md").write_text(self.markdown())
        stem.with_suffix(".json").write_text(json.dumps(asdict(self), indent=1))
        written = [stem.with_suffix(".md"), stem.with_suffix(".json")]
        if all(p.size > 0 for p in self.points):
            from mnnvl_backend.tools import bench_picture

            try:
                written += bench_picture.draw(self, place.world_size, stem, limit)
            except ImportError:
                print("no picture: pip install matplotlib")
        print(f"written: {', '.join(map(str, written))}")


def usual_dtype(place: Place) -> str:
    return "bfloat16" if place.device.type == "cuda" else "float32"


def report(title: str, machine: dict[str, Any], table: str, notes: dict[str, str]) -> str:
    """Markdown."""
    machine_lines = "\n".join(f"- {key}: {value}" for key, value in machine.items())
    note_lines = "\n".join(f"- {name}: {note}" for name, note in notes.items())
    return f"# {title}\n\n{machine_lines}\n\n{table}\n\n{note_lines}\n"


def human(size: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def describe(place: Place, switches: Collection[str]) -> dict[str, Any]:
    """The machine, the versions, and what of `switches` is set in the environment."""
    import mnnvl_backend

    machine: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "ranks": f"{place.world_size} x {place.description}",
        "mnnvl_backend": mnnvl_backend.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "switches": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k in switches),
    }
    if place.device.type == "cuda":
        machine["CUDA"] = torch.version.cuda
        machine["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return machine
