#include "cpu/fused_rows.h"

#include <vector>

#include "common/error.h"
#include "cpu/plan.h"
#include "cpu/reduce.h"
#include "protocol/fused_row.h"
#include "system/float_environment.h"

// Loops over elements, in vectors where the compiler can: it gives the same bits, since nothing is contracted.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
// Sanitizers don't like what chooses among the clones before main().
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define MNNVL_EACH_TARGET __attribute__((target_clones("default", "avx2")))
#endif
#endif
#ifndef MNNVL_EACH_TARGET
#define MNNVL_EACH_TARGET
#endif

namespace mnnvl::cpu {
namespace {

// One row at a time, in arrays that every row uses again. `Stored` is the integer of an element's bits.
template <Dtype dtype>
class Rows {
 public:
  using Stored = fused::Stored<dtype>;
  using Wide = fused::Wide<dtype>;

  explicit Rows(const RowWork& work)
      : w_(work),
        weight_(size_t(work.hidden)),
        squares_(size_t(work.hidden)),
        r_(size_t(work.hidden)),
        norm_bits_(size_t(work.hidden)),
        norm_(size_t(work.hidden)),
        quantised_(size_t(work.hidden)) {
    for (int64_t i = 0; i < work.hidden; ++i) {
      float gamma;
      if (work.gamma_is_float32) {
        gamma = at<float>(work.gamma, i);
      } else {
        gamma = fused::widen<dtype>(at<Stored>(work.gamma, i));
      }
      weight_[size_t(i)] = fused::add(Wide(work.weight_bias), Wide(gamma));
    }
  }

  void finish(int64_t number, const std::byte* sums) {
    number_ = number;
    const size_t bytes = size_t(w_.hidden) * sizeof(Stored);
    std::memcpy(r_.data(), sums, bytes);
    if (w_.residual != nullptr) {
      std::memcpy(norm_bits_.data(), row_of(w_.residual, sizeof(Stored)), bytes);
      add_residual(r_.data(), norm_bits_.data(), w_.hidden);
    }
    std::memcpy(row_of(w_.residual_out, sizeof(Stored)), r_.data(), bytes);
    const Wide inverse = fused::inverse_rms(fused::divide(sum_of_squares(), Wide(w_.hidden)), w_.epsilon);
    normalise(r_.data(), weight_.data(), inverse, norm_bits_.data(), norm_.data(), w_.hidden);
    if (w_.norm != nullptr) std::memcpy(row_of(w_.norm, sizeof(Stored)), norm_bits_.data(), bytes);
    quantise();
  }

 private:
  // Of any alignment.
  template <typename T>
  static T at(const void* array, int64_t i) {
    T value;
    std::memcpy(&value, static_cast<const std::byte*>(array) + i * int64_t(sizeof(T)), sizeof value);
    return value;
  }
  std::byte* row_of(const void* matrix, size_t element) const {
    return static_cast<std::byte*>(const_cast<void*>(matrix)) + number_ * w_.hidden * int64_t(element);
  }
  float scale() const { return w_.scale != nullptr ? *w_.scale : w_.scale_value; }

  MNNVL_EACH_TARGET static void add_residual(Stored* __restrict r, const Stored* __restrict residual, int64_t count) {
    for (int64_t i = 0; i < count; ++i) r[i] = fused::add_residual<dtype>(r[i], residual[i]);
  }
  MNNVL_EACH_TARGET static void square(const Stored* __restrict r, Wide* __restrict squares, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const Wide v = fused::widen<dtype>(r[i]);
      squares[i] = fused::multiply(v, v);
    }
  }
  MNNVL_EACH_TARGET static void normalise(const Stored* __restrict r, const Wide* __restrict weight, Wide inverse,
                                          Stored* __restrict bits, float* __restrict norm, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const Wide v = fused::multiply(Wide(fused::widen<dtype>(r[i])), inverse);
      bits[i] = fused::round_signed<dtype>(fused::multiply(v, weight[i]));
      norm[i] = fused::widen<dtype>(bits[i]);
    }
  }
  MNNVL_EACH_TARGET static void multiply_to_e4m3(const float* __restrict v, float factor, uint8_t* __restrict to,
                                                 int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = fused::to_e4m3(fused::multiply(v[i], factor));
  }
  MNNVL_EACH_TARGET static void divide_to_e4m3(const float* __restrict v, float scale, uint8_t* __restrict to,
                                               int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = fused::to_e4m3(fused::divide(v[i], scale));
  }

