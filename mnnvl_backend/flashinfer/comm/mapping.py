"""flashinfer.comm.mapping"""

from mnnvl_backend.flashinfer.mapping import Mapping

__all__ = ["Mapping"]
