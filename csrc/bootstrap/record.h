// The bytes of a set-up record: numbers and strings one after another. Both ends run the same version of this
// package, on machines of one byte order; a record that does not parse is an error, never a guess.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "common/error.h"

namespace mnnvl {

class RecordWriter {
 public:
  template <typename T>
  RecordWriter& put(T value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
    return *this;
  }
  RecordWriter& put(const std::string& value) {
    put(static_cast<uint32_t>(value.size()));
    bytes_ += value;
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

class RecordReader {
 public:
  explicit RecordReader(const std::string& bytes) : bytes_(bytes) {}  // which must outlive the reader

  template <typename T>
  RecordReader& get(T& value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    std::memcpy(&value, take(sizeof(value)), sizeof(value));
    return *this;
  }
  RecordReader& get(std::string& value) {
    uint32_t size = 0;
    get(size);
    value.assign(take(size), size);
    return *this;
  }
  // Throws unless everything was read.
  void finish() const {
    if (position_ != bytes_.size()) malformed();
  }

 private:
  const char* take(size_t size) {
    if (size > bytes_.size() - position_) malformed();
    position_ += size;
    return bytes_.data() + position_ - size;
  }
  [[noreturn]] void malformed() const {
    fail(ErrorKind::kSystem, "a set-up record of ", bytes_.size(),
         " bytes does not parse; do all ranks run the same version of mnnvl_backend?");
  }

  const std::string& bytes_;
  size_t position_ = 0;
};

}  // namespace mnnvl