  // fused::amax_of() of all, by their bits: those of NaN are greater than infinity's.
  static inline __attribute__((always_inline)) float amax_of(const float* v, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t magnitude = arithmetic::bits_as<uint32_t>(v[i]) & 0x7fffffffu;
      magnitude = magnitude > 0x7f800000u ? 0 : magnitude;
      most = magnitude > most ? magnitude : most;
    }
    return arithmetic::bits_as<float>(most);
  }
  MNNVL_EACH_TARGET static float largest(const float* v, int64_t count) { return amax_of(v, count); }
  MNNVL_EACH_TARGET static void to_nv_float4(const float* __restrict v, float global, int64_t blocks,
                                             uint8_t* __restrict scales, uint8_t* __restrict to) {
    for (int64_t block = 0; block < blocks; ++block) {
      const float* begin = v + block * fused::kNVBlock;
      scales[block] = fused::nv_scale(amax_of(begin, fused::kNVBlock), global);
      const float factor = fused::nv_factor(scales[block], global);
      uint8_t codes[fused::kNVBlock];
      for (int i = 0; i < fused::kNVBlock; ++i) codes[i] = fused::to_e2m1(fused::multiply(begin[i], factor));
      for (int i = 0; i < fused::kNVBlock / 2; ++i) {
        to[block * fused::kNVBlock / 2 + i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
      }
    }
  }

  Wide sum_of_squares() {
    constexpr int kPack = kPackBytes / int(sizeof(Stored));
    square(r_.data(), squares_.data(), w_.hidden);
    Wide lanes[fused::kRowLanes] = {};
    for (int64_t pack = 0; pack * kPack < w_.hidden; ++pack) {
      Wide sum = 0;
      const int64_t end = min64((pack + 1) * kPack, w_.hidden);
      for (int64_t i = pack * kPack; i < end; ++i) sum = fused::add(sum, squares_[size_t(i)]);
      Wide& lane = lanes[pack % fused::kRowLanes];
      lane = fused::add(lane, sum);
    }
    for (int apart = 1; apart < fused::kRowLanes; apart *= 2) {
      for (int i = 0; i < fused::kRowLanes; i += 2 * apart) lanes[i] = fused::add(lanes[i], lanes[i + apart]);
    }
    return lanes[0];
  }

  void quantise() {
    if (w_.quantization == Quantization::kNone) return;
    uint8_t* to = quantised_.data();
    int64_t bytes = w_.hidden;
    switch (w_.quantization) {
      case Quantization::kNone: break;
      case Quantization::kFloat8: multiply_to_e4m3(norm_.data(), fused::inverse(scale()), to, w_.hidden); break;
      case Quantization::kDynamicFloat8: {
        const float row_scale = fused::dynamic_scale(amax(0, w_.hidden));
        std::memcpy(static_cast<std::byte*>(w_.scales) + number_ * 4, &row_scale, 4);
        divide_to_e4m3(norm_.data(), row_scale, to, w_.hidden);
        break;
      }
      case Quantization::kGroupFloat8:
        for (int64_t group = 0; group < w_.hidden / w_.group; ++group) {
          const int64_t begin = group * w_.group;
          const float group_scale = fused::group_scale(amax(begin, begin + w_.group));
          scale_byte(fused::group_scale_offset(w_, number_, group)) = fused::exponent_of(group_scale);
          divide_to_e4m3(norm_.data() + begin, group_scale, to + begin, w_.group);
        }
        break;
      case Quantization::kNVFloat4:
        block_scales_.resize(size_t(fused::nv_blocks(w_)));
        to_nv_float4(norm_.data(), scale(), fused::nv_blocks(w_), block_scales_.data(), to);
        for (int64_t block = 0; block < fused::nv_blocks(w_); ++block) {
          scale_byte(fused::nv_scale_offset(w_, number_, block)) = block_scales_[size_t(block)];
        }
        bytes /= 2;
        break;
    }
    std::memcpy(static_cast<std::byte*>(w_.quantised) + number_ * bytes, to, size_t(bytes));
  }

  uint8_t& scale_byte(int64_t offset) { return static_cast<uint8_t*>(w_.scales)[offset]; }

  float amax(int64_t begin, int64_t end) const { return largest(norm_.data() + begin, end - begin); }

  const RowWork& w_;
  int64_t number_ = 0;
  std::vector<Wide> weight_, squares_;
  std::vector<Stored> r_, norm_bits_;
  std::vector<float> norm_;  // rounded to the dtype
  std::vector<uint8_t> quantised_, block_scales_;
};

