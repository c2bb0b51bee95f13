// What ends a wait of the CPU communicator, and what every rank then hears.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>

#include "native/cpu_group.h"

namespace mnnvl::test {
namespace {

constexpr size_t kSegment = cpu::kControlBytes + cpu::kGenerations * 256;

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
  const Segments segments(2, kSegment);
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
  const Segments segments(2, kSegment);
  CpuRank rank(segments, 0);
  rank.abort();
  rank.abort();
  CHECK(error_of([&] { rank.barrier(); }).kind() == ErrorKind::kAborted);
}

TEST(communicator_a_late_rank_is_named_and_all_hear_of_it) {
  const Segments segments(3, kSegment);
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
  const Segments segments(2, kSegment);
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

TEST(communicator_refuses_bad_arguments) {
  const Segments segments(2, kSegment), tiny(2, cpu::kControlBytes);
  CHECK(error_of([&] { CpuRank(tiny, 0); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { CpuRank(segments, 2); }).kind() == ErrorKind::kInvalidArgument);
  CpuRank rank(segments, 0);
  CHECK(error_of([&] { rank.broadcast(nullptr, 8, 2); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { rank.broadcast(nullptr, -1, 0); }).kind() == ErrorKind::kInvalidArgument);
  CHECK(error_of([&] { rank.barrier(0); }).kind() == ErrorKind::kInvalidArgument);
  rank.check();  // a caller's mistake breaks nothing
}

}  // namespace
}  // namespace mnnvl::test
