// The reductions of every instruction set that this machine has: the same bits as the portable one, and those by
// definition.
#include <cstring>

#include "cpu/reduce.h"
#include "native/harness.h"
#include "native/rank_order.h"

namespace mnnvl::test {
namespace {

using cpu::Isa;
constexpr size_t kMargin = 64;  // before and behind a result, to be left alone

struct Result {
  Bytes out, second;
};

Result reduce(Isa isa, Dtype dtype, ReduceOp op, const std::vector<const std::byte*>& sources, int64_t numel,
              size_t shift) {
  const size_t bytes = static_cast<size_t>(numel * element_size(dtype));
  Result result{Bytes(bytes + 2 * kMargin, std::byte{0x5a}), Bytes(bytes + 2 * kMargin, std::byte{0x5a})};
  const cpu::ReduceFunction function = cpu::reduce_function(isa, dtype, op);
  function(sources.data(), static_cast<int>(sources.size()), result.out.data() + kMargin - shift,
           result.second.data() + kMargin, numel);
  return result;
}

// One reduction by `isa`, from and to odd addresses.
void check(Isa isa, Dtype dtype, ReduceOp op, const std::vector<const std::byte*>& sources, int64_t numel,
           size_t shift) {
  const Result seen = reduce(isa, dtype, op, sources, numel, shift);
  const Result portable = reduce(Isa::kPortable, dtype, op, sources, numel, shift);
  const auto where = str(name(isa), ", dtype ", static_cast<int>(dtype), ", op ", static_cast<int>(op), ", ",
                         sources.size(), " ranks, ", numel, " elements");
  CHECK(seen.out == portable.out, where);
  CHECK(seen.second == portable.second, where);
  for (int64_t i = 0; i < numel; ++i) {
    const uint64_t bits = element_bits(seen.out.data() + kMargin - shift, i, dtype);
    CHECK(bits == element_bits(seen.second.data() + kMargin, i, dtype), where, ": second differs at ", i);
    CHECK(bits == rank_order_bits(sources, i, dtype, op), where, ": element ", i, ": ", bits, " for ",
          rank_order_bits(sources, i, dtype, op));
  }
}

// Every reduction of every instruction set; those other than the portable one have float sums alone.
template <typename Body>
void for_each_variant(const Body& body) {
  int instruction_sets = 0;
  for (int isa = 0; isa < cpu::kIsaCount; ++isa) {
    if (cpu::reduce_function(static_cast<Isa>(isa), Dtype::kFloat32, ReduceOp::kSum) == nullptr) continue;
    ++instruction_sets;
    for (Dtype dtype : kNumberDtypes) {
      for (ReduceOp op : kReduceOps) {
        const bool has = isa == 0 ? has_reduction(dtype, op) : is_float_sum(dtype, op);
        CHECK((cpu::reduce_function(static_cast<Isa>(isa), dtype, op) != nullptr) == has, isa);
        if (has) body(static_cast<Isa>(isa), dtype, op);
      }
    }
  }
#if defined(__aarch64__)
  CHECK(instruction_sets == 2, "NEON is part of every AArch64 machine");
#endif
  CHECK(instruction_sets >= 1);
}

TEST(reduce_refuses_what_is_not_reduced) {
  for (Dtype dtype : {Dtype::kUInt16, Dtype::kUInt32, Dtype::kUInt64, Dtype::kComplex64, Dtype::kOther}) {
    for (ReduceOp op : kReduceOps)
      CHECK(error_of([&] { cpu::reduce_function(dtype, op); }).kind() == ErrorKind::kInvalidArgument);
  }
  const Error error = error_of([] { cpu::reduce_function(Dtype::kFloat16, ReduceOp::kBand); });
  CHECK(std::string(error.what()) == "mnnvl: no band of float16", error.what());
}

TEST(reduce_any_bits_of_every_length) {
  for_each_variant([](Isa isa, Dtype dtype, ReduceOp op) {
    for (int64_t numel = 0; numel <= iterations(150); ++numel) {
      const int count = 1 + static_cast<int>(numel % 5);
      std::vector<Bytes> inputs;
      std::vector<const std::byte*> sources;
      for (int r = 0; r < count; ++r)
        inputs.push_back(any_bytes(mix(static_cast<uint64_t>(numel * 8 + r)), numel * 8 + 8));
      for (int r = 0; r < count; ++r) sources.push_back(inputs[static_cast<size_t>(r)].data() + (numel + r) % 8);
      check(isa, dtype, op, sources, numel, static_cast<size_t>(numel % 4));
    }
  });
}

// Every 16-bit number: alone, halved, and with a number that cancels most of it.
TEST(reduce_every_16_bit_pattern) {
  constexpr int64_t kPatterns = 1 << 16;
  Bytes all(kPatterns * 2), others(kPatterns * 2), few(kPatterns * 2);
  for (int64_t i = 0; i < kPatterns; ++i) {
    const uint16_t pattern = static_cast<uint16_t>(i), other = static_cast<uint16_t>(i ^ 0x8001u),
                   small = static_cast<uint16_t>(mix(static_cast<uint64_t>(i)) & 0x83ffu);
    std::memcpy(all.data() + i * 2, &pattern, 2);
    std::memcpy(others.data() + i * 2, &other, 2);
    std::memcpy(few.data() + i * 2, &small, 2);
  }
  for_each_variant([&](Isa isa, Dtype dtype, ReduceOp op) {
    if (element_size(dtype) != 2) return;
    const int64_t numel = iterations(kPatterns);
    check(isa, dtype, op, {all.data()}, numel, 0);
    check(isa, dtype, op, {all.data(), others.data()}, numel, 2);
    check(isa, dtype, op, {others.data(), few.data(), all.data()}, numel, 0);
  });
}

// Every pair of 8-bit numbers.
TEST(reduce_every_pair_of_8_bits) {
  Bytes first, second;
  for (int pair = 0; pair < 1 << 16; ++pair) {
    first.push_back(static_cast<std::byte>(pair >> 8));
    second.push_back(static_cast<std::byte>(pair));
  }
  for_each_variant([&](Isa isa, Dtype dtype, ReduceOp op) {
    if (element_size(dtype) == 1) check(isa, dtype, op, {first.data(), second.data()}, iterations(1 << 16), 0);
  });
}

TEST(reduce_in_place) {
  for_each_variant([](Isa isa, Dtype dtype, ReduceOp op) {
    const int64_t numel = 1001;
    const Bytes a = any_bytes(1, numel * 8), b = any_bytes(2, numel * 8);
    Bytes mine = b;
    const std::byte* sources[] = {a.data(), mine.data()};
    cpu::reduce_function(isa, dtype, op)(sources, 2, mine.data(), nullptr, numel);
    for (int64_t i = 0; i < numel; ++i) {
      CHECK(element_bits(mine.data(), i, dtype) == rank_order_bits({a.data(), b.data()}, i, dtype, op), name(isa), i);
    }
  });
}

}  // namespace
}  // namespace mnnvl::test
