#include "cpu/fused_rows.h"

#include <vector>

#include "common/error.h"
#include "cpu/reduce.h"
#include "protocol/fused_row.h"
#include "system/float_environment.h"

namespace mnnvl::cpu {
namespace {

// Of any alignment.
template <typename T>
T load(const void* array, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(array) + i * int64_t(sizeof(T)), sizeof value);
  return value;
}
template <typename T>
void store(void* array, int64_t i, T value) {
  std::memcpy(static_cast<std::byte*>(array) + i * int64_t(sizeof(T)), &value, sizeof value);
}

// One row's normalised elements, and what is made of them.
class Row {
 public:
  Row(const RowWork& work, int64_t number) : w_(work), number_(number), norm_(size_t(work.hidden)) {}

  template <Dtype dtype>
  void normalise(const std::byte* sums) {
    using Stored = fused::Stored<dtype>;
    constexpr int kPack = kPackBytes / int(sizeof(Stored));
    const int64_t hidden = w_.hidden, begin = number_ * hidden;
    using Wide = fused::Wide<dtype>;
    Wide lanes[fused::kRowLanes] = {};
    for (int64_t pack = 0; pack * kPack < hidden; ++pack) {
      Wide squares = 0;
      for (int64_t i = pack * kPack; i < min64((pack + 1) * kPack, hidden); ++i) {
        Stored r = load<Stored>(sums, i);
        if (w_.residual != nullptr) r = fused::add_residual<dtype>(r, load<Stored>(w_.residual, begin + i));
        store(w_.residual_out, begin + i, r);
        const Wide v = fused::widen<dtype>(r);
        squares = fused::add(squares, fused::multiply(v, v));
      }
      Wide& lane = lanes[pack % fused::kRowLanes];
      lane = fused::add(lane, squares);
    }
    for (int apart = 1; apart < fused::kRowLanes; apart *= 2) {
      for (int i = 0; i < fused::kRowLanes; i += 2 * apart) lanes[i] = fused::add(lanes[i], lanes[i + apart]);
    }
    const auto inverse = fused::inverse_rms(lanes[0], hidden, w_.epsilon);
    for (int64_t i = 0; i < hidden; ++i) {
      const float gamma =
          w_.gamma_is_float32 ? load<float>(w_.gamma, i) : fused::widen<dtype>(load<Stored>(w_.gamma, i));
      const Stored normed =
          fused::normalise<dtype>(load<Stored>(w_.residual_out, begin + i), inverse, gamma, w_.weight_bias);
      if (w_.norm != nullptr) store(w_.norm, begin + i, normed);
      norm_[size_t(i)] = fused::widen<dtype>(normed);
    }
  }

  void quantise() {
    switch (w_.quantization) {
      case Quantization::kNone: return;
      case Quantization::kFloat8: {
        const float factor = fused::divide(1.0f, scale());
        return write_float8(0, w_.hidden, [&](float v) { return fused::multiply(v, factor); });
      }
      case Quantization::kDynamicFloat8: {
        const float row_scale = fused::dynamic_scale(amax(0, w_.hidden));
        store(w_.scales, number_, row_scale);
        return write_float8(0, w_.hidden, [&](float v) { return fused::divide(v, row_scale); });
      }
      case Quantization::kGroupFloat8:
        for (int64_t group = 0; group < w_.hidden / w_.group; ++group) {
          const int64_t begin = group * w_.group, end = begin + w_.group;
          const float group_scale = fused::group_scale(amax(begin, end));
          store(w_.scales, fused::group_scale_offset(w_, number_, group), fused::exponent_of(group_scale));
          write_float8(begin, end, [&](float v) { return fused::divide(v, group_scale); });
        }
        return;
      case Quantization::kNVFloat4:
        for (int64_t block = 0; block < fused::nv_blocks(w_); ++block) write_block(block);
        return;
    }
  }

 private:
  float scale() const { return w_.scale != nullptr ? *w_.scale : w_.scale_value; }

  float amax(int64_t begin, int64_t end) const {
    float most = 0;
    for (int64_t i = begin; i < end; ++i) most = fused::amax_of(most, norm_[size_t(i)]);
    return most;
  }

  template <typename Scaled>
  void write_float8(int64_t begin, int64_t end, const Scaled& scaled) {
    for (int64_t i = begin; i < end; ++i) {
      store(w_.quantised, number_ * w_.hidden + i, fused::to_e4m3(scaled(norm_[size_t(i)])));
    }
  }

  void write_block(int64_t block) {
    const int64_t begin = block * fused::kNVBlock, end = begin + fused::kNVBlock;
    const uint8_t block_scale = fused::nv_scale(amax(begin, end), scale());
    const float factor = fused::nv_factor(block_scale, scale());
    const auto code = [&](int64_t i) { return fused::to_e2m1(fused::multiply(norm_[size_t(i)], factor)); };
    store(w_.scales, fused::nv_scale_offset(w_, number_, block), block_scale);
    for (int64_t i = begin; i < end; i += 2) {
      store(w_.quantised, (number_ * w_.hidden + i) / 2, uint8_t(code(i) | code(i + 1) << 4));
    }
  }

  const RowWork& w_;
  const int64_t number_;
  std::vector<float> norm_;  // rounded to the dtype
};

template <Dtype dtype>
void finish(const RowWork& work, int64_t number, const std::byte* sums) {
  Row row(work, number);
  row.normalise<dtype>(sums);
  row.quantise();
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

void finish_rows(const RowWork& work, int64_t first, int64_t count, const std::byte* sums) {
  const int64_t row_bytes = work.hidden * element_size(work.dtype);
  for (int64_t i = 0; i < count; ++i) {
    const std::byte* sum = sums + i * row_bytes;
    switch (work.dtype) {
      case Dtype::kFloat32: finish<Dtype::kFloat32>(work, first + i, sum); break;
      case Dtype::kFloat16: finish<Dtype::kFloat16>(work, first + i, sum); break;
      default: finish<Dtype::kBFloat16>(work, first + i, sum); break;
    }
  }
}

void zero_padding(const RowWork& work) {
  fused::each_padding(work, 0, 1, [&](int64_t offset, int bytes) {
    std::memset(static_cast<std::byte*>(work.scales) + offset, 0, size_t(bytes));
  });
}

void run_alone(const FusedRequest& request) {
  check_row_work(request.work);
  const RowWork& work = request.work;
  const FloatEnvironment ieee;
  const ReduceFunction reduce = reduce_function(work.dtype, ReduceOp::kSum);
  const int64_t row_bytes = work.hidden * element_size(work.dtype);
  std::vector<std::byte> sum(static_cast<size_t>(row_bytes));
  for (int64_t row = 0; row < work.rows; ++row) {
    const std::byte* in = static_cast<const std::byte*>(request.in) + row * row_bytes;
    reduce(&in, 1, sum.data(), nullptr, work.hidden);
    finish_rows(work, row, 1, sum.data());
  }
  zero_padding(work);
}

}  // namespace mnnvl::cpu
