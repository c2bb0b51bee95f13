// What one collective asks of a transport: raw pointers and sizes, the same structs for CPU and GPU, one struct an
// operation. A request is a plain value: it owns nothing and is read only during the call it is handed to, except for
// the memory that its pointers name, which must stay alive and unmoved until the collective has completed (on the CPU:
// until the call returns; on a GPU: until the stream has passed it).
//
// What holds for all of them:
// - Pointers are memory of the transport's device, contiguous, of any alignment. Null is allowed where no bytes are
//   behind it (zero elements, zero bytes).
// - "The same on every rank" is what makes the ranks' calls one collective. A transport that can find out a difference
//   fails with it (FailureCause::kMismatch); it never hands out another call's data as the result.
// - Negative sizes and roots out of range are Error(kInvalidArgument), before anything is shared with a peer.
#pragma once

#include <cstdint>
#include <variant>

#include "protocol/types.h"

namespace mnnvl {

// out[i] = the reduction over ranks r of in_r[i], in rank order (protocol/arithmetic.h): the same bits on every rank.
struct AllReduceRequest {
  const void* in = nullptr;  // [numel]
  void* out = nullptr;       // [numel]; may equal `in`, must not overlap it otherwise
  int64_t numel = 0;         // the same on every rank, as are the three below
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  Strategy strategy = Strategy::kAuto;  // kAuto: the transport chooses, by its tuning
  bool pdl = false;  // GPU: launch with programmatic dependent launch; the CPU ignores it. May differ between ranks
};

// What is done with each row of the sum s over ranks r of in_r, in this order (protocol/fused_row.h):
//   residual_out = s + residual, norm = residual_out * rsqrt(mean square + epsilon) * (weight_bias + gamma), and its
//   quantisation. Every rank's own tensors: what is the same on all ranks gives the same bits on all ranks.
struct RowWork {
  int64_t rows = 0, hidden = 0;  // of every matrix
  Dtype dtype = Dtype::kFloat32;  // float32, float16 or bfloat16
  const void* residual = nullptr;  // [rows, hidden]; null: zeros
  const void* gamma = nullptr;  // [hidden]
  bool gamma_is_float32 = false;  // else it is of `dtype`
  float epsilon = 0, weight_bias = 0;
  void* residual_out = nullptr;  // [rows, hidden]; may equal `residual` or the input
  void* norm = nullptr;  // [rows, hidden], may equal the input or `residual`; null: not wanted
  Quantization quantization = Quantization::kNone;
  void* quantised = nullptr;  // float8_e4m3fn [rows, hidden]; kNVFloat4: two elements a byte, the first one low
  // kNVFloat4: float8_e4m3fn, a scale for 16 elements; kDynamicFloat8: float32 [rows]; kGroupFloat8: exponents in
  // int32, fused_row.h.
  void* scales = nullptr;
  const float* scale = nullptr;  // of the whole tensor, read when the rows are there; null: `scale_value`
  float scale_value = 1;
  ScaleLayout layout = ScaleLayout::kLinear;  // of kNVFloat4
  int group = 0;  // elements of a scale, kGroupFloat8; divides `hidden`
};

struct FusedRequest {
  const void* in = nullptr;  // [rows, hidden]
  RowWork work;  // its rows, hidden and dtype are the same on every rank
  Strategy strategy = Strategy::kAuto;  // the same on every rank
  bool pdl = false;  // as in AllReduceRequest
};

// out of rank d = the reduction over ranks r of ins_r[d].
struct ReduceScatterRequest {
  const void* const* ins = nullptr;  // [world_size] pointers to [numel_of(d)] each; the arrays are read during the call
  void* out = nullptr;  // [numel_of(this rank)]; may equal ins[rank], must not overlap any of them otherwise
  int64_t numel = 0;  // of each part; the same on every rank, as is all below
  // [world_size]: parts of their own sizes instead. Null or not is the same on every rank: on a GPU, where the two go
  // different ways, nobody would find the difference before the deadline.
  const int64_t* numels = nullptr;
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;

  constexpr int64_t numel_of(int rank) const { return numels != nullptr ? numels[rank] : numel; }
};

// out of rank `root` = the reduction over ranks r of in_r.
struct ReduceRequest {
  const void* in = nullptr;  // [numel]
  void* out = nullptr;  // [numel], on `root` alone; may equal `in`, must not overlap it otherwise
  int64_t numel = 0;  // the same on every rank, as is all below
  int root = 0;
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
};

// outs[r] = in of rank r.
struct AllGatherRequest {
  const void* in = nullptr;  // [bytes of this rank]
  // [world_size] pointers to [bytes of that rank] each; no two overlap. outs[rank] may equal `in`; no other may overlap
  // it. The arrays themselves are read during the call only.
  void* const* outs = nullptr;
  int64_t bytes = 0;  // of one contribution; the same on every rank
  const int64_t* sizes = nullptr;  // [world_size], the same on every rank: contributions of their own sizes instead

