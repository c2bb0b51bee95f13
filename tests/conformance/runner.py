"""Runs torch's tests of process groups with mnnvl and with the backend whose place it takes, and compares.

    bash scripts/conformance.sh [--backend mnnvl|gloo|nccl] [--device cpu|cuda] [--world N] [-k TEXT] [--output FOLDER]

Every test that the reference (gloo on CPU, NCCL on GPUs) passes on this machine must pass with mnnvl, but for those in
expectations.py, which must not. The exit status says whether that held; a record says what ran, and why each other test
did not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from conformance import record
from conformance.expectations import BY_DESIGN, REFERENCE_PASSES_AT_LEAST
from conformance.torch_suite import ALONE, FAILED, PASSED, REFERENCE, SKIPPED, Outcome, list_methods, run_method
from launcher import RankFailure, RankPool

SECONDS = 420  # torch's harness allows its slowest test 400
LOG = Path("build/conformance.log")
# Without this, tests meant for CPU would use the GPUs that they see.
ENVIRONMENT = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "cuda": {}}


def run_one(pool: RankPool, name: str, backend: str, reference: str, device: str, world_size: int) -> Outcome:
    """One test on all ranks, `backend` in the place of `reference`. Its folder is new, so that nothing of another test
    is met there."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mnnvl-conformance-") as folder:
        for part in ("barrier", "test_dir", "init_dir"):
            (Path(folder) / part).mkdir()
        arguments = (name, folder, backend, reference)
        try:
            outcomes = pool.run(run_method, world_size, device, SECONDS, ENVIRONMENT[device], arguments, backend=None)
        except RankFailure as failure:
            return Outcome(FAILED, str(failure), time.monotonic() - begin)
    if len({(outcome.status, outcome.reason) for outcome in outcomes}) > 1:
        return Outcome(FAILED, f"the ranks ended differently: {outcomes}", time.monotonic() - begin)
    return outcomes[0]


def listed(pool: RankPool, backend: str, device: str, world_size: int) -> dict[str, tuple[str, str | None]]:
    """Each test's name -> in whose place the backend runs it, and why not."""
    references = [REFERENCE[device]] + [ALONE] * (backend == "mnnvl" and device == "cpu")
    usual, *alone = (
        pool.run(list_methods, world_size, device, SECONDS, ENVIRONMENT[device], (backend, reference), backend=None)[0]
        for reference in references
    )
    tests = {name: (references[0], skipped) for name, skipped in usual.items()}
    for name, skipped in (alone[0] if alone else {}).items():
        if skipped is None and tests[name][1] is not None:
            tests[name] = (ALONE, None)
    return tests


def run_suite(backend: str, device: str, world_size: int, only: str) -> dict[str, Outcome]:
    """Every test whose name contains `only`. What ranks print and how they fail goes to LOG."""
    results: dict[str, Outcome] = {}
    with RankPool() as pool:
        for name, (reference, skipped) in listed(pool, backend, device, world_size).items():
            if only not in name:
                continue
            if skipped is not None:
                results[name] = Outcome(SKIPPED, skipped)
                continue
            with LOG.open("a") as log, contextlib.redirect_stdout(log):
                print(f"\n---- {backend}, {world_size} ranks, {device}: {name}", flush=True)
                results[name] = outcome = run_one(pool, name, backend, reference, device, world_size)
                print(outcome.reason)
            print(f"{backend}: {name} {outcome.status}, {outcome.seconds:.1f} s", flush=True)
    return results


def problems(
    results: dict[str, Outcome], reference: dict[str, Outcome], by_design: dict[str, str], at_least: int
) -> Iterable[str]:
    """What is not as expected."""
    passes = [name for name, outcome in reference.items() if outcome.status == PASSED]
    if len(passes) < at_least:
        yield f"the reference passes {len(passes)} tests, expected at least {at_least}: what is compared with is broken"
    for name in passes:
        passed = results[name].status == PASSED
        if name in by_design and passed:
            yield f"{name}: passes; take it off the list of tests that can't"
        elif name not in by_design and not passed:
            yield f"{name}: {results[name].status}, the reference passes"
    for name, outcome in results.items():
        if outcome.status == FAILED and reference[name].status == SKIPPED:
            yield f"{name}: failed, the reference skips it"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="conformance.sh", description=__doc__)
    parser.add_argument("--backend", default="mnnvl", choices=("mnnvl", "gloo", "nccl"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--world", type=int, default=None, help="ranks; 4 on CPU, 2 on GPUs")
    parser.add_argument("-k", default="", metavar="TEXT", dest="only", help="only tests whose names contain TEXT")
    parser.add_argument("--output", type=Path, help="folder of the record; none is written without")
    args = parser.parse_args(arguments)
    world_size = args.world or {"cpu": 4, "cuda": 2}[args.device]
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("")
    reference_name = REFERENCE[args.device]
    begin = time.monotonic()
    reference = run_suite(reference_name, args.device, world_size, args.only)
    results = reference
    if args.backend != reference_name:
        results = run_suite(args.backend, args.device, world_size, args.only)
    by_design = BY_DESIGN[args.device] if args.backend == "mnnvl" else {}
    at_least = 0 if args.only else REFERENCE_PASSES_AT_LEAST.get((args.device, world_size), 1)
    wrong = list(problems(results, reference, by_design, at_least))
    run = record.Run(
        f"bash scripts/conformance.sh {' '.join(arguments)}".strip(), args.device, world_size, args.backend,
        reference_name, results, reference, by_design, wrong, time.monotonic() - begin,
    )  # fmt: skip
    text = record.markdown(run)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        file = args.output / f"{datetime.date.today().isoformat()}-conformance-{args.device}-{world_size}.md"
        file.write_text(text)
        print(f"written: {file}")
    print(f"what ranks printed, and tracebacks of failures: {LOG}")
    return run.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
