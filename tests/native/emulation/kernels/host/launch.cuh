// In place of csrc/kernels/host/launch.cuh: a launch runs the grid, and returns when it has ended; but if one is to
// begin beside it, when that may.
#pragma once

#include <type_traits>

#include "kernels/kernels.h"
#include "native/emulation/cuda.h"
#include "native/emulation/cuda_fp16.h"

namespace mnnvl::kernels {

constexpr int kMinBlocks = 2;

// One instance of a world of its own, and the loop: what more there is differs in numbers alone.
#define MNNVL_FOR_EACH_INSTANCE(X) \
  X(float, 2) \
  X(float, 3) \
  X(float, 0) X(__half, 2) X(__half, 3) X(__half, 0) X(__nv_bfloat16, 2) X(__nv_bfloat16, 3) X(__nv_bfloat16, 0)

template <typename T>
constexpr Dtype dtype_of() {
  return sizeof(T) == 4 ? Dtype::kFloat32 : std::is_same<T, __half>::value ? Dtype::kFloat16 : Dtype::kBFloat16;
}
constexpr int instance_of(int world_size) { return world_size <= 3 ? world_size : 0; }

template <typename Params>
bool has_dependents(const Params&) {
  return false;
}
inline bool has_dependents(const AllReduceParams& params) { return params.chain.more; }

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int64_t blocks, const Launch& shape) {
  struct Running {
    std::vector<std::unique_ptr<emulation::Cluster>> clusters;
    std::vector<std::thread> threads;
    ~Running() {
      for (std::thread& thread : threads) thread.join();
    }
  };
  // Of this rank's stream, whose calls come from one thread.
  static thread_local std::shared_ptr<emulation::Grid> last;
  static thread_local std::vector<std::unique_ptr<Running>> all;
  const auto grid = std::make_shared<emulation::Grid>(blocks, std::exchange(last, nullptr));
  if (grid->before != nullptr && grid->before->ended != grid->before->blocks) ++emulation::early_launches;
  all.push_back(std::make_unique<Running>());
  Running& running = *all.back();
  for (int64_t c = 0; c < blocks / shape.cluster; ++c) {
    running.clusters.push_back(std::make_unique<emulation::Cluster>(shape.cluster));
  }
  for (int64_t b = 0; b < blocks; ++b) {
    running.threads.emplace_back(
        [=, threads = shape.threads, cluster = running.clusters[size_t(b / shape.cluster)].get()] {
          emulation::Grid::current() = grid.get();
          emulation::Block block(unsigned(b), unsigned(blocks), unsigned(threads), *cluster);
          block.run([&] { kernel(params); });
          block.let_dependents_begin();
          ++grid->ended;
        });
  }
  if (!has_dependents(params)) return all.clear();
  while (grid->letting != blocks) std::this_thread::yield();
  last = grid;
}

template <typename Kernel>
void load(Kernel) {}

}  // namespace mnnvl::kernels