  constexpr int64_t bytes_of(int rank) const { return sizes != nullptr ? sizes[rank] : bytes; }
};

// data of every rank = data of rank `root`.
struct BroadcastRequest {
  void* data = nullptr;  // [bytes]; read on `root`, written elsewhere
  int64_t bytes = 0;  // the same on every rank, as is the root
  int root = 0;  // 0 <= root < world size
};

// out of rank r = ins[r] of rank `root`.
struct ScatterRequest {
  const void* const* ins = nullptr;  // on `root` alone: [world_size] pointers to [bytes] each
  void* out = nullptr;  // [bytes]; on `root` it may equal ins[root], and must not overlap any of them otherwise
  int64_t bytes = 0;  // the same on every rank, as is the root
  int root = 0;
};

// outs[r] of rank `root` = in of rank r.
struct GatherRequest {
  const void* in = nullptr;  // [bytes]
  void* const* outs = nullptr;  // on `root` alone: as those of all_gather
  int64_t bytes = 0;  // the same on every rank, as is the root
  int root = 0;
};

// outs[r] of rank d = ins[d] of rank r. What rank r sends to d has the size that d expects of r; each pair's own.
struct AllToAllRequest {
  const void* const* ins = nullptr;  // [world_size] pointers to [send_bytes[d]] each
  const int64_t* send_bytes = nullptr;  // [world_size]
  void* const* outs = nullptr;  // [world_size] pointers to [receive_bytes[r]] each; none overlaps an input or another
  const int64_t* receive_bytes = nullptr;  // [world_size]
  Dtype dtype = Dtype::kOther;  // the same on every rank
};

// No rank passes before every rank has come.
struct BarrierRequest {};

// One message of a pair of ranks. What it is must be the same at both ends: bytes, dtype, tag.
struct Message {
  void* data = nullptr;  // [bytes]; read by a send, written by a receive
  int64_t bytes = 0;
  int peer = 0;  // another rank; kAnySource for a receive on the CPU
  int32_t tag = 0;
  Dtype dtype = Dtype::kOther;

