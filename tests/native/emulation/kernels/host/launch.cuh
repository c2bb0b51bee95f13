// In place of csrc/kernels/host/launch.cuh: a launch runs the grid, and returns when it has ended.
#pragma once

#include "kernels/kernels.h"
#include "native/emulation/cuda.h"

namespace mnnvl::kernels {

constexpr int kMinBlocks = 2;

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int64_t blocks, const Launch& shape) {
  std::vector<std::thread> running;
  for (int64_t b = 0; b < blocks; ++b) {
    running.emplace_back([&, b] {
      emulation::Block block(unsigned(b), unsigned(blocks), unsigned(shape.threads));
      block.run([&] { kernel(params); });
    });
  }
  for (std::thread& thread : running) thread.join();
}

template <typename Kernel>
void load(Kernel) {}

}  // namespace mnnvl::kernels
