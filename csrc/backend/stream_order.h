// Never two collectives at once in one workspace: calls on one group from several streams are chained.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <memory>
#include <optional>

namespace mnnvl {

// Not thread-safe; the owner calls enter() before and leave() after each collective, in their order.
//
// Work inside a capture is chained within that capture; between a captured graph's replays and other calls the order
// is the user's, who alone knows where the graph is replayed.
class StreamOrder {
 public:
  // Makes `stream` wait for the collectives enqueued before this one. Returns true while `stream` is capturing;
  // throws if its capture has been invalidated.
  bool enter(c10::Stream stream);
  // `end` has been recorded on `stream` behind the collective.
  void leave(c10::Stream stream, std::shared_ptr<c10::Event> end);
  // Whether the last collective outside captures has ended.
  bool idle() const { return !eager_ || eager_->end->query(); }

 private:
  struct Last {
    c10::Stream stream;
    std::shared_ptr<c10::Event> end;
  };
  std::optional<Last> eager_;     // of the last call outside captures
  std::optional<Last> captured_;  // of the last call inside one
  std::optional<uint64_t> captured_id_, current_id_;
};

}  // namespace mnnvl
