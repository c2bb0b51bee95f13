"""flashinfer.comm.mnnvl: communicators for set-up, and questions about a device."""

from mnnvl_backend.flashinfer.backends import MPIBackend, TorchDistBackend
from mnnvl_backend.flashinfer.control import CommBackend
from mnnvl_backend.flashinfer.hardware import is_mnnvl_fabric_supported, is_multicast_supported

__all__ = ["CommBackend", "MPIBackend", "TorchDistBackend", "is_mnnvl_fabric_supported", "is_multicast_supported"]
