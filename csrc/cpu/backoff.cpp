#include "cpu/backoff.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace mnnvl::cpu {
namespace {

// Spinning. With a core for every rank a peer is usually less than a few microseconds behind, and a futex sleep costs 5
// (50 on a virtual machine whose idle core has to be woken). After that, or at once with more ranks than cores, the
// peer waited for may need this very core (the scheduler puts two ranks on one core when a third process is busy), so
// it is yielded: a switch costs about 1 microsecond, a sleep and its wake-up 5 to 10, and yielding to nobody 0.3. The
// sum is bounded, so that waiting for a late rank, milliseconds or minutes, leaves the cores to others.
constexpr int kPausesPerLook = 4;
constexpr int kLooksBeforeClock = 8;
constexpr auto kSpinOwnCore = std::chrono::microseconds(2);
constexpr auto kYieldOwnCore = std::chrono::microseconds(100);
constexpr auto kYieldShared = std::chrono::microseconds(200);

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // as long as x86's pause; "yield" is a no-op on most cores
#endif
}

// The cores that any of these processes may run on. Pids that can't be asked are taken to share ours.
int count_cores(const std::vector<int>& pids) {
  cpu_set_t all;
  CPU_ZERO(&all);
  if (sched_getaffinity(0, sizeof all, &all) != 0) return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  for (int pid : pids) {
    cpu_set_t one;
    CPU_ZERO(&one);
    if (pid > 0 && sched_getaffinity(pid, sizeof one, &one) == 0) CPU_OR(&all, &all, &one);
  }
  return CPU_COUNT(&all);
}

}  // namespace

bool enough_cores(const std::vector<int>& peer_pids) {
  return count_cores(peer_pids) >= static_cast<int>(peer_pids.size());
}

bool Backoff::pause() {
  const int look = look_++;
  if (look < kLooksBeforeClock || own_core_) {
    for (int i = 0; i < kPausesPerLook; ++i) cpu_pause();
  }
  if (look < kLooksBeforeClock) return true;
  const auto now = std::chrono::steady_clock::now();
  if (look == kLooksBeforeClock) start_ = now;
  if (own_core_ && now - start_ < kSpinOwnCore) return true;
  if (now - start_ > (own_core_ ? kYieldOwnCore : kYieldShared)) return false;
  sched_yield();
  return true;
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, std::chrono::nanoseconds at_most) {
  timespec timeout;
  timeout.tv_sec = static_cast<time_t>(at_most.count() / 1000000000);
  timeout.tv_nsec = static_cast<long>(at_most.count() % 1000000000);
  // Not FUTEX_PRIVATE: the word is shared by processes. EAGAIN, EINTR and ETIMEDOUT all mean: look again.
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace mnnvl::cpu
