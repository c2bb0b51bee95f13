// The CPU communicator's collectives: every byte against the definition. Threads as ranks; several processes are
// tested from Python.
#include <algorithm>
#include <cstring>

#include "native/cpu_group.h"
#include "native/rank_order.h"

namespace mnnvl::test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};
constexpr int64_t kSmallSlots = 256;  // many steps
constexpr int64_t kLargeSlots = 64 << 10;

// Rank `rank`'s input to call `call`: every rank can make everybody's.
Bytes contribution(uint64_t call, int rank, int64_t bytes) {
  return any_bytes(mix(call * 1000 + static_cast<uint64_t>(rank)), bytes);
}

// Numbers of like size, so that sums are neither infinite nor all of one rank.
Bytes numbers(uint64_t call, int rank, int64_t numel, Dtype dtype) {
  Bytes data(static_cast<size_t>(numel * element_size(dtype)));
  const uint64_t seed = mix(call * 1000 + static_cast<uint64_t>(rank));
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t units = static_cast<int64_t>(mix(seed + static_cast<uint64_t>(i)) % 20001) - 10000;
    const uint64_t bits = rounded_bits(static_cast<double>(units) / 977.0, dtype);
    std::memcpy(data.data() + i * element_size(dtype), &bits, static_cast<size_t>(element_size(dtype)));
  }
  return data;
}

struct Reduction {
  uint64_t call = 0;
  int64_t numel = 0;
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  Strategy strategy = Strategy::kAuto;
  bool in_place = false;
  int64_t shift = 0;  // of both tensors from an aligned address
};

void check_all_reduce(CpuRank& rank, int world_size, const Reduction& r) {
  const int64_t size = element_size(r.dtype), bytes = r.numel * size;
  std::vector<Bytes> inputs;
  std::vector<const std::byte*> pointers;
  for (int peer = 0; peer < world_size; ++peer) inputs.push_back(numbers(r.call, peer, r.numel, r.dtype));
  for (const Bytes& input : inputs) pointers.push_back(input.data());
  Bytes in(static_cast<size_t>(bytes + r.shift + 64)), out(in.size(), std::byte{0x5a});
  std::copy(inputs[rank.rank()].begin(), inputs[rank.rank()].end(), in.begin() + r.shift);
  Bytes& result = r.in_place ? in : out;
  rank.all_reduce({in.data() + r.shift, result.data() + r.shift, r.numel, r.dtype, r.op, r.strategy});
  for (int64_t i = 0; i < r.numel; ++i) {
    const uint64_t expected = rank_order_bits(pointers, i, r.dtype, r.op);
    const uint64_t seen = element_bits(result.data() + r.shift, i, r.dtype);
    CHECK(seen == expected, "call ", r.call, ", rank ", rank.rank(), " of ", world_size, ", element ", i, " of ",
          r.numel, ": ", seen, " for ", expected);
  }
  const std::byte guard = r.in_place ? std::byte{0} : std::byte{0x5a};
  for (size_t i = static_cast<size_t>(r.shift + bytes); i < result.size(); ++i) CHECK(result[i] == guard, "behind");
}

void check_all_gather(CpuRank& rank, int world_size, uint64_t call, int64_t bytes, bool in_place) {
  Bytes in = contribution(call, rank.rank(), bytes);
  std::vector<Bytes> outs(static_cast<size_t>(world_size), Bytes(in.size()));
  std::vector<void*> pointers;
  for (Bytes& out : outs) pointers.push_back(out.data());
  if (in_place) pointers[static_cast<size_t>(rank.rank())] = in.data();
  rank.all_gather(in.data(), pointers.data(), bytes);
  for (int peer = 0; peer < world_size; ++peer) {
    const Bytes expected = contribution(call, peer, bytes);
    const auto* seen = static_cast<const std::byte*>(pointers[static_cast<size_t>(peer)]);
    CHECK(std::equal(expected.begin(), expected.end(), seen), "call ", call, ", ", bytes, " bytes of rank ", peer,
          " at rank ", rank.rank());
  }
}

void check_broadcast(CpuRank& rank, uint64_t call, int64_t bytes, int root) {
  Bytes data = contribution(call, rank.rank(), bytes);
  rank.broadcast(data.data(), bytes, root);
  CHECK(data == contribution(call, root, bytes), "call ", call, ", ", bytes, " bytes of ", root, " at ", rank.rank());
}

TEST(communicator_all_reduce_sizes) {
  const int64_t sizes[] = {0, 1, 3, 31, 64, 1000, 4099, 20000};
  for (int world_size : {1, 2, 3, 4}) {
    const Segments segments(world_size, kLargeSlots);
    run_group(segments, [&](CpuRank& rank) {
      uint64_t call = 0;
      for (int64_t numel : sizes) {
        for (Dtype dtype : kDtypes) {
          for (Strategy strategy : {Strategy::kOneShot, Strategy::kTwoShot}) {
            const ReduceOp op = call % 2 == 0 ? ReduceOp::kSum : ReduceOp::kAvg;
            check_all_reduce(rank, world_size, {call, numel, dtype, op, strategy, call % 3 == 0, int64_t(call % 5)});
            ++call;
          }
        }
      }
    });
  }
}

