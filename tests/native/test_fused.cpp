// The fused all-reduces, their source run on a CPU (native/emulation), among ranks that are threads: every byte as cpu/
// makes it of the ranks' sum, on clusters of 1, 2 and 4 blocks, by one launch and several.
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/fused_rows.h"
#include "cpu/reduce.h"
#include "kernels/kernels.h"
#include "native/emulation/group.h"
#include "native/harness.h"
#include "protocol/fused_row.h"
#include "transport/cuda_launch.h"

namespace mnnvl::test {
namespace {

using Group = LamportGroup;

struct Outputs {
  Bytes residual, norm, quantised, scales;

  explicit Outputs(const RowWork& work)
      : residual(size_t(work.rows * work.hidden * element_size(work.dtype)), std::byte{0x5a}),
        norm(residual.size(), std::byte{0x5a}),
        quantised(size_t(work.rows * work.hidden), std::byte{0x5a}),
        scales(size_t(align_up(work.rows, 128) * align_up(work.hidden, 16) + 16), std::byte{0x5a}) {}

  RowWork work_on(RowWork work) {
    work.residual_out = residual.data();
    work.norm = norm.data();
    work.quantised = quantised.data();
    work.scales = scales.data();
    return work;
  }
};

struct Problem {
  RowWork work;
  Strategy strategy;
  std::vector<Bytes> inputs;
  Bytes residual, gamma;

  // `usual`: as engines have them, many rows of whole warps' packs without scales.
  Problem(uint64_t seed, int world_size, bool usual = false) {
    Random random(seed);
    constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};
    constexpr int kHidden[] = {1, 8, 48, 200, 1024, 2049, 2880, 4096, 5120, 8208};
    work.dtype = kDtypes[random.below(3)];
    work.hidden = kHidden[random.below(std::size(kHidden))];
    work.rows = work.hidden > 2000 ? 1 + random.below(4) : 1 + random.below(12);
    work.quantization = Quantization(random.below(5));
    if (work.quantization == Quantization::kNVFloat4 && (work.hidden % 16 != 0 || work.dtype == Dtype::kFloat32)) {
      work.quantization = Quantization::kDynamicFloat8;
    }
    if (usual) {
      work.dtype = random.below(2) == 0 ? Dtype::kFloat16 : Dtype::kBFloat16;
      work.hidden = random.below(2) == 0 ? 1024 : 5120;
      work.rows = 4 + random.below(9);
      work.quantization = random.below(2) == 0 ? Quantization::kNone : Quantization::kFloat8;
    }
    for (work.group = int(1 + random.below(64)); work.hidden % work.group != 0;) --work.group;
    work.layout = random.below(2) == 0 ? ScaleLayout::kLinear : ScaleLayout::kSwizzled128x4;
    work.gamma_is_float32 = random.below(2) == 0;
    work.epsilon = 1e-5f;
    work.weight_bias = random.below(2) == 0 ? 0.0f : 1.0f;
    work.scale_value = 0.037f;
    strategy = random.below(2) == 0 ? Strategy::kOneShot : Strategy::kTwoShot;
    fill(random, world_size);
  }

  // Another shape, with elements of its own.
  void take_rows(int64_t rows, int64_t hidden) {
    Random random(uint64_t(rows + hidden));
    work.rows = rows;
    work.hidden = hidden;
    const int world_size = int(inputs.size());
    inputs.clear();
    fill(random, world_size);
  }

  void fill(Random& random, int world_size) {
    for (int r = 0; r < world_size; ++r) inputs.push_back(elements(random, work.dtype, work.rows * work.hidden));
    residual = elements(random, work.dtype, work.rows * work.hidden);
    gamma = elements(random, work.gamma_is_float32 ? Dtype::kFloat32 : work.dtype, work.hidden);
    work.residual = random.below(3) == 0 ? nullptr : residual.data();
    work.gamma = gamma.data();
  }

