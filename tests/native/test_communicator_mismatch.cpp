// Ranks whose calls differ (cpu/layout.h, "Calls"): no rank ever ends a call with data of another call, and what is
// found is named. Also the packing that carries a call.
#include <algorithm>
#include <atomic>
#include <vector>

#include "native/cpu_group.h"

namespace mnnvl::test {
namespace {

constexpr int64_t kSlotBytes = 512;

constexpr Operation kCollectives[] = {Operation::kAllReduce,     Operation::kAllGather, Operation::kBroadcast,
                                      Operation::kBarrier,       Operation::kReduce,    Operation::kScatter,
                                      Operation::kReduceScatter, Operation::kGather,    Operation::kAllToAll};

struct Call {
  Operation operation = Operation::kBarrier;
  int64_t numel = 0;
  int root = 0;
  Strategy strategy = Strategy::kOneShot;
};

Call random_call(Random& random, int world_size) {
  const int64_t most = random.below(4) == 0 ? 700 : 40;  // beyond 128 elements: several steps
  return {kCollectives[random.below(std::size(kCollectives))], random.below(most),
          static_cast<int>(random.below(world_size)), random.below(2) == 0 ? Strategy::kOneShot : Strategy::kTwoShot};
}

// What rank `rank` brings to its call number `index`.
float value_of(size_t index, int rank) {
  return static_cast<float>(1 + (index * 7 + static_cast<size_t>(rank) * 3) % 50);
}

bool all_are(const std::vector<float>& data, float value) {
  return std::all_of(data.begin(), data.end(), [&](float v) { return v == value; });
}

// One rank, which counts its calls.
class Caller {
 public:
  Caller(const Segments& segments, int rank, int64_t timeout_ms)
      : communicator_(options_of(segments, rank)),
        rank_(rank),
        world_size_(segments.world_size()),
        timeout_ms_(timeout_ms) {}

  // Runs the next call; true if the result is what that call makes of all ranks' values.
  bool right(const Call& call) {
    const size_t index = calls_++;
    const int64_t numel = call.numel, bytes = numel * 4;
    const bool is_root = rank_ == call.root;
    std::vector<float> mine(static_cast<size_t>(numel), value_of(index, rank_));
    float* const data = mine.data();
    const std::vector<const void*> ins(static_cast<size_t>(world_size_), data);  // the same for everybody
    const std::vector<int64_t> sizes(ins.size(), bytes);
    std::vector<std::vector<float>> all(ins.size(), std::vector<float>(mine.size()));
    std::vector<void*> outs;
    for (auto& one : all) outs.push_back(one.data());
    float sum = 0;
    for (int r = 0; r < world_size_; ++r) sum += value_of(index, r);
    const auto run = [&](const Request& request) { communicator_.run(request, timeout_ms_); };
    const auto all_are_theirs = [&] {
      for (int r = 0; r < world_size_; ++r) {
        if (!all_are(all[static_cast<size_t>(r)], value_of(index, r))) return false;
      }
      return true;
    };
    switch (call.operation) {
      case Operation::kBroadcast:
        run(BroadcastRequest{data, bytes, call.root});
        return all_are(mine, value_of(index, call.root));
      case Operation::kAllReduce:
        run(AllReduceRequest{data, data, numel, Dtype::kFloat32, ReduceOp::kSum, call.strategy});
        return all_are(mine, sum);
      case Operation::kReduce: run(ReduceRequest{data, data, numel, call.root}); return !is_root || all_are(mine, sum);
      case Operation::kReduceScatter:
        run(ReduceScatterRequest{ins.data(), outs[0], numel});
        return all_are(all[0], sum);
      case Operation::kScatter:
        run(ScatterRequest{ins.data(), outs[0], bytes, call.root});
        return all_are(all[0], value_of(index, call.root));
      case Operation::kGather:
        run(GatherRequest{data, outs.data(), bytes, call.root});
        return !is_root || all_are_theirs();
      case Operation::kAllGather: run(AllGatherRequest{data, outs.data(), bytes}); return all_are_theirs();
      case Operation::kAllToAll:
        run(AllToAllRequest{ins.data(), sizes.data(), outs.data(), sizes.data(), Dtype::kFloat32});
        return all_are_theirs();
      default: run(BarrierRequest{}); return true;
    }
  }
  void abort() { communicator_.abort(); }

