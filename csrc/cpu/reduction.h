// What the collectives that reduce have in common.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu/reduce.h"
#include "cpu/steps.h"
#include "system/float_environment.h"

namespace mnnvl::cpu {

// The arithmetic of one call, on the thread that made it.
class Reduction {
 public:
  Reduction(const Steps& steps, ReduceFunction function, Dtype dtype)
      : steps_(steps), function_(function), element_bytes_(element_size(dtype)) {}

  // Reduces `bytes` of all ranks in rank order: `own`, and of the peers what lies at of(peer). `second`: null, or a
  // second place for the result.
  template <typename Of>
  void operator()(const std::byte* own, const Of& of, int64_t bytes, std::byte* out,
                  std::byte* second = nullptr) const {
    std::array<const std::byte*, kMaxWorldSize> sources;
    for (int r = 0; r < steps_.world_size(); ++r) sources[r] = r == steps_.rank() ? own : of(r);
    function_(sources.data(), steps_.world_size(), out, second, bytes / element_bytes_);
  }

 private:
  const Steps& steps_;
  const ReduceFunction function_;
  const int64_t element_bytes_;
  const FloatEnvironment ieee_;
};

}  // namespace mnnvl::cpu
