"""The dated record of a run: what ran, on what, and why each test that didn't pass did not."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from conformance.torch_suite import FAILED, PASSED, SKIPPED, Outcome

import mnnvl_backend

ROOT = Path(__file__).resolve().parents[2]
RESULTS = (PASSED, SKIPPED, FAILED)


@dataclass(frozen=True)
class Run:
    """All that a record tells of. `wrong` is what was not as expected."""

    command: str
    device: str
    world_size: int
    backend: str
    reference_name: str
    results: dict[str, Outcome]
    reference: dict[str, Outcome]
    by_design: dict[str, str]
    wrong: list[str]
    seconds: float

    @property
    def exit_status(self) -> int:
        return 1 if self.wrong else 0


def machine(run: Run) -> Iterator[str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    yield f"- date: {datetime.date.today().isoformat()}"
    yield f"- command: `{run.command}`, exit status {run.exit_status}, {run.seconds:.0f} s"
    yield f"- mnnvl_backend: {mnnvl_backend.__version__}, commit {commit.stdout.strip() or 'unknown'}"
    yield f"- torch: {torch.__version__}, python: {platform.python_version()}"
    yield f"- system: {platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"
    if run.device == "cuda":
        names = Counter(torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count()))
        yield f"- GPUs: {', '.join(f'{count} x {name}' for name, count in names.items())}"
        yield f"- CUDA: {torch.version.cuda}, NCCL: {'.'.join(map(str, torch.cuda.nccl.version()))}"


def error_line(reason: str) -> str:
    """Of a report of all ranks, the last error of the first rank that has one; others were only killed afterwards."""
    errors: dict[str, str] = {}
    for rank, line in re.findall(r"^\[rank(\d+)\] (.*)$", reason, re.M):
        if re.match(r"[\w.]*(Error|Exception|Interrupt)\b|died with|killed:", line):
            errors[rank] = line
    first = next((line for line in errors.values() if not line.startswith("killed:")), None)
    return (first or next(iter(errors.values()), reason.strip().splitlines()[-1]))[:300].replace("|", "\\|")


def counts(run: Run) -> Iterator[str]:
    yield "| backend | " + " | ".join(RESULTS) + " |"
    yield "| --- |" + " ---: |" * len(RESULTS)
    for name, results in {run.reference_name: run.reference, run.backend: run.results}.items():
        count = Counter(outcome.status for outcome in results.values())
        yield f"| {name} | " + " | ".join(str(count[status]) for status in RESULTS) + " |"


def failures(run: Run) -> Iterator[str]:
    """Each failing test of either backend, with its error; and what the expectations say of it."""
    for name, results in {run.reference_name: run.reference, run.backend: run.results}.items():
        failed = {test: outcome for test, outcome in results.items() if outcome.status == FAILED}
        yield f"\n## Failed with {name}: {len(failed)}\n"
        for test, outcome in failed.items():
            yield f"- `{test}`: {error_line(outcome.reason)}"
            if name == run.backend and test in run.by_design:
                yield f"  - by design: {run.by_design[test]}"
        if run.backend == run.reference_name:
            return


def alone(run: Run) -> Iterator[str]:
    """Tests of operations that the reference doesn't have."""
    names = [name for name, outcome in run.results.items() if outcome.status == PASSED]
    names = [name for name in names if run.reference[name].status == SKIPPED]
    if names:
        yield f"\n## Passed with {run.backend} where {run.reference_name} is skipped: {len(names)}\n"
        yield ", ".join(f"`{name}`" for name in names)


def skips(run: Run) -> Iterator[str]:
    reasons = defaultdict(list)
    for test, outcome in run.results.items():
        if outcome.status == SKIPPED:
            reasons[outcome.reason].append(test)
    yield f"\n## Skipped with {run.backend}: {sum(map(len, reasons.values()))}\n"
    yield "The same tests, for the same reasons, as with its reference, unless said above.\n"
    for reason, tests in sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        yield f"- {reason.strip().replace(chr(10), ' ')} ({len(tests)}): {', '.join(f'`{test}`' for test in tests)}"


def markdown(run: Run) -> str:
    title = f"# PyTorch's tests of process groups: {run.backend} beside {run.reference_name}, {run.world_size} ranks"
    wrong = [f"- {what}" for what in run.wrong] or ["Nothing."]
    lines = [
        f"{title}, {run.device}", "", *machine(run), "", *counts(run), "", "## Not as expected", "", *wrong,
        *failures(run), *alone(run), *skips(run),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
