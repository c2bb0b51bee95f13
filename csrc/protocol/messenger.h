// Messages between pairs of ranks as work under way on the host: what the CPU transport offers beside its collectives.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "common/error.h"
#include "protocol/requests.h"

namespace mnnvl {

// All messages of one rank. Any thread may call anything; messages may be under way while another thread runs
// collectives.
class Messenger {
 public:
  // One request under way. May be kept for as long as anybody likes, beyond the messenger's life too.
  class Transfer {
   public:
    virtual ~Transfer() = default;
    // True once all its messages are over, well or not, and `done` has returned; false at `deadline`. The waiting
    // thread moves this rank's messages meanwhile. Not from within a Done.
    virtual bool wait(std::chrono::steady_clock::time_point deadline) = 0;
    // The rank that the request's first receive came from; meaningful once the transfer has ended well. -1: none.
    virtual int source() const = 0;
  };
  // Called once for each transfer, with what it failed of: on the thread that ended it, perhaps within post(). Holds no
  // lock of the messenger, must be short, must not wait, must not throw.
  using Done = std::function<void(const std::optional<Error>&)>;

  virtual ~Messenger() = default;

  // Begins the messages of the request, whose memory must stay until the transfer is over. It is over by `timeout_ms`
  // (positive; a very long one saturates) at the latest: with an error, which breaks the group as that of a collective
  // does. Bad arguments are Error(kInvalidArgument) and break nothing; in a broken group, its error is thrown at once.
  virtual std::shared_ptr<Transfer> post(const ExchangeRequest& request, int64_t timeout_ms, Done done) = 0;
  // True once no transfer is under way and every Done has returned; false after `timeout`.
  virtual bool wait_idle(std::chrono::milliseconds timeout) = 0;
};

}  // namespace mnnvl
