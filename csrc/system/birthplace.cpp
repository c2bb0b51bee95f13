#include "system/birthplace.h"

#include <pthread.h>

#include "common/error.h"

namespace mnnvl {

std::atomic<uint32_t> Birthplace::now_{0};

struct CountForks {
  CountForks() {
    pthread_atfork(nullptr, nullptr, [] { Birthplace::now_.fetch_add(1, std::memory_order_relaxed); });
  }
};
static const CountForks count_forks;

void Birthplace::refuse(const char* made) const {
  fail(ErrorKind::kSystem, "mnnvl: this ", made, " belongs to process ", pid_, ", of which process ", getpid(),
       " is a child by fork(): a child takes no part in its parent's, and makes its own");
}

}  // namespace mnnvl
