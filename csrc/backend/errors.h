// The torch boundary: Error becomes the exception that c10d's users catch.
#pragma once

#include <c10/util/Exception.h>

#include "common/error.h"

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

}  // namespace mnnvl
