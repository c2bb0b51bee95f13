// Collectives over raw pointers, on the CPU or on a GPU stream: requests in, CPU steps or kernels out. No torch.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "bootstrap/exchange.h"
#include "memory/options.h"
#include "protocol/counters.h"
#include "protocol/failure.h"
#include "protocol/messenger.h"
#include "protocol/requests.h"
#include "protocol/types.h"

namespace mnnvl {

struct TransportOptions {
  int64_t timeout_ms = 0;  // of each wait of the set-up, and of collectives that bring none of their own
  int64_t workspace_bytes = 0;  // all of a rank's workspace; 0: the default
  int64_t stage_bytes = 0;  // nonzero: a Lamport-only workspace whose generations hold this (the standalone function)
  Strategy strategy = Strategy::kAuto;  // for calls that ask for kAuto
  // By world size, where somebody has measured it: up to how many bytes kAuto takes one shot. Goes before the tables.
  std::map<int, int64_t> cpu_oneshot_bytes, cuda_oneshot_bytes;
  bool pdl = false;  // GPU: programmatic dependent launches also where a request doesn't ask; may differ between ranks
  int max_ctas = 0;  // GPU: most blocks of a launch, and so multiprocessors that it takes; 0: all there are
  int async_max_ctas = 0;  // the same of float sums that run beside compute; may differ between ranks
  bool multicast = true;  // allowed; used where every rank can
  std::string multicast_forbidden;  // the switches that forbid multicast objects, "NAME=value"; empty: none
  Bootstrap bootstrap = Bootstrap::kAuto;
  std::string host_id;
  std::string nccl_path;
  std::function<void(const std::string&)> log;  // of failures that no call is there to raise; any thread
  std::shared_ptr<TransportCounters> counters;  // of this transport and those that follow it; null: nobody looks
};

// How one request is run.
struct Run {
  int64_t timeout_ms = 0;  // of every wait, saturating
  void* stream = nullptr;  // the native handle; null on the CPU
  bool beside_compute = false;  // GPU: leave multiprocessors to others; may differ between ranks
};

// All Requests are collective and made in the same order on every rank, from one thread at a time. Failures are Errors;
// after one, every later request throws. World size is at least 2: a group of one never makes a transport.
class Transport {
 public:
  virtual ~Transport() = default;

  // On the CPU it returns with the result in place; on a GPU it enqueues.
  virtual void run(const Request& request, const Run& run) = 0;

  // Point-to-point on a GPU: enqueues. Not collective, and free to be under way beside collectives; the caller orders
  // those requests that send to, or receive from, the same rank.
  virtual void exchange(const ExchangeRequest& request, const Run& run);
  // The messages between pairs of ranks that a host moves: those of the CPU, which are no part of the order of requests
  // and may be under way beside them, on other threads. Null on a GPU, where messages are enqueued on a stream like
  // collectives. Null while detached, too. The transfers that it gives may live on.
  virtual std::shared_ptr<Messenger> messenger() { return nullptr; }

  // Sleep; csrc/README.md, "Giving the memory back". Both are collective, in the order of requests, and beside no other
  // call but check(), abort(), messenger() and attached(). Both throw on every rank if they throw on one.
  //
  // Waits for what was enqueued on every rank, then gives the workspace's memory back: this rank's bytes of it, 0 if it
  // was detached before. Addresses stay, so launches that were captured are valid again after attach(); they must not
  // run meanwhile. A failure before any rank has let go leaves the transport attached.
  virtual size_t detach(Exchange& exchange) = 0;
  // New memory, at rest. Nothing if attached. After a failure it is detached, and this may be called again.
  virtual void attach(Exchange& exchange) = 0;
  // Any thread. While it is false, requests throw what check_attached() throws, before anything is enqueued.
  virtual bool attached() const = 0;

  // Throws the failure of this transport, if it has one by now. Any thread.
  virtual void check() = 0;
  // From any thread: ends all waits here, and tells the peers that the failure began here: kLocalAbort or kLocalError.
  virtual void abort(FailureCause cause) = 0;
  // Waits for what was enqueued, and for messages under way, each of which ends by its deadline, and releases the
  // memory; nothing but check() may be called afterwards. Idempotent; the destructor does it too, but ends messages
  // under way by abort(): nobody is left to want them.
  virtual void close() = 0;
};

// Error(kUnsupported) with "not attached", which breaks no group.
[[noreturn]] void fail_detached();
inline void check_attached(const Transport& transport) {
  if (!transport.attached()) fail_detached();
}

// Collective: what must be the same on every rank and isn't looked at elsewhere. Error(kInvalidArgument) naming two
// ranks.
void agree_on_options(Exchange& exchange, const TransportOptions& options, int64_t oneshot_bytes);
// Of cpu_oneshot_bytes or cuda_oneshot_bytes; -1: nobody has measured it.
int64_t tuned(const std::map<int, int64_t>& oneshot_bytes, int world_size);

// A group of one has no transport, and exchanges nothing. On a GPU it is prepared once, which loads kernels.
void prepare_alone(int device);
// `device`: a CUDA ordinal, current; -1: the CPU.
void run_alone(const FusedRequest& request, int device, const Run& run);

std::unique_ptr<Transport> make_cpu_transport(Exchange& exchange, const TransportOptions& options);
// `device` is a CUDA ordinal.
std::unique_ptr<Transport> make_cuda_transport(Exchange& exchange, int device, const TransportOptions& options);

}  // namespace mnnvl