 private:
  static cpu::CommunicatorOptions options_of(const Segments& segments, int rank) {
    cpu::CommunicatorOptions options;
    options.rank = rank;
    options.world_size = segments.world_size();
    options.segments = segments.addresses();
    options.segment_bytes = segments.bytes();
    options.peer_pids.assign(options.segments.size(), -1);
    return options;
  }

  cpu::Communicator communicator_;
  const int rank_;
  const int world_size_;
  const int64_t timeout_ms_;
  size_t calls_ = 0;
};

// One rank's program parts from the others': a call is another one, is inserted, is left out, or trades places.
void part(std::vector<Call>& calls, Random& random, int world_size) {
  const auto at = calls.begin() + random.below(static_cast<int64_t>(calls.size()) - 1);
  switch (random.below(4)) {
    case 0: *at = random_call(random, world_size); break;
    case 1: calls.insert(at, random_call(random, world_size)); break;
    case 2: calls.erase(at); break;
    default: std::iter_swap(at, at + 1); break;
  }
}

// Returns how many ranks' calls ended in an error that says that calls differ.
int run_parted(uint64_t seed, uint32_t first_epoch, bool parted) {
  Random random(seed);
  const int world_size = 2 + static_cast<int>(random.below(3));
  std::vector<Call> common;
  for (int i = 0; i < 60; ++i) common.push_back(random_call(random, world_size));
  std::vector<std::vector<Call>> programs(static_cast<size_t>(world_size), common);
  if (parted) part(programs[static_cast<size_t>(random.below(world_size))], random, world_size);
  Segments segments(world_size, kSlotBytes);
  segments.start_from(first_epoch);
  std::atomic<int> named{0};
  // Two ranks that each wait for a broadcast from the other show each other nothing: that ends at the timeout.
  std::vector<std::unique_ptr<Caller>> callers;
  for (int rank = 0; rank < world_size; ++rank)
    callers.push_back(std::make_unique<Caller>(segments, rank, parted ? 1000 : kLongMs));
  run_threads(world_size, [&](int rank) {
    Caller& caller = *callers[static_cast<size_t>(rank)];
    try {
      for (const Call& call : programs[static_cast<size_t>(rank)]) {
        CHECK(caller.right(call), "seed ", seed, ", rank ", rank, ", ", name(call.operation));
      }
      if (parted) caller.abort();  // whoever is done early would leave the others waiting
    } catch (const Error& error) {
      CHECK(parted, "like calls failed: ", error.what());
      if (std::string(error.what()).find("came with another call") != std::string::npos) named.fetch_add(1);
    }
  });
  return named.load();
}

TEST(communicator_parted_programs_never_mix_data) {
  int named = 0;
  const int rounds = iterations(100);
  for (int seed = 0; seed < rounds; ++seed) named += run_parted(static_cast<uint64_t>(seed), 0, /*parted=*/true);
  CHECK(named >= rounds / 2, named, " of ", rounds);  // some changes change nothing, or come at the very end
}

TEST(communicator_parted_programs_around_the_wraps) {
  // Of the 32 bits of the steps, and of the 16 that stand beside a call.
  for (int seed = 0; seed < iterations(30); ++seed) {
    for (uint32_t first : {0xffffffa0u, 0x0000ffa0u}) run_parted(1000 + static_cast<uint64_t>(seed), first, true);
  }
}

TEST(communicator_like_programs_are_never_parted) {
  for (int seed = 0; seed < iterations(50); ++seed) {
    for (uint32_t first : {0u, 0xffffffa0u, 0x0000ffa0u})
      CHECK(run_parted(2000 + static_cast<uint64_t>(seed), first, /*parted=*/false) == 0);
  }
}

TEST(communicator_packs_calls) {
  for (Operation operation : kCollectives) {
    for (Strategy strategy : {Strategy::kOneShot, Strategy::kTwoShot}) {
      const CallDescriptor call{operation,        (int64_t{1} << 40) - 3, kMaxWorldSize - 1,
                                Dtype::kBFloat16, ReduceOp::kAvg,         strategy};
      const CallDescriptor again = unpack(pack(call));
      CHECK(again.operation == operation && again.bytes == call.bytes && again.root == call.root &&
            again.dtype == call.dtype && again.op == call.op && again.strategy == strategy);
    }
  }
}

}  // namespace
}  // namespace mnnvl::test
