#include "tuning/choose_cpu.h"

#include "tuning/crossover.h"

namespace mnnvl {
namespace {

constexpr Crossover kCrossovers[] = {
#include "tuning/tables/cpu_crossovers.inc"
};
static_assert(complete(kCrossovers));

}  // namespace

Strategy choose_cpu_strategy(Strategy asked, int64_t bytes, int world_size, int64_t oneshot_bytes) {
  if (asked != Strategy::kAuto) return asked;
  return bytes <= oneshot_limit(kCrossovers, world_size, oneshot_bytes) ? Strategy::kOneShot : Strategy::kTwoShot;
}

}  // namespace mnnvl
