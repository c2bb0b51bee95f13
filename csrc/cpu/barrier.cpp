#include "cpu/operations.h"

namespace mnnvl::cpu {

void run(Steps& steps, const BarrierRequest& request, int64_t timeout_ms) {
  steps.begin(descriptor_of(request), timeout_ms);
  if (steps.world_size() == 1) return;
  // It writes no slot, but names its call beside.
  const auto take = [&](int64_t, uint32_t epoch) { steps.wait_all_posted(epoch); };
  steps.run(1, /*posts=*/true, [](int64_t, uint32_t) {}, take);
}

}  // namespace mnnvl::cpu