  static constexpr int kAnySource = -1;
};

// Messages sent and received as one: it is over when all are, and the order of the lists doesn't matter but for those
// of one pair and direction. Not collective: only those ranks take part that the messages name, and it may be under way
// while they go through collectives. The messages of one pair and direction arrive in the order in which they were
// sent; a receive on the CPU takes the first with its tag, on a GPU the first, whose tag must be its own.
struct ExchangeRequest {
  const Message* sends = nullptr;  // [send_count]; the arrays are read during the call only
  int send_count = 0;
  const Message* receives = nullptr;  // [receive_count]
  int receive_count = 0;
};

// The collectives.
using Request = std::variant<AllReduceRequest, ReduceScatterRequest, ReduceRequest, AllGatherRequest, BroadcastRequest,
                             ScatterRequest, GatherRequest, AllToAllRequest, BarrierRequest, FusedRequest>;

// The operation is the request's type: there is no second place where the two could differ.
constexpr Operation operation_of(const AllReduceRequest&) { return Operation::kAllReduce; }
constexpr Operation operation_of(const ReduceScatterRequest&) { return Operation::kReduceScatter; }
constexpr Operation operation_of(const ReduceRequest&) { return Operation::kReduce; }
constexpr Operation operation_of(const AllGatherRequest&) { return Operation::kAllGather; }
constexpr Operation operation_of(const BroadcastRequest&) { return Operation::kBroadcast; }
constexpr Operation operation_of(const ScatterRequest&) { return Operation::kScatter; }
constexpr Operation operation_of(const GatherRequest&) { return Operation::kGather; }
constexpr Operation operation_of(const AllToAllRequest&) { return Operation::kAllToAll; }
constexpr Operation operation_of(const BarrierRequest&) { return Operation::kBarrier; }
constexpr Operation operation_of(const FusedRequest&) { return Operation::kFusedAllReduce; }
inline Operation operation_of(const Request& request) {
  return std::visit([](const auto& r) { return operation_of(r); }, request);
}

// What all ranks' calls, or both ends of a message, must have in common, in a form that they can show each other and
// that errors can name.
struct CallDescriptor {
  Operation operation = Operation::kBarrier;  // of a message: kSend at both ends
  // Of the tensor; all_gather, reduce_scatter, scatter, gather: of one rank's part, or of all if they differ;
  // all_to_all: what the pair moves, on the CPU 0; barrier: 0.
  int64_t bytes = 0;
  int root = 0;  // where there is one; all_gather, reduce_scatter: 0, or a digest of the sizes if they differ
  Dtype dtype = Dtype::kFloat32;  // reductions, all_to_all and messages
  ReduceOp op = ReduceOp::kSum;  // reductions
  Strategy strategy = Strategy::kOneShot;  // all_reduce, also fused
  int32_t tag = 0;  // messages
};

// Parts of their own sizes, in units of `scale` bytes: their sum, and a digest of them.
constexpr CallDescriptor descriptor_of_parts(Operation operation, const int64_t* sizes, int world_size, int64_t scale) {
  int64_t sum = 0;
  uint64_t digest = 0;
  for (int i = 0; i < world_size; ++i) {
    sum += sizes[i];
    digest = (digest ^ static_cast<uint64_t>(sizes[i])) * 0x9e3779b97f4a7c15u;
  }
  return {operation, sum * scale, 1 + static_cast<int>((digest >> 32) % 251)};
}

constexpr CallDescriptor descriptor_of(const AllReduceRequest& r) {
  return {operation_of(r), r.numel * element_size(r.dtype), 0, r.dtype, r.op, r.strategy};
}
constexpr CallDescriptor descriptor_of(const ReduceScatterRequest& r, int world_size) {
  CallDescriptor call{operation_of(r), r.numel * element_size(r.dtype)};
  if (r.numels != nullptr) call = descriptor_of_parts(operation_of(r), r.numels, world_size, element_size(r.dtype));
  call.dtype = r.dtype;
  call.op = r.op;
  return call;
}
constexpr CallDescriptor descriptor_of(const ReduceRequest& r) {
  return {operation_of(r), r.numel * element_size(r.dtype), r.root, r.dtype, r.op};
}
constexpr CallDescriptor descriptor_of(const AllGatherRequest& r, int world_size) {
  if (r.sizes == nullptr) return {operation_of(r), r.bytes};
  return descriptor_of_parts(operation_of(r), r.sizes, world_size, 1);
}
constexpr CallDescriptor descriptor_of(const BroadcastRequest& r) { return {operation_of(r), r.bytes, r.root}; }
constexpr CallDescriptor descriptor_of(const ScatterRequest& r) { return {operation_of(r), r.bytes, r.root}; }
constexpr CallDescriptor descriptor_of(const GatherRequest& r) { return {operation_of(r), r.bytes, r.root}; }
constexpr CallDescriptor descriptor_of(const AllToAllRequest& r) { return {operation_of(r), 0, 0, r.dtype}; }
constexpr CallDescriptor descriptor_of(const BarrierRequest& r) { return {operation_of(r)}; }
constexpr CallDescriptor descriptor_of(const Message& m) {
  CallDescriptor call{Operation::kSend, m.bytes};
  call.dtype = m.dtype;
  call.tag = m.tag;
  return call;
}

// A call in one word, without the tag: bytes 0-39 (larger ones lose their high bits), root
// 40-47, strategy 48-49, reduction 50-53, dtype 54-58, operation 59-63.
constexpr uint64_t pack(const CallDescriptor& call) {
  const auto field = [](auto value, int shift, int bits) {
    return (static_cast<uint64_t>(value) & ((uint64_t{1} << bits) - 1)) << shift;
  };
  return field(call.bytes, 0, 40) | field(call.root, 40, 8) | field(call.strategy, 48, 2) | field(call.op, 50, 4) |
         field(call.dtype, 54, 5) | field(call.operation, 59, 5);
}

constexpr CallDescriptor unpack(uint64_t word) {
  const auto field = [word](int shift, int bits) { return word >> shift & ((uint64_t{1} << bits) - 1); };
  return {static_cast<Operation>(field(59, 5)), static_cast<int64_t>(field(0, 40)),
          static_cast<int>(field(40, 8)),       static_cast<Dtype>(field(54, 5)),
          static_cast<ReduceOp>(field(50, 4)),  static_cast<Strategy>(field(48, 2))};
}
static_assert(unpack(pack({Operation::kBroadcast, 123456789012, 71})).bytes == 123456789012 &&
              unpack(pack({Operation::kBroadcast, 123456789012, 71})).root == 71 &&
              unpack(pack({Operation::kBarrier})).operation == Operation::kBarrier);

}  // namespace mnnvl
