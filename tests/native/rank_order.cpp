#include "native/rank_order.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace mnnvl::test {
namespace {

struct Format {
  int mantissa_bits;
  int smallest_exponent;  // of a normal number
  int largest_exponent;
};

Format format_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return {52, -1022, 1023};
    case Dtype::kFloat32: return {23, -126, 127};
    case Dtype::kFloat16: return {10, -14, 15};
    case Dtype::kBFloat16: return {7, -126, 127};
    case Dtype::kFloat8E5M2: return {2, -14, 15};
    default: return {3, -6, 8};  // float8_e4m3fn
  }
}

// The bits of a NaN, and of the largest result there is.
uint64_t canonical_nan(Dtype dtype) { return (uint64_t{1} << (element_size(dtype) * 8 - 1)) - 1; }
uint64_t largest_bits(Dtype dtype) {
  if (dtype == Dtype::kFloat8E4M3) return 0x7e;  // 448: there is no infinity
  const Format format = format_of(dtype);
  return static_cast<uint64_t>(format.largest_exponent * 2 + 1) << format.mantissa_bits;
}

bool is_signed(Dtype dtype) { return dtype != Dtype::kUInt8 && dtype != Dtype::kBool; }

// As floating-point arithmetic of one width does it.
template <typename Float>
double reduce_floats(const std::vector<double>& values, ReduceOp op) {
  Float result = static_cast<Float>(values[0]);
  for (size_t r = 1; r < values.size(); ++r) {
    const Float value = static_cast<Float>(values[r]);
    if (op == ReduceOp::kSum || op == ReduceOp::kAvg) result += value;
    if (op == ReduceOp::kProduct) result *= value;
    if (op == ReduceOp::kMin || op == ReduceOp::kMax) {
      if (std::isnan(result) || std::isnan(value)) {
        result = std::numeric_limits<Float>::quiet_NaN();
      } else {
        result = op == ReduceOp::kMin ? std::fmin(result, value) : std::fmax(result, value);
      }
    }
  }
  if (op == ReduceOp::kAvg) result /= static_cast<Float>(values.size());
  return static_cast<double>(result);
}

// In 64 bits that wrap, of which the lower ones are right whatever the width.
uint64_t reduce_integers(const std::vector<int64_t>& values, ReduceOp op, Dtype dtype) {
  uint64_t result = static_cast<uint64_t>(values[0]);
  for (size_t r = 1; r < values.size(); ++r) {
    const uint64_t value = static_cast<uint64_t>(values[r]);
    const bool less = values[r] < static_cast<int64_t>(result);
    switch (op) {
      case ReduceOp::kSum:
      case ReduceOp::kAvg: result += value; break;
      case ReduceOp::kProduct: result *= value; break;
      case ReduceOp::kMin: result = less ? value : result; break;
      case ReduceOp::kMax: result = less ? result : value; break;
      case ReduceOp::kBand: result &= value; break;
      case ReduceOp::kBor: result |= value; break;
      case ReduceOp::kBxor: result ^= value; break;
    }
  }
  if (op != ReduceOp::kAvg) return result;
  const int64_t sum = static_cast<int64_t>(result);  // of narrow integers: in 32 bits
  const int64_t count = static_cast<int64_t>(values.size());
  return static_cast<uint64_t>(dtype == Dtype::kInt64 ? sum / count : static_cast<int32_t>(sum) / count);
}

int64_t integer_value(uint64_t bits, Dtype dtype) {
  if (dtype == Dtype::kBool) return bits != 0;
  const int unused = 64 - element_size(dtype) * 8;
  return is_signed(dtype) ? static_cast<int64_t>(bits << unused) >> unused : static_cast<int64_t>(bits);
}

}  // namespace

bool is_floating(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kFloat32:
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
    case Dtype::kFloat8E5M2:
    case Dtype::kFloat8E4M3: return true;
    default: return false;
  }
}

bool has_reduction(Dtype dtype, ReduceOp op) {
  const bool of_bits = op == ReduceOp::kBand || op == ReduceOp::kBor || op == ReduceOp::kBxor;
  if (dtype == Dtype::kBool) return op != ReduceOp::kAvg;
  return !(of_bits && is_floating(dtype));
}

uint64_t element_bits(const std::byte* array, int64_t i, Dtype dtype) {
  const int size = element_size(dtype);
  uint64_t bits = 0;
  for (int b = size - 1; b >= 0; --b) bits = bits << 8 | static_cast<uint64_t>(array[i * size + b]);
  return bits;
}

double element_value(uint64_t bits, Dtype dtype) {
  const Format format = format_of(dtype);
  const uint64_t sign_bit = uint64_t{1} << (element_size(dtype) * 8 - 1);
  const double sign = (bits & sign_bit) != 0 ? -1.0 : 1.0;
  const uint64_t magnitude = bits & (sign_bit - 1);
  if (magnitude > largest_bits(dtype)) return std::numeric_limits<double>::quiet_NaN();
  const int exponent = static_cast<int>(magnitude >> format.mantissa_bits);
  const uint64_t mantissa = magnitude & ((uint64_t{1} << format.mantissa_bits) - 1);
  if (exponent == format.largest_exponent * 2 + 1 && dtype != Dtype::kFloat8E4M3) {
    return sign * std::numeric_limits<double>::infinity();
  }
  const uint64_t units = exponent == 0 ? mantissa : mantissa + (uint64_t{1} << format.mantissa_bits);
  const int unit = (exponent == 0 ? 1 : exponent) - 1 + format.smallest_exponent - format.mantissa_bits;
  return std::copysign(std::ldexp(static_cast<double>(units), unit), sign);
}

uint64_t rounded_bits(double value, Dtype dtype) {
  if (value == 0) return 0;
  if (std::isnan(value)) return canonical_nan(dtype);
  const Format format = format_of(dtype);
  const uint64_t sign = std::signbit(value) ? uint64_t{1} << (element_size(dtype) * 8 - 1) : 0;
  if (std::isinf(value)) return sign | largest_bits(dtype);
  const double magnitude = std::fabs(value);
  int exponent = std::ilogb(magnitude);
  if (exponent < format.smallest_exponent) exponent = format.smallest_exponent;
  const double units = std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - exponent));  // to nearest even
  if (units == 0) return 0;
  // A carry out of the mantissa moves into the exponent by itself, up to the largest.
  const uint64_t biased = static_cast<uint64_t>(exponent - format.smallest_exponent);
  const uint64_t bits = (biased << format.mantissa_bits) + static_cast<uint64_t>(units);
  return sign | (bits > largest_bits(dtype) ? largest_bits(dtype) : bits);
}

uint64_t rank_order_bits(const std::vector<const std::byte*>& inputs, int64_t i, Dtype dtype, ReduceOp op) {
  if (is_floating(dtype)) {
    std::vector<double> values;
    for (const std::byte* input : inputs) values.push_back(element_value(element_bits(input, i, dtype), dtype));
    const bool wide = dtype == Dtype::kFloat64;
    return rounded_bits(wide ? reduce_floats<double>(values, op) : reduce_floats<float>(values, op), dtype);
  }
  std::vector<int64_t> values;
  for (const std::byte* input : inputs) values.push_back(integer_value(element_bits(input, i, dtype), dtype));
  const uint64_t wide = reduce_integers(values, op, dtype);
  if (dtype == Dtype::kBool) return op == ReduceOp::kBxor ? wide & 1 : wide != 0;
  const int unused = 64 - element_size(dtype) * 8;
  return wide << unused >> unused;
}

}  // namespace mnnvl::test
