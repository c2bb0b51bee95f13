// What native tests of the set-up over the double ask of its results.
#pragma once

#include <string>

#include "native/fake_setup.h"
#include "native/harness.h"

namespace mnnvl::test {

inline void check_clean(const FakeSetupResult& result, const std::string& what) {
  for (const auto& [kind, count] : result.leaks) CHECK(count == 0, what, ": ", count, " ", kind);
  CHECK(result.descriptors_leaked == 0, what, ": ", result.descriptors_leaked);
  CHECK(result.mappings_leaked == 0, what, ": ", result.mappings_leaked);
}

inline void check_works(const FakeSetupResult& result, const std::string& what) {
  check_clean(result, what);
  for (size_t rank = 0; rank < result.ok.size(); ++rank) {
    CHECK(result.ok[rank], what, ": ", result.errors[rank]);
    CHECK(result.verified[rank], what, ": rank ", rank);
  }
}

// All ranks raise the same, and it names `rank`.
inline void check_fails_alike(const FakeSetupResult& result, int rank, const std::string& what) {
  check_clean(result, what);
  for (size_t r = 0; r < result.ok.size(); ++r) {
    CHECK(!result.ok[r], what, ": rank ", r, " goes on");
    CHECK(result.errors[r] == result.errors[0], what, ": ", result.errors[r], " | ", result.errors[0]);
  }
  const std::string named = str("failed on rank ", rank, " (");
  CHECK(result.errors[0].find(named) != std::string::npos, what, ": ", result.errors[0]);
}

}  // namespace mnnvl::test
