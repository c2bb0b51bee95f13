// The CPU transport giving its memory back, for the sanitizers: collectives and messages before and after, other
// threads that look at it or abort it at any moment. tests/native/test_setup.cpp has the same of the memory of GPUs.
#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "native/harness.h"
#include "native/thread_exchange.h"
#include "transport/transport.h"

namespace mnnvl::test {
namespace {

constexpr int kWorld = 3;
constexpr int kTimeoutMs = 20000;

TransportOptions small() {
  TransportOptions options;
  options.timeout_ms = kTimeoutMs;
  options.workspace_bytes = 1 << 20;
  return options;
}

// The sum of what every rank brings, and a message round the ranks.
void check_values(Transport& transport, int rank, int seed) {
  Run run;
  run.timeout_ms = kTimeoutMs;
  std::vector<float> x(1000, float(rank + seed));
  AllReduceRequest request;
  request.in = request.out = x.data();
  request.numel = int64_t(x.size());
  transport.run(request, run);
  const float expected = float(kWorld * seed + kWorld * (kWorld - 1) / 2);
  for (float value : x) CHECK(value == expected, value, " instead of ", expected);

  int sent = 100 * seed + rank, received = -1;
  Message out, in;
  out.data = &sent;
  in.data = &received;
  out.bytes = in.bytes = sizeof(int);
  out.peer = (rank + 1) % kWorld;
  in.peer = (rank + kWorld - 1) % kWorld;
  const auto transfer = transport.messenger()->post({&out, 1, &in, 1}, kTimeoutMs, [](const auto&) {});
  transfer->wait(std::chrono::steady_clock::now() + std::chrono::milliseconds(kTimeoutMs));
  transport.check();
  CHECK(received == 100 * seed + in.peer, received);
}

// Looks at the transport from another thread as long as it lives.
class Onlooker {
 public:
  explicit Onlooker(Transport& transport)
      : thread_([this, &transport] {
          while (!stop_) {
            transport.check();
            if (const auto messenger = transport.messenger()) (void)messenger->wait_idle(std::chrono::milliseconds(0));
            looks_ += transport.attached() ? 1 : 0;
          }
        }) {}
  ~Onlooker() {
    stop_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int> looks_{0};
  std::thread thread_;
};

TEST(sleep_of_the_cpu_transport) {
  const auto exchanges = make_thread_exchanges(kWorld, kTimeoutMs);
  run_threads(kWorld, [&](int rank) {
    Exchange& exchange = *exchanges[rank];
    const std::unique_ptr<Transport> transport = make_cpu_transport(exchange, small());
    const Onlooker onlooker(*transport);
    for (int i = 0; i < iterations(20); ++i) {
      check_values(*transport, rank, i);
      CHECK(transport->detach(exchange) == 1 << 20);
      CHECK(transport->detach(exchange) == 0 && !transport->attached() && transport->messenger() == nullptr);
      const Error error = error_of([&] { check_values(*transport, rank, i); });
      CHECK(error.kind() == ErrorKind::kUnsupported &&
                std::string(error.what()).find("not attached") != std::string::npos,
            error.what());
      transport->attach(exchange);
      transport->attach(exchange);
    }
    check_values(*transport, rank, 99);
  });
}

// At any moment: every rank ends in a sleep or a wake, with the same rank to blame, and long before the deadline.
TEST(sleep_aborted) {
  for (int i = 0; i < iterations(30); ++i) {
    const auto exchanges = make_thread_exchanges(kWorld, kTimeoutMs);
    std::atomic<int> failed{0};
    const auto begin = std::chrono::steady_clock::now();
    run_threads(kWorld, [&](int rank) {
      Exchange& exchange = *exchanges[rank];
      const std::unique_ptr<Transport> transport = make_cpu_transport(exchange, small());
      const auto aborted = std::async(std::launch::async, [&] {
        std::this_thread::sleep_for(std::chrono::microseconds(100 * i));
        if (rank == 1) transport->abort(FailureCause::kLocalAbort);
      });
      const Error error = error_of([&] {
        for (int seed = 0;; ++seed) {
          try {
            check_values(*transport, rank, seed);
          } catch (const Error&) {  // the next sleep says so, to all
          }
          transport->detach(exchange);
          transport->attach(exchange);
        }
      });
      CHECK(std::string(error.what()).find("rank 1") != std::string::npos, error.what());
      ++failed;
      aborted.wait();
    });
    CHECK(failed == kWorld, failed.load());
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(kTimeoutMs / 2));
  }
}

}  // namespace
}  // namespace mnnvl::test