TEST(communicator_moves) {
  for (int world_size : {1, 2, 3, 4}) {
    const Segments segments(world_size, kSmallSlots);
    run_group(segments, [&](CpuRank& rank) {
      for (int64_t bytes : {0, 1, 63, 64, 65, 256, 257, 5000}) {
        check_all_gather(rank, world_size, static_cast<uint64_t>(bytes), bytes, /*in_place=*/bytes % 2 == 0);
        for (int root = 0; root < world_size; ++root) check_broadcast(rank, static_cast<uint64_t>(bytes), bytes, root);
      }
    });
  }
}

// Contributions of their own sizes: some none, some many steps, alone or all.
TEST(communicator_uneven_all_gather) {
  for (int world_size : {1, 2, 3, 4}) {
    const Segments segments(world_size, kSmallSlots);
    run_group(segments, [&](CpuRank& rank) {
      for (uint64_t call = 0; call < static_cast<uint64_t>(iterations(60)); ++call) {
        Random random(call);
        std::vector<int64_t> sizes;
        std::vector<Bytes> outs;
        std::vector<void*> pointers;
        for (int r = 0; r < world_size; ++r) {
          sizes.push_back(random.below(3) == 0 ? 0 : random.below(int64_t{1} << random.below(13)));
          outs.emplace_back(static_cast<size_t>(sizes.back()), std::byte{0x5a});
        }
        Bytes in = contribution(call, rank.rank(), sizes[static_cast<size_t>(rank.rank())]);
        for (Bytes& out : outs) pointers.push_back(out.empty() ? nullptr : out.data());
        if (call % 2 == 0) pointers[static_cast<size_t>(rank.rank())] = in.data();
        AllGatherRequest request{in.empty() ? nullptr : in.data(), pointers.data()};
        request.sizes = sizes.data();
        rank.run(request);
        for (int r = 0; r < world_size; ++r) {
          const auto index = static_cast<size_t>(r);
          const Bytes expected = contribution(call, r, sizes[index]);
          const auto* seen = static_cast<const std::byte*>(pointers[index]);
          CHECK(std::equal(expected.begin(), expected.end(), seen), "call ", call, ", rank ", r, " at ", rank.rank());
        }
      }
    });
  }
}

// Nobody leaves a barrier before all have come.
TEST(communicator_barrier) {
  for (int world_size : {2, 3, 4}) {
    const Segments segments(world_size, kSmallSlots);
    std::atomic<int> come{0};
    run_group(segments, [&](CpuRank& rank) {
      for (int round = 1; round <= iterations(50); ++round) {
        come.fetch_add(1);
        rank.barrier();
        CHECK(come.load() >= round * world_size, "round ", round);
      }
    });
  }
}

void random_call(CpuRank& rank, int world_size, uint64_t call, Random random) {
  const int64_t size = int64_t{1} << random.below(13);
  const int64_t numel = random.below(size + 1);
  switch (random.below(5)) {
    case 0: return rank.barrier();
    case 1: return check_broadcast(rank, call, numel, static_cast<int>(random.below(world_size)));
    case 2: return check_all_gather(rank, world_size, call, numel, random.below(2) == 0);
    default: break;
  }
  Reduction r{call, numel};
  r.dtype = kDtypes[random.below(3)];
  r.op = random.below(2) == 0 ? ReduceOp::kSum : ReduceOp::kAvg;
  const Strategy strategies[] = {Strategy::kOneShot, Strategy::kTwoShot, Strategy::kAuto};
  r.strategy = strategies[random.below(3)];
  r.in_place = random.below(2) == 0;
  r.shift = random.below(8);
  check_all_reduce(rank, world_size, r);
}

void random_calls(int world_size, int64_t slot_bytes, uint32_t first_epoch, int count) {
  Segments segments(world_size, slot_bytes);
  segments.start_from(first_epoch);
  run_group(segments, [&](CpuRank& rank) {
    for (int call = 0; call < count; ++call) {
      random_call(rank, world_size, static_cast<uint64_t>(call),
                  Random(mix(first_epoch) + static_cast<uint64_t>(call)));
    }
  });
}

TEST(communicator_random_calls_2) { random_calls(2, kLargeSlots, 0, iterations(200)); }
TEST(communicator_random_calls_3) { random_calls(3, kLargeSlots, 0, iterations(200)); }
TEST(communicator_random_calls_4) { random_calls(4, kLargeSlots, 0, iterations(200)); }
TEST(communicator_random_calls_in_many_steps) { random_calls(3, kSmallSlots, 0, iterations(200)); }
// 32-bit epochs pass zero on the way.
TEST(communicator_random_calls_around_the_wrap) { random_calls(3, kSmallSlots, 0xffffff80u, iterations(200)); }

}  // namespace
}  // namespace mnnvl::test
