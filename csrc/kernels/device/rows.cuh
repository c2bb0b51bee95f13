// Kinds of rows for which the fused kernels have code of their own, and which instances have it: one that has none of a
// kind takes kPacked's. Each costs every build half a second or more, so the rarer worlds have few.
#pragma once

#include "kernels/epilogue/quantise.cuh"

namespace mnnvl::kernels {

enum class Rows {
  kAny,
  kPacked,  // every row of every matrix is whole packs, and aligned; so are those below
  kOnePack,  // no thread has more than one, and no cluster more than one row
  kUnscaled,  // the same, and no scales are written; nor are they of those below
  kTwoPacks,  // no thread has more than two, and no cluster more than one row
  kTeams,  // many, of whole warps' packs, of which no lane (fused_row.h) has two: each by a team of a block's warps
};

// Of the all-reduces.
constexpr bool has_one_pack(int instance) { return instance == 2 || instance == 4 || instance == 8; }
constexpr bool has_two_packs(int instance) { return instance == 2; }
constexpr bool has_teams(int instance) { return instance == 2 || instance == 4 || instance == 8; }

inline bool fits_teams(const FusedParams& params) {
  return params.packed && params.team_shift != 0 && !writes_scales(params.work.quantization) &&
         params.packs % 32 == 0 && params.packs <= fused::kRowLanes;
}

// Of float32, which engines don't have between their layers, there is the loop for worlds of any size alone.
template <typename T>
constexpr int fused_instance(int instance) {
  return sizeof(T) == 4 ? 0 : instance;
}

}  // namespace mnnvl::kernels
