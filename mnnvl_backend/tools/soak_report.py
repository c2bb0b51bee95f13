"""What `mnnvl soak` shows and leaves behind: a live line, a closing summary, JSON. Rank 0 alone shows it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnnvl_backend.tools import demo
from mnnvl_backend.tools.bench_results import describe, human
from mnnvl_backend.tools.launch import Place
from mnnvl_backend.tools.soak import Plan, Progress, Summary
from mnnvl_backend.tools.soak_growth import ALLOWED, Change, amount

SECONDS_BETWEEN_LINES = 10.0  # where nothing can be written over
SWITCHES = (
    "MNNVL_STRATEGY", "MNNVL_TUNING", "MNNVL_MULTICAST", "MNNVL_BOOTSTRAP", "MNNVL_WORKSPACE_BYTES",
    "MNNVL_BLOCKING_WAIT", "CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_DISTRIBUTED_DEBUG",
)  # fmt: skip


class Report:
    """Use it in this order: begin, show after each round, then end or lost."""

    def __init__(self, place: Place) -> None:
        self._place, self._plain = place, demo.Report(place.rank)
        self._live: Any = None
        self._last_line = 0.0

    def begin(self, plan: Plan) -> None:
        self._plain.say(
            f"mnnvl soak: {self._place.world_size} ranks, {self._place.description}, seed {plan.seed}, "
            f"{plan.seconds / 60:g} minutes after the warm-up; Ctrl-C ends it with a summary"
        )
        if self._place.rank != 0:
            return
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError:
            return
        console = Console()
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()

    def show(self, progress: Progress) -> None:
        """The live line; a plain one now and then."""
        if self._place.rank != 0:
            return
        line = status(progress)
        if self._live is not None:
            from rich.text import Text

            style = "bold red" if progress.mismatches else "red" if grown_text(progress.changes) else "green"
            self._live.update(Text(line, style=style), refresh=True)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._plain.say("  " + line)

    def end(self, summary: Summary, json_path: str | None) -> None:
        """The summary, and JSON if a path is given."""
        if self._place.rank != 0:
            return
        self._close()
        self._operations(summary)
        self._growth(summary)
        for text in [*summary.described, *summary.errors, *summary.grown]:
            self._plain.say(text)
        if summary.mismatches or summary.errors:
            self._plain.say(f"again: {again(summary)}")
        machine = describe(self._place, SWITCHES)
        self._plain.say(", ".join(f"{key} {value}" for key, value in machine.items() if value))
        self._plain.say(verdict(summary))
        if json_path:
            Path(json_path).write_text(json.dumps(as_json(summary, machine), indent=1))
            self._plain.say(f"written: {json_path}")

    def lost(self, plan: Plan, error: RuntimeError) -> None:
        """A rank is gone. Any rank may be the one that tells."""
        self._close()
        who = f"mnnvl soak, rank {self._place.rank}"
        print(f"{who}: another rank is gone, or came to no agreement; seed {plan.seed}: {error}", flush=True)

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _operations(self, summary: Summary) -> None:
        rows = [[name, f"{count:,}"] for name, count in summary.operations.items()]
        total = sum(summary.operations.values())
        self._plain.table("calls on each rank", ["operation", "calls"], [*rows, ["all", f"{total:,}"]])

    def _growth(self, summary: Summary) -> None:
        """Of each quantity the rank that grew most."""
        rows = []
        for name, (rank, change) in worst(summary.growth).items():
            difference, slope = amount(name, change.after - change.before), amount(name, change.per_hour)
            allowed = amount(name, change.allowed)
            rows.append([name, amount(name, change.before), difference, slope, allowed, str(rank)])
        columns = ["quantity", "warm", "growth", "an hour", "allowed", "rank"]
        self._plain.table(
            "what a rank uses after the warm-up, and growth since; of the rank that grew most", columns, rows
        )


def status(progress: Progress) -> str:
    """One line: round, operations so far, mismatches, growth, time left."""
    left = max(0, round(progress.seconds_left))
    count = sum(progress.outcome.operations.values())
    return (
        f"round {progress.round}  {count:,} calls, {progress.outcome.bytes / (1 << 30):.2f} GiB compared  "
        f"{progress.mismatches} mismatches  {grown_text(progress.changes) or growth_text(progress.changes)}  "
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )


def growth_text(changes: dict[str, Change]) -> str:
    shown = ("resident", "heap", "descriptors", "threads", "device")
    parts = [f"{name} {amount(name, changes[name].after - changes[name].before)}" for name in shown if name in changes]
    return ", ".join(parts)


def grown_text(changes: dict[str, Change]) -> str:
    grown = [f"{name} {amount(name, c.after - c.before)}" for name, c in changes.items() if c.grown]
    return f"GROWN: {', '.join(grown)}" if grown else ""


def worst(growth: list[dict[str, Change]]) -> dict[str, tuple[int, Change]]:
    """By quantity: the rank that grew most, and by how much."""
    names = [name for name in ALLOWED if growth and name in growth[0]]
    return {
        name: max(
            ((rank, changes[name]) for rank, changes in enumerate(growth)),
            key=lambda pair: pair[1].after - pair[1].before,
        )
        for name in names
    }


def again(summary: Summary) -> str:
    """The command that goes through the last round again, which is the failing one if a call failed."""
    failing = next(iter(summary.described or summary.errors))
    number = failing.split("round ", 1)[1].split(",", 1)[0]
    return f"mnnvl soak --seed {summary.plan.seed} --first-round {number} (with {len(summary.growth)} ranks)"


def verdict(summary: Summary) -> str:
    failed = [
        f"{summary.mismatches} mismatches" if summary.mismatches else "",
        f"{len(summary.errors)} errors" if summary.errors else "",
        f"{len(summary.grown)} quantities grew" if summary.grown else "",
    ]
    what = (
        ", ".join(filter(None, failed))
        or f"0 mismatches, {'no growth' if summary.watched else 'too short to see growth'}"
    )
    return (
        f"soak: {'passed' if summary.passed else 'FAILED'}{', interrupted' if summary.interrupted else ''}: {what}; "
        f"{summary.rounds} rounds to number {summary.last_round} in {summary.seconds:.0f} s, "
        f"{sum(summary.operations.values()):,} calls on each rank, {human_bytes(summary.bytes)} compared, "
        f"seed {summary.plan.seed}"
    )


def human_bytes(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else human(count >> 20 << 20)


def as_json(summary: Summary, machine: dict[str, Any]) -> dict[str, Any]:
    """All of the summary; growth by quantity, a list by rank."""
    plan = asdict(summary.plan) | {"timeout": summary.plan.timeout.total_seconds()}
    growth = {name: [changes[name].as_json() for changes in summary.growth] for name in worst(summary.growth)}
    fields = ("rounds", "last_round", "seconds", "interrupted", "watched", "passed", "operations", "bytes",
              "mismatches", "described", "errors", "grown")  # fmt: skip
    return {"machine": machine, "plan": plan, **{name: getattr(summary, name) for name in fields}, "growth": growth}
