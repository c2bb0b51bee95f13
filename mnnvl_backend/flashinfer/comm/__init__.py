"""FlashInfer's package flashinfer.comm, as far as it is about this family of all-reduces: the same names in modules of
the same names, so that a program changes its imports and nothing else."""

from mnnvl_backend.flashinfer.comm.allreduce import allreduce_fusion, create_allreduce_fusion_workspace
from mnnvl_backend.flashinfer.comm.mapping import Mapping
from mnnvl_backend.flashinfer.comm.trtllm_mnnvl_ar import MNNVLAllReduceFusionWorkspace
from mnnvl_backend.flashinfer.comm.workspace_base import AllReduceFusionWorkspace
from mnnvl_backend.flashinfer.quantization import (
    AllReduceFusionPattern,
    QuantizationSFLayout,
    compute_fp4_swizzled_layout_sf_size,
)

__all__ = [
    "AllReduceFusionPattern",
    "AllReduceFusionWorkspace",
    "MNNVLAllReduceFusionWorkspace",
    "Mapping",
    "QuantizationSFLayout",
    "allreduce_fusion",
    "compute_fp4_swizzled_layout_sf_size",
    "create_allreduce_fusion_workspace",
]
