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
  std::byte data[256] = {}, others[256] = {};
  void* outs[] = {data, others};
  const auto reduction = [&](int64_t numel, Dtype dtype, ReduceOp op, Strategy strategy) {
    return AllReduceRequest{data, others, numel, dtype, op, strategy};
  };
  const AllReduceRequest plain = reduction(16, Dtype::kFloat32, ReduceOp::kSum, Strategy::kOneShot);
  const int64_t sizes[] = {16, 48}, others_sizes[] = {48, 16};
  AllGatherRequest uneven{data, outs}, otherwise_uneven{data, outs};
  uneven.sizes = sizes;
  otherwise_uneven.sizes = others_sizes;
  const std::pair<Request, Request> pairs[] = {
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

TEST(communicator_refuses_bad_arguments) {
  const Segments segments(2, kSlotBytes), tiny(2, 0);
  CHECK(error_of([&] { CpuRank(tiny, 0); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { CpuRank(segments, 2); }).kind() == ErrorKind::kInvalidArgument);
  CpuRank rank(segments, 0);
  CHECK(error_of([&] { rank.broadcast(nullptr, 8, 2); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { rank.broadcast(nullptr, -1, 0); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { rank.barrier(0); }).kind() == ErrorKind::kInvalidArgument);
  const AllReduceRequest undecided{nullptr, nullptr, 0, Dtype::kFloat32, ReduceOp::kSum, Strategy::kAuto};
  CHECK(error_of([&] { rank.run(undecided); }).kind() == ErrorKind::kInvalidArgument);
  rank.check();  // a caller's mistake breaks nothing
}

}  // namespace
}  // namespace mnnvl::test
