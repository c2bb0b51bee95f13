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

// Waits by the parity of a phase, as an mbarrier's does: who comes two phases late waits for ever. The last warp, which
// may have no packs, comes late.
template <typename Word>
struct ClusterValues {
  std::atomic<Word> values[2][32];
  std::atomic<int64_t> missing[2];  // values that are expected and have not come, and kOpen while more may be expected
  std::atomic<uint32_t> phases[2];
  static constexpr int64_t kOpen = 1 << 20;

  void prepare() {
    for (int turn : {0, 1}) {
      missing[turn] = kOpen;
      phases[turn] = 0;
    }
    mine().push_back(this);
  }
  void expect(uint32_t round, int blocks, int count) {
    if (blocks > 1 && threadIdx.x == 0) count_in(round % 2, count - kOpen);
  }
  void send(uint32_t round, int blocks, int place, Word value) {
    const int lane = int(threadIdx.x % 32);
    if (lane >= blocks) return;
    if (blocks == 1) {
      values[round % 2][place] = value;
      return;
    }
    const size_t at = size_t(std::find(mine().begin(), mine().end(), this) - mine().begin());
    auto* to = static_cast<ClusterValues*>(emulation::Block::current()->cluster().placed[size_t(lane)][at]);
    to->values[round % 2][place] = value;
    to->count_in(round % 2, -1);
  }
  Word take(uint32_t round, int blocks) {
    emulation::Block* const block = emulation::Block::current();
    if (blocks == 1) {
      block->meet_all();
    } else {
      const auto late = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
      const bool last_warp = threadIdx.x / 32 == blockDim.x / 32 - 1;
      while (last_warp && round == 0 && phases[0].load() < 2 && std::chrono::steady_clock::now() < late) block->yield();
      while (phases[round % 2].load() % 2 == round / 2 % 2) block->yield();
    }
    return values[round % 2][threadIdx.x % 32];
  }
  Word take_of_team(uint32_t round, int team, int threads) {
    emulation::Block::current()->meet_team(unsigned(team), unsigned(threads));
    return values[round % 2][threadIdx.x % 32];
  }

 private:
  void count_in(uint32_t turn, int64_t change) {
    if (missing[turn].fetch_add(change) + change != 0) return;
    missing[turn] = kOpen;
    ++phases[turn];
  }
  static std::vector<void*>& mine() {
    const emulation::Block* block = emulation::Block::current();
    return block->cluster().placed[size_t(block->cluster_rank())];
  }
};

}  // namespace mnnvl::kernels
