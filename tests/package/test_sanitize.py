"""scripts/sanitize.sh, which needs a GPU: that it covers every kernel by tests that exist, and, over a stand-in for
compute-sanitizer, that no kind of failure passes for success."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
CLEAN = 'echo "3 passed in 1 s"; echo "========= ERROR SUMMARY: 0 errors" >$log'


def listed(what: str, tool: str) -> set[str]:
    out = subprocess.run(["bash", "scripts/sanitize.sh", "--list", "--tool", tool], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout  # fmt: skip
    lines = [line.split(" ", 2) for line in out.splitlines()]
    sections = {section for section, key, _ in lines if key == "tool"}
    return {value for section, key, value in lines if key == what and section in sections}


def sanitize(folder: Path, stand_in: str, *arguments: str, seconds: int = 60) -> tuple[int, str]:
    """Runs the script with a compute-sanitizer that does `stand_in`; its $log is what the tool would write."""
    tool = folder / "compute-sanitizer"
    tool.write_text(
        "#!/bin/bash\n"
        'while [ "$1" != -m ]; do [ "$1" != --log-file ] || log=${2//%p/$$}; [ "$1" != --tool ] || tool=$2; shift; done\n'
        f"{stand_in}\n"
    )
    tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable,
                                "SANITIZE_BUILT": "1", "SANITIZE_SECONDS": str(seconds)}  # fmt: skip
    done = subprocess.run(["bash", "scripts/sanitize.sh", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_every_kernel_and_tool() -> None:
    sources = {str(f.relative_to(KERNELS)): f.read_text() for f in KERNELS.rglob("*.cu") if f.parent.name != "host"}
    for tool in ("memcheck", "synccheck"):
        assert listed("kernel", tool) == set(sources)
    assert listed("kernel", "racecheck") == {
        name for name, text in sources.items() if "__shared__" in text and not name.startswith("channel/")
    }


def test_its_tests_exist() -> None:
    tests = sorted(listed("test", "memcheck"))
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", *tests], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert set(re.findall(r"^tests/\S+", done.stdout, re.M)) == set(tests), done.stdout + done.stderr


def test_all_is_well(tmp_path: Path) -> None:
    record = tmp_path / "record.md"
    code, out = sanitize(tmp_path, CLEAN, "--record", str(record))
    assert code == 0, out
    rows = re.findall(r"^\| (\w+check) +\| (\w+) +\| 3 passed +\| +0 \| +\d+ s \| ok \|$", record.read_text(), re.M)
    assert {tool for tool, _ in rows} == {"memcheck", "racecheck", "synccheck"}
    assert rows == re.findall(r"^\| (\w+check) +\| (\w+) +\| 3 passed", out, re.M)


@pytest.mark.parametrize(
    ("stand_in", "row"),
    [
        ('echo "3 passed"; echo "========= ERROR SUMMARY: 2 errors" >$log; exit 9', "3 passed  |      2 | errors"),
        ('echo "3 passed"; echo "========= ERROR SUMMARY: 1 error" >$log', "3 passed  |      1 | errors"),
        ('echo "3 passed"; echo "========= Invalid __global__ read of size 4 bytes" >$log', "3 passed  |      1 | errors"),
        ('echo "3 passed"; echo "========= RACECHECK SUMMARY: 4 hazards displayed (4 errors)" >$log',
         "3 passed  |      4 | errors"),
        (CLEAN + "; exit 1", "3 passed  |      0 | exit code 1"),
        ('echo "3 skipped"; echo "========= ERROR SUMMARY: 0 errors" >$log', "none      |      0 | no test passed (ok)"),
        ('echo "3 passed"', "3 passed  |      0 | the tool said nothing (ok)"),
        ("sleep 30", "none      |      0 | the tool said nothing (no test passed (out of time))"),
    ],
    ids=["errors", "one error", "killed before its summary", "hazards", "a test failed", "skipped", "no tool", "hangs"],
)  # fmt: skip
def test_no_failure_passes(tmp_path: Path, stand_in: str, row: str) -> None:
    code, out = sanitize(tmp_path, stand_in, "--tool", "memcheck", "--section", "channels", seconds=1)
    assert code == 1, out
    assert row in re.sub(r"\| +\d+ s ", "", out), out


def test_arguments(tmp_path: Path) -> None:
    code, out = sanitize(tmp_path, CLEAN, "--tool", "leakcheck")
    assert code == 1
    assert "--tool: expected one of memcheck racecheck synccheck, got 'leakcheck'" in out
    code, out = sanitize(tmp_path, CLEAN, "--tool", "racecheck", "--section", "graphs")
    assert code == 1
    assert "none of these tools runs any of these sections" in out
