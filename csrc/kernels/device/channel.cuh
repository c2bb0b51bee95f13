// What the blocks of kernels on pair channels are made of: lines, headers, copies. The protocol is argued for in
// csrc/README.md, "Pair channels on the GPU"; how a message is cut, in protocol/channels.h.
#pragma once

#include "kernels/device/memory_order.cuh"
#include "kernels/device/pack.cuh"
#include "kernels/device/wait.cuh"

namespace mnnvl::kernels {

// One end of one lane of a channel: where its words are. For a source `rings` is the destination's workspace and
// `credit` lies in its own; for a destination it is the other way round.
struct LaneWords {
  std::byte* rings;
  uint32_t* posted;
  uint64_t* credit;
  int64_t channel;  // index where the rings are
  int lane;

  __device__ __forceinline__ LaneWords(const DeviceGroup& g, ChannelKind kind, int peer, int lane_index, bool incoming)
      : lane(lane_index) {
    const WorkspaceLayout& l = g.layout;
    const int source = incoming ? peer : g.rank, destination = incoming ? g.rank : peer;
    channel = l.channel_index(kind, destination, source, g.world_size);
    const int64_t outgoing = l.channel_index(kind, source, destination, g.world_size);
    rings = g.peers[destination];
    posted = reinterpret_cast<uint32_t*>(rings + l.posted(channel, lane));
    credit = reinterpret_cast<uint64_t*>(g.peers[source] + l.credit(outgoing, lane));
  }

