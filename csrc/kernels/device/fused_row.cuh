// A row of a fused all-reduce on a cluster of blocks: protocol/fused_row.h, by hardware's conversions where these round
// as it says.
//
// Thread t of block b takes packs b * threads + t, then every further one a cluster's threads away. With fewer blocks
// than kMaxFusedCluster these belong to several of the row's lanes, in turns. The first kKept stay in registers from
// the sum to the end; others are read back from residual_out, where the same thread has written them.
//
// Warps hand their sums to all blocks of the cluster (cluster.cuh). A thread whose wait gave up comes all the same, and
// its warp's sum is then one that no arithmetic makes; so all threads of the cluster leave a failed call behind the
// same row.
#pragma once

#include "kernels/device/cluster.cuh"
#include "kernels/device/pack.cuh"
#include "kernels/epilogue/quantise.cuh"
#include "protocol/fused_row.h"

namespace mnnvl::kernels {

template <typename T, int kWorld>
class FusedRow {
 public:
  // Worlds that leave registers for it keep all packs of a row of up to 16 KiB.
  static constexpr int kKept = kWorld >= 1 && kWorld <= 4 ? kMaxFusedCluster : 1;
  static constexpr int kElements = kPackElements<T>, kThreads = kFusedThreads, kWarps = kThreads / 32;
  using Wide = fused::Wide<kDtype<T>>;
  struct Shared {
    ClusterValues<Wide> sums;
    ClusterValues<float> most;
  };
  static_assert(kWarps * kMaxFusedCluster == 32 && kThreads * kMaxFusedCluster == fused::kRowLanes);

  __device__ __forceinline__ FusedRow(const RowWork& work, Shared& shared)
      : w_(work),
        shared_(shared),
        packs_(int(ceil_div(work.hidden, kElements))),
        rank_(cluster_rank()),
        blocks_(cluster_size()),
        quantiser_(work, packs_) {
    if (blocks_ == 1) return;
    if (threadIdx.x == 0) {
      shared.sums.prepare();
      shared.most.prepare();
    }
    cluster_arrive();
  }

  // The rows of this block's cluster: first, first + step, ...
  __device__ __forceinline__ int first_row() const { return int(blockIdx.x) / blocks_; }
  __device__ __forceinline__ int row_step() const { return int(gridDim.x) / blocks_; }
  // The packs of this thread in each of them: first, first + step, ...
  __device__ __forceinline__ int first_pack() const { return rank_ * kThreads + int(threadIdx.x); }
  __device__ __forceinline__ int pack_step() const { return blocks_ * kThreads; }
  __device__ __forceinline__ int packs() const { return packs_; }
  // Pack i of a row of a matrix like the input, zero behind the row's end.
  __device__ __forceinline__ uint4 load(const void* matrix, int64_t row, int i) const {
    return load_pack<Unit<T>>(place(matrix, row, i), bytes_behind(i));
  }

  // Loads what every row wants. Once, before finish(), when what others wait for has been sent.
  __device__ __forceinline__ void prepare() {
    gamma_ = gamma_of(first_pack());
    quantiser_.prepare();
    if (blocks_ > 1) cluster_wait();  // all are there
  }

  // `sum(i, pack)`: pack i of the row's sum, false if the wait for it gave up. False, for all threads of the cluster,
  // if one did. Every thread of the cluster must come, for the same rows.
  template <typename Sum>
  __device__ __forceinline__ bool finish(int64_t row, const Sum& sum) {
    row_ = row;
    Wide squares[kMaxFusedCluster] = {};
    bool failed = false;
    uint4 residual = residual_pack(first_pack());
#pragma unroll 1
    for (int n = 0, i = first_pack(); i < packs_; ++n, i += pack_step()) {
      uint4 s;
      if (!sum(i, s)) failed = true;
      const uint4 r = with_residual(s, residual);
      residual = residual_pack(i + pack_step());
      store_pack<Unit<T>>(place(w_.residual_out, row_, i), bytes_behind(i), r);
#pragma unroll
      for (int k = 0; k < kKept; ++k) {
        if (n == k) kept_[k] = r;
      }
      const Wide of_pack = sum_of_squares(r);
      const int turn = n % (kMaxFusedCluster / blocks_);
#pragma unroll
      for (int k = 0; k < kMaxFusedCluster; ++k) squares[k] = fused::add(squares[k], turn == k ? of_pack : Wide(0));
    }
    // Which may read what other threads have written of residual_out.
    if (w_.quantization == Quantization::kGroupFloat8) cluster_barrier(blocks_);
    if (!cluster_sum(squares, failed)) return false;
    inverse_ = fused::inverse_rms(sum_, w_.hidden, w_.epsilon);
    if (w_.quantization == Quantization::kDynamicFloat8) find_row_scale();
    each_norm([&](int i, uint4 norm) { write(i, norm); });
    ++round_;
    return true;
  }

