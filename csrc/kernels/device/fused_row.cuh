// A row of a fused all-reduce on a cluster of blocks: protocol/fused_row.h, by hardware's conversions where these round
// as it says.
//
// The row's warps are dealt out to the cluster's blocks in turn: few packs are few warps on each multiprocessor. A
// thread takes the pack of its number among them, then every further one a cluster's threads away, kBatch at once:
// their loads are in flight together. In a cluster of fewer threads than the row has lanes they belong to several
// lanes, in turns. The first batch stays in registers from the sum to the end; others are read back from residual_out,
// where the same thread has written them.
//
// Warps hand their sums to all blocks of the cluster (cluster.cuh). A thread whose wait gave up comes all the same, and
// its warp's sum is then one that no arithmetic makes; so all threads of the cluster leave a failed call behind the
// same row.
//
// The kernels are bound by the latency of their instructions, so the usual rows have code of their own (rows.cuh). Of
// many rows each is a team's, some of a block's warps, so that a multiprocessor has the loads of several under way; a
// warp sums the squares of 32 neighbouring packs there, as one of a cluster does.
#pragma once

#include "kernels/device/cluster.cuh"
#include "kernels/device/pack.cuh"
#include "kernels/device/rows.cuh"
#include "kernels/epilogue/quantise.cuh"
#include "protocol/fused_row.h"

namespace mnnvl::kernels {

template <typename T, int kWorld, Rows kRows>
class FusedRow {
 public:
  static constexpr bool kPacked = kRows >= Rows::kPacked, kScaled = kRows < Rows::kUnscaled;
  static constexpr bool kTeams = kRows == Rows::kTeams;
  static constexpr bool kOneBatch = kRows >= Rows::kOnePack && !kTeams;  // of a thread, in all
  // As many as leave registers for what all ranks have sent of them.
  static constexpr bool kSingle = kRows == Rows::kAny || kRows == Rows::kOnePack || kRows == Rows::kUnscaled;
  static constexpr bool kFewRanks = kWorld == 1 || kWorld == 2;
  static constexpr int kBatch = kSingle ? 1 : kTeams ? (kFewRanks ? 3 : kWorld == 4 ? 2 : 1) : kFewRanks ? 2 : 1;
  static constexpr int kElements = kPackElements<T>;
  using Wide = fused::Wide<kDtype<T>>;
  struct Shared {
    ClusterValues<Wide> sums[kTeams ? kMaxFusedTeams : 1];
    ClusterValues<float> most;
  };
  static constexpr int kMaxTurns = kOneBatch ? kBatch : fused::kRowLanes / kFusedThreads;
  static_assert(fused::kRowLanes == 32 * 32);  // a warp adds what its likes have summed

  __device__ __forceinline__ FusedRow(const FusedParams& params, Shared& shared)
      : p_(params),
        w_(params.work),
        shared_(shared),
        blocks_(kTeams ? 1 : 1 << params.cluster_shift),
        step_(kTeams ? 1 << params.team_shift : int(blockDim.x) << params.cluster_shift),
        first_pack_(kTeams
                        ? int(threadIdx.x) & (step_ - 1)
                        : ((int(threadIdx.x) >> 5 << params.cluster_shift) + (int(blockIdx.x) & (blocks_ - 1))) * 32 +
                              int(threadIdx.x) % 32),
        quantiser_(params) {}

  // The rows of this block's cluster, or of this team: first, first + step, ... A row is the same block's either way.
  __device__ __forceinline__ int first_row() const {
    return kTeams ? int(blockIdx.x) + team() * int(gridDim.x) : int(blockIdx.x) >> p_.cluster_shift;
  }
  __device__ __forceinline__ int row_step() const {
    return kTeams ? int(gridDim.x) * (int(blockDim.x) >> p_.team_shift) : int(gridDim.x) >> p_.cluster_shift;
  }
  // The packs of this thread in each of them: batches of kBatch, pack_step() from each other.
  __device__ __forceinline__ int first_pack() const { return first_pack_; }
  __device__ __forceinline__ int pack_step() const { return step_; }
  // How many packs of the row the batch has that begins with this one.
  __device__ __forceinline__ int count_from(int i) const {
    int count = 0;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) count += i + n * pack_step() < p_.packs ? 1 : 0;
    return count;
  }
  // Packs of a row of a matrix like the input, zero behind the row's end.
  __device__ __forceinline__ void load(const void* matrix, int row, int i, uint4 (&packs)[kBatch]) const {
    const std::byte* const first = place(matrix, row);
#pragma unroll
    for (int n = 0; n < kBatch; ++n, i += pack_step()) packs[n] = i < p_.packs ? load_at(first, i) : uint4{};
  }

