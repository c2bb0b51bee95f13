// In place of csrc/kernels/device/cluster.cuh: the same over what blocks of a cluster, threads of the system, share.
#pragma once

#include <algorithm>

#include "native/emulation/cuda.h"
#include "protocol/fused_row.h"

namespace mnnvl::kernels {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <typename Real>
Real shuffled_xor(Real v, int apart) {
  uint32_t words[sizeof(Real) / 4];
  memcpy(words, &v, sizeof v);
  for (uint32_t& word : words) word = emulation::Block::current()->meet(word)[(threadIdx.x % 32) ^ unsigned(apart)];
  memcpy(&v, words, sizeof v);
  return v;
}
template <typename Real>
Real warp_sum(Real v) {
  for (int apart = 1; apart < 32; apart *= 2) v = fused::add(v, shuffled_xor(v, apart));
  return v;
}
inline float warp_max(float v, int lanes) {
  for (int apart = 1; apart < lanes; apart *= 2) v = fused::amax_of(v, shuffled_xor(v, apart));
  return v;
}

inline void cluster_arrive() { emulation::Block::current()->cluster().arrived.fetch_add(1); }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
// A thread may only be one barrier ahead.
inline void cluster_wait() {
  emulation::Block* block = emulation::Block::current();
  const uint64_t all = uint64_t(block->cluster().size) * block->threads();
  const uint64_t mine = ++block->barriers_of_thread() * all;
  while (block->cluster().arrived.load() < mine) block->yield();
}
inline void cluster_barrier(int) {
  cluster_arrive();
  cluster_wait();
}

template <typename Word>
struct ClusterValues {
  std::atomic<Word> values[2][32];
  std::atomic<uint64_t> came[2];
  uint64_t wanted[2];

  void prepare() {
    for (int turn : {0, 1}) {
      came[turn] = 0;
      wanted[turn] = 0;
    }
    mine().push_back(this);
  }
  void expect(uint32_t round, int blocks, int count) {
    if (blocks > 1 && threadIdx.x == 0) wanted[round % 2] += uint64_t(count);
  }
  void send(uint32_t round, int blocks, int place, Word value) {
    const int lane = int(threadIdx.x % 32);
    if (lane >= blocks) return;
    auto* to = this;
    if (blocks > 1) {
      const size_t at = size_t(std::find(mine().begin(), mine().end(), this) - mine().begin());
      to = static_cast<ClusterValues*>(emulation::Block::current()->cluster().placed[size_t(lane)][at]);
    }
    to->values[round % 2][place] = value;
    to->came[round % 2].fetch_add(1);
  }
  Word take(uint32_t round, int blocks) {
    emulation::Block::current()->meet_all();  // thread 0 has said what it wants
    while (blocks > 1 && came[round % 2].load() != wanted[round % 2]) emulation::Block::current()->yield();
    return values[round % 2][threadIdx.x % 32];
  }

 private:
  static std::vector<void*>& mine() {
    const emulation::Block* block = emulation::Block::current();
    return block->cluster().placed[size_t(block->cluster_rank())];
  }
};

}  // namespace mnnvl::kernels