  void expect(Outputs& outputs) const {
    std::vector<const std::byte*> sources;
    for (const Bytes& input : inputs) sources.push_back(input.data());
    Bytes sum(inputs[0].size());
    cpu::reduce_function(work.dtype, ReduceOp::kSum)(sources.data(), int(sources.size()), sum.data(), nullptr,
                                                     work.rows * work.hidden);
    FusedRequest request;
    request.in = sum.data();
    request.work = outputs.work_on(work);
    cpu::finish_in_blocks(request, [this](const std::byte* in, int64_t numel, std::byte* sums) {
      std::memcpy(sums, in, size_t(numel * element_size(work.dtype)));
    });
  }
};

void check_same(const Bytes& got, const Bytes& wanted, const char* what, uint64_t seed) {
  CHECK(got.size() == wanted.size(), what);
  for (size_t i = 0; i < got.size(); ++i) {
    CHECK(got[i] == wanted[i], what, " of case ", seed, ", byte ", i, ": ", int(got[i]), " for ", int(wanted[i]));
  }
}

void check_same(const Outputs& got, const Outputs& wanted, uint64_t seed) {
  check_same(got.residual, wanted.residual, "residual_out", seed);
  check_same(got.norm, wanted.norm, "norm", seed);
  check_same(got.quantised, wanted.quantised, "quantised", seed);
  check_same(got.scales, wanted.scales, "scales", seed);
}

// Many multiprocessors give rows clusters of as many blocks as they can use, few give them one; a small stage takes
// several launches.
void run_cases(int world_size, int64_t stage_bytes, int multiprocessors, uint64_t first, int count,
               bool usual = false) {
  const Group group(world_size, stage_bytes, multiprocessors);
  run_threads(world_size, [&](int rank) {
    for (uint64_t seed = first; seed < first + uint64_t(count); ++seed) {
      const Problem problem(seed, world_size, usual);
      Outputs expected(problem.work), outputs(problem.work);
      problem.expect(expected);
      FusedRequest request;
      // Of some cases one rank's rows aren't packed, while others' are.
      const size_t apart = seed % 3 == 0 && rank == 1 ? size_t(element_size(problem.work.dtype)) : 0;
      Bytes input(apart);
      input.insert(input.end(), problem.inputs[size_t(rank)].begin(), problem.inputs[size_t(rank)].end());
      request.in = input.data() + apart;
      request.work = outputs.work_on(problem.work);
      request.strategy = problem.strategy;
      group.run(rank, request);
      check_same(outputs, expected, seed);
    }
  });
  group.check_clear();
}

TEST(fused_rows_on_the_device_are_those_of_the_cpu) {
  for (int world_size : {2, 3, 4}) {
    run_cases(world_size, 1 << 20, 64, 100 * uint64_t(world_size), iterations(12));  // clusters of up to 4
    run_cases(world_size, 1 << 20, 8, 100 * uint64_t(world_size) + 20, iterations(12));  // of 1, 2 or 4 by rows
    run_cases(world_size, 160 << 10, 4, 100 * uint64_t(world_size) + 40, iterations(12));  // several launches
  }
  run_cases(2, 1 << 20, 2, 600, iterations(8), /*usual=*/true);  // teams of half a block, and of a quarter
  run_cases(2, 160 << 10, 2, 620, iterations(4), /*usual=*/true);
}

// By the loops for worlds without an instance of their own: most ranks own no row of the two-shot.
TEST(fused_rows_of_16_ranks) {
  run_cases(16, 128 << 10, 8, /*first=*/7229, 1);  // one shot, NVFP4
  run_cases(16, 128 << 10, 8, /*first=*/7280, 1);  // two shots
}

// The mean square by a reciprocal is the rounded quotient, of any sum and any number of elements.
template <typename Real>
void check_means(uint64_t seed) {
  Random random(seed);
  constexpr Real kLimit = std::numeric_limits<Real>::max();
  for (int i = 0; i < 200'000; ++i) {
    const int64_t hidden = i < 20'000 ? i + 1 : 1 + int64_t(random.below(i % 2 == 0 ? 1 << 16 : 1 << 30));
    Real sum = std::ldexp(Real(1) + Real(random.below(1 << 30)) / Real(1 << 30), int(random.below(250)) - 125);
    constexpr Real kEdges[] = {0,
                               kLimit,
                               std::numeric_limits<Real>::infinity(),
                               std::numeric_limits<Real>::denorm_min(),
                               Real(0x1p-80f),
                               Real(0x1p+127f)};
    if (i % 16 == 0) sum = kEdges[random.below(std::size(kEdges))];
    const Real got = fused::mean_of(sum, Real(hidden), fused::inverse(Real(hidden)));
    CHECK(got == sum / Real(hidden), sum, " / ", hidden, ": ", got);
  }
}

TEST(fused_means_are_quotients) {
  check_means<float>(1);
  check_means<double>(2);
}

void check_alone(const Problem& problem, uint64_t seed) {
  Outputs expected(problem.work), outputs(problem.work);
  problem.expect(expected);
  FusedRequest request;
  request.in = problem.inputs[0].data();
  request.work = outputs.work_on(problem.work);
  launch_alone(request, nullptr);
  check_same(outputs, expected, seed);
}

TEST(fused_rows_alone) {
  for (uint64_t seed = 1; seed <= uint64_t(iterations(20)); ++seed) check_alone(Problem(seed, 1), seed);
}

// More rows than blocks, for teams of several rows and of none.
TEST(fused_rows_alone_by_teams) {
  for (const int rows : {140, 300, 600}) {
    Problem problem(uint64_t(rows), 1, /*usual=*/true);
    problem.take_rows(rows, 1024);
    check_alone(problem, uint64_t(rows));
  }
}

// Teams without a peer's rows leave one by one, and the block ends.
TEST(fused_teams_without_a_rank_end_at_the_deadline) {
  for (const Strategy strategy : {Strategy::kOneShot, Strategy::kTwoShot}) {
    const Group group(2, 1 << 20, /*multiprocessors=*/2, /*timeout_ms=*/300);
    run_threads(2, [&](int rank) {
      if (rank == 1) return;
      Problem problem(1, 2, /*usual=*/true);
      problem.take_rows(12, 5120);
      Outputs outputs(problem.work);
      FusedRequest request;
      request.in = problem.inputs[0].data();
      request.work = outputs.work_on(problem.work);
      request.strategy = strategy;
      for (int call = 0; call < 2; ++call) group.run(rank, request);
      CHECK(group.record(rank).valid == 1 && group.record(rank).peer == 1, "names ", group.record(rank).peer);
    });
  }
}

// A rank that doesn't come: the others' clusters leave together, of one block and of several, and later calls at once.
TEST(fused_rows_without_a_rank_end_at_the_deadline) {
  struct Case {
    int multiprocessors, rows;
    Strategy strategy;
  };
  // Of four rows by two shots the last rank owns none: it waits for one that waits itself, and names the one behind it.
  for (const auto& [multiprocessors, rows, strategy] :
       {Case{64, 3, Strategy::kOneShot}, Case{1, 3, Strategy::kOneShot}, Case{64, 3, Strategy::kTwoShot},
        Case{64, 4, Strategy::kTwoShot}}) {
    const Group group(3, 1 << 20, multiprocessors, /*timeout_ms=*/rows == 4 ? 7000 : 300);
    run_threads(3, [&, rows = rows, strategy = strategy](int rank) {
      if (rank == 1) return;
      RowWork work;
      work.rows = rows;
      work.hidden = 8192;
      work.dtype = Dtype::kBFloat16;
      work.quantization = Quantization::kDynamicFloat8;
      Bytes input(size_t(work.rows * work.hidden * 2)), gamma(size_t(work.hidden * 2));
      work.gamma = gamma.data();
      Outputs outputs(work);
      FusedRequest request;
      request.in = input.data();
      request.work = outputs.work_on(work);
      request.strategy = strategy;
      for (int call = 0; call < 2; ++call) group.run(rank, request);
      CHECK(group.record(rank).valid == 1 && group.record(rank).peer == 1, "rank ", rank, " names ",
            group.record(rank).peer);
      CHECK(group.record(rank).operation == Operation::kFusedAllReduce, "another operation");
    });
  }
}

}  // namespace
}  // namespace mnnvl::test
