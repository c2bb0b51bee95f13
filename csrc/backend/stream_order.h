// Never two collectives at once in one workspace: calls on one group from several streams are chained.
#pragma once

#include <c10/core/Stream.h>

#include <cstdint>
#include <optional>

namespace mnnvl {

// Not thread-safe; the owner calls it in the order of the collectives.
//
// The chain is made only when the stream changes, by an event recorded then on the previous stream, so that the common
// case of one stream costs nothing. Work inside a capture is chained within that capture; between a captured graph's
// replays and other calls the order is the user's, who alone knows where the graph is replayed.
class StreamOrder {
 public:
  // Makes `stream` wait for the collectives enqueued before this one. Returns true while `stream` is capturing.
  bool enter(c10::Stream stream);

 private:
  struct Captured {
    uint64_t id;
    c10::Stream stream;
  };
  std::optional<c10::Stream> eager_;     // of the last call outside captures
  std::optional<Captured> captured_;     // of the last call inside one
};

}  // namespace mnnvl
