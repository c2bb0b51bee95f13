// The portable reductions, and the choice among instruction sets.
#if !defined(__clang__)  // which assumes it without a word
// Nobody looks at floating-point exceptions, so a choice between two results may compute both: that is how a loop over
// such choices is vectorised.
#pragma GCC optimize("no-trapping-math")
#endif

#include "cpu/reduce.h"

#include <array>

#include "common/error.h"
#include "protocol/arithmetic.h"
#include "protocol/failure_text.h"

namespace mnnvl::cpu {
namespace {

using arithmetic::Element;

// Loops over so many elements have a length that the compiler knows, which is what it vectorises; their accumulators
// stay in the nearest cache.
constexpr int kBlock = 64;

template <Dtype dtype>
struct Widen {
  auto operator()(typename Element<dtype>::Stored v) const { return Element<dtype>::widen(v); }
};

// 256 numbers are looked up faster than computed.
template <Dtype dtype>
struct WidenByTable {
  WidenByTable() {
    static const std::array<float, 256> all = [] {
      std::array<float, 256> of{};
      for (int bits = 0; bits < 256; ++bits) of[bits] = Element<dtype>::widen(static_cast<uint8_t>(bits));
      return of;
    }();
    table = all.data();
  }
  float operator()(uint8_t v) const { return table[v]; }
  const float* table;
};
template <>
struct Widen<Dtype::kFloat8E4M3> : WidenByTable<Dtype::kFloat8E4M3> {};
template <>
struct Widen<Dtype::kFloat8E5M2> : WidenByTable<Dtype::kFloat8E5M2> {};

template <Dtype dtype, ReduceOp op, int kNumel>
inline void reduce_block(const std::byte* const* sources, int count, std::byte* out, std::byte* second, int64_t offset,
                         const Widen<dtype>& widen) {
  typename Element<dtype>::Stored stored[kNumel];
  typename Element<dtype>::Wide wide[kNumel];
  __builtin_memcpy(stored, sources[0] + offset, sizeof stored);
  for (int k = 0; k < kNumel; ++k) wide[k] = widen(stored[k]);
  for (int r = 1; r < count; ++r) {
    __builtin_memcpy(stored, sources[r] + offset, sizeof stored);
    for (int k = 0; k < kNumel; ++k) wide[k] = arithmetic::combine<op>(wide[k], widen(stored[k]));
  }
  for (int k = 0; k < kNumel; ++k) stored[k] = Element<dtype>::narrow(arithmetic::finish<op>(wide[k], count));
  __builtin_memcpy(out + offset, stored, sizeof stored);
  if (second != nullptr) __builtin_memcpy(second + offset, stored, sizeof stored);
}

template <Dtype dtype, ReduceOp op>
void reduce(const std::byte* const* sources, int count, std::byte* out, std::byte* second, int64_t numel) {
  const Widen<dtype> widen;
  const int64_t size = element_size(dtype);
  int64_t i = 0;
  for (; i + kBlock <= numel; i += kBlock)
    reduce_block<dtype, op, kBlock>(sources, count, out, second, i * size, widen);
  for (; i < numel; ++i) reduce_block<dtype, op, 1>(sources, count, out, second, i * size, widen);
}

constexpr int kDtypes = static_cast<int>(Dtype::kFloat8E5M2) + 1;
constexpr int kOps = static_cast<int>(ReduceOp::kBxor) + 1;

// [dtype][computed(op)]; null: not reduced.
constexpr auto kPortable = [] {
  std::array<std::array<ReduceFunction, kOps>, kDtypes> table{};
#define MNNVL_ENTRY(dtype, op) \
  table[static_cast<int>(Dtype::dtype)][static_cast<int>(ReduceOp::op)] = reduce<Dtype::dtype, ReduceOp::op>;
  MNNVL_FOR_EACH_REDUCTION(MNNVL_ENTRY)
#undef MNNVL_ENTRY
  return table;
}();

}  // namespace

ReduceFunction reduce_function(Isa isa, Dtype dtype, ReduceOp op) {
  const int d = static_cast<int>(dtype);
  const int o = static_cast<int>(arithmetic::computed(dtype, op));
  if (isa == Isa::kPortable) return arithmetic::is_reduced(dtype, op) ? kPortable[d][o] : nullptr;
  if (!is_float_sum(dtype, op)) return nullptr;
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? detail::kReduceAvx2[d][o] : nullptr;
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("f16c")
                 ? detail::kReduceAvx512[d][o]
                 : nullptr;
#elif defined(__aarch64__)
    case Isa::kNeon: return detail::kReduceNeon[d][o];
#endif
    default: return nullptr;
  }
}

ReduceFunction reduce_function(Dtype dtype, ReduceOp op) {
  for (int isa = kIsaCount - 1; isa >= 0; --isa) {
    if (ReduceFunction function = reduce_function(static_cast<Isa>(isa), dtype, op)) return function;
  }
  fail(ErrorKind::kInvalidArgument, "mnnvl: no ", mnnvl::name(op), " of ", mnnvl::name(dtype));
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kNeon: return "neon";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  return "?";
}

}  // namespace mnnvl::cpu
