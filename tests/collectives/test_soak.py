"""`mnnvl soak` for a few seconds: random calls of all kinds from two threads on two groups while others come and go, on a
GPU on three streams and in graphs. Every byte is checked, and nothing may grow.

MNNVL_TEST_SECONDS: how long (default 4); MNNVL_TEST_SEED: of all that is drawn. A failure shows seed, round and call.
"""

from __future__ import annotations

import json
import mmap
import os
import threading

import pytest
import torch
from launcher import Rank, run_ranks
from torchrun import torchrun

from mnnvl_backend.tools import soak_calls, soak_lanes
from mnnvl_backend.tools.soak import WARM_UP_ROUNDS, Plan, Soak, Summary
from mnnvl_backend.tools.soak_growth import MIB, Growth

SECONDS = float(os.environ.get("MNNVL_TEST_SECONDS", "4"))
SEED = int(os.environ.get("MNNVL_TEST_SEED", "1"))


def soak_body(rank: Rank, seconds: float) -> Summary:
    soak = Soak(rank, Plan(seconds, SEED, timeout=rank.group_timeout))
    summary = soak.run(lambda progress: None, threading.Event())
    if summary.passed:
        soak.close()
    return summary


@pytest.mark.timeout(SECONDS + 150)
@pytest.mark.parametrize("world_size", [2, 3])
def test_soak(device, world_size):
    """In processes of their own, where nothing else has left anything."""
    if device == "cuda" and world_size > max(2, torch.cuda.device_count()):
        pytest.skip(f"fewer than {world_size} CUDA devices")
    summaries = run_ranks(soak_body, world_size, device, args=(SECONDS,), timeout=SECONDS + 120)
    for summary in summaries:
        assert summary.passed, "\n".join([*summary.described, *summary.errors, *summary.grown])
        assert summary.rounds > WARM_UP_ROUNDS
        assert set(soak_calls.CALLS) | {"function", "fused", "fused_fp8", "brief group"} <= set(summary.operations)
    print(summaries[0])


def mismatch_body(rank: Rank) -> Summary:
    """Rank 1 spoils what one broadcast of a later round gave it."""
    broadcast = soak_calls.CALLS["broadcast"]
    last = WARM_UP_ROUNDS * soak_lanes.ROUNDS_APART + SEED * 1_000_003
    spoilt: list[int] = []

    def spoiling(p: soak_calls.Prepared) -> soak_calls.Works:
        works = broadcast(p)
        if (
            rank.rank == 1
            and p.case.seed > last
            and p.case.seed < last + 1000
            and not p.case.asynchronous
            and not spoilt
        ):
            spoilt.append(p.case.seed)
            p.memories[0].flip_a_bit(soak_lanes.random.Random(0))
        return works

    soak_calls.CALLS["broadcast"] = spoiling
    return soak_body(rank, 2)


@pytest.mark.timeout(120)
def test_a_mismatch_is_told_with_its_round():
    for summary in run_ranks(mismatch_body, 2, timeout=100):
        assert summary.mismatches == 1
        assert not summary.passed
        (text,) = summary.described
        assert text.startswith(f"seed {SEED}, round {WARM_UP_ROUNDS}, lane 0, rank 1: Case(")
        assert "operation='broadcast'" in text
        assert not summary.errors


def growth_body(rank: Rank) -> Summary:
    """Rank 1 opens a descriptor in each round."""
    run = soak_lanes.Lane.run

    def leaking(lane: soak_lanes.Lane, seed: int, number: int) -> soak_lanes.Outcome:
        if rank.rank == 1 and lane.number == 0:
            os.dup(0)
        return run(lane, seed, number)

    soak_lanes.Lane.run = leaking
    return soak_body(rank, 1)


@pytest.mark.timeout(120)
def test_growth_of_one_rank_is_told_by_all():
    for summary in run_ranks(growth_body, 2, timeout=100):
        assert not summary.passed
        assert not summary.mismatches
        (text,) = summary.grown
        assert text.startswith("rank 1: descriptors: ")
        change = summary.growth[1]["descriptors"]
        assert change.after - change.before == summary.rounds - WARM_UP_ROUNDS


def error_body(rank: Rank) -> Summary:
    """A thread of rank 1 raises and makes no call in a later round."""
    go_through = soak_lanes.Lane.go_through

    def raising(lane: soak_lanes.Lane, cases: list, chance: object, outcome: object, where: str) -> None:
        if rank.rank == 1 and "round 1, lane 0" in where:
            raise OSError("planted")
        go_through(lane, cases, chance, outcome, where)

    soak_lanes.Lane.go_through = raising
    return soak_body(rank, 60)


@pytest.mark.timeout(120)
def test_a_rank_that_fails_ends_all():
    for summary in run_ranks(error_body, 3, timeout=100, group_timeout=5):
        assert not summary.passed
        assert f"seed {SEED}, round 1, lane 0, rank 1: OSError: planted" in summary.errors


@pytest.mark.timeout(120)
def test_the_command(tmp_path):
    """Under torchrun, with its report."""
    path = tmp_path / "soak.json"
    arguments = ["--minutes", "0.02", "--seed", "3", "--device", "cpu", "--json", str(path)]
    ran = torchrun(2, "-m", "mnnvl_backend", "soak", *arguments, timeout=75)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "soak: passed: 0 mismatches, no growth" in ran.stdout
    found = json.loads(path.read_text())
    assert found["passed"]
    assert found["plan"]["seed"] == 3
    assert found["mismatches"] == 0
    assert len(found["growth"]["descriptors"]) == 2
    assert found["machine"]["torch"] == torch.__version__


def test_growth_is_found():
    growth, woken = Growth(torch.device("cpu")), threading.Event()
    growth.sample(warming_up=True)
    growth.sample(warming_up=False)
    assert not growth.grown()
    thread = threading.Thread(target=woken.wait)
    thread.start()
    descriptor = os.memfd_create("segment")
    os.truncate(descriptor, MIB)
    segments = [mmap.mmap(descriptor, MIB) for _ in range(70)]
    tensors = [torch.ones(1000) for _ in range(20_000)]
    for _ in range(3):
        growth.sample(warming_up=False)
    found = {text.split(":")[0] for text in growth.grown()}
    assert all(growth.changes()[name].per_hour > 0 for name in found)
    woken.set()
    thread.join()
    for segment in segments:
        segment.close()
    os.close(descriptor)
    assert found == {name for name, value in growth.before.items() if value or name == "segments"}
    del tensors
    growth.settle()
    assert not growth.grown()
