#include "backend/store_exchange.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <thread>

#include "common/error.h"

namespace mnnvl {
namespace {
constexpr auto kLongPause = std::chrono::microseconds(6400);
}

StoreExchange::StoreExchange(c10::intrusive_ptr<c10d::Store> store, std::string prefix, int rank, int size,
                             std::chrono::milliseconds timeout, const std::atomic<bool>& cancelled)
    : store_(std::move(store)),
      prefix_(std::move(prefix)),
      rank_(rank),
      size_(size),
      timeout_(timeout),
      cancelled_(cancelled) {}

std::string StoreExchange::key(uint64_t round, int rank) const { return str(prefix_, "/", round, "/", rank); }

// Polls instead of Store::wait(), which nothing but its time-out can end.
void StoreExchange::wait_for(const std::vector<std::string>& keys, uint64_t round) {
  const std::string gave_up = prefix_ + "/gave_up";
  const auto deadline = std::chrono::steady_clock::now() + timeout_;
  auto pause = std::chrono::microseconds(100);
  while (!store_->check(keys)) {
    if (pause >= kLongPause && store_->check({gave_up})) {
      const std::vector<uint8_t> text = store_->get(gave_up);
      fail(ErrorKind::kPeerFailed, std::string(text.begin(), text.end()));
    }
    std::string reason;
    if (cancelled_) reason = str("mnnvl: abort() was called on rank ", rank_, " during the set-up");
    if (std::chrono::steady_clock::now() > deadline) reason = str("mnnvl set-up: ", missing(keys, round));
    if (!reason.empty()) {
      store_->set(gave_up, std::vector<uint8_t>(reason.begin(), reason.end()));
      fail(cancelled_ ? ErrorKind::kAborted : ErrorKind::kTimeout, reason);
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, kLongPause);
  }
}

std::string StoreExchange::missing(const std::vector<std::string>& keys, uint64_t round) const {
  std::string ranks;
  int count = 0;
  for (int r = 0; r < size_; ++r) {
    if (!store_->check({keys[r]})) ranks += str(count++ == 0 ? "" : ", ", r);
  }
  return str("rank ", rank_, " waited ", timeout_.count() / 1000.0, " s for rank", count == 1 ? " " : "s ", ranks,
             " to reach step ", round, " of ", prefix_);
}

std::vector<std::string> StoreExchange::all_gather(const std::string& mine) {
  const uint64_t round = round_++;
  std::vector<std::string> keys, all;
  for (int r = 0; r < size_; ++r) keys.push_back(key(round, r));
  try {
    store_->set(keys[rank_], std::vector<uint8_t>(mine.begin(), mine.end()));
    wait_for(keys, round);
    for (const std::string& k : keys) {
      const std::vector<uint8_t> value = store_->get(k);
      all.emplace_back(value.begin(), value.end());
    }
    // Whoever posted this round has read the last one, so its keys are no longer needed.
    if (round > 0) store_->deleteKey(key(round - 1, rank_));
  } catch (const c10::Error& error) {
    fail(ErrorKind::kSystem, "mnnvl set-up: rank ", rank_, " lost the c10d store: ", error.what_without_backtrace());
  }
  return all;
}

}  // namespace mnnvl
