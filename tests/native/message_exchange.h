// Requests of messages for native tests: their memory, what must arrive, and how they ended.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "native/cpu_group.h"

namespace mnnvl::test {

// What message `id` says: anybody can make it.
inline Bytes content(uint64_t id, int64_t bytes) { return any_bytes(id, bytes); }

// One request. Stays where it is while it is under way, also where a test has failed.
class Exchange {
 public:
  Exchange() = default;
  Exchange(const Exchange&) = delete;
  ~Exchange() {
    if (transfer_) transfer_->wait(std::chrono::steady_clock::time_point::max());
  }
  void send(uint64_t id, int64_t bytes, int peer, int32_t tag, Dtype dtype = Dtype::kUInt8) {
    memory_.push_back(content(id, bytes));
    sends_.push_back({memory_.back().data(), bytes, peer, tag, dtype});
  }
  void receive(uint64_t id, int64_t bytes, int peer, int32_t tag, Dtype dtype = Dtype::kUInt8) {
    memory_.emplace_back(static_cast<size_t>(bytes), std::byte{0x5a});
    receives_.push_back({memory_.back().data(), bytes, peer, tag, dtype});
    ids_.push_back(id);
  }
  void post(CpuRank& rank, int64_t timeout_ms = kLongMs) {
    // The arrays are read by the call only.
    const std::vector<Message> sends = sends_, receives = receives_;
    transfer_ = rank.messenger().post(
        {sends.data(), static_cast<int>(sends.size()), receives.data(), static_cast<int>(receives.size())}, timeout_ms,
        [this](const std::optional<Error>& error) {
          error_ = error;
          ends_.fetch_add(1);
        });
  }
  void wait() {
    CHECK(transfer_->wait(std::chrono::steady_clock::now() + std::chrono::milliseconds(2 * kLongMs)), "not over");
    check();
  }
  // Without a wait: somebody else moves it.
  void await_over() const {
    while (!over()) std::this_thread::sleep_for(std::chrono::microseconds(200));
    check();
  }
  Error error() {
    CHECK(transfer_->wait(std::chrono::steady_clock::now() + std::chrono::milliseconds(2 * kLongMs)), "not over");
    CHECK(ends_ == 1 && error_, ends_.load(), " ends, no error");
    return *error_;
  }
  bool over() const { return ends_ > 0; }
  int source() const { return transfer_->source(); }
  Messenger::Transfer& transfer() const { return *transfer_; }
  // `id` of the receive `index`, where it wasn't known before.
  void expect(size_t index, uint64_t id) { ids_[index] = id; }
  void check() const {
    CHECK(ends_ == 1, ends_.load(), " ends");
    if (error_) throw Error(*error_);
    for (size_t i = 0; i < ids_.size(); ++i) {
      if (ids_[i] == kUnknown) continue;
      const Bytes expected = content(ids_[i], receives_[i].bytes);
      const auto* seen = static_cast<const std::byte*>(receives_[i].data);
      CHECK(std::equal(expected.begin(), expected.end(), seen), "other bytes from ", receives_[i].peer, " with tag ",
            receives_[i].tag);
    }
  }

  static constexpr uint64_t kUnknown = ~uint64_t{0};

 private:
  std::deque<Bytes> memory_;
  std::vector<Message> sends_, receives_;
  std::vector<uint64_t> ids_;
  std::shared_ptr<Messenger::Transfer> transfer_;
  std::optional<Error> error_;
  std::atomic<int> ends_{0};
};

// Of one message each, begun.
inline std::unique_ptr<Exchange> isend(CpuRank& rank, uint64_t id, int64_t bytes, int peer, int32_t tag = 0,
                                       int64_t timeout_ms = kLongMs) {
  auto exchange = std::make_unique<Exchange>();
  exchange->send(id, bytes, peer, tag);
  exchange->post(rank, timeout_ms);
  return exchange;
}
inline std::unique_ptr<Exchange> irecv(CpuRank& rank, uint64_t id, int64_t bytes, int peer, int32_t tag = 0,
                                       int64_t timeout_ms = kLongMs) {
  auto exchange = std::make_unique<Exchange>();
  exchange->receive(id, bytes, peer, tag);
  exchange->post(rank, timeout_ms);
  return exchange;
}

}  // namespace mnnvl::test
