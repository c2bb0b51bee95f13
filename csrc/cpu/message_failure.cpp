// What ends messages that don't arrive, and what its error names.
#include <algorithm>

#include "cpu/message_flow.h"

namespace mnnvl::cpu {
namespace {

CallDescriptor descriptor_of(const MessageHeader& header) {
  CallDescriptor call{Operation::kSend, header.bytes};
  call.dtype = static_cast<Dtype>(header.dtype);
  call.tag = header.tag;
  return call;
}

}  // namespace

// A message that is under way, and the first for which wanted(transfer, peer): sends first, then what arrives.
template <typename Wanted>
MessageFlow::Awaited MessageFlow::find_awaited(Wanted wanted) const {
  const auto awaited = [](const Incoming& receive, int peer, int64_t moved) {
    return Awaited{&receive.message, receive.transfer.get(), Operation::kRecv, peer, moved};
  };
  for (int r = 0; r < world_size_; ++r) {
    for (const Outgoing& send : peers_[r].sends) {
      if (wanted(*send.transfer, r)) return {&send.message, send.transfer.get(), Operation::kSend, r, send.moved};
    }
    const auto& arrival = peers_[r].arrival;
    if (!arrival) continue;
    const Incoming& receive = arrival->receive.transfer ? arrival->receive : arrival->unexpected->receive;
    if (receive.transfer && wanted(*receive.transfer, r)) return awaited(receive, r, arrival->moved);
  }
  for (const Incoming& receive : receives_) {
    if (wanted(*receive.transfer, receive.message.peer)) return awaited(receive, receive.message.peer, 0);
  }
  return {};
}

// A wait of this message that `record`, whose cause, peer and told are set, has ended.
FailureRecord MessageFlow::record_of(FailureRecord record, const Awaited& awaited) const {
  record.valid = 1;
  record.rank = rank_;
  record.operation = awaited.operation;
  record.sequence = awaited.transfer->sequence;
  if (awaited.message != nullptr) record.expected = static_cast<uint64_t>(awaited.message->bytes);
  record.seen = static_cast<uint64_t>(awaited.moved);
  return record;
}

void MessageFlow::fail(FailureRecord record, const Awaited& awaited, FailureDetails details) {
  const std::chrono::duration<double> waited = Clock::now() - awaited.transfer->started;
  details.word = "bytes";
  end_all(failure_.end(record_of(record, awaited), waited.count(), details));
}

void MessageFlow::fail_here(const std::string& what) {
  end_all(failure_.end(
      Error(ErrorKind::kSystem, str("mnnvl: rank ", rank_, " can't go on with its sends and receives: ", what))));
}

void MessageFlow::end_all(const Error& error) {
  for (const State& transfer : transfers_) {
    transfer->error = error;
    transfer->finished = true;
  }
  finished_.insert(finished_.end(), transfers_.begin(), transfers_.end());
  transfers_.clear();
  receives_.clear();
  any_receives_ = 0;
  for (Peer& peer : peers_) {
    peer.sends.clear();
    peer.arrival.reset();
    peer.receives = 0;
  }
  unexpected_.clear();
}

// Ends everything if the group is broken, here by a collective or by a word from anybody.
bool MessageFlow::told() {
  FailureRecord record{};
  if (failure_.failed()) {
    end_all(failure_.error());
  } else if (failure_.told(&record)) {
    fail(record, find_awaited([](const TransferState&, int) { return true; }), {});
  } else {
    return false;
  }
  return true;
}

bool MessageFlow::agrees(const Incoming& incoming, int source, const MessageHeader& header) {
  const Message& message = incoming.message;
  if (message.bytes == header.bytes && static_cast<int32_t>(message.dtype) == header.dtype) return true;
  const Mismatch mismatch{Mismatch::Kind::kMessage, mnnvl::descriptor_of(message), descriptor_of(header)};
  FailureRecord record{};
  record.cause = FailureCause::kMismatch;
  record.peer = source;
  FailureDetails details;
  details.waiting = false;
  details.mismatch = &mismatch;
  const Incoming mine = incoming;  // its list is cleared
  fail(record, {&mine.message, mine.transfer.get(), Operation::kRecv, source, 0}, details);
  return false;
}

bool MessageFlow::needs(const Peer& peer) const {
  if (!peer.sends.empty() || peer.receives > 0) return true;
  return peer.arrival && (peer.arrival->receive.transfer || peer.arrival->unexpected->receive.transfer);
}

void MessageFlow::look_around(Clock::time_point now) {
  if (transfers_.empty() || told()) return;
  guarded([&] { look_for_deadlines(now); });
  guarded([&] { look_for_dead_peers(); });
}

void MessageFlow::look_for_deadlines(Clock::time_point now) {
  if (now < next_deadline()) return;
  advance_channels();  // what is there by now counts
  const Awaited late = find_awaited([now](const TransferState& transfer, int) { return now >= transfer.deadline; });
  if (late.message == nullptr) return;
  FailureRecord record{};
  record.cause = FailureCause::kDeadline;
  record.peer = late.peer;
  fail(record, late, {});
}

void MessageFlow::look_for_dead_peers() {
  int ended = 0;
  const auto fail_of = [&](int wanted) {
    FailureRecord record{};
    record.cause = FailureCause::kPeerDied;
    record.peer = wanted;
    FailureDetails details;
    if (wanted != Message::kAnySource) details.peer_pid = failure_.peer_pid(wanted);
    fail(record, find_awaited([wanted](const TransferState&, int peer) { return peer == wanted; }), details);
  };
  for (int r = 0; r < world_size_; ++r) {
    Peer& peer = peers_[r];
    if (r == rank_ || (!needs(peer) && any_receives_ == 0) || !failure_.peer_ended(r)) continue;
    ++ended;
    // What it posted, or had taken, before its end counts.
    for (bool moved = true; moved;) {
      moved = send_some(r);
      moved |= receive_some(r);
    }
    if (needs(peer)) return fail_of(r);
  }
  if (any_receives_ > 0 && ended == world_size_ - 1) fail_of(Message::kAnySource);
}

}  // namespace mnnvl::cpu
