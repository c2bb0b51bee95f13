#include "cpu/operations.h"

namespace mnnvl::cpu {

void run(Steps& steps, const BarrierRequest& request, int64_t timeout_ms) {
  steps.begin(descriptor_of(request), timeout_ms);
  if (steps.world_size() == 1) return;
  const uint32_t epoch = steps.take_epochs(1);
  steps.wait_for_slot(epoch);  // it writes no slot, but names its call beside
  steps.post(epoch);
  steps.wait_all_posted(epoch);
  steps.finish(epoch);
}

}  // namespace mnnvl::cpu
