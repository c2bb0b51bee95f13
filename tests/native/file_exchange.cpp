#include "native/file_exchange.h"

#include <errno.h>
#include <stdio.h>

#include <fstream>
#include <iterator>
#include <thread>

#include "common/error.h"
#include "system/deadline.h"

namespace mnnvl {

FileExchange::FileExchange(std::string directory, int rank, int size, int timeout_ms)
    : directory_(std::move(directory)), rank_(rank), size_(size), timeout_ms_(timeout_ms) {}

std::string FileExchange::path(int peer) const { return str(directory_, "/", round_, ".", peer); }

std::vector<std::string> FileExchange::all_gather(const std::string& mine) {
  // Written aside and renamed, so that a file that can be opened is whole.
  std::string aside = path(rank_) + ".part";
  std::ofstream file(aside, std::ios::binary);
  file << mine;
  file.close();
  if (!file) fail_errno(errno, "writing ", aside);
  if (rename(aside.c_str(), path(rank_).c_str()) != 0) fail_errno(errno, "rename of ", aside);

  Deadline deadline(timeout_ms_);
  std::vector<std::string> records;
  while (static_cast<int>(records.size()) < size_) {
    std::ifstream file(path(static_cast<int>(records.size())), std::ios::binary);
    if (file) {
      records.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
      continue;
    }
    if (deadline.passed()) {
      fail(ErrorKind::kTimeout, "rank ", records.size(), " did not come to all_gather number ", round_, " within ",
           timeout_ms_, " ms");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ++round_;
  return records;
}

}  // namespace mnnvl
