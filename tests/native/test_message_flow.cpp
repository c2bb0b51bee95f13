// The state behind a rank's messages, driven step by step: what depends on an order of events that threads can't be
// made to take.
#include <sys/wait.h>
#include <unistd.h>

#include "cpu/message_flow.h"
#include "native/message_exchange.h"

namespace mnnvl::test {
namespace {

constexpr int kAny = Message::kAnySource;

// One rank without threads.
class Flow {
 public:
  Flow(const Segments& segments, int rank, std::vector<int> pids = {})
      : options_(options_of(segments, rank, std::move(pids))),
        failure_(rank, options_.segments, options_.peer_pids),
        flow_(options_, failure_) {}

  std::shared_ptr<cpu::TransferState> send(const Bytes& data, int peer, int32_t tag = 0) {
    const Message message{const_cast<std::byte*>(data.data()), int64_t(data.size()), peer, tag, Dtype::kUInt8};
    return post({&message, 1, nullptr, 0});
  }
  std::shared_ptr<cpu::TransferState> receive(Bytes& data, int peer, int32_t tag = 0) {
    const Message message{data.data(), int64_t(data.size()), peer, tag, Dtype::kUInt8};
    return post({nullptr, 0, &message, 1});
  }
  cpu::MessageFlow& operator*() { return flow_; }
  cpu::GroupFailure& failure() { return failure_; }

 private:
  static cpu::CommunicatorOptions options_of(const Segments& segments, int rank, std::vector<int> pids) {
    pids.resize(static_cast<size_t>(segments.world_size()), -1);
    return {rank, segments.world_size(), segments.addresses(), segments.bytes(), std::move(pids)};
  }
  std::shared_ptr<cpu::TransferState> post(const ExchangeRequest& request) {
    auto transfer = std::make_shared<cpu::TransferState>();
    transfer->started = cpu::MessageFlow::Clock::now();
    transfer->deadline = transfer->started + std::chrono::hours(1);
    flow_.post(request, transfer);
    return transfer;
  }

  const cpu::CommunicatorOptions options_;
  cpu::GroupFailure failure_;
  cpu::MessageFlow flow_;
};

// What this channel's ring holds.
uint32_t held(const Segments& segments, int source, int destination) {
  const cpu::ChannelWords& words = *segments.channel(source, destination).words;
  return words.posted.load() - words.taken.load();
}

TEST(flow_takes_what_a_dead_peer_had_posted) {
  const pid_t child = fork();
  if (child == 0) _exit(0);
  CHECK(child > 0 && waitpid(child, nullptr, 0) == child);
  const Segments segments(2, 1024);
  Flow rank(segments, 0, {-1, child}), dead(segments, 1);
  Bytes data(100), more(100);
  const auto first = rank.receive(data, 1), second = rank.receive(more, 1);
  dead.send(content(1, 100), 0);  // between this rank's last look at the channel and that at the process
  (*rank).look_around(cpu::MessageFlow::Clock::now());
  CHECK(first->finished && !first->error && data == content(1, 100));
  CHECK(second->finished && second->error, "the second needs a peer that is dead");
}

TEST(flow_moves_nothing_in_a_broken_group) {
  const Segments segments(2, 1024);
  Flow rank(segments, 0), other(segments, 1);
  Bytes data(100);
  const auto transfer = rank.receive(data, 1);
  other.send(content(1, 100), 0);
  rank.failure().abort(FailureCause::kLocalAbort);
  CHECK((*rank).advance());
  CHECK(transfer->finished && transfer->error && transfer->error->kind() == ErrorKind::kAborted);
  CHECK(data == Bytes(100) && held(segments, 1, 0) > 0);
  CHECK(!(*rank).outstanding() && !(*rank).advance());
}

// The heap holds only what a receive has to be looked for behind.
TEST(flow_leaves_in_its_ring_what_nobody_waits_for) {
  const Segments segments(3, 1024);
  Flow rank(segments, 0), other(segments, 1);
  const Bytes small = content(1, 40), large = content(2, 5000);
  Bytes in(40);
  const auto stuck = rank.send(large, 2);  // something is under way all the time
  other.send(small, 0, 7);
  other.send(small, 0, 8);
  CHECK(!(*rank).advance());
  CHECK(held(segments, 1, 0) == 2, held(segments, 1, 0));
  CHECK(rank.receive(in, kAny, 7)->finished && in == small);
  CHECK(!(*rank).advance());
  CHECK(held(segments, 1, 0) == 1, "any source was asked for once");
  Bytes none(40);
  const auto waiting = rank.receive(none, 2, 8);  // of another rank
  CHECK(!(*rank).advance() && held(segments, 1, 0) == 1);
  const auto drained = rank.receive(none, 1, 9);
  CHECK(held(segments, 1, 0) == 0, "it may hide one that is waited for");
  Bytes late(40);
  CHECK(rank.receive(late, 1, 8)->finished && late == small);
  CHECK(!waiting->finished && !drained->finished && !stuck->finished);
}

// A receive may find its message half-way on the heap.
TEST(flow_finds_messages_that_are_still_arriving) {
  const Segments segments(2, 1024);
  Flow rank(segments, 0), other(segments, 1);
  const Bytes large = content(2, 5000);
  Bytes wanted(5000), behind(10);
  const auto out = other.send(large, 0, 1);
  const auto hidden = rank.receive(behind, 1, 2);
  const auto found = rank.receive(wanted, 1, 1);
  CHECK(!found->finished);
  const Bytes last = content(3, 10);
  const auto second = other.send(last, 0, 2);
  while ((*rank).advance() || (*other).advance()) {
  }
  CHECK(found->finished && wanted == large && hidden->finished && behind == last);
  CHECK(out->finished && second->finished);
}

}  // namespace
}  // namespace mnnvl::test
