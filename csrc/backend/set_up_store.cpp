#include "backend/set_up_store.h"

#include <c10/util/Exception.h>
#include <sys/eventfd.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>

#include "common/error.h"
#include "system/unique_fd.h"

namespace mnnvl {
namespace {

std::string text_of(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

bool has_descriptors(int count) {
  std::vector<UniqueFd> some;
  while (count-- > 0) {
    if (!some.emplace_back(::eventfd(0, EFD_CLOEXEC))) return false;
  }
  return true;
}

}  // namespace

SetUpStore::SetUpStore(c10::intrusive_ptr<c10d::Store> store, std::string prefix, int rank)
    : store_(std::move(store)), prefix_(std::move(prefix)), rank_(rank) {}

std::vector<std::string> SetUpStore::full(const std::vector<std::string>& keys) const {
  std::vector<std::string> result;
  for (const std::string& key : keys) result.push_back(prefix_ + "/" + key);
  return result;
}

void SetUpStore::lost(const char* function, const std::string& text) const {
  fail(ErrorKind::kSystem, "mnnvl set-up: rank ", rank_, " could not use the c10d store (", function, " of ", prefix_,
       "): ", text);
}

// By reference: a Python store's exception may only be copied with the GIL held.
template <typename F>
auto SetUpStore::guarded(const char* function, const F& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& error) {
    lost(function, text_of(error));
  }
}

void SetUpStore::set(const std::string& key, const std::string& value) {
  guarded("set", [&] { store_->set(prefix_ + "/" + key, std::vector<uint8_t>(value.begin(), value.end())); });
}

int64_t SetUpStore::add(const std::string& key, int64_t amount) {
  return guarded("add", [&] { return store_->add(prefix_ + "/" + key, amount); });
}

std::vector<std::string> SetUpStore::get(const std::vector<std::string>& keys) {
  const std::vector<std::string> names = full(keys);
  std::vector<std::string> all;
  guarded("get", [&] {
    if (names.size() > 1 && store_->hasExtendedApi()) {
      for (const auto& value : store_->multiGet(names)) all.emplace_back(value.begin(), value.end());
      return;
    }
    for (const std::string& name : names) {
      const std::vector<uint8_t> value = store_->get(name);
      all.emplace_back(value.begin(), value.end());
    }
  });
  MNNVL_ASSERT(all.size() == keys.size(), "the store gave ", all.size(), " values for ", keys.size(), " keys");
  return all;
}

bool SetUpStore::have(const std::vector<std::string>& keys) {
  const std::vector<std::string> names = full(keys);
  if (can_check_) {
    try {
      const bool answer = store_->check(names);
      has_checked_ = true;
      return answer;
    } catch (const c10::DistNetworkError& error) {
      lost("check", text_of(error));
    } catch (const std::exception& error) {
      // A store that has never answered has no check, whatever it throws to say so.
      if (has_checked_) lost("check", text_of(error));
      can_check_ = false;
    }
  }
  try {
    store_->wait(names, patience_);
    patience_ = kShortWait;
    return true;
  } catch (const c10::DistNetworkError& error) {
    lost("wait", text_of(error));
  } catch (const std::exception&) {
    // Each store has its own exception for a wait that ends without the keys. If this one meant something worse, the
    // next get or add will say so.
    patience_ = std::min(patience_ * 2, std::chrono::milliseconds(kLongWait));
    return false;
  }
}

c10::intrusive_ptr<c10d::Store> SetUpStore::apart() {
  c10d::Store* inmost = store_.get();
  if (auto* prefixed = dynamic_cast<c10d::PrefixStore*>(inmost)) inmost = prefixed->getUnderlyingNonPrefixStore().get();
  if (dynamic_cast<c10d::TCPStore*>(inmost) == nullptr) return store_;
  return guarded("clone", [&] {
    // TCPStore tries to connect for minutes, whatever is in the way: a server that is gone, which says so here, or no
    // descriptors left, for which the set-up has better words.
    (void)store_->check({prefix_});
    return has_descriptors(4) ? store_->clone() : store_;
  });
}

void SetUpStore::forget(const std::string& key) noexcept {
  if (!can_delete_) return;
  try {
    store_->deleteKey(prefix_ + "/" + key);
  } catch (const std::exception&) {
    can_delete_ = false;
  }
}

}  // namespace mnnvl
