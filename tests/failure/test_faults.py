"""Every fault of faults.py, each tried often: who survives raises soon and says who and what, nothing is left behind, and a new
group works.

MNNVL_TEST_TRIES: how often each (default 1). scripts/faults.sh makes a table of it, in the folder MNNVL_FAULTS_RECORD.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from failing import NOTICED_WITHIN, works
from faults import FAULTS, Fault
from faults_of_processes import VICTIM, WORLD_SIZE, Seen
from launcher import Died, Rank, run_ranks

from mnnvl_backend.tools.soak_growth import Growth

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
TRIES = int(os.environ.get("MNNVL_TEST_TRIES", "1"))


@dataclasses.dataclass
class Report:
    """Of a rank that is still there."""

    seen: list[Seen | None]
    left: list[str]  # what has grown


def life(rank: Rank, name: str) -> None:
    """A group, from nothing to nothing, with all that torch makes at a first use."""
    rank.init(prefix=name)
    works(rank)
    dist.all_reduce(torch.ones(5, device=rank.device), async_op=True).get_future().then(lambda future: None).wait()
    dist.destroy_process_group()


def survivors(rank: Rank, fault: Fault) -> Rank:
    """This rank in a group of those that are left."""
    if fault.dies is None:
        return rank
    return dataclasses.replace(rank, rank=rank.rank - (rank.rank > VICTIM), world_size=rank.world_size - 1)


def body(rank: Rank, number: int, turns: Iterable[int]) -> Report:
    fault = FAULTS[number]
    for warm_up in range(2):
        life(rank, f"warm-up {warm_up}")
    gc.freeze()  # what is looked through for garbage several times is what came since
    growth = Growth(rank.device)
    growth.sample(warming_up=True)
    seen = []
    for turn in turns:
        if not fault.makes_groups:
            rank.init(prefix=f"turn{turn}", timeout=timedelta(seconds=fault.timeout))
        seen.append(fault.body(rank, turn))
        if dist.is_initialized():
            dist.destroy_process_group()
        left = survivors(rank, fault)
        left.meet(f"over {turn}")
        life(left, f"after {turn}")
    growth.sample(warming_up=False)
    growth.settle()
    children = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
    return Report(seen, growth.grown() + [f"children: {children}"] * bool(children))


def sockets() -> set[str]:
    """The names of set-ups' abstract sockets on this host, whosever they are."""
    return {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@mnnvl-" in line}


def stay(before: set[str]) -> list[str]:
    """Sockets that are new and don't go."""
    new = sockets() - before
    end = time.monotonic() + 2
    while new and time.monotonic() < end:
        time.sleep(0.02)
        new &= sockets()
    return [f"socket {name}" for name in new]


def check(fault: Fault, reports: list[Report | Died]) -> list[Seen]:
    """What was raised, all of it as it should be."""
    raised: list[Seen] = []
    for rank, report in enumerate(reports):
        if fault.dies is not None and rank == VICTIM:
            assert report == Died(fault.dies)
            continue
        assert isinstance(report, Report), report
        assert report.left == [], f"rank {rank}: left behind: {report.left}"
        for turn, seen in enumerate(report.seen):
            assert (seen is not None) == bool(fault.says), f"rank {rank}, turn {turn}: {seen}"
            if seen is not None:
                assert re.search(fault.says, seen.text), f"rank {rank}, turn {turn}: {seen}"
                assert seen.seconds < NOTICED_WITHIN, f"rank {rank}, turn {turn}: {seen}"
                raised.append(seen)
    return raised


class Table:
    """What was tried in this run, by device."""

    def __init__(self) -> None:
        self.rows: dict[str, list[str]] = {}

    def add(self, device: str, name: str, tried: int, seconds: list[float], outcome: str) -> None:
        slowest = f"{max(seconds):.3f}" if seconds else ""
        cells = (name, str(tried) if tried else "", slowest, outcome, "nothing" if tried else "")
        self.rows.setdefault(device, []).append(f"| {' | '.join(cells)} |")

    def write(self, folder: Path) -> None:
        for device, rows in self.rows.items():
            date = time.strftime("%Y-%m-%d")
            lines = [f"# Faults, {device}, {date}", "", *machine(), "", HEAD, "|---|---:|---:|---|---|", *rows]
            (folder / f"{date}-faults-{device}.md").write_text("\n".join(lines) + "\n")


HEAD = "| fault, of rank 1 of 3 | tried | slowest raise (s) | what follows | left behind |"


def machine() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"- {model[1] if model else platform.machine()}, {os.cpu_count()} cores; GPUs: {', '.join(gpus) or 'none'}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, Linux {platform.release()}",
        f"- `MNNVL_TEST_TRIES={TRIES} bash scripts/faults.sh`",
        "- Every survivor raised within 5 s of the fault, naming the rank and what it was in; then a new group worked, and memory,",
        "  descriptors, threads, mappings, segments, processes and sockets were as before.",
    ]


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    made = Table()
    yield made
    if folder := os.environ.get("MNNVL_FAULTS_RECORD"):
        made.write(Path(folder))


@pytest.mark.timeout(120 + 20 * TRIES)
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_fault(device: str, number: int, table: Table) -> None:
    fault = FAULTS[number]
    if device not in fault.devices:
        pytest.skip(f"not of {device}")
    if reason := fault.needs():
        table.add(device, fault.name, 0, [], f"not possible here: {reason}")
        pytest.skip(reason)
    before = sockets()
    dies = fault.dies is not None
    raised = []
    for turns in [[turn] for turn in range(TRIES)] if dies else [range(TRIES)]:
        reports = run_ranks(
            body, WORLD_SIZE, device, args=(number, turns), backend=None, timeout=60 + 10 * len(turns),
            may_die=[VICTIM] if dies else [],
        )  # fmt: skip
        raised += check(fault, reports)
    assert stay(before) == []
    usual = "raise" if fault.says else "all go on, with right numbers"
    table.add(device, fault.name, TRIES, [seen.seconds for seen in raised], fault.outcome or usual)


@pytest.mark.parametrize("plan", ["fabric", "descriptors"])
def test_out_of_memory_at_any_call_of_a_set_up(plan: str, table: Table) -> None:
    """Of the driver, on one rank, over the double: all raise alike, or all go on without what failed (multicast, one kind of handle)."""
    from double import run_fake_setup  # loaded here alone: each try's processes import this file

    config = {"world_size": WORLD_SIZE, "clusters": ["rack" if plan == "fabric" else ""]}
    calls = run_fake_setup(**config)["calls_by_rank"][VICTIM]
    seconds, tried, spared = [], 0, 0
    for function, nth in [(f, n) for f, count in calls.items() for n in range(count)] * TRIES:
        result = run_fake_setup(**config, faults=[(VICTIM, function, nth + 1, OUT_OF_MEMORY)])
        left = (result["leaks"], result["descriptors_leaked"], result["mappings_leaked"])
        assert left == ({}, 0, 0), (function, nth)
        assert max(result["seconds"]) < NOTICED_WITHIN, (function, nth)
        tried += 1
        if all(result["ok"]):
            spared += 1
            continue
        assert not any(result["ok"]), (function, nth)
        assert all(re.search(rf"rank {VICTIM}\b", text) for text in result["errors"]), (function, nth)
        seconds += result["seconds"]
    assert 0 < spared < tried
    outcome = f"raise, or all do without ({spared} times)"
    table.add(
        "cpu", f"out of memory at any call of the driver in set-up, by {plan} (the double)", tried, seconds, outcome
    )