  // Of the rank itself; found anew each time, for it is wanted but twice.
  static __device__ __forceinline__ LaneState* state(const DeviceGroup& g, ChannelKind kind, int peer, int lane,
                                                     bool incoming) {
    const int64_t own = g.layout.channel_index(kind, g.rank, peer, g.world_size);
    return reinterpret_cast<LaneState*>(g.peers[g.rank] + g.layout.state(incoming, own, lane, g.world_size));
  }
  __device__ __forceinline__ std::byte* slot(const DeviceGroup& g, uint32_t n) const {
    return rings + g.layout.slot(channel, lane, n);
  }
  __device__ __forceinline__ std::byte* lines(const DeviceGroup& g, uint64_t message) const {
    return rings + g.layout.lines(channel, lane, message);
  }
  __device__ __forceinline__ std::byte* header(const DeviceGroup& g, uint64_t message) const {
    return rings + g.layout.header(channel, message);
  }
};

// Not zero, which lines hold at rest, and never twice on a lane.
__device__ __forceinline__ uint64_t flag_of(uint64_t message) { return message + 1; }

__device__ __forceinline__ void store_header(std::byte* header, uint64_t message, uint64_t call, int32_t tag) {
  st_relaxed_sys_b128(header, call, flag_of(message));
  st_relaxed_sys_b128(header + kLineBytes, uint32_t(tag), flag_of(message));
}

// False if it isn't there yet.
__device__ __forceinline__ bool load_header(const std::byte* header, uint64_t message, uint64_t& call, int32_t& tag) {
  uint64_t first_flag, second, second_flag;
  ld_relaxed_sys_b128(header, call, first_flag);
  ld_relaxed_sys_b128(header + kLineBytes, second, second_flag);
  tag = int32_t(uint32_t(second));
  return first_flag == flag_of(message) && second_flag == flag_of(message);
}

__device__ __forceinline__ bool line_is_there(const std::byte* line, uint64_t flag) {
  uint64_t data, seen;
  ld_relaxed_sys_b128(line, data, seen);
  return seen == flag;
}

// 8 bytes, or the `valid` (1..8) that there are, from memory that allows accesses of a Unit.
template <typename Unit>
__device__ __forceinline__ uint64_t load_line_data(const std::byte* from, int valid) {
  if (sizeof(Unit) == kLineData && valid >= kLineData) return *reinterpret_cast<const uint64_t*>(from);
  uint64_t data = 0;
#pragma unroll
  for (int i = 0; i < kLineData; ++i) {
    if (i < valid) data |= uint64_t(from[i]) << (8 * i);
  }
  return data;
}

template <typename Unit>
__device__ __forceinline__ void store_line_data(std::byte* to, int valid, uint64_t data) {
  if (sizeof(Unit) == kLineData && valid >= kLineData) {
    *reinterpret_cast<uint64_t*>(to) = data;
    return;
  }
#pragma unroll
  for (int i = 0; i < kLineData; ++i) {
    if (i < valid) to[i] = std::byte(data >> (8 * i));
  }
}

constexpr int kWarp = 32;  // threads

// Of a thread: what a lane carries of one message at most, among seven warps. Single bytes cost registers, and nobody
// is in a hurry with them.
template <typename Unit>
constexpr int kLinesInFlight = sizeof(Unit) == kLineData ? 5 : 1;

// Thread `thread` of `threads` does its part of sending `bytes` as lines. A warp's stores stand side by side: a line
// each of 32 threads fills whole packets.
template <typename Unit>
__device__ __forceinline__ void send_lines(std::byte* lines, const std::byte* from, int bytes, uint64_t flag,
                                           int thread, int threads) {
  const int count = (bytes + kLineData - 1) / kLineData;
  for (int first = thread; first < count; first += kLinesInFlight<Unit> * threads) {
    uint64_t data[kLinesInFlight<Unit>];
#pragma unroll
    for (int k = 0; k < kLinesInFlight<Unit>; ++k) {
      const int at = (first + k * threads) * kLineData;
      data[k] = at < bytes ? load_line_data<Unit>(from + at, bytes - at) : 0;
    }
#pragma unroll
    for (int k = 0; k < kLinesInFlight<Unit>; ++k) {
      const int at = (first + k * threads) * kLineData;
      if (at < bytes) st_relaxed_sys_b128(lines + 2 * at, data[k], flag);
    }
  }
}

// The same of receiving. False if the wait gave up.
template <typename Unit>
__device__ __forceinline__ bool take_lines(const std::byte* lines, std::byte* to, int bytes, uint64_t flag, int thread,
                                           int threads, Wait& wait, int peer) {
  const int count = (bytes + kLineData - 1) / kLineData;
  for (int first = thread; first < count; first += kLinesInFlight<Unit> * threads) {
    uint64_t data[kLinesInFlight<Unit>];
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int k = 0; k < kLinesInFlight<Unit>; ++k) {
        const int at = (first + k * threads) * kLineData;
        if (at >= bytes) continue;
        uint64_t seen;
        ld_relaxed_sys_b128(lines + 2 * at, data[k], seen);
        complete = complete && seen == flag;
      }
    } while (!complete && wait.keep_on(peer, flag, flag - 1));
    if (!complete) return false;
#pragma unroll
    for (int k = 0; k < kLinesInFlight<Unit>; ++k) {
      const int at = (first + k * threads) * kLineData;
      if (at < bytes) store_line_data<Unit>(to + at, bytes - at, data[k]);
    }
  }
  return true;
}

// Several loads in flight, also of a piece that gives a thread only a few.
template <typename Unit>
__device__ __forceinline__ void copy_by(std::byte* to, const std::byte* from, int bytes, int thread, int threads) {
  constexpr int kInFlight = sizeof(Unit) == 16 ? 8 : 4;
  const int count = bytes / int(sizeof(Unit));
  auto* out = reinterpret_cast<Unit*>(to);
  const auto* in = reinterpret_cast<const Unit*>(from);
  for (int first = thread; first < count; first += kInFlight * threads) {
    Unit units[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * threads < count) units[k] = in[first + k * threads];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * threads < count) out[first + k * threads] = units[k];
    }
  }
  for (int at = count * int(sizeof(Unit)) + thread; at < bytes; at += threads) to[at] = from[at];
}

// Thread `thread` of `threads` does its part of a copy between any addresses, in the largest unit that both allow.
__device__ __forceinline__ void copy_bytes(std::byte* to, const std::byte* from, int bytes, int thread, int threads) {
  const uintptr_t both = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (both % 16 == 0) return copy_by<uint4>(to, from, bytes, thread, threads);
  if (both % 4 == 0) return copy_by<uint32_t>(to, from, bytes, thread, threads);
  copy_by<uint8_t>(to, from, bytes, thread, threads);
}

}  // namespace mnnvl::kernels
