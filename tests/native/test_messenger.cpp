// Messages between pairs of ranks: every byte, in every order that programs may ask for. Threads as ranks; several
// processes are tested from Python.
#include <algorithm>
#include <deque>
#include <optional>

#include "native/cpu_group.h"

namespace mnnvl::test {
namespace {

using Bytes = std::vector<std::byte>;
using Clock = std::chrono::steady_clock;

constexpr int64_t kSmallRing = 128;  // slots: a message of a few hundred bytes is several

Clock::time_point at_last() { return Clock::now() + std::chrono::milliseconds(2 * kLongMs); }

// What message `id` says.
Bytes content(uint64_t id, int64_t bytes) {
  Bytes data(static_cast<size_t>(bytes));
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(mix(id + i / 8) >> (i % 8 * 8));
  return data;
}

// One request with its memory, and what came of it.
class Exchange {
 public:
  void send(uint64_t id, int64_t bytes, int peer, int32_t tag) {
    memory_.push_back(content(id, bytes));
    sends_.push_back({memory_.back().data(), bytes, peer, tag, Dtype::kUInt8});
  }
  void receive(uint64_t id, int64_t bytes, int peer, int32_t tag) {
    memory_.emplace_back(static_cast<size_t>(bytes), std::byte{0x5a});
    receives_.push_back({memory_.back().data(), bytes, peer, tag, Dtype::kUInt8});
    expected_.emplace_back(memory_.back().data(), content(id, bytes));
  }
  void post(CpuRank& rank, int64_t timeout_ms = kLongMs) {
    const ExchangeRequest request{sends_.data(), static_cast<int>(sends_.size()), receives_.data(),
                                  static_cast<int>(receives_.size())};
    transfer_ = rank.messenger().post(request, timeout_ms, [this](const std::optional<Error>& error) {
      ++ends_;
      error_ = error;
    });
    std::fill(sends_.begin(), sends_.end(), Message{});  // the arrays are read by the call only
    std::fill(receives_.begin(), receives_.end(), Message{});
  }
  void wait() {
    CHECK(transfer_->wait(at_last()), "not over");
    check();
  }
  // It is over, whoever has moved it.
  void check() const {
    CHECK(ends_ == 1, ends_.load(), " ends");
    if (error_) throw Error(*error_);
    for (const auto& [at, bytes] : expected_) CHECK(std::equal(bytes.begin(), bytes.end(), at), "other bytes");
  }
  Error error() const {
    CHECK(ends_ == 1 && error_, "no error");
    return *error_;
  }
  bool over() const { return ends_ > 0; }
  Messenger::Transfer& transfer() const { return *transfer_; }

 private:
  std::deque<Bytes> memory_;
  std::vector<Message> sends_, receives_;
  std::vector<std::pair<const std::byte*, Bytes>> expected_;
  std::shared_ptr<Messenger::Transfer> transfer_;
  std::atomic<int> ends_{0};
  std::optional<Error> error_;
};

TEST(messenger_sends_and_receives) {
  const Segments segments(2, 4096, 1024);
  run_group(segments, [&](CpuRank& rank) {
    for (int64_t bytes : {0, 1, 31, 32, 33, 992, 1000, 5000, 100000}) {
      for (int from : {0, 1}) {
        Exchange message;
        if (rank.rank() == from) {
          message.send(static_cast<uint64_t>(bytes), bytes, 1 - from, 7);
        } else {
          message.receive(static_cast<uint64_t>(bytes), bytes, from, 7);
        }
        message.post(rank);
        message.wait();
      }
    }
  });
}

}  // namespace
}  // namespace mnnvl::test
