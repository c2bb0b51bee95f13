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

Error to_error(const FailureRecord& record, double timeout_seconds) {
  const std::string where = str(" in ", name(record.operation), " (call ", record.sequence, ", stage ", record.stage,
                                ", expected ", record.expected, ", seen ", record.seen, ")");
  // Whoever hears of a failure tells everybody where it began, so this rank may hear of its own abort().
  const bool own = record.cause == FailureCause::kPeerFailed && record.peer == record.rank;
  switch (own ? FailureCause::kLocalAbort : record.cause) {
    case FailureCause::kPeerDied:
      return Error(ErrorKind::kPeerFailed, str("mnnvl: the process of rank ", record.peer, " has ended; rank ",
                                               record.rank, " waited for it", where));
    case FailureCause::kPeerFailed:
      return Error(ErrorKind::kPeerFailed, str("mnnvl: rank ", record.rank, " stopped", where,
                                               " because another rank did: the failure began at rank ", record.peer));
    case FailureCause::kLocalAbort:
      return Error(ErrorKind::kAborted, str("mnnvl: rank ", record.rank, " stopped", where, " because of abort()"));
    case FailureCause::kDeadline:
    case FailureCause::kNone: break;
  }
  return Error(ErrorKind::kTimeout, str("mnnvl: rank ", record.rank, " waited ", timeout_seconds, " s for rank ",
                                        record.peer, where, ": the group's timeout passed"));
}

}  // namespace mnnvl