template <Dtype dtype>
void finish(const RowWork& work, int64_t first, int64_t count, const std::byte* sums) {
  Rows<dtype> rows(work);
  for (int64_t i = 0; i < count; ++i) rows.finish(first + i, sums + i * work.hidden * element_size(dtype));
}

// Rows first .. first + count, from their sums [count, hidden].
void finish_rows(const RowWork& work, int64_t first, int64_t count, const std::byte* sums) {
  switch (work.dtype) {
    case Dtype::kFloat32: return finish<Dtype::kFloat32>(work, first, count, sums);
    case Dtype::kFloat16: return finish<Dtype::kFloat16>(work, first, count, sums);
    default: return finish<Dtype::kBFloat16>(work, first, count, sums);
  }
}

}  // namespace

void check_row_work(const RowWork& work) {
  const auto invalid = [](const auto&... what) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: fused all_reduce: ", what...);
  };
  if (work.rows < 0 || work.hidden < 0) invalid("[", work.rows, ", ", work.hidden, "] elements");
  if (!is_float_sum(work.dtype, ReduceOp::kSum)) invalid("of dtype ", int(work.dtype));
  if (work.quantization == Quantization::kNVFloat4 && work.hidden % fused::kNVBlock != 0)
    invalid("NVFP4 of rows of ", work.hidden, " elements, no multiple of ", fused::kNVBlock);
  if (work.quantization == Quantization::kGroupFloat8 && (work.group <= 0 || work.hidden % work.group != 0))
    invalid("groups of ", work.group, " in rows of ", work.hidden);
}

void finish_in_blocks(const FusedRequest& request, const SumRows& sum) {
  const RowWork& work = request.work;
  const int64_t row_bytes = work.hidden * element_size(work.dtype), block_rows = rows_of_block(row_bytes);
  std::vector<std::byte> sums(static_cast<size_t>(min64(block_rows, work.rows) * row_bytes));
  for (int64_t row = 0; row < work.rows; row += block_rows) {
    const int64_t rows = min64(block_rows, work.rows - row);
    sum(static_cast<const std::byte*>(request.in) + row * row_bytes, rows * work.hidden, sums.data());
    const FloatEnvironment ieee;
    finish_rows(work, row, rows, sums.data());
  }
  fused::each_padding(work, 0, 1, [&](int64_t offset, int bytes) {
    std::memset(static_cast<std::byte*>(work.scales) + offset, 0, size_t(bytes));
  });
}

void run_alone(const FusedRequest& request) {
  check_row_work(request.work);
  const ReduceFunction reduce = reduce_function(request.work.dtype, ReduceOp::kSum);
  finish_in_blocks(request, [&](const std::byte* in, int64_t numel, std::byte* sums) {
    const FloatEnvironment ieee;
    reduce(&in, 1, sums, nullptr, numel);
  });
}

}  // namespace mnnvl::cpu
