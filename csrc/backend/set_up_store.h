// What a set-up asks of a c10d store.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <string>
#include <vector>

namespace mnnvl {

// Needs set, get, add and wait, which every store has, somebody's own Python one too. Uses check, deleteKey and
// multiGet where they work. Keys stand below the prefix. Whatever the store throws becomes Error(kSystem) that names
// the set-up, the rank and the function, and keeps the store's text. One thread at a time.
class SetUpStore {
 public:
  SetUpStore(c10::intrusive_ptr<c10d::Store> store, std::string prefix, int rank);

  void set(const std::string& key, const std::string& value);
  int64_t add(const std::string& key, int64_t amount);
  // Of keys that are there, and that nobody deletes meanwhile: a store may wait minutes for one that isn't.
  std::vector<std::string> get(const std::vector<std::string>& keys);
  // Whether all keys are there. A store without check is asked by waits, short ones at first: some stores log each that
  // fails.
  bool have(const std::vector<std::string>& keys);
  // False once a check was refused; before the first have() it is not known, and true.
  bool can_check() const { return can_check_; }
  // The store for a thread of ours beside the user's: with a connection of its own where a wait of his, which may take
  // minutes, holds up everybody else (TCPStore).
  c10::intrusive_ptr<c10d::Store> apart();
  // Tidying: what a store can't or won't delete stays.
  void forget(const std::string& key) noexcept;

  const std::string& prefix() const { return prefix_; }

 private:
  static constexpr std::chrono::milliseconds kShortWait{50}, kLongWait{800};

  std::vector<std::string> full(const std::vector<std::string>& keys) const;
  template <typename F>
  auto guarded(const char* function, const F& f) -> decltype(f());
  [[noreturn]] void lost(const char* function, const std::string& text) const;

  c10::intrusive_ptr<c10d::Store> store_;
  const std::string prefix_;
  const int rank_;
  bool can_check_ = true, has_checked_ = false, can_delete_ = true;
  std::chrono::milliseconds patience_ = kShortWait;
};

}  // namespace mnnvl
