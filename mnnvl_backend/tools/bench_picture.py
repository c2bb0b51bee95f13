"""The picture of a benchmark: time and bus bandwidth by size, ours beside the peers'."""

from __future__ import annotations

from pathlib import Path

from mnnvl_backend.tools.bench_operations import OPERATIONS
from mnnvl_backend.tools.bench_results import Results, human

OURS, PEERS = "#76b900", ("#1f5fa8", "#c2543d", "#7a5aa6", "#9a7b1f", "#4f9d9d")
MARKERS = "osD^vP"


def draw(results: Results, world_size: int, stem: Path, limit: float | None = None) -> list[Path]:
    """Writes `stem`.svg and `stem`.png, log axes throughout. `limit`: GB/s of the link in one direction, drawn in.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    carried = OPERATIONS[results.operation].carried(world_size)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    time, bandwidth = figure.subplots(1, 2)
    all_sizes = sorted({point.size for point in results.points})
    names = list(dict.fromkeys(point.peer for point in results.points))
    ours = [name for name in names if name.startswith("mnnvl")]
    for i, name in enumerate([*ours, *(name for name in names if name not in ours)]):
        points = sorted((point for point in results.points if point.peer == name), key=lambda point: point.size)
        sizes = [point.size for point in points]
        style = {
            "color": OURS if name in ours else PEERS[(i - len(ours)) % len(PEERS)],
            "linewidth": 2.4 if name in ours else 1.3,
            "linestyle": "--" if name in ours[1:] else "-",
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
            "zorder": 3 if name in ours else 2,
        }
        (line,) = time.plot(sizes, [point.median for point in points], label=name, **style)
        time.fill_between(
            sizes, [p.least for p in points], [p.most for p in points], color=line.get_color(), alpha=0.12, linewidth=0
        )
        bandwidth.plot(
            sizes, [size * carried / point.median / 1e3 for size, point in zip(sizes, points, strict=True)], **style
        )
    if limit is not None:
        bandwidth.axhline(limit, color="#555555", linewidth=1, linestyle=":")
        bandwidth.annotate(f"the link: {limit:g} GB/s", (0.02, limit), xycoords=("axes fraction", "data"), fontsize=8,
                           va="bottom", color="#555555")  # fmt: skip
    for axes, title in ((time, "µs, slowest rank: median, least to most"), (bandwidth, "bus bandwidth, GB/s")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="bytes of a rank")
        axes.xaxis.set_major_locator(FixedLocator(all_sizes[:: -(-len(all_sizes) // 7)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: human(int(size))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    time.legend(frameon=False, fontsize=9)
    machine = results.machine
    figure.suptitle(f"{results.operation}, {machine['ranks']}, {machine['dtype']}, {machine['date']}", fontsize=11)
    files = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    # The same files for the same results: without the day, the version of matplotlib and random ids.
    with rc_context({"svg.hashsalt": stem.name}):
        for file in files:
            figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None})
    return files
