#include "cpu/message_flow.h"

#include <algorithm>

namespace mnnvl::cpu {
namespace {

bool fits(const Message& receive, int source, const MessageHeader& header) {
  return (receive.peer == source || receive.peer == Message::kAnySource) && receive.tag == header.tag;
}

}  // namespace

MessageFlow::MessageFlow(const CommunicatorOptions& options, GroupFailure& failure)
    : rank_(options.rank), world_size_(options.world_size), failure_(failure), peers_(options.segments.size()) {
  const Division division = divide(options.segment_bytes, world_size_);
  const auto channel = [&](int source, int destination) {
    return channel_at(options.segments[destination] + division.rings_offset(), division.ring_slot_bytes, source,
                      destination, world_size_);
  };
  for (int r = 0; r < world_size_; ++r) {
    if (r == rank_) continue;
    Peer& peer = peers_[r];
    peer.out = channel(rank_, r);
    peer.in = channel(r, rank_);
    peer.bell = &control_of(options.segments[r])->bell;
    peer.posted = peer.out.words->posted.load(std::memory_order_seq_cst);
    peer.taken_seen = peer.out.words->taken.load(std::memory_order_seq_cst);
    peer.taken = peer.posted_seen = peer.in.words->taken.load(std::memory_order_seq_cst);
  }
}

void MessageFlow::post(const ExchangeRequest& request, const State& transfer) {
  failure_.check();
  transfer->sequence = ++sequence_;
  transfer->left = request.send_count + request.receive_count;
  FailureRecord record{};
  if (failure_.told(&record)) {
    FailureDetails details;
    details.waiting = false;
    Awaited nothing;
    nothing.transfer = transfer.get();
    nothing.operation = request.send_count > 0 ? Operation::kSend : Operation::kRecv;
    const Error error = failure_.end(record_of(record, nothing), 0, details);
    end_all(error);
    throw error;
  }
  transfer->place = transfers_.size();
  transfers_.push_back(transfer);
  if (transfer->left == 0) {
    transfer->left = 1;
    return finish_one(transfer);
  }
  guarded([&] {
    for (int i = 0; i < request.send_count && !transfer->finished; ++i) {
      peers_[request.sends[i].peer].sends.push_back({request.sends[i], transfer});
      send_some(request.sends[i].peer);
    }
    for (int i = 0; i < request.receive_count && !transfer->finished; ++i) {
      receive({request.receives[i], transfer, i == 0});
    }
  });
}

bool MessageFlow::advance() {
  if (transfers_.empty()) return false;
  if (told()) return true;
  bool moved = true;  // if it throws
  guarded([&] { moved = advance_channels(); });
  return moved;
}

// The first to get its turn is another one each time: a receive from any source takes what it sees first.
bool MessageFlow::advance_channels() {
  bool moved = false;
  turn_ = (turn_ + 1) % world_size_;
  for (int i = 0; i < world_size_; ++i) {
    const int r = (turn_ + i) % world_size_;
    if (r == rank_) continue;
    moved |= send_some(r);
    moved |= receive_some(r);
  }
  return moved;
}

bool MessageFlow::send_some(int destination) {
  Peer& peer = peers_[destination];
  bool moved = false;
  for (int i = 0; i < kRingSlots && !peer.sends.empty(); ++i) {
    if (peer.posted - peer.taken_seen >= kRingSlots) {
      peer.taken_seen = peer.out.words->taken.load(std::memory_order_seq_cst);
      if (peer.posted - peer.taken_seen >= kRingSlots) break;
    }
    Outgoing& send = peer.sends.front();
    const Message& message = send.message;
    std::byte* to = peer.out.slot(peer.posted);
    int64_t room = peer.out.slot_bytes;
    if (!std::exchange(send.begun, true)) {
      const MessageHeader header{
          message.bytes, message.tag, static_cast<int32_t>(message.dtype), peer.messages_out++, {}};
      copy_bytes(to, &header, sizeof header);
      to += sizeof header;
      room -= static_cast<int64_t>(sizeof header);
    }
    const int64_t bytes = min64(room, message.bytes - send.moved);
    copy_bytes(to, static_cast<const std::byte*>(message.data) + send.moved, bytes);
    send.moved += bytes;
    peer.out.words->posted.store(++peer.posted, std::memory_order_seq_cst);
    ring(*peer.bell);
    moved = true;
    if (send.moved < message.bytes) continue;
    finish_one(send.transfer);
    peer.sends.pop_front();
  }
  return moved;
}

bool MessageFlow::receive_some(int source) {
  Peer& peer = peers_[source];
  bool moved = false;
  for (int i = 0; i < kRingSlots && (peer.arrival || waits_for(peer)); ++i) {
    if (peer.taken == peer.posted_seen) {
      peer.posted_seen = peer.in.words->posted.load(std::memory_order_seq_cst);
      if (peer.taken == peer.posted_seen) break;
    }
    moved = true;
    const std::byte* from = peer.in.slot(peer.taken);
    int64_t held = peer.in.slot_bytes;
    if (!peer.arrival) {
      MessageHeader header;
      copy_bytes(&header, from, sizeof header);
      if (!begin_arrival(source, header)) break;
      from += sizeof header;
      held -= static_cast<int64_t>(sizeof header);
    }
    Arrival& arrival = *peer.arrival;
    const int64_t bytes = min64(held, arrival.bytes - arrival.moved);
    copy_bytes(arrival.to + arrival.moved, from, bytes);
    arrival.moved += bytes;
    peer.in.words->taken.store(++peer.taken, std::memory_order_seq_cst);
    ring(*peer.bell);
    if (arrival.moved == arrival.bytes) end_arrival(peer);
  }
  return moved;
}

// Finds the receive that the message goes to. False if that broke the group.
bool MessageFlow::begin_arrival(int source, const MessageHeader& header) {
  Peer& peer = peers_[source];
  MNNVL_ASSERT(header.sequence == peer.messages_in, "message ", header.sequence, " of rank ", source, " in place of ",
               peer.messages_in);
  const auto found = std::find_if(receives_.begin(), receives_.end(),
                                  [&](const Incoming& r) { return fits(r.message, source, header); });
  if (found == receives_.end()) {
    std::unique_ptr<std::byte[]> heap(new std::byte[static_cast<size_t>(header.bytes)]);
    std::byte* to = heap.get();
    unexpected_.push_back({source, header, std::move(heap)});
    peer.arrival = Arrival{to, header.bytes, 0, {}, std::prev(unexpected_.end())};
  } else {
    if (!agrees(*found, source, header)) return false;
    if (found->first) found->transfer->source = source;
    --(found->message.peer == Message::kAnySource ? any_receives_ : peer.receives);
    peer.arrival = Arrival{static_cast<std::byte*>(found->message.data), header.bytes, 0, std::move(*found), {}};
    receives_.erase(found);
  }
  ++peer.messages_in;
  return true;
}

void MessageFlow::end_arrival(Peer& peer) {
  const Arrival arrival = std::move(*peer.arrival);
  peer.arrival.reset();
  if (arrival.receive.transfer) return finish_one(arrival.receive.transfer);
  arrival.unexpected->complete = true;
  if (!arrival.unexpected->receive.transfer) return;
  const Incoming receive = std::move(arrival.unexpected->receive);
  copy_bytes(receive.message.data, arrival.to, arrival.bytes);
  unexpected_.erase(arrival.unexpected);
  finish_one(receive.transfer);
}

void MessageFlow::receive(Incoming incoming) {
  if (take_unexpected(incoming)) return;
  const int source = incoming.message.peer;
  ++(source == Message::kAnySource ? any_receives_ : peers_[source].receives);
  receives_.push_back(std::move(incoming));
  if (source != Message::kAnySource) {
    receive_some(source);
  } else {
    advance_channels();
  }
}

// True if the receive has found its message, or that broke the group.
bool MessageFlow::take_unexpected(Incoming& incoming) {
  const auto found = std::find_if(unexpected_.begin(), unexpected_.end(), [&](const Unexpected& u) {
    return !u.receive.transfer && fits(incoming.message, u.source, u.header);
  });
  if (found == unexpected_.end()) return false;
  if (!agrees(incoming, found->source, found->header)) return true;
  if (incoming.first) incoming.transfer->source = found->source;
  if (!found->complete) {
    found->receive = std::move(incoming);
    return true;
  }
  copy_bytes(incoming.message.data, found->data.get(), found->header.bytes);
  unexpected_.erase(found);
  finish_one(incoming.transfer);
  return true;
}

void MessageFlow::finish_one(const State& transfer) {
  if (--transfer->left > 0) return;
  transfer->finished = true;
  finished_.push_back(transfer);
  transfers_.back()->place = transfer->place;
  std::swap(transfers_[transfer->place], transfers_.back());
  transfers_.pop_back();
}

MessageFlow::Clock::time_point MessageFlow::next_deadline() const {
  Clock::time_point next = Clock::time_point::max();
  for (const State& transfer : transfers_) next = std::min(next, transfer->deadline);
  return next;
}

}  // namespace mnnvl::cpu
