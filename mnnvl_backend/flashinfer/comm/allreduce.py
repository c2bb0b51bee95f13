"""flashinfer.comm.allreduce: the unified function and its workspaces."""

from mnnvl_backend.flashinfer.quantization import AllReduceFusionPattern, QuantizationSFLayout
from mnnvl_backend.flashinfer.unified import allreduce_fusion, create_allreduce_fusion_workspace
from mnnvl_backend.flashinfer.workspace import MNNVLAllReduceFusionWorkspace
from mnnvl_backend.flashinfer.workspace_base import AllReduceFusionWorkspace

__all__ = [
    "AllReduceFusionPattern",
    "AllReduceFusionWorkspace",
    "MNNVLAllReduceFusionWorkspace",
    "QuantizationSFLayout",
    "allreduce_fusion",
    "create_allreduce_fusion_workspace",
]
