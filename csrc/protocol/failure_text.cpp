#include "protocol/failure_text.h"

#include <cstdio>

namespace mnnvl {
const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return "float32";
    case Dtype::kFloat16: return "float16";
    case Dtype::kBFloat16: return "bfloat16";
    case Dtype::kFloat64: return "float64";
    case Dtype::kInt8: return "int8";
    case Dtype::kUInt8: return "uint8";
    case Dtype::kInt16: return "int16";
    case Dtype::kUInt16: return "uint16";
    case Dtype::kInt32: return "int32";
    case Dtype::kUInt32: return "uint32";
    case Dtype::kInt64: return "int64";
    case Dtype::kUInt64: return "uint64";
    case Dtype::kBool: return "bool";
    case Dtype::kComplex64: return "complex64";
    case Dtype::kComplex128: return "complex128";
    case Dtype::kFloat8E4M3: return "float8_e4m3fn";
    case Dtype::kFloat8E5M2: return "float8_e5m2";
    case Dtype::kOther: break;
  }
  return "of another dtype";
}

const char* name(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum: return "sum";
    case ReduceOp::kAvg: return "avg";
    case ReduceOp::kProduct: return "product";
    case ReduceOp::kMin: return "min";
    case ReduceOp::kMax: return "max";
    case ReduceOp::kBand: return "band";
    case ReduceOp::kBor: return "bor";
    case ReduceOp::kBxor: return "bxor";
  }
  return "unknown reduction";
}

namespace {

// "2 s", "2.3 s", "0.05 s": what a person wants to know of a wait.
std::string seconds(double s) {
  char text[32];
  std::snprintf(text, sizeof text, s < 1 ? "%.2f" : "%.1f", s);
  std::string trimmed(text);
  trimmed.erase(trimmed.find_last_not_of('0') + 1);
  if (trimmed.back() == '.') trimmed.pop_back();
  return trimmed + " s";
}

// " in all_reduce (call 17, stage 0: expected 40, seen 39)"
std::string where(const FailureRecord& record, const FailureDetails& details) {
  std::string text = str(" in ", name(record.operation), " (call ", record.sequence);
  if (details.waiting) {
    text += details.word != nullptr ? str(", ", details.word) : str(", stage ", record.stage);
    text += str(": expected ", record.expected, ", seen ", record.seen);
  }
  return text + ")";
}

// What another rank found, as told by the abort word; empty if the word doesn't say.
std::string found(const FailureRecord& record) {
  const int finder = abort_finder(record.told);
  switch (abort_cause(record.told)) {
    case FailureCause::kDeadline:
      if (finder == record.peer) return ": it waited for a message of any rank until the timeout passed";
      return str(": rank ", finder, " waited for it until the timeout passed");
    case FailureCause::kPeerDied: return str(": rank ", finder, " found that its process has ended");
    case FailureCause::kLocalAbort: return str(": abort() was called there");
    case FailureCause::kLocalError: return str(", in another of its calls");
    case FailureCause::kMismatch:
      return str(": its call or message differs from that of rank ", finder, ", whose error names both");
    case FailureCause::kConcurrent: return str(", in two calls at once where one may be");
    case FailureCause::kNone:
    case FailureCause::kPeerFailed: break;
  }
  return "";
}

// "message of 192 bytes float32 with tag 3", without its first word.
std::string message_text(const CallDescriptor& call) {
  return str("of ", call.bytes, " bytes ", name(call.dtype), " with tag ", call.tag);
}

std::string message_mismatch_text(const FailureRecord& record, const FailureDetails& details) {
  const Mismatch& mismatch = *details.mismatch;
  return str("mnnvl: rank ", record.rank, " received another message than it asked for", where(record, details),
             ": rank ", record.peer, " sent a message ", message_text(mismatch.theirs), ", rank ", record.rank,
             " expected one ", message_text(mismatch.mine),
             ". A message's size and type must be the same at both ends");
}

std::string mismatch_text(const FailureRecord& record, const FailureDetails& details) {
  const int me = record.rank;
  const int peer = record.peer;
  std::string text = str("mnnvl: rank ", peer, " came with another call than rank ", me, where(record, details), ": ");
  if (details.mismatch != nullptr && details.mismatch->kind == Mismatch::Kind::kMessage) {
    return message_mismatch_text(record, details);
  }
  if (details.mismatch == nullptr) return text + "the ranks' calls differ";
  const std::string mine = describe(details.mismatch->mine);
  const std::string theirs = describe(details.mismatch->theirs);
  switch (details.mismatch->kind) {
    case Mismatch::Kind::kCalls: text += str("rank ", me, " is in ", mine, ", rank ", peer, " in ", theirs); break;
    case Mismatch::Kind::kWentOn:
      text += str("rank ", me, " is in ", mine, ", which rank ", peer, " has passed in some other call; rank ", peer,
                  " is now in ", theirs);
      break;
    case Mismatch::Kind::kPassed:
      text += str("rank ", me, " is in ", mine, ", which rank ", peer, " has passed in some other call");
      break;
    case Mismatch::Kind::kEarlier:
      text += str("both are in ", mine, ", but their calls before it differed, where neither read from the other");
      break;
    case Mismatch::Kind::kPair:
      text += str("rank ", peer, " sends ", details.mismatch->theirs.bytes, " bytes to rank ", me, ", which expects ",
                  details.mismatch->mine.bytes);
      break;
    case Mismatch::Kind::kMessage: break;
  }
  return text + ". Every rank must make the same calls in the same order, with the same sizes and types";
}

std::string awaited(const FailureRecord& record) { return record.peer < 0 ? "any rank" : str("rank ", record.peer); }

Error aborted(const FailureRecord& record, const std::string& place) {
  return Error(ErrorKind::kAborted, str("mnnvl: rank ", record.rank, " stopped", place, ": abort() was called"));
}

Error local_error(const FailureRecord& record, const std::string& place) {
  return Error(ErrorKind::kAborted, str("mnnvl: rank ", record.rank, " stopped", place, ": it failed in another call"));
}

}  // namespace