  // Scales' padding, by all threads of the grid.
  __device__ __forceinline__ void zero_padding() const {
    auto* scales = static_cast<std::byte*>(w_.scales);
    const auto zero = [&](int64_t offset, int bytes) { store_bytes<4>(scales + offset, bytes, 0); };
    fused::each_padding(w_, int64_t(blockIdx.x) * kThreads + threadIdx.x, int64_t(gridDim.x) * kThreads, zero);
  }

 private:
  __device__ __forceinline__ int64_t bytes_behind(int i) const {
    return (w_.hidden - int64_t(i) * kElements) * int64_t(sizeof(T));
  }
  __device__ __forceinline__ std::byte* place(const void* matrix, int64_t row, int i) const {
    return static_cast<std::byte*>(const_cast<void*>(matrix)) + (row * w_.hidden + int64_t(i) * kElements) * sizeof(T);
  }

  __device__ __forceinline__ uint4 residual_pack(int i) const {
    if (w_.residual == nullptr || i >= packs_) return {};
    return load(w_.residual, row_, i);
  }
  // gamma's elements of a pack, as they lie: of T in the first half, or float32.
  struct Gamma {
    uint4 low, high;
  };
  __device__ __forceinline__ bool wide_gamma() const { return sizeof(T) == 2 && w_.gamma_is_float32; }
  __device__ __forceinline__ Gamma gamma_of(int i) const {
    if (i >= packs_) return {};
    const int64_t first = int64_t(i) * kElements;
    const auto* gamma = static_cast<const std::byte*>(w_.gamma);
    if (!wide_gamma()) return {load_pack<Unit<T>>(gamma + first * sizeof(T), bytes_behind(i)), {}};
    const int64_t behind = (w_.hidden - first) * 4;
    return {load_pack<uint32_t>(gamma + first * 4, behind),
            behind > kPackBytes ? load_pack<uint32_t>(gamma + first * 4 + kPackBytes, behind - kPackBytes) : uint4{}};
  }

  __device__ __forceinline__ uint4 with_residual(uint4 s, uint4 residual) const {
    if (w_.residual == nullptr) return s;
    float a[kElements], b[kElements];
    Accumulator<T>::expand(s, a);
    Accumulator<T>::expand(residual, b);
#pragma unroll
    for (int e = 0; e < kElements; ++e) a[e] = fused::add(a[e], b[e]);
    return rounded(a);
  }

  // -0 stays, and can't come of a sum with s, which isn't.
  __device__ __forceinline__ static uint4 rounded(const float (&v)[kElements]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(v[i]);
      } else {
        words[i] = round_pair<T>({v[2 * i], v[2 * i + 1]});
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  // What is behind the row's end is zero.
  __device__ __forceinline__ static Wide sum_of_squares(uint4 r) {
    float v[kElements];
    Accumulator<T>::expand(r, v);
    Wide sum = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum = fused::add(sum, fused::multiply(Wide(v[e]), Wide(v[e])));
    return sum;
  }

  // Not a number, and not the one that arithmetic makes.
  __device__ __forceinline__ static auto failure() {
    if constexpr (sizeof(Wide) == 8) {
      return uint64_t{0x7ff0000000000001};
    } else {
      return uint32_t{0x7f800001};
    }
  }

  // False, for all, if a thread failed.
  __device__ __forceinline__ bool cluster_sum(const Wide (&squares)[kMaxFusedCluster], bool failed) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int lane_groups = min(int(ceil_div(packs_, kThreads)), kMaxFusedCluster);  // of the row, kThreads each
    shared_.sums.expect(round_, blocks_, lane_groups * kWarps);
    const bool any_failed = __any_sync(kWholeWarp, failed);
#pragma unroll
    for (int k = 0; k < kMaxFusedCluster; ++k) {
      const int group = rank_ + k * blocks_;
      if (group >= lane_groups) break;
      const Wide sum = warp_sum(squares[k]);
      shared_.sums.send(round_, blocks_, group * kWarps + warp,
                        any_failed ? arithmetic::bits_as<Wide>(failure()) : sum);
    }
    Wide sum = shared_.sums.take(round_, blocks_);
    if (lane / kWarps >= lane_groups) sum = 0;
    if (__any_sync(kWholeWarp, arithmetic::bits_as<decltype(failure())>(sum) == failure())) return false;
    sum_ = warp_sum(sum);
    return true;
  }
  __device__ __forceinline__ float cluster_max(float amax) {
    shared_.most.expect(round_, blocks_, blocks_ * kWarps);
    shared_.most.send(round_, blocks_, rank_ * kWarps + int(threadIdx.x) / 32, warp_max(amax, 32));
    amax = shared_.most.take(round_, blocks_);
    return warp_max(int(threadIdx.x) % 32 < blocks_ * kWarps ? amax : 0.0f, 32);
  }

