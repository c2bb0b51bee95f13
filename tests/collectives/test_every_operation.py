"""Every operation in every form, of every dtype, by every ReduceOp, as mnnvl_backend/tools/soak_operations.py lists them: random sizes, offsets,
roots and payloads, in place or not, a few calls in flight at once. All bytes are checked on all ranks: what came, what was only
read, and what lies around.

MNNVL_TEST_CASES: how many for each world size (default 600); MNNVL_TEST_SEED: the first one's seed. A failure shows the case, whose
seed runs it again alone: MNNVL_TEST_CASES=1 MNNVL_TEST_SEED=<seed>; to shrink it, change it: MNNVL_TEST_CASE='Case(...)'.
"""

from __future__ import annotations

import itertools
import os
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
from launcher import Rank
from reference import EVERY_DTYPE, all_reduce_works

from mnnvl_backend.tools import soak_calls
from mnnvl_backend.tools.soak_calls import CALLS, Coalesced, Prepared, prepared
from mnnvl_backend.tools.soak_operations import COMBINATIONS, LEAST_SEEDS, REDUCTIONS, SUPPORT, WORLDS, Case

CASES = int(os.environ.get("MNNVL_TEST_CASES", "600"))
FIRST_SEED = int(os.environ.get("MNNVL_TEST_SEED", "1"))
ONE_CASE = os.environ.get("MNNVL_TEST_CASE")
SECONDS = 60 + CASES / 5  # more than enough


def run(rank: Rank, cases: list[Case]) -> list[Prepared | Coalesced]:
    """All in flight before the first wait, as far as they are asynchronous."""
    calls = [prepared(rank, case) for case in cases]
    for call, mismatch in soak_calls.run(calls):
        raise AssertionError(f"rank {rank.rank} of {rank.world_size}, {call.case}: {mismatch}\nof {cases}")
    return calls


def cases_body(rank: Rank, cases: list[Case]) -> None:
    while cases:
        count = random.Random(cases[0].seed).randint(1, 4)
        run(rank, cases[:count])
        cases = cases[count:]


def random_cases(world_size: int) -> list[Case]:
    return [Case.random(seed, world_size) for seed in range(FIRST_SEED, FIRST_SEED + CASES)]


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_operation(ranks, device, world_size):
    cases = [eval(ONE_CASE, {"Case": Case, "torch": torch})] if ONE_CASE else random_cases(world_size)
    ranks(cases_body, world_size, device, args=(cases,), timeout=SECONDS)


def test_every_combination_is_tried():
    """Of operation, form, dtype and ReduceOp, so that what the README promises has been run."""
    assert set(CALLS) == set(SUPPORT)
    cases = [
        Case.random(seed, world_size) for world_size in WORLDS for seed in range(FIRST_SEED, FIRST_SEED + LEAST_SEEDS)
    ]
    assert {(case.operation, case.form, case.dtype, case.op) for case in cases} == set(COMBINATIONS)


def refused_body(rank: Rank) -> None:
    for dtype, op in itertools.product(EVERY_DTYPE, REDUCTIONS):
        if dtype in REDUCTIONS[op]:
            continue
        x = torch.zeros(4 * dtype.itemsize, dtype=torch.uint8).to(rank.device).view(dtype)
        reduce_op = dist._make_nccl_premul_sum(2.0) if op == "PREMUL_SUM" else getattr(dist.ReduceOp, op)
        calls = {
            "all_reduce": partial(dist.all_reduce, x, reduce_op),
            "reduce": partial(dist.reduce, x, 0, reduce_op),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, x[:2], x, reduce_op),
        }
        assert set(calls) == {name for name, operation in SUPPORT.items() if operation.reduces}
        for name, call in calls.items():
            try:
                call()
            except (TypeError, ValueError):
                continue
            raise AssertionError(f"{name} of {dtype} by {op} is not refused")
    all_reduce_works(rank)


def test_what_is_not_listed_is_refused(ranks, device):
    ranks(refused_body, 2, device)


def flipped_bit_body(rank: Rank, cases: list[Case]) -> int:
    """Anywhere: in a result, in what was only read, beside them."""
    chance, tried = random.Random(rank.rank), 0
    for case in cases:
        (call,) = run(rank, [case])
        if memories := [memory for memory in call.memories if memory.tensors]:
            chance.choice(memories).flip_a_bit(chance)
            tried += 1
            with pytest.raises(AssertionError, match="elements of tensor .* differ"):
                call.check()
    return tried


def test_a_flipped_bit_is_found(ranks, device):
    cases = [Case.random(seed, 2) for seed in range(100)]
    assert min(ranks(flipped_bit_body, 2, device, args=(cases,))) == len(cases) - sum(
        case.operation == "barrier" for case in cases
    )


def serves(case: Case) -> bool:
    """Gloo, in the same bits: where the order of a reduction doesn't matter."""
    if case.form in ("coalesced", "uneven", "lists") or case.operation == "reduce":
        return False
    if case.op:
        exact = case.payload == "integers" or not case.dtype.is_floating_point
        return exact and case.op in ("SUM", "MIN", "MAX") and case.dtype in GLOO_DTYPES
    return case.dtype in GLOO_DTYPES


GLOO_DTYPES = [
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


@pytest.mark.parametrize("world_size", [2, 3])
def test_gloo_agrees_with_the_reference(ranks, world_size):
    """So that reference and test are not only right by what they test."""
    cases = [case for seed in range(1500) if serves(case := Case.random(seed, world_size))]
    assert {case.operation for case in cases} == set(SUPPORT) - {"reduce"}
    ranks(cases_body, world_size, args=(cases,), backend="gloo")
