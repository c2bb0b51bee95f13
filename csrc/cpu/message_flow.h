// Messages under way: which receive gets which message, and the moving of their bytes through the channels. All of one
// rank's sends and receives, as a state that any thread may drive, one at a time: threads and waiting are messenger.h.
//
// Matching. A receive takes the earliest message of its source with its tag, one from any source the first with its tag
// of anybody. The message at the head of a ring goes to the earliest posted receive that fits; if none does, while some
// receive waits for this source or for any, it is drained to the heap whole (an unexpected message), so that those
// behind it come into sight; new receives look there first, in the order of arrival. Without a receive that may be
// meant, a message stays in its ring, and its sender waits. Both ends' bytes and dtype must agree, which is found when
// the two meet.
//
// Progress. advance() gives every channel its turn, in which it moves what it can and at most a ring, and waits for
// none. Sends of one pair go one after another; nothing else has to wait for anything: what a rank has posted moves as
// soon as both ends have posted it, whatever the order in which ranks listed their messages.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "cpu/group_failure.h"
#include "cpu/segment.h"
#include "protocol/messenger.h"

namespace mnnvl::cpu {

// One request under way.
struct TransferState {
  using Clock = std::chrono::steady_clock;

  Messenger::Done done;
  Clock::time_point started;
  Clock::time_point deadline;
  // The rest belongs to the flow, until it hands the transfer out as finished.
  int left = 0;  // messages that are not over
  int source = -1;  // of the first receive
  uint64_t sequence = 0;
  size_t place = 0;  // in the flow's list
  bool finished = false;
  std::optional<Error> error;
};

// Not thread-safe. Throws from post() only; what fails later ends the transfers.
class MessageFlow {
 public:
  using Clock = TransferState::Clock;

  // `failure` must outlive it.
  MessageFlow(const CommunicatorOptions& options, GroupFailure& failure);

  // Takes the request up and moves of it what can be moved at once. Throws, with nothing taken up, if the group is
  // broken.
  void post(const ExchangeRequest& request, const std::shared_ptr<TransferState>& transfer);
  // Moves what can be moved, and ends everything if the group has been broken. True if anything changed.
  bool advance();
  // What no word shows: ends everything if a deadline has passed, or a peer that is needed has died.
  void look_around(Clock::time_point now);
  // Breaks the group for a reason of this rank's own.
  void fail_here(const std::string& what);

  bool outstanding() const { return !transfers_.empty(); }
  // Of what is outstanding.
  Clock::time_point next_deadline() const;
  bool has_finished() const { return !finished_.empty(); }
  // Those that ended since the last time.
  std::vector<std::shared_ptr<TransferState>> take_finished() { return std::exchange(finished_, {}); }

 private:
  using State = std::shared_ptr<TransferState>;
  struct Outgoing {
    Message message;
    State transfer;
    bool begun = false;  // its header is in the ring
    int64_t moved = 0;
  };
  struct Incoming {
    Message message;
    State transfer;  // null: none
    bool first = false;  // of its request
  };
  struct Unexpected {
    int source;
    MessageHeader header;
    std::unique_ptr<std::byte[]> data;
    bool complete = false;
    Incoming receive;  // found it before it was complete
  };
  struct Arrival {  // the message at the head of a ring, once its header has been read
    std::byte* to;
    int64_t bytes;
    int64_t moved = 0;
    Incoming receive;
    std::list<Unexpected>::iterator unexpected;  // where `receive` is none
  };
  struct Peer {
    Channel out, in;
    Bell* bell;
    uint32_t posted = 0, taken_seen = 0;  // of `out`
    uint32_t taken = 0, posted_seen = 0;  // of `in`
    uint32_t messages_out = 0, messages_in = 0;  // begun: the next one's sequence number
    std::deque<Outgoing> sends;
    std::optional<Arrival> arrival;
    int receives = 0;  // unmatched ones that name this source
  };
  struct Awaited {  // what an error names
    const Message* message = nullptr;
    const TransferState* transfer = nullptr;
    Operation operation = Operation::kRecv;
    int peer = 0;
    int64_t moved = 0;
  };

  bool told();
  bool advance_channels();
  bool send_some(int destination);
  bool receive_some(int source);
  bool begin_arrival(int source, const MessageHeader& header);
  void end_arrival(Peer& peer);
  void receive(Incoming incoming);
  bool take_unexpected(Incoming& incoming);
  bool agrees(const Incoming& incoming, int source, const MessageHeader& header);
  bool waits_for(const Peer& peer) const { return peer.receives > 0 || any_receives_ > 0; }
  bool needs(const Peer& peer) const;
  void look_for_deadlines(Clock::time_point now);
  void look_for_dead_peers();

  // What can throw in the middle is memory, for what is remembered and what is unexpected.
  template <typename Body>
  void guarded(Body body) {
    try {
      body();
    } catch (const std::exception& error) {
      fail_here(error.what());
    }
  }
  void finish_one(const State& transfer);
  template <typename Wanted>
  Awaited find_awaited(Wanted wanted) const;
  FailureRecord record_of(FailureRecord record, const Awaited& awaited) const;
  void fail(FailureRecord record, const Awaited& awaited, FailureDetails details);
  void end_all(const Error& error);

  const int rank_;
  const int world_size_;
  GroupFailure& failure_;
  std::vector<Peer> peers_;
  std::list<Incoming> receives_;  // unmatched, in the order in which they were posted
  std::list<Unexpected> unexpected_;  // in the order of their arrival
  int any_receives_ = 0;  // of receives_, those from any source
  int turn_ = 0;
  uint64_t sequence_ = 0;
  std::vector<State> transfers_;  // outstanding
  std::vector<State> finished_;
};

}  // namespace mnnvl::cpu
