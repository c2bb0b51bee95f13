#include "backend/store_exchange.h"

#include "common/error.h"

namespace mnnvl {

StoreExchange::StoreExchange(c10::intrusive_ptr<c10d::Store> store, std::string prefix, int rank, int size,
                             std::chrono::milliseconds timeout)
    : store_(std::move(store)), prefix_(std::move(prefix)), rank_(rank), size_(size), timeout_(timeout) {}

std::string StoreExchange::key(uint64_t round, int rank) const { return str(prefix_, "/", round, "/", rank); }

std::vector<std::string> StoreExchange::all_gather(const std::string& mine) {
  const uint64_t round = round_++;
  store_->set(key(round, rank_), std::vector<uint8_t>(mine.begin(), mine.end()));
  std::vector<std::string> keys;
  for (int r = 0; r < size_; ++r) keys.push_back(key(round, r));
  try {
    store_->wait(keys, timeout_);
  } catch (const std::exception& error) {
    std::string missing;
    for (int r = 0; r < size_; ++r) {
      bool there = false;
      try {
        there = store_->check({keys[r]});
      } catch (const std::exception&) {
        fail(ErrorKind::kSystem, "mnnvl set-up: rank ", rank_, " lost the c10d store: ", error.what());
      }
      if (!there) missing += str(missing.empty() ? "" : ", ", r);
    }
    fail(ErrorKind::kTimeout, "mnnvl set-up: rank ", rank_, " waited ", timeout_.count() / 1000.0, " s for rank",
         missing.find(',') == std::string::npos ? " " : "s ", missing, " to reach step ", round, " of ", prefix_);
  }
  std::vector<std::string> all;
  for (const std::string& k : keys) {
    const std::vector<uint8_t> value = store_->get(k);
    all.emplace_back(value.begin(), value.end());
  }
  // Whoever posted this round has read the last one, so its keys are no longer needed.
  if (round > 0) store_->deleteKey(key(round - 1, rank_));
  return all;
}

}  // namespace mnnvl
