// An Exchange between processes that share a directory, whatever their network: for tests and diagnosis.
#pragma once

#include <cstdint>
#include <string>

#include "bootstrap/exchange.h"

namespace mnnvl {

class FileExchange final : public Exchange {
 public:
  // `directory` exists, is empty at the start and used by one group only; the files stay for the caller to remove.
  FileExchange(std::string directory, int rank, int size, int timeout_ms);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::vector<std::string> all_gather(const std::string& mine) override;

 private:
  std::string path(int peer) const;

  const std::string directory_;
  const int rank_;
  const int size_;
  const int timeout_ms_;
  uint64_t round_ = 0;
};

}  // namespace mnnvl
