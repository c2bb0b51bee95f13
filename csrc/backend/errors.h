// The torch boundary: Error becomes the exception that c10d's users catch.
#pragma once

#include <c10/util/Exception.h>

#include "common/error.h"
#include "protocol/failure.h"

namespace mnnvl {

// ValueError, RuntimeError, or DistBackendError by the error's kind.
[[noreturn]] void throw_as_torch(const Error& error);

// Runs `body` and rethrows an Error as a torch exception.
template <typename F>
auto at_torch_boundary(F&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Error& error) {
    throw_as_torch(error);
  }
}

// "rank 1 waited for rank 3 in all_reduce (call 17, stage 0, expected 40, seen 39) until the deadline of 5 s".
Error to_error(const FailureRecord& record, double timeout_seconds);

}  // namespace mnnvl