std::string describe(const CallDescriptor& call) {
  const char* operation = name(call.operation);
  switch (call.operation) {
    case Operation::kAllReduce:
    case Operation::kFusedAllReduce:
      return str(operation, " of ", call.bytes, " bytes ", name(call.dtype), " ", name(call.op),
                 call.strategy == Strategy::kOneShot ? " (one-shot)" : " (two-shot)");
    case Operation::kReduceScatter:
      return str(operation, " of ", call.bytes, call.root == 0 ? " bytes a rank " : " bytes in all, uneven, ",
                 name(call.dtype), " ", name(call.op));
    case Operation::kReduce:
      return str(operation, " of ", call.bytes, " bytes ", name(call.dtype), " ", name(call.op), " to root ",
                 call.root);
    case Operation::kAllGather:
      return str(operation, " of ", call.bytes, call.root == 0 ? " bytes a rank" : " bytes in all, uneven");
    case Operation::kScatter: return str(operation, " of ", call.bytes, " bytes a rank from root ", call.root);
    case Operation::kGather: return str(operation, " of ", call.bytes, " bytes a rank to root ", call.root);
    case Operation::kAllToAll:
      return str(operation, " of ", call.bytes == 0 ? std::string() : str(call.bytes, " bytes "), name(call.dtype));
    case Operation::kBroadcast: return str(operation, " of ", call.bytes, " bytes from root ", call.root);
    case Operation::kSend:
    case Operation::kRecv: return str("message ", message_text(call));
    case Operation::kBarrier: break;
  }
  return operation;
}

Error to_error(const FailureRecord& record, double waited_seconds, const FailureDetails& details) {
  const std::string place = where(record, details);
  // Whoever hears of a failure tells everybody where it began, so a rank may hear of its own abort(), or that it was
  // waited for in vain.
  if (record.cause == FailureCause::kPeerFailed && record.peer == record.rank) {
    const FailureCause told = abort_cause(record.told);
    if (told == FailureCause::kLocalAbort) return aborted(record, place);
    if (told == FailureCause::kLocalError) return local_error(record, place);
    if (told == FailureCause::kNone) {
      return Error(ErrorKind::kAborted, str("mnnvl: rank ", record.rank, " stopped", place,
                                            ": abort() was called here, or another rank waited for this one in vain"));
    }
  }
  switch (record.cause) {
    case FailureCause::kPeerDied:
      return Error(ErrorKind::kPeerFailed,
                   str("mnnvl: rank ", record.rank, " waited ", seconds(waited_seconds), " for ", awaited(record),
                       place, record.peer < 0 ? ": all others' processes" : str(": the process of rank ", record.peer),
                       details.peer_pid > 0 ? str(" (pid ", details.peer_pid, ")") : "",
                       record.peer < 0 ? " have ended" : " has ended"));
    case FailureCause::kPeerFailed:
      return Error(ErrorKind::kPeerFailed, str("mnnvl: rank ", record.rank, " stopped", place,
                                               " because the failure began at rank ", record.peer, found(record)));
    case FailureCause::kLocalAbort: return aborted(record, place);
    case FailureCause::kLocalError: return local_error(record, place);
    case FailureCause::kMismatch: return Error(ErrorKind::kPeerFailed, mismatch_text(record, details));
    case FailureCause::kConcurrent:
      return Error(
          ErrorKind::kAborted,
          str("mnnvl: rank ", record.rank, " stopped", place,
              record.peer == record.rank ? "" : str(" with rank ", record.peer),
              ": a captured graph that holds one was replayed while another was under way; wait for it first"));
    case FailureCause::kDeadline:
    case FailureCause::kNone: break;
  }
  return Error(ErrorKind::kTimeout, str("mnnvl: rank ", record.rank, " waited ", seconds(waited_seconds), " for ",
                                        awaited(record), place, ": the timeout passed"));
}

}  // namespace mnnvl
