#include "driver/library.h"

#include <dlfcn.h>

namespace mnnvl {

Library Library::open(const std::string& name, bool only_if_loaded) {
  Library library;
  library.handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | (only_if_loaded ? RTLD_NOLOAD : 0));
  if (library.handle_ == nullptr) {
    const char* text = dlerror();
    library.problem_ = text != nullptr ? text : name + " is not loaded";
  }
  return library;
}

void* Library::find(const char* symbol) const { return handle_ != nullptr ? dlsym(handle_, symbol) : nullptr; }

}  // namespace mnnvl
