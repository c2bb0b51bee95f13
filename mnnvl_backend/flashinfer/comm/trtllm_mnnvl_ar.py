"""flashinfer.comm.trtllm_mnnvl_ar: the functions of one workspace, and those that they replaced."""

from mnnvl_backend.flashinfer.allreduce import trtllm_mnnvl_allreduce
from mnnvl_backend.flashinfer.backends import MPIBackend, mpi_barrier
from mnnvl_backend.flashinfer.control import CommBackend
from mnnvl_backend.flashinfer.fusion import (
    trtllm_mnnvl_fused_allreduce_add_rmsnorm,
    trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant,
)
from mnnvl_backend.flashinfer.legacy import (
    get_allreduce_mnnvl_workspace,
    trtllm_mnnvl_all_reduce,
    trtllm_mnnvl_fused_allreduce_rmsnorm,
)
from mnnvl_backend.flashinfer.mapping import Mapping
from mnnvl_backend.flashinfer.quantization import MNNVLQuantType, QuantizationSFLayout
from mnnvl_backend.flashinfer.strategy import MNNVL_ONE_SHOT_THRESHOLD, MNNVLAllreduceFusionStrategy
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace
from mnnvl_backend.flashinfer.workspace_base import AllReduceFusionWorkspace

__all__ = [
    "MNNVL_ONE_SHOT_THRESHOLD",
    "AllReduceFusionWorkspace",
    "CommBackend",
    "MNNVLAllReduceFusionWorkspace",
    "MNNVLAllreduceFusionStrategy",
    "MNNVLQuantType",
    "MPIBackend",
    "Mapping",
    "QuantizationSFLayout",
    "get_allreduce_mnnvl_workspace",
    "mpi_barrier",
    "trtllm_mnnvl_all_reduce",
    "trtllm_mnnvl_allreduce",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant",
    "trtllm_mnnvl_fused_allreduce_rmsnorm",
]