  __device__ __forceinline__ uint4 normalised(uint4 r, const Gamma& gamma) const {
    float v[kElements], g[kElements];
    Accumulator<T>::expand(r, v);
    if (!wide_gamma()) {
      Accumulator<T>::expand(gamma.low, g);
    } else {
      const uint32_t words[8] = {gamma.low.x,  gamma.low.y,  gamma.low.z,  gamma.low.w,
                                 gamma.high.x, gamma.high.y, gamma.high.z, gamma.high.w};
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[e] = __uint_as_float(words[e]);
    }
    const Wide bias = w_.weight_bias;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const Wide n = fused::multiply(fused::multiply(Wide(v[e]), inverse_), fused::add(bias, Wide(g[e])));
      if constexpr (sizeof(T) == 4) {
        v[e] = __uint_as_float(fused::round_signed<Dtype::kFloat32>(n));
      } else {
        v[e] = n;
      }
    }
    return rounded(v);
  }

  // Calls body(pack, norm) for the packs of this thread's warp, also for those behind the row's end, which are zero.
  template <typename Body>
  __device__ __forceinline__ void each_norm(const Body& body) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll 1
    for (int n = 0, i = first_pack(); i - lane < packs_; ++n, i += pack_step()) {
      uint4 norm{};
      if (i < packs_) {
        uint4 r{};
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          if (n == k) r = kept_[k];
        }
        if (n >= kKept) r = load(w_.residual_out, row_, i);
        norm = normalised(r, n == 0 ? gamma_ : gamma_of(i));
      }
      body(i, norm);
    }
  }

  __device__ __forceinline__ void find_row_scale() {
    float amax = 0;
    each_norm([&](int, uint4 norm) { amax = fused::amax_of(amax, pack_amax<T>(norm)); });
    const float row_scale = quantiser_.take_row_amax(cluster_max(amax));
    if (first_pack() == 0) static_cast<float*>(w_.scales)[row_] = row_scale;
  }

  __device__ __forceinline__ void write(int i, uint4 norm) const {
    if (i < packs_ && w_.norm != nullptr) store_pack<Unit<T>>(place(w_.norm, row_, i), bytes_behind(i), norm);
    if (w_.quantization == Quantization::kNone) return;
    quantiser_.write(row_, i, norm, [&](int64_t element) { return norm_of(element); });
  }

  // Of any element of the row, once the cluster has passed cluster_sum().
  __device__ __forceinline__ float norm_of(int64_t element) const {
    const auto r = static_cast<const fused::Stored<kDtype<T>>*>(w_.residual_out)[row_ * w_.hidden + element];
    const float gamma = w_.gamma_is_float32
                            ? static_cast<const float*>(w_.gamma)[element]
                            : fused::widen<kDtype<T>>(static_cast<const fused::Stored<kDtype<T>>*>(w_.gamma)[element]);
    return fused::widen<kDtype<T>>(fused::normalise<kDtype<T>>(r, inverse_, gamma, w_.weight_bias));
  }

  const RowWork& w_;
  Shared& shared_;
  const int packs_, rank_, blocks_;
  RowQuantiser<T> quantiser_;
  Gamma gamma_;  // of the first pack
  uint4 kept_[kKept];  // packs of residual_out
  int64_t row_ = 0;
  uint32_t round_ = 0;  // rows so far
  Wide sum_ = 0, inverse_ = 0;
};

}  // namespace mnnvl::kernels
