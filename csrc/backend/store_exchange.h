// The control plane over a c10d store.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <chrono>
#include <string>

#include "bootstrap/exchange.h"

namespace mnnvl {

class StoreExchange final : public Exchange {
 public:
  // Keys are `prefix`/round/rank; `prefix` must be fresh for the group. Every wait ends after `timeout`, or with
  // Error(kAborted) soon after `*cancelled` is set. A rank that gives up a wait leaves word in the store, so that those who
  // come later don't wait for it.
  StoreExchange(c10::intrusive_ptr<c10d::Store> store, std::string prefix, int rank, int size,
                std::chrono::milliseconds timeout, const std::atomic<bool>& cancelled);
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::vector<std::string> all_gather(const std::string& mine) override;

 private:
  std::string key(uint64_t round, int rank) const;
  void wait_for(const std::vector<std::string>& keys, uint64_t round);
  std::string missing(const std::vector<std::string>& keys, uint64_t round) const;

  c10::intrusive_ptr<c10d::Store> store_;
  std::string prefix_;
  int rank_, size_;
  std::chrono::milliseconds timeout_;
  const std::atomic<bool>& cancelled_;
  uint64_t round_ = 0;
};

}  // namespace mnnvl
