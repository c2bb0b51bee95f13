"""PyTorch's own tests of process groups with mnnvl on CPU: some of each kind. All of them: scripts/conformance.sh.

And that the comparison itself can fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conformance import record
from conformance.runner import problems, run_one
from conformance.torch_suite import ALONE, FAILED, PASSED, SKIPPED, Outcome, Stand
from launcher import RankPool

WORLD_SIZE = 4
QUICK = (
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook",
    "test_all_gather_coalesced_with_empty",
    "test_all_gather_object_subgroup",
    "test_all_reduce_coalesced_sum",
    "test_all_reduce_complex_unsupported_ops",
    "test_all_reduce_sum_async",
    "test_barrier_timeout_full_group",
    "test_batch_isend_irecv_gloo_tags",
    "test_broadcast",
    "test_destroy_group",
    "test_gather_checks",
    "test_gather_object",
    "test_get_future",
    "test_monitored_barrier_gloo_rank_0_timeout",
    "test_new_subgroups_with_group_param",
    "test_reduce_product",
    "test_scatter_complex",
    "test_send_recv_any_source_torch_profiler",
    "test_send_recv_with_tag",
)
QUICK_ALONE = ("test_all_to_all", "test_all_to_all_single_unequal_split_complex")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks of their own: torch's tests change much of the process that imports them."""
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("name", QUICK)
def test_passes_as_with_gloo(pool, name):
    outcome = run_one(pool, name, "mnnvl", "gloo", "cpu", WORLD_SIZE)
    assert outcome.status == PASSED, outcome.reason


@pytest.mark.parametrize("name", QUICK_ALONE)
def test_passes_where_gloo_has_no_such_operation(pool, name):
    outcome = run_one(pool, name, "mnnvl", ALONE, "cpu", WORLD_SIZE)
    assert outcome.status == PASSED, outcome.reason


def test_a_skip_is_seen(pool):
    assert run_one(pool, "test_barrier_cuda", "mnnvl", "gloo", "cpu", WORLD_SIZE).status == SKIPPED


def test_a_failure_is_seen(pool):
    """Of a test that needs what mnnvl refuses by design. Last of those with ranks: it costs the pool its ranks."""
    outcome = run_one(pool, "test_sparse_all_reduce_sum", "mnnvl", "gloo", "cpu", WORLD_SIZE)
    assert outcome.status == FAILED
    assert record.error_line(outcome.reason).startswith("ValueError: mnnvl all_reduce: tensor: expected a dense tensor")


@pytest.mark.parametrize(
    ("outcome", "by_design", "expected"),
    [
        (PASSED, {}, []),
        (FAILED, {}, ["test_a: failed, the reference passes"]),
        (SKIPPED, {}, ["test_a: skipped, the reference passes"]),
        (FAILED, {"test_a": "why"}, []),
        (PASSED, {"test_a": "why"}, ["test_a: passes; take it off the list of tests that can't"]),
    ],
)
def test_what_is_not_as_expected(outcome, by_design, expected):
    reference = {"test_a": Outcome(PASSED), "test_b": Outcome(SKIPPED), "test_c": Outcome(FAILED)}
    results = {"test_a": Outcome(outcome), "test_b": Outcome(SKIPPED), "test_c": Outcome(FAILED)}
    assert list(problems(results, reference, by_design, 1)) == expected


def test_a_failure_where_the_reference_is_skipped_is_an_error():
    reference, results = {"test_a": Outcome(SKIPPED)}, {"test_a": Outcome(FAILED)}
    assert list(problems(results, reference, {}, 0)) == ["test_a: failed, the reference skips it"]


def test_a_reference_that_runs_nothing_is_an_error():
    assert "passes 0 tests" in next(iter(problems({}, {"test_a": Outcome(SKIPPED)}, {}, 1)))


def test_stand():
    """Equal to both names in either order, hashed and written as its own."""
    stand = Stand("mnnvl", "gloo")
    assert stand == "gloo" and "gloo" == stand and stand == "mnnvl" and stand != "nccl"  # noqa: PT018, SIM300
    assert not stand != "gloo"  # noqa: SIM202
    assert (stand.lower(), f"{stand}", {stand: 1}["mnnvl"]) == ("mnnvl", "mnnvl", 1)
