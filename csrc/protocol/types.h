// Names that every layer shares: limits, dtypes, operations, strategies. Plain C++ for host and device.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace mnnvl {

constexpr int kMaxWorldSize = 72;     // one NVL72 rack
constexpr int kMaxFastWorldSize = 8;  // world sizes with a specialised kernel; larger ones take the loop
constexpr int kPackBytes = 16;        // one vector access; the unit of every Lamport protocol

// Most threads a block of the kernels: what tuning/ may ask for, and what kernels/ compiles for (launch bounds). They
// take half of a multiprocessor; the all-reduces of larger worlds need more registers a thread. A block of a two-shot
// or a reduce-scatter may be of twice as many.
MNNVL_HOST_DEVICE constexpr int max_all_reduce_threads(int world_size) { return world_size <= 4 ? 512 : 256; }
// Of the fused ones, which keep more: this many, or half. Blocks of a cluster share a row.
constexpr int kFusedThreads = 256;
constexpr int kMaxFusedTeams = 4;  // of a block, each with rows of its own
constexpr int kMaxFusedCluster = 4;

// What the Lamport kernels add comes first; of the others a message or a descriptor only needs the name.
enum class Dtype : int {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kFloat64 = 3,
  kInt8 = 4,
  kUInt8 = 5,
  kInt16 = 6,
  kUInt16 = 7,
  kInt32 = 8,
  kUInt32 = 9,
  kInt64 = 10,
  kUInt64 = 11,
  kBool = 12,
  kComplex64 = 13,
  kComplex128 = 14,
  kFloat8E4M3 = 15,
  kFloat8E5M2 = 16,
  kOther = 31,  // some other: its bytes can be moved
};
enum class ReduceOp : int {
  kSum = 0,
  kAvg = 1,
  kProduct = 2,
  kMin = 3,
  kMax = 4,
  kBand = 5,
  kBor = 6,
  kBxor = 7,
};
// The values are FlashInfer's MNNVLAllreduceFusionStrategy.
enum class Strategy : int { kOneShot = 0, kTwoShot = 1, kAuto = 99 };
enum class Operation : int {
  kAllReduce = 0,
  kAllGather = 1,
  kBroadcast = 2,
  kBarrier = 3,
  kSend = 4,
  kRecv = 5,
  kReduceScatter = 6,
  kReduce = 7,
  kScatter = 8,
  kGather = 9,
  kAllToAll = 10,
  kFusedAllReduce = 11,
};
// What a fused all-reduce does with its rows, by the values of FlashInfer's MNNVLQuantType; the last is ours.
enum class Quantization : int { kNone = 0, kFloat8 = 1, kNVFloat4 = 2, kDynamicFloat8 = 3, kGroupFloat8 = 4 };
// Of the scales of kNVFloat4, by the values of FlashInfer's QuantizationSFLayout.
enum class ScaleLayout : int { kSwizzled128x4 = 0, kLinear = 2 };

// Bytes; 0 of kOther.
constexpr int element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kInt8:
    case Dtype::kUInt8:
    case Dtype::kBool:
    case Dtype::kFloat8E4M3:
    case Dtype::kFloat8E5M2: return 1;
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
    case Dtype::kInt16:
    case Dtype::kUInt16: return 2;
    case Dtype::kFloat32:
    case Dtype::kInt32:
    case Dtype::kUInt32: return 4;
    case Dtype::kFloat64:
    case Dtype::kInt64:
    case Dtype::kUInt64:
    case Dtype::kComplex64: return 8;
    case Dtype::kComplex128: return 16;
    case Dtype::kOther: break;
  }
  return 0;
}

// What the Lamport kernels and the CPU's vectorised sums add.
constexpr bool is_float_sum(Dtype dtype, ReduceOp op) {
  return (dtype == Dtype::kFloat32 || dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16) &&
         (op == ReduceOp::kSum || op == ReduceOp::kAvg);
}

constexpr const char* name(Operation op) {
  switch (op) {
    case Operation::kAllReduce: return "all_reduce";
    case Operation::kAllGather: return "all_gather";
    case Operation::kBroadcast: return "broadcast";
    case Operation::kBarrier: return "barrier";
    case Operation::kSend: return "send";
    case Operation::kRecv: return "recv";
    case Operation::kReduceScatter: return "reduce_scatter";
    case Operation::kReduce: return "reduce";
    case Operation::kScatter: return "scatter";
    case Operation::kGather: return "gather";
    case Operation::kAllToAll: return "all_to_all";
    case Operation::kFusedAllReduce: return "fused all_reduce";
  }
  return "?";
}

}  // namespace mnnvl
