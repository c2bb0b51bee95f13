// A shared library opened at run time and kept for the life of the process.
#pragma once

#include <string>

namespace mnnvl {

class Library {
 public:
  // Returns an unloaded Library on failure, its problem() being the loader's text. Never throws, never unloads: code of
  // such libraries may run in their own threads until the process ends.
  static Library open(const std::string& name, bool only_if_loaded = false);

  bool loaded() const { return handle_ != nullptr; }
  const std::string& problem() const { return problem_; }

  // Sets `*function` to the first of the given symbols that exists, else to null; returns whether one does.
  template <typename Function, typename... More>
  bool resolve(Function** function, const char* symbol, More... more) const {
    *function = reinterpret_cast<Function*>(find(symbol));
    if (*function != nullptr) return true;
    if constexpr (sizeof...(more) > 0) return resolve(function, more...);
    return false;
  }

 private:
  void* find(const char* symbol) const;
  void* handle_ = nullptr;
  std::string problem_;
};

}  // namespace mnnvl
