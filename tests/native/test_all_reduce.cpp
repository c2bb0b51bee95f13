// The plain all-reduces and the reduce-scatter of float sums, their source run on a CPU (native/emulation), among ranks
// that are threads: every byte as cpu/ makes it, in one window and in many.
#include <cstring>
#include <thread>

#include "cpu/reduce.h"
#include "native/emulation/cuda.h"
#include "native/emulation/group.h"
#include "native/harness.h"

namespace mnnvl::test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};

// The same for every rank, but for what only it sees.
struct Case {
  Dtype dtype;
  ReduceOp op;
  Strategy strategy;
  int64_t numel;
  std::vector<Bytes> inputs;
  Bytes expected;

  Case(uint64_t seed, int world_size, int64_t most_bytes) {
    Random random(seed);
    dtype = kDtypes[random.below(3)];
    op = random.below(3) == 0 ? ReduceOp::kAvg : ReduceOp::kSum;
    strategy = random.below(4) == 0 ? Strategy::kOneShot : Strategy::kTwoShot;
    const int64_t most = most_bytes / element_size(dtype);
    numel = 1 + random.below(random.below(4) == 0 ? 100 : most);
    std::vector<const std::byte*> sources;
    for (int r = 0; r < world_size; ++r) inputs.push_back(elements(random, dtype, numel));
    for (const Bytes& input : inputs) sources.push_back(input.data());
    expected.resize(inputs[0].size());
    cpu::reduce_function(dtype, op)(sources.data(), world_size, expected.data(), nullptr, numel);
  }
};

void check_same(const std::byte* got, const Bytes& wanted, uint64_t seed) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    CHECK(got[i] == wanted[i], "case ", seed, ", byte ", i, " of ", wanted.size(), ": ", int(got[i]), " for ",
          int(wanted[i]));
  }
}

