"""Exhaustive searches of the protocols' models by SPIN: README.md says what each of them shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SECONDS, MEGABYTES, DEPTH = 110, 900, 2_000_000

pytestmark = [
    pytest.mark.skipif(shutil.which("spin") is None, reason="spin isn't installed"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc isn't installed"),
    pytest.mark.timeout(2 * SECONDS),
]

ASSERTION, DEADLOCK = "assertion violated", "invalid end state"


@dataclass(frozen=True)
class Search:
    """One model with its parameters; `finds`: what must go wrong, or nothing."""

    model: str
    parameters: str = ""
    finds: str = ""

    def __str__(self) -> str:
        return f"{self.model} {self.parameters}".strip().replace(" ", "-")


RIGHT = [
    Search("lamport"),
    Search("lamport", "G=2"),
    Search("lamport", "TWO=3 SMALL=1 ONE=0 PER=2 G=2"),
    Search("lamport", "MULTICAST=1 ONE=0"),
    Search("lamport", "MULTICAST=1 TWO=0"),
    Search("lamport", "N=3 TWO=1"),
    Search("lamport", "FAIL=1"),
    Search("lamport", "FAIL=2"),
    Search("windows"),
    Search("windows", "SHORT=1"),
    Search("windows", "PER_GENERATION=4 LAG=3 WINDOWS=9 ONE=0"),
    Search("windows", "PER_GENERATION=4 LAG=3 WINDOWS=9 K=1 T=1"),
    Search("channel", "PIECES=0"),
    Search("channel", "LINES=0 PIECES=2"),
    Search("channel", "PIECES=0 FAIL=1"),
    Search("channel", "LINES=0 FAIL=1"),
    Search("agreement"),
    Search("agreement", "DIE=1"),
    Search("agreement", "LATE=1"),
    Search("futex", "KIND=0 WAITERS=3"),
    Search("futex", "KIND=0 ABORT=1 BOUNDED=1"),
    Search("futex", "KIND=1"),
    Search("futex", "KIND=1 ABORT=1"),
]

WRONG = [
    Search("lamport", "G=1", ASSERTION),
    Search("lamport", "MISTAKE=1", ASSERTION),
    Search("lamport", "MISTAKE=2", DEADLOCK),
    Search("lamport", "MISTAKE=3", ASSERTION),
    Search("lamport", "MISTAKE=4 MULTICAST=1", ASSERTION),
    Search("lamport", "MISTAKE=5", ASSERTION),
    Search("lamport", "MISTAKE=6", DEADLOCK),
    Search("lamport", "MISTAKE=7 FAIL=1", DEADLOCK),
    Search("lamport", "MISTAKE=8 FAIL=1", ASSERTION),
    Search("lamport", "MISTAKE=9 FAIL=1", ASSERTION),
    Search("windows", "G=2", ASSERTION),
    Search("windows", "LAG=1", DEADLOCK),
    Search("windows", "LAG=4", ASSERTION),
    *(Search("windows", f"MISTAKE={n}", ASSERTION) for n in (1, 2, 3)),
    *(Search("channel", f"LINES=0 PIECES=2 MISTAKE={n}", ASSERTION) for n in (1, 2, 5)),
    *(Search("channel", f"PIECES=0 MISTAKE={n}", ASSERTION) for n in (3, 4)),
    *(Search("channel", f"PIECES=0 MISTAKE={n}", DEADLOCK) for n in (6, 7, 9)),
    Search("channel", "PIECES=0 FAIL=1 MISTAKE=8", DEADLOCK),
    Search("agreement", "DIE=1 MISTAKE=1", ASSERTION),
    Search("agreement", "MISTAKE=2", ASSERTION),
    Search("agreement", "LATE=1 MISTAKE=3", ASSERTION),
    Search("agreement", "MISTAKE=4", ASSERTION),
    Search("agreement", "DIE=1 MISTAKE=5", DEADLOCK),
    Search("futex", "KIND=0 ABORT=1 BOUNDED=0", DEADLOCK),
    *(Search("futex", f"KIND=0 MISTAKE={n}", DEADLOCK) for n in (1, 2, 4, 5)),
    *(Search("futex", f"KIND=1 MISTAKE={n}", DEADLOCK) for n in (1, 2, 3, 4, 5)),
]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)}\n{output}"
    return output


def search(what: Search, folder: Path, optimise: str) -> str:
    """What the verifier says at its end."""
    model = folder / f"{what.model}.pml"
    shutil.copy(HERE / model.name, model)
    said = run(["spin", "-a", *(f"-D{p}" for p in what.parameters.split()), model.name], folder)
    assert "error" not in said.lower(), said
    flags = [optimise, "-w", "-DSAFETY", f"-DMEMLIM={MEGABYTES}"]
    run(["gcc", *flags, "-o", "pan", "pan.c"], folder)
    # Ends at the first error.
    return run(["./pan", f"-m{DEPTH}"], folder)


def errors(output: str) -> int:
    found = re.search(r"errors: (\d+)", output)
    assert found, output
    return int(found[1])


def is_complete(output: str) -> bool:
    stops = ("max search depth too small", "Search not completed", "out of memory")
    return "Full statespace search" in output and not any(stop in output for stop in stops)


@pytest.mark.parametrize("what", RIGHT, ids=str)
def test_no_error(what: Search, tmp_path: Path) -> None:
    output = search(what, tmp_path, "-O1")
    assert errors(output) == 0, output
    assert is_complete(output), output


@pytest.mark.parametrize("what", WRONG, ids=str)
def test_mistake_is_found(what: Search, tmp_path: Path) -> None:
    output = search(what, tmp_path, "-O0")
    assert errors(output) == 1, output
    assert what.finds in output.splitlines()[0], output


def test_incomplete_search_is_seen(tmp_path: Path) -> None:
    search(Search("futex"), tmp_path, "-O0")
    assert not is_complete(run(["./pan", "-m20"], tmp_path))
