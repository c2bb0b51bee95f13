"""flashinfer.comm.workspace_base"""

from mnnvl_backend.flashinfer.workspace_base import AllReduceFusionWorkspace

__all__ = ["AllReduceFusionWorkspace"]
