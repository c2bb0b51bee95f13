"""What is expected of torch's tests where mnnvl takes the place of gloo (CPU) or NCCL (CUDA)."""

from __future__ import annotations

# Tests that the reference passes and mnnvl can't, by design -> why. One that passes after all is reported.
MONITORED = "torch's own function refuses every backend but gloo, by name; the group's monitored_barrier works"
BY_DESIGN: dict[str, dict[str, str]] = {
    "cpu": {
        "test_ddp_logging_data_cpu": "wants the backend's name in DDP's log, which says \"custom\" of all plugins",
        "test_monitored_barrier_failure_order": MONITORED,
        "test_monitored_barrier_gloo": MONITORED,
        "test_monitored_barrier_gloo_subgroup": MONITORED,
        "test_monitored_barrier_wait_all_ranks": MONITORED,
        "test_sparse_all_reduce_sum": "sparse tensors are refused, with an error that says so",
    },
    "cuda": {
        "test_ddp_profiling_execution_trace": 'begins by asking whether the name of the backend is "nccl"',
    },
}

# (device, world size) -> how many tests the reference passes at least, whatever the version of torch: with fewer
# there is little to compare with.
REFERENCE_PASSES_AT_LEAST = {("cpu", 4): 90, ("cpu", 8): 108, ("cuda", 2): 140}