// A rank may have fewer blocks than others, be slow, reduce in place, and begin anywhere.
void run_cases(int world_size, int64_t stage_bytes, int multiprocessors, uint64_t first, int count) {
  const LamportGroup group(world_size, stage_bytes, multiprocessors);
  const int64_t most = 12 * stage_bytes;
  run_threads(world_size, [&](int rank) {
    for (uint64_t seed = first; seed < first + uint64_t(count); ++seed) {
      const Case one(seed, world_size, most);
      Random random(seed * 100 + uint64_t(rank));
      const Bytes& input = one.inputs[size_t(rank)];
      const size_t apart = random.below(3) == 0 ? size_t(element_size(one.dtype)) : 0;
      Bytes in(apart), out(apart + input.size(), std::byte{0x5a});
      in.insert(in.end(), input.begin(), input.end());
      AllReduceRequest request;
      request.in = in.data() + apart;
      request.out = random.below(2) == 0 ? in.data() + apart : out.data() + apart;
      request.numel = one.numel;
      request.dtype = one.dtype;
      request.op = one.op;
      request.strategy = one.strategy;
      if (random.below(8) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      group.run(rank, request, /*blocks=*/random.below(3) == 0 ? 1 : 0);
      check_same(static_cast<const std::byte*>(request.out), one.expected, seed);
    }
  });
  group.check_clear();
}

TEST(all_reduces_on_the_device_are_those_of_the_cpu) {
  for (int world_size : {2, 3, 4, 5, 8}) {
    const auto seed = uint64_t(1000 * world_size);
    run_cases(world_size, 4 << 10, 1, seed, iterations(24));  // up to some 50 windows a call, of one block
    run_cases(world_size, 24 << 10, 4, seed + 100, iterations(6));  // one block may be of whole multiprocessors
  }
}

// Windows and nothing else, call after call, of ranks that differ in speed and threads that differ in what they have to
// do: a last window may be of one pack. That the gate orders memory only tests/protocols/windows.pml can show.
TEST(windows_follow_each_other_through_the_same_slots) {
  for (int world_size : {2, 3, 4}) {
    const LamportGroup group(world_size, 4 << 10, /*multiprocessors=*/1);
    run_threads(world_size, [&](int rank) {
      Random random{uint64_t(rank)};
      for (int call = 0; call < iterations(16); ++call) {
        const size_t numel = size_t(9'000 + 4 * call);
        std::vector<float> in(numel), out(numel);
        for (size_t i = 0; i < numel; ++i) in[i] = float((rank + 1) * (int(i % 97) + call));
        AllReduceRequest request;
        request.in = in.data();
        request.out = out.data();
        request.numel = int64_t(numel);
        request.strategy = Strategy::kTwoShot;
        if (random.below(5) == 0) std::this_thread::sleep_for(std::chrono::microseconds(random.below(3000)));
        group.run(rank, request);
        const float ranks = float(world_size * (world_size + 1) / 2);
        for (size_t i = 0; i < numel; ++i) {
          CHECK(out[i] == ranks * float(int(i % 97) + call), "call ", call, ", element ", i, ": ", out[i]);
        }
      }
    });
    group.check_clear();
  }
}

// Threads that wait for others of their block leave with them.
TEST(windows_without_a_rank_end_at_the_deadline) {
  for (int world_size : {2, 3}) {
    const LamportGroup group(world_size, 4 << 10, /*multiprocessors=*/1, /*timeout_ms=*/300);
    run_threads(world_size, [&](int rank) {
      std::vector<float> data(10'000, 1.0f);
      AllReduceRequest request;
      request.in = request.out = data.data();
      request.numel = int64_t(data.size());
      request.strategy = Strategy::kTwoShot;
      group.run(rank, request);
      CHECK(group.record(rank).valid == 0, "the call with all ranks failed");
      if (rank == 1) return;
      for (int call = 0; call < 2; ++call) group.run(rank, request);
      CHECK(group.record(rank).valid == 1 && group.record(rank).peer == 1, "names ", group.record(rank).peer);
    });
  }
}

// An abort word that only some threads of a block have seen at their start, so that those don't come to the gate:
// neither may the others, which might find all packs there and never look at it again.
TEST(windows_end_when_a_part_of_a_block_begins_aborted) {
  for (int seen : {1, 32, 40, 127}) {
    const LamportGroup group(/*world_size=*/2, 4 << 10, /*multiprocessors=*/1, /*timeout_ms=*/5000);
    emulation::interruption.word = &group.control(0)->abort;
    emulation::interruption.value = abort_word(1, FailureCause::kLocalAbort, 1);
    emulation::interruption.loads = seen;
    emulation::interruption.place = group.control(0);
    run_threads(2, [&](int rank) {
      std::vector<float> data(10'000, 1.0f);
      AllReduceRequest request;
      request.in = request.out = data.data();
      request.numel = int64_t(data.size());
      request.strategy = Strategy::kTwoShot;
      if (rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      group.run(rank, request);
      for (const float x : data) CHECK(x == 1.0f, "rank ", rank, " has reduced what a part of the block sent");
    });
    emulation::interruption.place = nullptr;
    CHECK(group.record(0).valid == 1 && group.record(0).peer == 1, "names ", group.record(0).peer);
  }
}

TEST(reduce_scatters_on_the_device_are_those_of_the_cpu) {
  for (int world_size : {2, 3, 5}) {
    const LamportGroup group(world_size, 8 << 10, /*multiprocessors=*/2);
    run_threads(world_size, [&](int rank) {
      for (uint64_t seed = 1; seed <= uint64_t(iterations(30)); ++seed) {
        Random random(seed);
        const Dtype dtype = kDtypes[random.below(3)];
        const int64_t numel = 1 + random.below(20'000), bytes = numel * element_size(dtype);
        std::vector<Bytes> inputs;  // [source]: the parts of all destinations
        for (int r = 0; r < world_size; ++r) inputs.push_back(elements(random, dtype, numel * world_size));
        std::vector<const std::byte*> parts;
        std::vector<const void*> mine;
        for (int r = 0; r < world_size; ++r) {
          parts.push_back(inputs[size_t(r)].data() + rank * bytes);
          mine.push_back(inputs[size_t(rank)].data() + r * bytes);
        }
        Bytes expected(static_cast<size_t>(bytes)), out(expected.size());
        cpu::reduce_function(dtype, ReduceOp::kSum)(parts.data(), world_size, expected.data(), nullptr, numel);
        ReduceScatterRequest request;
        request.ins = mine.data();
        request.out = out.data();
        request.numel = numel;
        request.dtype = dtype;
        group.run(rank, request);
        check_same(out.data(), expected, seed);
      }
    });
    group.check_clear();
  }
}

}  // namespace
}  // namespace mnnvl::test
