#include "native/thread_exchange.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>

#include "common/error.h"

namespace mnnvl {
namespace {

struct Meeting {
  explicit Meeting(int world_size) : records(world_size) {}

  std::mutex mutex;
  std::condition_variable changed;
  uint64_t round = 0;  // completed all_gathers
  int arrived = 0;
  std::vector<std::optional<std::string>> records;  // of the round under way
  std::vector<std::string> last;                    // of the completed round
  std::string broken;
};

class ThreadExchange final : public Exchange {
 public:
  ThreadExchange(std::shared_ptr<Meeting> meeting, int rank, int size, int timeout_ms)
      : meeting_(std::move(meeting)), rank_(rank), size_(size), timeout_ms_(timeout_ms) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::vector<std::string> all_gather(const std::string& mine) override {
    Meeting& m = *meeting_;
    std::unique_lock<std::mutex> lock(m.mutex);
    if (!m.broken.empty()) fail(ErrorKind::kTimeout, m.broken);
    const uint64_t round = m.round;
    m.records[rank_] = mine;
    if (++m.arrived == size_) {
      // `last` can be overwritten only once all ranks have come again, hence have read it.
      m.last.clear();
      for (auto& record : m.records) m.last.push_back(std::move(*record));
      for (auto& record : m.records) record.reset();
      m.arrived = 0;
      ++m.round;
      m.changed.notify_all();
      return m.last;
    }
    auto settled = [&] { return m.round != round || !m.broken.empty(); };
    bool in_time = m.changed.wait_for(lock, std::chrono::milliseconds(timeout_ms_), settled);
    if (!in_time) {
      std::string absent;
      for (int peer = 0; peer < size_; ++peer) {
        if (!m.records[peer]) absent += str(absent.empty() ? "" : ", ", peer);
      }
      m.broken = str("rank(s) ", absent, " did not come to all_gather number ", round, " within ", timeout_ms_, " ms");
      m.changed.notify_all();
    }
    if (m.round == round) fail(ErrorKind::kTimeout, m.broken);
    return m.last;
  }

 private:
  const std::shared_ptr<Meeting> meeting_;
  const int rank_;
  const int size_;
  const int timeout_ms_;
};

}  // namespace

std::vector<std::unique_ptr<Exchange>> make_thread_exchanges(int world_size, int timeout_ms) {
  auto meeting = std::make_shared<Meeting>(world_size);
  std::vector<std::unique_ptr<Exchange>> exchanges;
  for (int rank = 0; rank < world_size; ++rank) {
    exchanges.push_back(std::make_unique<ThreadExchange>(meeting, rank, world_size, timeout_ms));
  }
  return exchanges;
}

}  // namespace mnnvl
