// Which protocol serves a collective of the CPU transport: a pure function, tested alone.
#pragma once

#include <cstdint>

#include "protocol/types.h"

namespace mnnvl {

// `bytes`: of the tensor. Gives kOneShot or kTwoShot: the caller's own wish unless that is kAuto; then one shot up to
// `oneshot_bytes`, or, if that is -1, up to what the table says. Arguments that are the same on every rank give the
// same on every rank: the ranks must agree, or their calls don't fit together.
Strategy choose_cpu_strategy(Strategy asked, int64_t bytes, int world_size, int64_t oneshot_bytes = -1);

}  // namespace mnnvl
