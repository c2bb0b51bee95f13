#include "bootstrap/record.h"

#include <cstdio>

namespace mnnvl {
namespace {

bool continues(const std::string& text, size_t at, int least, int most) {
  if (at >= text.size()) return false;
  const int byte = static_cast<unsigned char>(text[at]);
  return byte >= least && byte <= most;
}

// Bytes of the UTF-8 character at `at`, 0 if it is none, or a control character. As strict as Python, whose exceptions
// the text ends in: no overlong forms, no surrogates, nothing beyond U+10FFFF.
size_t character_at(const std::string& text, size_t at) {
  const int first = static_cast<unsigned char>(text[at]);
  if (first < 0x80) return (first >= 0x20 && first != 0x7f) || first == '\n' || first == '\t' ? 1 : 0;
  if (first < 0xc2 || first > 0xf4) return 0;
  const int least = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const int most = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  const size_t size = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  if (!continues(text, at + 1, least, most)) return 0;
  for (size_t i = 2; i < size; ++i) {
    if (!continues(text, at + i, 0x80, 0xbf)) return 0;
  }
  return size;
}

}  // namespace

std::string readable(const std::string& text) {
  std::string shown;
  size_t cut = 0;  // where there is room for what says that it was cut
  for (size_t at = 0; at < text.size();) {
    if (shown.size() + 40 <= kMaxTextBytes) cut = shown.size();
    const size_t size = character_at(text, at);
    if (size > 0) {
      shown.append(text, at, size);
    } else {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\x%02x", static_cast<unsigned>(static_cast<unsigned char>(text[at])));
      shown += escape;
    }
    if (shown.size() > kMaxTextBytes) return shown.substr(0, cut) + str("... (", text.size(), " bytes)");
    at += size > 0 ? size : 1;
  }
  return shown;
}

RecordReader::RecordReader(const std::string& bytes, int rank) : bytes_(bytes), rank_(rank) {
  if (bytes_.size() > kMaxRecordBytes) {
    fail(ErrorKind::kSystem, "the set-up record of rank ", rank_, " has ", bytes_.size(),
         " bytes, and none has more than ", kMaxRecordBytes);
  }
}

void RecordReader::malformed() const {
  fail(ErrorKind::kSystem, "the set-up record of rank ", rank_, ", ", bytes_.size(),
       " bytes, does not parse; do all ranks run the same version of mnnvl_backend?");
}

}  // namespace mnnvl
