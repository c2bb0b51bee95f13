#include "native/rank_order.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace mnnvl::test {
namespace {

// Of the two 16-bit formats. Float32 needs none: it is the accumulator itself.
struct Format {
  int mantissa_bits;
  int smallest_exponent;  // of a normal number
  int largest_exponent;
};

Format format_of(Dtype dtype) { return dtype == Dtype::kFloat16 ? Format{10, -14, 15} : Format{7, -126, 127}; }

}  // namespace

uint32_t element_bits(const std::byte* array, int64_t i, Dtype dtype) {
  uint32_t wide;
  uint16_t narrow;
  if (dtype == Dtype::kFloat32) {
    std::memcpy(&wide, array + i * 4, 4);
    return wide;
  }
  std::memcpy(&narrow, array + i * 2, 2);
  return narrow;
}

float element_value(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const Format format = format_of(dtype);
  const float sign = (bits & 0x8000u) != 0 ? -1.0f : 1.0f;
  const int exponent = static_cast<int>((bits & 0x7fffu) >> format.mantissa_bits);
  const int mantissa = static_cast<int>(bits & ((1u << format.mantissa_bits) - 1));
  if (exponent == format.largest_exponent * 2 + 1) {
    return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  }
  const int units = exponent == 0 ? mantissa : mantissa + (1 << format.mantissa_bits);
  const int unit = (exponent == 0 ? 1 : exponent) - 1 + format.smallest_exponent - format.mantissa_bits;
  return std::copysign(std::ldexp(static_cast<float>(units), unit), sign);
}

uint32_t rounded_bits(float value, Dtype dtype) {
  if (value == 0) return 0;
  if (dtype == Dtype::kFloat32) {
    if (std::isnan(value)) return 0x7fffffffu;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  }
  if (std::isnan(value)) return 0x7fffu;
  const Format format = format_of(dtype);
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0;
  const uint32_t infinity = static_cast<uint32_t>(format.largest_exponent * 2 + 1) << format.mantissa_bits;
  if (std::isinf(value)) return sign | infinity;
  const double magnitude = std::fabs(static_cast<double>(value));
  int exponent = std::ilogb(magnitude);
  if (exponent < format.smallest_exponent) exponent = format.smallest_exponent;
  const double units = std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - exponent));  // to nearest even
  if (units == 0) return 0;
  // A carry out of the mantissa moves into the exponent by itself, up to infinity.
  const int64_t biased = exponent - format.smallest_exponent;
  const int64_t bits = (biased << format.mantissa_bits) + static_cast<int64_t>(units);
  return sign | (bits > infinity ? infinity : static_cast<uint32_t>(bits));
}

uint32_t rank_order_bits(const std::vector<const std::byte*>& inputs, int64_t i, Dtype dtype, ReduceOp op) {
  float sum = 0;
  for (const std::byte* input : inputs) sum += element_value(element_bits(input, i, dtype), dtype);
  if (op == ReduceOp::kAvg) sum /= static_cast<float>(inputs.size());
  return rounded_bits(sum, dtype);
}

}  // namespace mnnvl::test
