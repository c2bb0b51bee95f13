// The arithmetic that the bit contract needs, whatever the calling thread has set (torch.set_flush_denormal, a
// library's rounding mode): round to nearest even, subnormals kept, no traps. Restores the caller's mode at the end.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace mnnvl {

class FloatEnvironment {
 public:
  FloatEnvironment() : saved_(get()) {
    if (saved_ != kIeee) set(kIeee);
  }
  ~FloatEnvironment() {
    if (saved_ != kIeee) set(saved_);
  }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kIeee = 0x1f80;
  // The sticky exception flags are left out: they would make every other call write the register.
  static uint64_t get() { return _mm_getcsr() & ~0x3fu; }
  static void set(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kIeee = 0;
  static uint64_t get() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode)::"memory");
    return mode;
  }
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#else
  static constexpr uint64_t kIeee = 0;
  static uint64_t get() { return kIeee; }
  static void set(uint64_t) {}
#endif
  uint64_t saved_;
};

}  // namespace mnnvl
