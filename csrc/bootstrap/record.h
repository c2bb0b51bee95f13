// The bytes of a set-up record: numbers and strings one after another. Both ends run the same version of this
// package, on machines of one byte order; a record that does not parse is an error, never a guess. Records come from
// outside, so nothing in them is believed: sizes are checked before they are used, a bool is 0 or 1, an enumeration has
// one of its values, and what is shown to people is made fit to be shown.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "common/error.h"

namespace mnnvl {

// No record is longer, whoever sent it: the longest, errors with a table of 72 ranks, have some 20 KiB.
constexpr size_t kMaxRecordBytes = 1 << 20;
constexpr size_t kMaxTextBytes = 1 << 15;

// Text from outside as errors may show it: valid UTF-8 without control characters but tabs and ends of lines, other
// bytes as \xNN, cut to kMaxTextBytes in all. Texts that are fit are not changed, and so is what this gives.
std::string readable(const std::string& text);

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

// Throws Error(kSystem) that names the rank.
class RecordReader {
 public:
  // `rank`: whose record it is. The bytes must outlive the reader.
  RecordReader(const std::string& bytes, int rank);

  template <typename T>
  RecordReader& get(T& value) {
    static_assert(std::is_arithmetic_v<T>);
    std::memcpy(&value, take(sizeof(value)), sizeof(value));
    return *this;
  }
  RecordReader& get(bool& value) {
    static_assert(sizeof(bool) == 1);
    const char byte = *take(1);
    if (byte != 0 && byte != 1) malformed();
    value = byte == 1;
    return *this;
  }
  // An enumeration whose values go from 0 to `last`.
  template <typename T>
  RecordReader& get(T& value, T last) {
    static_assert(std::is_same_v<std::underlying_type_t<T>, int>);
    int code = 0;
    get(code);
    if (code < 0 || code > static_cast<int>(last)) malformed();
    value = static_cast<T>(code);
    return *this;
  }
  RecordReader& get(std::string& bytes) {
    uint32_t size = 0;
    get(size);
    bytes.assign(take(size), size);
    return *this;
  }
  // What people may see of it.
  RecordReader& get_text(std::string& text) {
    get(text);
    text = readable(text);
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
  [[noreturn]] void malformed() const;

  const std::string& bytes_;
  const int rank_;
  size_t position_ = 0;
};

}  // namespace mnnvl
