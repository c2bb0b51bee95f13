"""What is expected of torch's tests where mnnvl takes the place of gloo (CPU) or NCCL (CUDA)."""

from __future__ import annotations

# Tests that the reference passes and mnnvl can't, by design -> why. One that passes after all is reported.
BY_DESIGN: dict[str, dict[str, str]] = {
    "cpu": {
        "test_sparse_all_reduce_sum": "sparse tensors are refused, with an error that says so",
        "test_ddp_logging_data_cpu": (
            "wants the group's name in DDP's log; torch's C++ (ProcessGroup::getBackendName) says \"custom\" of every plugin"
        ),
    },
    "cuda": {},
}

# (device, world size) -> how many tests the reference passes at least, whatever the version of torch: fewer mean that
# the comparison compares nothing.
REFERENCE_PASSES_AT_LEAST = {("cpu", 4): 90}
