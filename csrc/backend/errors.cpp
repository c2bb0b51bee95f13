#include "backend/errors.h"

namespace mnnvl {

void throw_as_torch(const Error& error) {
  switch (error.kind()) {
    case ErrorKind::kInvalidArgument: C10_THROW_ERROR(ValueError, error.what());
    case ErrorKind::kUnsupported: C10_THROW_ERROR(Error, error.what());
    case ErrorKind::kSystem:
    case ErrorKind::kTimeout:
    case ErrorKind::kPeerFailed:
    case ErrorKind::kAborted: break;
  }
  C10_THROW_ERROR(DistBackendError, error.what());
}

}  // namespace mnnvl
