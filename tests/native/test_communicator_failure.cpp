// What ends a wait of the CPU communicator, and what every rank then hears.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <utility>

#include "native/cpu_group.h"

namespace mnnvl::test {
namespace {

constexpr int64_t kSlotBytes = 256;

double seconds_of(const std::function<void()>& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

bool contains(const Error& error, const std::string& text) {
  return std::string(error.what()).find(text) != std::string::npos;
}

// The failure is kept, and no later call waits.
void check_broken(CpuRank& rank, const Error& first) {
  CHECK(std::string(error_of([&] { rank.check(); }).what()) == first.what());
  CHECK(std::string(error_of([&] { rank.barrier(); }).what()) == first.what());
}

TEST(communicator_abort_ends_a_wait) {
  const Segments segments(2, kSlotBytes);
  CpuRank waiting(segments, 0), late(segments, 1);
  std::thread aborter([&] {
    segments.await_sleeper(1);
    waiting.abort();
  });
  const double seconds = seconds_of([&] {
    const Error error = error_of([&] { waiting.barrier(); });
    CHECK(error.kind() == ErrorKind::kAborted, error.what());
    check_broken(waiting, error);
  });
  aborter.join();
  CHECK(seconds < kLongMs / 2000.0);
  const Error heard = error_of([&] { late.barrier(); });
  CHECK(heard.kind() == ErrorKind::kPeerFailed, heard.what());
  CHECK(contains(heard, "rank 0"), heard.what());
  check_broken(late, heard);
}

TEST(communicator_abort_before_a_wait) {
  const Segments segments(2, kSlotBytes);
  CpuRank rank(segments, 0);
  rank.abort();
  rank.abort();
  CHECK(error_of([&] { rank.barrier(); }).kind() == ErrorKind::kAborted);
}

TEST(communicator_a_late_rank_is_named_and_all_hear_of_it) {
  const Segments segments(3, kSlotBytes);
  CpuRank impatient(segments, 0), patient(segments, 1), late(segments, 2);
  std::thread other([&] {
    const double seconds = seconds_of([&] {
      const Error error = error_of([&] { patient.barrier(); });
      if (error.kind() != ErrorKind::kPeerFailed || !contains(error, "rank 0")) std::terminate();
    });
    if (seconds > kLongMs / 2000.0) std::terminate();
  });
  const Error error = error_of([&] { impatient.barrier(300); });
  CHECK(error.kind() == ErrorKind::kTimeout, error.what());
  CHECK(contains(error, "for rank 2"), error.what());
  other.join();
  CHECK(error_of([&] { late.barrier(); }).kind() == ErrorKind::kPeerFailed);
  check_broken(impatient, error);
}

// A child process stands for the peer; it does nothing but live until it is killed.
TEST(communicator_a_dead_peer_ends_a_wait) {
  const pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  CHECK(child > 0);
  const Segments segments(2, kSlotBytes);
  CpuRank rank(segments, 0, {-1, child});
  std::thread killer([&] {
    segments.await_sleeper(1);
    kill(child, SIGKILL);
  });
  const Error error = error_of([&] { rank.barrier(); });
  killer.join();
  waitpid(child, nullptr, 0);
  CHECK(error.kind() == ErrorKind::kPeerFailed, error.what());
  CHECK(contains(error, "has ended"), error.what());
}

// Ranks whose calls differ: an error on both, whatever differs, that names both calls where one read from the other.
TEST(communicator_ranks_that_call_different_things) {
  std::byte data[256] = {}, others[256] = {}, unshared[256] = {};
  void* outs[] = {data, others};
  const auto reduction = [&](int64_t numel, Dtype dtype, ReduceOp op, Strategy strategy) {
    return AllReduceRequest{data, others, numel, dtype, op, strategy};
  };
  const AllReduceRequest plain = reduction(16, Dtype::kFloat32, ReduceOp::kSum, Strategy::kOneShot);
  const int64_t sizes[] = {16, 48}, others_sizes[] = {48, 16};
  AllGatherRequest uneven{data, outs}, otherwise_uneven{data, outs};
  uneven.sizes = sizes;
  otherwise_uneven.sizes = others_sizes;
  const void* ins[] = {data, data};
  const int64_t to_self[] = {64, 0};
  const ReduceScatterRequest scattered{ins, others, 16};
  ReduceScatterRequest averaged = scattered, unevenly = scattered;
  averaged.op = ReduceOp::kAvg;
  unevenly.numels = to_self;
  const std::pair<Request, Request> pairs[] = {
      {scattered, averaged},
      {scattered, unevenly},
      {scattered, ReduceScatterRequest{ins, others, 8}},
      {scattered, ReduceScatterRequest{ins, others, 16, nullptr, Dtype::kInt32}},
      {scattered, plain},
      {ReduceRequest{data, others, 16, 0}, ReduceRequest{data, others, 16, 1}},
      {ReduceRequest{data, others, 16, 0}, ReduceRequest{data, others, 15, 0}},
      {ReduceRequest{data, others, 16, 0}, ReduceRequest{data, others, 16, 0, Dtype::kInt32}},
      {ReduceRequest{data, others, 16, 0}, ReduceRequest{data, others, 16, 0, Dtype::kFloat32, ReduceOp::kMax}},
      {ScatterRequest{ins, others, 16, 0}, ScatterRequest{ins, unshared, 16, 1}},  // both take their own part
      {ScatterRequest{ins, others, 16, 0}, ScatterRequest{ins, others, 17, 0}},
      {ScatterRequest{ins, others, 16, 0}, BroadcastRequest{data, 16, 0}},
      {GatherRequest{data, outs, 16, 0}, GatherRequest{data, outs, 16, 1}},
      {GatherRequest{data, outs, 16, 0}, GatherRequest{data, outs, 17, 0}},
      {AllToAllRequest{ins, to_self, outs, to_self}, AllToAllRequest{ins, to_self, outs, to_self, Dtype::kInt8}},
      {AllToAllRequest{ins, to_self, outs, to_self}, BarrierRequest{}},
      {uneven, otherwise_uneven},
      {plain, reduction(15, Dtype::kFloat32, ReduceOp::kSum, Strategy::kOneShot)},
      {plain, reduction(16, Dtype::kFloat32, ReduceOp::kAvg, Strategy::kOneShot)},
      {plain, reduction(32, Dtype::kBFloat16, ReduceOp::kSum, Strategy::kOneShot)},
      {plain, reduction(16, Dtype::kFloat32, ReduceOp::kSum, Strategy::kTwoShot)},
      {plain, BarrierRequest{}},
      {BroadcastRequest{data, 64, 0}, BroadcastRequest{data, 64, 1}},
      {BroadcastRequest{data, 64, 0}, AllGatherRequest{data, outs, 64}},
      {uneven, AllGatherRequest{data, outs, 64}},
  };
  for (const auto& [first, second] : pairs) {
    const Segments segments(2, kSlotBytes);
    CpuRank a(segments, 0), b(segments, 1);
    std::vector<std::string> texts(2);
    run_threads(2, [&](int rank) {
      // Two roots read from nobody; the next call finds the difference at the latest.
      CpuRank& mine = rank == 0 ? a : b;
      const Request request = rank == 0 ? first : second;
      const Error error = error_of([&] {
        mine.run(request);
        mine.barrier();
      });
      CHECK(error.kind() == ErrorKind::kPeerFailed, error.what());
      texts[static_cast<size_t>(rank)] = error.what();
    });
    const std::string both = texts[0] + " | " + texts[1];
    if (both.find("their calls before it differed") != std::string::npos) continue;
    for (const Request& request : {first, second})
      CHECK(both.find(name(operation_of(request))) != std::string::npos, both);
  }
}

// A pair of ranks that don't agree in what the one sends to the other, who else may agree with both.
TEST(communicator_all_to_all_of_sizes_that_differ) {
  for (const auto& [sent, expected] : {std::pair<int64_t, int64_t>{12, 20}, {0, 20}, {12, 0}, {5000, 20}}) {
    const Segments segments(3, kSlotBytes);
    std::vector<std::unique_ptr<CpuRank>> ranks;
    for (int r = 0; r < 3; ++r) ranks.push_back(std::make_unique<CpuRank>(segments, r));
    run_threads(3, [&](int me) {
      Bytes data(5000), received(5000);
      const void* ins[] = {data.data(), data.data(), data.data()};
      void* outs[] = {received.data(), received.data(), received.data()};
      int64_t send[] = {0, 0, 0}, receive[] = {0, 0, 0};
      if (me == 2) send[1] = sent;
      if (me == 1) receive[2] = expected;
      const Error error = error_of([&] {
        ranks[size_t(me)]->run(AllToAllRequest{ins, send, outs, receive, Dtype::kFloat32});
        ranks[size_t(me)]->barrier();
      });
      CHECK(error.kind() == ErrorKind::kPeerFailed, error.what());
      if (me == 1) {
        CHECK(contains(error, str("rank 2 sends ", sent, " bytes to rank 1, which expects ", expected)), error.what());
      } else {
        CHECK(contains(error, "rank 1"), error.what());
      }
      check_broken(*ranks[size_t(me)], error);
    });
  }
}

// In every operation, where the peer never comes.
TEST(communicator_deadline_and_abort_of_every_operation) {
  Bytes data(4000), others(4000);
  const void* ins[] = {data.data(), data.data() + 2000};
  void* outs[] = {others.data(), others.data() + 2000};
  const int64_t sizes[] = {2000, 2000};
  const Request requests[] = {
      AllReduceRequest{data.data(), others.data(), 500, Dtype::kInt32, ReduceOp::kMax, Strategy::kTwoShot},
      ReduceScatterRequest{ins, others.data(), 500},
      ReduceRequest{data.data(), others.data(), 500, 0},
      AllGatherRequest{data.data(), outs, 2000},
      BroadcastRequest{data.data(), 2000, 1},
      ScatterRequest{ins, others.data(), 2000, 1},
      GatherRequest{data.data(), outs, 2000, 0},
      AllToAllRequest{ins, sizes, outs, sizes},
  };
  for (const Request& request : requests) {
    const Segments late(2, kSlotBytes), aborted(2, kSlotBytes);
    CpuRank impatient(late, 0), patient(aborted, 0);
    const Error timeout = error_of([&] { impatient.run(request, 30); });
    CHECK(timeout.kind() == ErrorKind::kTimeout && contains(timeout, "for rank 1"), timeout.what());
    CHECK(contains(timeout, name(operation_of(request))), timeout.what());
    check_broken(impatient, timeout);
    std::thread aborter([&] {
      aborted.await_sleeper(1);
      patient.abort();
    });
    const Error error = error_of([&] { patient.run(request); });
    aborter.join();
    CHECK(error.kind() == ErrorKind::kAborted, error.what());
  }
}

// The senders of a gather or reduce wait when the slots are full, the root of a scatter likewise.
TEST(communicator_deadline_of_those_that_run_ahead) {
  Bytes data(4000);
  const void* ins[] = {data.data(), data.data() + 2000};
  const Request requests[] = {ReduceRequest{data.data(), nullptr, 1000, 1},
                              GatherRequest{data.data(), nullptr, 4000, 1}, ScatterRequest{ins, data.data(), 2000, 0}};
  for (const Request& request : requests) {
    const Segments segments(2, kSlotBytes);
    CpuRank rank(segments, 0);
    const Error timeout = error_of([&] { rank.run(request, 30); });
    CHECK(timeout.kind() == ErrorKind::kTimeout && contains(timeout, "for rank 1"), timeout.what());
    CHECK(contains(timeout, "done"), timeout.what());
  }
}

TEST(communicator_refuses_bad_arguments) {
  const Segments segments(2, kSlotBytes), tiny(2, 0), a_line_for_all_peers_but_one(8, 64 * 6);
  CHECK(error_of([&] { CpuRank(a_line_for_all_peers_but_one, 0); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { CpuRank(tiny, 0); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { CpuRank(segments, 2); }).kind() == ErrorKind::kInvalidArgument);
  CpuRank rank(segments, 0);
  CHECK(error_of([&] { rank.broadcast(nullptr, 8, 2); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { rank.broadcast(nullptr, -1, 0); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { rank.barrier(0); }).kind() == ErrorKind::kInvalidArgument);
  const AllReduceRequest undecided{nullptr, nullptr, 0, Dtype::kFloat32, ReduceOp::kSum, Strategy::kAuto};
  CHECK(error_of([&] { rank.run(undecided); }).kind() == ErrorKind::kInvalidArgument);
  const int64_t good[] = {1, 1}, bad[] = {1, -1}, others[] = {2, 1};
  ReduceScatterRequest uneven;
  uneven.numels = bad;
  const Request refused[] = {
      AllReduceRequest{nullptr, nullptr, 4, Dtype::kFloat16, ReduceOp::kBor, Strategy::kOneShot},
      AllReduceRequest{nullptr, nullptr, 4, Dtype::kComplex64, ReduceOp::kSum, Strategy::kOneShot},
      AllReduceRequest{nullptr, nullptr, -4, Dtype::kFloat32, ReduceOp::kSum, Strategy::kOneShot},
      ReduceRequest{nullptr, nullptr, -1},
      ReduceRequest{nullptr, nullptr, 1, 2},
      ReduceRequest{nullptr, nullptr, 1, 0, Dtype::kUInt16},
      ReduceScatterRequest{nullptr, nullptr, -1},
      ReduceScatterRequest{nullptr, nullptr, 1, nullptr, Dtype::kBool, ReduceOp::kAvg},
      uneven,
      ScatterRequest{nullptr, nullptr, -1, 0},
      ScatterRequest{nullptr, nullptr, 1, -1},
      GatherRequest{nullptr, nullptr, -1, 0},
      GatherRequest{nullptr, nullptr, 1, 2},
      AllToAllRequest{nullptr, bad, nullptr, good},
      AllToAllRequest{nullptr, good, nullptr, bad},
      AllToAllRequest{nullptr, good, nullptr, others},  // to itself another size than from itself
  };
  for (const Request& request : refused)
    CHECK(error_of([&] { rank.run(request); }).kind() == ErrorKind::kInvalidArgument, name(operation_of(request)));
  rank.check();  // a caller's mistake breaks nothing
}

}  // namespace
}  // namespace mnnvl::test
