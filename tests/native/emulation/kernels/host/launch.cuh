// In place of csrc/kernels/host/launch.cuh: a launch runs the grid, and returns when it has ended.
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
void launch(void (*kernel)(Params), const Params& params, int64_t blocks, const Launch& shape) {
  std::vector<std::unique_ptr<emulation::Cluster>> clusters;
  for (int64_t c = 0; c < blocks / shape.cluster; ++c) {
    clusters.push_back(std::make_unique<emulation::Cluster>(shape.cluster));
  }
  std::vector<std::thread> running;
  for (int64_t b = 0; b < blocks; ++b) {
    running.emplace_back([&, b] {
      emulation::Block block(unsigned(b), unsigned(blocks), unsigned(shape.threads),
                             *clusters[size_t(b / shape.cluster)]);
      block.run([&] { kernel(params); });
    });
  }
  for (std::thread& thread : running) thread.join();
}

template <typename Kernel>
void load(Kernel) {}

}  // namespace mnnvl::kernels
