// What ends messages that don't arrive, and what every rank then hears.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "native/message_exchange.h"

namespace mnnvl::test {
namespace {

constexpr int64_t kStepSlots = 1024, kSlots = 128;
constexpr int kAny = Message::kAnySource;

bool contains(const Error& error, const std::string& text) {
  return std::string(error.what()).find(text) != std::string::npos;
}

// Nothing goes on in this group, neither messages nor collectives.
void check_broken(CpuRank& rank, const Error& first) {
  CHECK(std::string(error_of([&] { rank.check(); }).what()) == first.what());
  CHECK(std::string(error_of([&] { isend(rank, 0, 1, 1 - rank.rank()); }).what()) == first.what());
  CHECK(std::string(error_of([&] { rank.barrier(); }).what()) == first.what());
}

// A process that has ended, but is there as a pid.
class DeadProcess {
 public:
  DeadProcess() : pid_(fork()) {
    if (pid_ == 0) {
      for (;;) pause();
    }
    CHECK(pid_ > 0);
  }
  ~DeadProcess() {
    die();
    waitpid(pid_, nullptr, 0);
  }
  void die() const { kill(pid_, SIGKILL); }
  int pid() const { return pid_; }

 private:
  pid_t pid_;
};

TEST(messenger_deadlines_name_the_message) {
  for (const bool waiting : {true, false}) {  // or the background thread finds it
    const Segments segments(3, kStepSlots, kSlots);
    CpuRank impatient(segments, 0), patient(segments, 1), late(segments, 2);
    const auto theirs = irecv(patient, 0, 4, 0);
    const auto more = isend(impatient, 0, 5000, 2);
    const auto mine = irecv(impatient, 0, 100, 2, 7, /*timeout_ms=*/100);
    if (!waiting) {
      while (!mine->over()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    const Error error = mine->error();
    CHECK(error.kind() == ErrorKind::kTimeout, error.what());
    CHECK(contains(error, "for rank 2 in recv") && contains(error, "expected 100, seen 0"), error.what());
    CHECK(std::string(more->error().what()) == error.what());  // everything ends
    check_broken(impatient, error);
    CHECK(theirs->error().kind() == ErrorKind::kPeerFailed, theirs->error().what());
    const Error heard = error_of([&] { irecv(late, 0, 1, 1); });
    CHECK(heard.kind() == ErrorKind::kPeerFailed, heard.what());
  }
}

TEST(messenger_a_send_without_room_ends_at_its_deadline) {
  const Segments segments(2, kStepSlots, kSlots);
  CpuRank rank(segments, 0);
  isend(rank, 0, 500, 1)->wait();  // fits
  const Error error = isend(rank, 0, 5000, 1, 0, /*timeout_ms=*/50)->error();
  CHECK(error.kind() == ErrorKind::kTimeout && contains(error, "for rank 1 in send"), error.what());
}

TEST(messenger_a_receive_from_anybody_ends_at_its_deadline) {
  const Segments segments(2, kStepSlots, kSlots);
  CpuRank rank(segments, 0), other(segments, 1);
  const Error error = irecv(rank, 0, 10, kAny, 0, /*timeout_ms=*/50)->error();
  CHECK(error.kind() == ErrorKind::kTimeout && contains(error, "for any rank in recv"), error.what());
  const Error heard = error_of([&] { other.barrier(); });
  CHECK(contains(heard, "began at rank 0: it waited for a message of any rank"), heard.what());
}

// A wait with an end of its own says so, and the message goes on.
TEST(messenger_a_wait_may_end_before_the_message) {
  const Segments segments(2, kStepSlots, kSlots);
  CpuRank rank(segments, 0), other(segments, 1);
  const auto in = irecv(rank, 3, 1000, 1);
  CHECK(!in->transfer().wait({}));
  CHECK(!in->transfer().wait(std::chrono::steady_clock::now() + std::chrono::milliseconds(30)));
  CHECK(!rank.messenger().wait_idle(std::chrono::milliseconds(1)));
  const auto out = isend(other, 3, 1000, 0);
  in->wait();
  out->wait();
}

TEST(messenger_mismatches_name_both_ends) {
  for (const bool unexpected : {false, true}) {
    for (const bool dtype : {false, true}) {
      const Segments segments(2, kStepSlots, kSlots);
      CpuRank sender(segments, 0), receiver(segments, 1);
      Exchange out, in;
      if (unexpected) out.send(0, 4, 1, /*tag=*/9);
      out.send(0, 192, 1, 3, Dtype::kFloat32);
      if (unexpected) out.send(0, 4, 1, /*tag=*/8);
      out.post(sender);
      out.wait();
      if (unexpected) irecv(receiver, 0, 4, 0, 8)->wait();
      in.receive(0, dtype ? 192 : 100, 0, 3, dtype ? Dtype::kInt32 : Dtype::kFloat32);
      in.post(receiver);
      const Error error = in.error();
      CHECK(error.kind() == ErrorKind::kPeerFailed, error.what());
      CHECK(contains(error, "rank 0 sent a message of 192 bytes float32 with tag 3"), error.what());
      CHECK(contains(error, dtype ? "rank 1 expected one of 192 bytes int32 with tag 3"
                                  : "rank 1 expected one of 100 bytes float32 with tag 3"),
            error.what());
      check_broken(receiver, error);
      const Error heard = error_of([&] { isend(sender, 0, 1, 1); });
      CHECK(heard.kind() == ErrorKind::kPeerFailed && contains(heard, "differs from that of rank 1"), heard.what());
    }
  }
}

TEST(messenger_abort_ends_all) {
  const Segments segments(3, kStepSlots, kSlots);
  CpuRank rank(segments, 0), other(segments, 1);
  const auto in = irecv(rank, 0, 10, 1), any = irecv(rank, 0, 10, kAny, 3), out = isend(rank, 0, 5000, 2);
  const auto theirs = irecv(other, 0, 1, 0, 5);
  std::thread aborter([&] {
    segments.await_messenger_asleep(0);
    rank.abort();
  });
  const Error error = in->error();
  aborter.join();
  CHECK(error.kind() == ErrorKind::kAborted, error.what());
  CHECK(any->error().kind() == ErrorKind::kAborted && out->error().kind() == ErrorKind::kAborted);
  CHECK(theirs->error().kind() == ErrorKind::kPeerFailed, theirs->error().what());
  check_broken(rank, error);
}

// Who posts may be the first to hear; what was under way ends all the same.
TEST(messenger_a_post_hears_of_a_failure) {
  for (int round = 0; round < iterations(50); ++round) {
    const Segments segments(2, kStepSlots, kSlots);
    CpuRank rank(segments, 0), other(segments, 1);
    const auto in = irecv(rank, 0, 10, 1);
    other.abort();
    const Error error = error_of([&] { isend(rank, 0, 10, 1); });
    CHECK(error.kind() == ErrorKind::kPeerFailed, error.what());
    while (!in->over()) std::this_thread::yield();
    CHECK(std::string(in->error().what()) == error.what(), in->error().what());
    CHECK(rank.messenger().wait_idle(std::chrono::milliseconds(kLongMs)));
  }
}

// Collectives and messages of a group break together, whichever fails.
TEST(messenger_breaks_with_the_collectives) {
  const Segments segments(2, kStepSlots, kSlots);
  CpuRank rank(segments, 0), other(segments, 1);
  const auto in = irecv(rank, 0, 10, 1), theirs = irecv(other, 0, 10, 0);
  const Error error = error_of([&] { rank.barrier(/*timeout_ms=*/50); });
  CHECK(error.kind() == ErrorKind::kTimeout, error.what());
  CHECK(std::string(in->error().what()) == error.what(), in->error().what());
  CHECK(theirs->error().kind() == ErrorKind::kPeerFailed, theirs->error().what());
}

TEST(messenger_fails_collectives_that_wait) {
  const Segments segments(2, kStepSlots, kSlots);
  CpuRank rank(segments, 0), other(segments, 1);
  const auto in = irecv(rank, 0, 10, 1, 0, /*timeout_ms=*/100);
  const Error error = error_of([&] { rank.barrier(); });
  CHECK(std::string(in->error().what()) == error.what(), error.what());
}

// What a peer posted before it died still counts; then those end that need it.
TEST(messenger_dead_peers) {
  const DeadProcess process;
  const Segments segments(3, kStepSlots, kSlots);
  CpuRank rank(segments, 0, {-1, process.pid(), -1}), dead(segments, 1), other(segments, 2);
  isend(dead, 1, 300, 0)->wait();
  const auto half = isend(dead, 2, 5000, 0);
  process.die();
  irecv(rank, 1, 300, 1)->wait();
  const auto any = irecv(rank, 3, 10, kAny, 3);
  const auto out = isend(other, 3, 10, 0, 3);  // somebody else lives
  any->wait();
  const Error error = irecv(rank, 0, 5000, 1, 7)->error();  // drains what is there, and it is none of it
  CHECK(error.kind() == ErrorKind::kPeerFailed, error.what());
  CHECK(contains(error, "rank 1 in recv") && contains(error, "has ended"), error.what());
  check_broken(rank, error);
  CHECK(half->transfer().wait(std::chrono::steady_clock::time_point::max()));  // well or not: it may have been drained
}

TEST(messenger_a_peer_dies_while_waited_for) {
  for (const bool sending : {false, true}) {
    const DeadProcess process;
    const Segments segments(2, kStepSlots, kSlots);
    CpuRank rank(segments, 0, {-1, process.pid()});
    const auto message = sending ? isend(rank, 0, 5000, 1) : irecv(rank, 0, 10, 1);
    std::thread killer([&] {
      segments.await_messenger_asleep(0);
      process.die();
    });
    const Error error = message->error();
    killer.join();
    CHECK(contains(error, sending ? "for rank 1 in send" : "for rank 1 in recv"), error.what());
    CHECK(contains(error, "has ended"), error.what());
  }
}

// A receive from anybody waits as long as anybody lives.
TEST(messenger_all_peers_dead) {
  const DeadProcess one, two;
  const Segments segments(3, kStepSlots, kSlots);
  CpuRank rank(segments, 0, {-1, one.pid(), two.pid()}), first(segments, 1);
  isend(first, 4, 10, 0)->wait();
  one.die();
  irecv(rank, 4, 10, kAny)->wait();
  const auto any = irecv(rank, 0, 10, kAny);
  CHECK(!any->transfer().wait(std::chrono::steady_clock::now() + std::chrono::milliseconds(100)));
  two.die();
  const Error error = any->error();
  CHECK(contains(error, "for any rank in recv") && contains(error, "have ended"), error.what());
}

TEST(messenger_refuses_bad_arguments) {
  const Segments segments(2, kStepSlots, kSlots);
  CpuRank rank(segments, 0), other(segments, 1);
  const auto kind = [&](const std::function<void()>& body) { return error_of(body).kind(); };
  for (int peer : {-1, 0, 2}) CHECK(kind([&] { isend(rank, 0, 1, peer); }) == ErrorKind::kInvalidArgument, peer);
  for (int peer : {-2, 0, 2}) CHECK(kind([&] { irecv(rank, 0, 1, peer); }) == ErrorKind::kInvalidArgument, peer);
  CHECK(kind([&] { isend(rank, 0, 1, 1, 0, /*timeout_ms=*/0); }) == ErrorKind::kInvalidArgument);
  Exchange nothing;
  nothing.post(rank);
  nothing.wait();
  const auto out = isend(rank, 0, 1, 1);  // a caller's mistake breaks nothing
  irecv(other, 0, 1, 0)->wait();
  out->wait();
}

// The group goes while messages are under way: they end, and what is left of them may be asked.
TEST(messenger_transfers_outlive_the_group) {
  const Segments segments(2, kStepSlots, kSlots);
  auto rank = std::make_unique<CpuRank>(segments, 0);
  const auto in = irecv(*rank, 0, 10, 1), out = isend(*rank, 0, 5000, 1);
  std::thread waiter([&] { CHECK(in->error().kind() == ErrorKind::kAborted); });
  segments.await_messenger_asleep(0);
  rank.reset();
  waiter.join();
  CHECK(out->error().kind() == ErrorKind::kAborted, out->error().what());
}

// The last owner of the group may be a Done, on whatever thread.
TEST(messenger_a_done_lets_go_of_the_group) {
  for (const bool waiting : {false, true}) {
    const Segments segments(2, kStepSlots, kSlots);
    auto rank = std::make_unique<CpuRank>(segments, 0);
    CpuRank other(segments, 1);
    std::atomic<bool> gone{false};
    std::byte data[1000];
    const Message message{data, 1000, 1, 0, Dtype::kUInt8};
    const auto transfer = rank->messenger().post({nullptr, 0, &message, 1}, kLongMs, [&](const auto&) {
      rank.reset();
      gone = true;
    });
    const auto out = isend(other, 0, 1000, 0);
    if (waiting) {
      CHECK(transfer->wait(std::chrono::steady_clock::time_point::max()));
    } else {
      while (!gone) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(gone);
    out->wait();
  }
}

}  // namespace
}  // namespace mnnvl::test
