// How a call becomes steps: pure functions of arguments that are the same on all ranks, so that all ranks count the
// same steps. Nothing here may look at the machine.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace mnnvl::cpu {

// A rank's input, output and slot of one step stay in its L2. Measured on an AMD EPYC 9004; a constant of the protocol
// and no choice of tuning/, since ranks that cut otherwise count other steps.
constexpr int64_t kMaxChunkBytes = 256 << 10;

// What every rank's slot holds at least: a line for each peer.
constexpr int64_t least_slot_bytes(int world_size) { return 64 * max64(world_size - 1, 1); }

// Equal chunks of whole 64-byte lines, the last one shorter.
struct Chunks {
  int64_t total_bytes;
  int64_t chunk_bytes;
  int64_t count;

  int64_t begin(int64_t i) const { return i * chunk_bytes; }
  int64_t bytes(int64_t i) const { return min64(chunk_bytes, total_bytes - begin(i)); }
};

// At most `at_most` bytes each. Of no bytes there are no chunks.
inline Chunks make_chunks(int64_t total_bytes, int64_t at_most) {
  if (total_bytes <= 0) return {0, at_most, 0};
  const int64_t chunk = align_up(ceil_div(total_bytes, ceil_div(total_bytes, at_most)), 64);
  return {total_bytes, chunk, ceil_div(total_bytes, chunk)};
}

inline int64_t chunk_limit(int64_t slot_size) { return min64(slot_size, kMaxChunkBytes); }

// The same for a slot that has a part for each peer of its owner, none for itself.
inline int64_t part_limit(int64_t slot_size, int world_size) {
  return align_down(chunk_limit(slot_size) / (world_size - 1), 64);
}
constexpr int part_index(int owner, int peer) { return peer < owner ? peer : peer - 1; }

// The bytes of a chunk that rank `owner` reduces in two-shot. Slices are whole 64-byte lines (four packs), as even as
// lines allow: a line then has one owner, and vector accesses stay aligned within the slots. A chunk of few lines
// leaves some owners nothing to do.
struct Slice {
  int64_t begin;
  int64_t bytes;
};

inline Slice slice_of(int64_t chunk_bytes, int owner, int world_size) {
  const int64_t lines = ceil_div(chunk_bytes, 64);
  const int64_t begin = min64(lines * owner / world_size * 64, chunk_bytes);
  const int64_t end = min64(lines * (owner + 1) / world_size * 64, chunk_bytes);
  return {begin, end - begin};
}

// Rows that a fused all-reduce sums at a time.
inline int64_t rows_of_block(int64_t row_bytes) { return max64(1, (int64_t{1} << 20) / max64(row_bytes, 1)); }

}  // namespace mnnvl::cpu
