// Which protocol serves a collective of the CPU transport: a pure function, tested alone.
#pragma once

#include <cstdint>

#include "protocol/types.h"

namespace mnnvl {

// `bytes`: of the tensor. Gives kOneShot or kTwoShot: the caller's own wish unless that is kAuto. Arguments that are
// the same on every rank give the same on every rank: the ranks must agree, or their calls don't fit together.
Strategy choose_cpu_strategy(Strategy asked, int64_t bytes, int world_size);

}  // namespace mnnvl
