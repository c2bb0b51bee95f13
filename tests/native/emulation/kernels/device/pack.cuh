// In place of csrc/kernels/device/pack.cuh, for kernels on pair channels.
#pragma once

#include "native/emulation/cuda.h"
#include "protocol/workspace.h"

namespace mnnvl::kernels {
inline bool is_vector_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; }
}  // namespace mnnvl::kernels
