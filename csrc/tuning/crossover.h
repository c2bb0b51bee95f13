// The one form of tuned data so far: up to which size one shot is faster than two. Tables of it are data, tables/*.inc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/error.h"
#include "protocol/types.h"

namespace mnnvl {

struct Crossover {
  int world_size;  // applies up to this world size, from the row before
  int64_t oneshot_bytes;  // one shot up to this many bytes of the tensor, two shots beyond
};

// A table is usable when its world sizes ascend to the largest there is: checked where it is compiled.
template <size_t kRows>
constexpr bool complete(const Crossover (&table)[kRows]) {
  for (size_t i = 1; i < kRows; ++i) {
    if (table[i].world_size <= table[i - 1].world_size) return false;
  }
  return table[kRows - 1].world_size == kMaxWorldSize;
}

// What somebody has measured (`tuned`, bytes; -1: nobody has) goes before the table.
template <size_t kRows>
int64_t oneshot_limit(const Crossover (&table)[kRows], int world_size, int64_t tuned) {
  if (tuned >= 0) return tuned;
  for (const Crossover& row : table) {
    if (world_size <= row.world_size) return row.oneshot_bytes;
  }
  fail(ErrorKind::kInvalidArgument, "world size ", world_size, " is over ", kMaxWorldSize);
}

}  // namespace mnnvl