  // Once, before finish(), while other loads are under way: loads what every row wants, and what `only_row` does where
  // there is one alone (-1: none).
  __device__ __forceinline__ void prepare([[maybe_unused]] int only_row = -1) {
    if (blocks_ > 1) {
      if (threadIdx.x == 0) {
        sums().prepare();
        shared_.most.prepare();
      }
      cluster_arrive_relaxed();
    }
#pragma unroll
    for (int n = 0; n < kKeptGammas; ++n) gamma_[n] = gamma_of(first_pack_ + n * pack_step());
    if constexpr (kOneBatch) {
      if (w_.residual != nullptr && only_row >= 0) load(w_.residual, only_row, first_pack_, residual_);
    }
    quantiser_.prepare();
    if (blocks_ > 1) cluster_wait();  // all have begun; empties L1
  }

  // `sum(i, packs)`: the batch of the row's sum that begins with pack i, false if the wait for it gave up. False, for
  // all threads of the cluster, if one did. Every thread of the cluster must come, for the same rows.
  template <typename Sum>
  __device__ __forceinline__ bool finish(int row, const Sum& sum) {
    row_ = row;
    std::byte* const residual_out = place(w_.residual_out, row);
    Wide squares[kMaxTurns] = {};
    bool failed = false;
#pragma unroll 1
    for (int first = first_pack_, turn = 0; first < p_.packs; first += kBatch * pack_step()) {
      uint4 r[kBatch], packs[kBatch];
      if constexpr (kOneBatch) {
#pragma unroll
        for (int n = 0; n < kBatch; ++n) r[n] = residual_[n];
      } else if (w_.residual != nullptr) {
        load(w_.residual, row, first, r);
      }
      if (!sum(first, packs)) failed = true;
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int i = first + n * pack_step();
        if (n != 0 && i >= p_.packs) continue;
        r[n] = w_.residual != nullptr ? with_residual(packs[n], r[n]) : packs[n];
        if (kOneBatch || first == first_pack_) kept_[n] = r[n];
        store_at(residual_out, i, r[n]);
        const Wide of_pack = sum_of_squares(r[n]);
        if constexpr (kTeams) {
          const Wide of_warp = warp_sum(of_pack);
          const bool any_failed = __any_sync(kWholeWarp, failed);
          sums().send(round_, 1, i / 32, any_failed ? arithmetic::bits_as<Wide>(failure()) : of_warp);
        } else if constexpr (kMaxTurns == 1) {
          squares[0] = of_pack;
        } else {
#pragma unroll
          for (int k = 0; k < kMaxTurns; ++k) squares[k] = fused::add(squares[k], turn == k ? of_pack : Wide(0));
          turn = (turn + 1) * step_ < fused::kRowLanes ? turn + 1 : 0;
        }
      }
      if constexpr (kOneBatch) break;
    }
    // Which may read what other threads have written of residual_out.
    if (kScaled && w_.quantization == Quantization::kGroupFloat8) cluster_barrier(blocks_);
    if (!cluster_sum(squares, failed)) return false;
    inverse_ = fused::inverse_rms(fused::mean_of(sum_, Wide(int(w_.hidden)), inverse_hidden()), w_.epsilon);
    if (kScaled && w_.quantization == Quantization::kDynamicFloat8) find_row_scale();
    std::byte* const to = place(w_.norm, row);
    each_norm([&](int i, uint4 norm) {
      if (w_.norm != nullptr && i < p_.packs) store_at(to, i, norm);
      if (w_.quantization == Quantization::kNone) return;
      quantiser_.write(row_, i, norm, [&](uint32_t element) { return norm_of(element); });
    });
    ++round_;
    return true;
  }

  // Scales' padding, by all threads of the grid.
  __device__ __forceinline__ void zero_padding() const {
    if constexpr (!kScaled) return;
    auto* scales = static_cast<std::byte*>(w_.scales);
    const auto zero = [&](int64_t offset, int bytes) { store_bytes<4>(scales + offset, bytes, 0); };
    fused::each_padding(w_, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x, zero);
  }

 private:
  __device__ __forceinline__ int team() const { return kTeams ? int(threadIdx.x) >> p_.team_shift : 0; }
  __device__ __forceinline__ ClusterValues<Wide>& sums() const { return shared_.sums[team()]; }

  __device__ __forceinline__ int64_t bytes_behind(int i) const {
    return int64_t(p_.row_bytes) - int64_t(i) * kPackBytes;
  }
  __device__ __forceinline__ std::byte* place(const void* matrix, int row) const {
    return static_cast<std::byte*>(const_cast<void*>(matrix)) + uint64_t(uint32_t(row)) * p_.row_bytes;
  }
  __device__ __forceinline__ uint4 load_at(const std::byte* row, int i) const {
    const std::byte* p = row + int64_t(i) * kPackBytes;
    if constexpr (kPacked) {
      return *reinterpret_cast<const uint4*>(p);
    } else {
      return load_pack<Unit<T>>(p, bytes_behind(i));
    }
  }
  __device__ __forceinline__ void store_at(std::byte* row, int i, uint4 pack) const {
    std::byte* p = row + int64_t(i) * kPackBytes;
    if constexpr (kPacked) {
      *reinterpret_cast<uint4*>(p) = pack;
    } else {
      store_pack<Unit<T>>(p, bytes_behind(i), pack);
    }
  }

  __device__ __forceinline__ Wide inverse_hidden() const {
    if constexpr (sizeof(Wide) == 8) {
      return p_.inverse_hidden_wide;
    } else {
      return p_.inverse_hidden;
    }
  }

  // gamma's elements of a pack, as they lie: of T in the first half, or float32.
  struct Gamma {
    uint4 low, high;
  };
  __device__ __forceinline__ bool wide_gamma() const { return sizeof(T) == 2 && w_.gamma_is_float32; }
  __device__ __forceinline__ Gamma gamma_of(int i) const {
    if (i >= p_.packs) return {};
    const auto* gamma = static_cast<const std::byte*>(w_.gamma);
    if (!wide_gamma()) return {load_at(gamma, i), {}};
    const std::byte* p = gamma + int64_t(i) * (2 * kPackBytes);
    if constexpr (kPacked) {
      return {*reinterpret_cast<const uint4*>(p), *reinterpret_cast<const uint4*>(p + kPackBytes)};
    } else {
      const int64_t behind = (w_.hidden - int64_t(i) * kElements) * 4;
      return {load_pack<uint32_t>(p, behind),
              behind > kPackBytes ? load_pack<uint32_t>(p + kPackBytes, behind - kPackBytes) : uint4{}};
    }
  }

  __device__ __forceinline__ static uint4 with_residual(uint4 s, uint4 residual) {
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

  // How many of the first `lanes` / 32 warps of a row have packs.
  __device__ __forceinline__ int row_warps(int lanes) const { return min(p_.packs + 31, lanes) / 32; }
  // How many hand something around. All that take do, or they could miss a round; of a single round nobody can.
  __device__ __forceinline__ int sending_warps(int with_packs) const {
    return kOneBatch ? with_packs : max(with_packs, step_ / 32);
  }
  // False, for all, if a thread failed.
  __device__ __forceinline__ bool cluster_sum(const Wide (&squares)[kMaxTurns], bool failed) {
    if constexpr (kTeams) return found_sum(sums().take_of_team(round_, team(), step_), p_.packs / 32);
    const int warps = sending_warps(row_warps(fused::kRowLanes));
    sums().expect(round_, blocks_, warps);
    const bool any_failed = __any_sync(kWholeWarp, failed);
#pragma unroll
    for (int k = 0; k < kMaxTurns; ++k) {
      const int warp = (first_pack_ + k * step_) / 32;
      if (warp >= warps) break;
      const Wide sum = warp_sum(squares[k]);
      sums().send(round_, blocks_, warp, any_failed ? arithmetic::bits_as<Wide>(failure()) : sum);
    }
    return found_sum(sums().take(round_, blocks_), warps);
  }
  __device__ __forceinline__ bool found_sum(Wide sum, int warps) {
    if (int(threadIdx.x) % 32 >= warps) sum = 0;
    if (__any_sync(kWholeWarp, arithmetic::bits_as<decltype(failure())>(sum) == failure())) return false;
    sum_ = warp_sum(sum);
    return true;
  }
  __device__ __forceinline__ float cluster_max(float amax) {
    const int warps = sending_warps(row_warps(step_));
    shared_.most.expect(round_, blocks_, warps);
    if (first_pack_ / 32 < warps) shared_.most.send(round_, blocks_, first_pack_ / 32, warp_max(amax, 32));
    amax = shared_.most.take(round_, blocks_);
    return warp_max(int(threadIdx.x) % 32 < warps ? amax : 0.0f, 32);
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
    const std::byte* const residual_out = place(w_.residual_out, row_);
    const auto norm_at = [&](int i, uint4 r, const Gamma& gamma) {
      body(i, i < p_.packs ? normalised(r, gamma) : uint4{});
    };
    if constexpr (kOneBatch) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int i = first_pack_ + n * pack_step();
        if (i - lane < p_.packs) norm_at(i, kept_[n], gamma_[n]);
      }
    } else if constexpr (kTeams) {
#pragma unroll 1
      for (int first = first_pack_; first < p_.packs; first += kBatch * pack_step()) {
        uint4 r[kBatch];
        Gamma gammas[kBatch];
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          const int i = first + n * pack_step();
          gammas[n] = gamma_of(i);
          r[n] = kept_[n];
          if (first != first_pack_ && i < p_.packs) r[n] = load_at(residual_out, i);
        }
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          const int i = first + n * pack_step();
          if (i < p_.packs) norm_at(i, r[n], gammas[n]);
        }
      }
    } else {
#pragma unroll 1
      for (int n = 0, i = first_pack_; i - lane < p_.packs; ++n, i += pack_step()) {
        uint4 r = kept_[0];
#pragma unroll
        for (int k = 1; k < kBatch; ++k) {
          if (n == k) r = kept_[k];
        }
        if (n >= kBatch && i < p_.packs) r = load_at(residual_out, i);
        norm_at(i, r, n == 0 ? gamma_[0] : gamma_of(i));
      }
    }
  }

  __device__ __forceinline__ void find_row_scale() {
    float amax = 0;
    each_norm([&](int, uint4 norm) { amax = fused::amax_of(amax, pack_amax<T>(norm)); });
    const float row_scale = quantiser_.take_row_amax(cluster_max(amax));
    if (first_pack_ == 0) static_cast<float*>(w_.scales)[p_.first_row + row_] = row_scale;
  }

  // Of any element of the row, once the cluster has passed cluster_sum().
  __device__ __forceinline__ float norm_of(uint32_t element) const {
    const auto r = static_cast<const fused::Stored<kDtype<T>>*>(w_.residual_out)[int64_t(row_) * w_.hidden + element];
    const float gamma = w_.gamma_is_float32
                            ? static_cast<const float*>(w_.gamma)[element]
                            : fused::widen<kDtype<T>>(static_cast<const fused::Stored<kDtype<T>>*>(w_.gamma)[element]);
    return fused::widen<kDtype<T>>(fused::normalise<kDtype<T>>(r, inverse_, gamma, w_.weight_bias));
  }

  const FusedParams& p_;
  const RowWork& w_;
  Shared& shared_;
  const int blocks_, step_, first_pack_;
  RowQuantiser<T, kPacked, kScaled> quantiser_;
  uint4 residual_[kBatch] = {};  // of the only batch
  static constexpr int kKeptGammas = kOneBatch ? kBatch : 1;
  Gamma gamma_[kKeptGammas];  // of the first packs
  uint4 kept_[kBatch];  // residual_out of the first batch
  int row_ = 0;
  uint32_t round_ = 0;  // rows so far
  Wide sum_ = 0, inverse_ = 0;
};

}  // namespace mnnvl::kernels
