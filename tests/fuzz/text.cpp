// Text of others in errors: always UTF-8 that Python takes, without control characters, and not longer than it may be.
#include <cstdint>

#include "bootstrap/record.h"
#include "fuzz/fuzz.h"

namespace mnnvl::fuzz {
namespace {

// A decoder of its own, by code points.
bool fit(const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const uint32_t first = static_cast<unsigned char>(text[at]);
    const int size = first < 0x80 ? 1 : first >> 5 == 6 ? 2 : first >> 4 == 14 ? 3 : first >> 3 == 30 ? 4 : 0;
    if (size == 0 || at + static_cast<size_t>(size) > text.size()) return false;
    uint32_t point = size == 1 ? first : first & (0x7fu >> size);
    for (int i = 1; i < size; ++i) {
      const uint32_t byte = static_cast<unsigned char>(text[at + static_cast<size_t>(i)]);
      if (byte >> 6 != 2) return false;
      point = point << 6 | (byte & 0x3f);
    }
    const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (point < least[size] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return false;
    if ((point < 0x20 && point != '\n' && point != '\t') || point == 0x7f) return false;
    at += static_cast<size_t>(size);
  }
  return true;
}

}  // namespace
}  // namespace mnnvl::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mnnvl;
  fuzz::Input input(data, size);
  const int repeats = input.below(16) == 0 ? 1 << 15 : 1;  // now and then to the limit
  const std::string piece = input.chunk();
  std::string text = input.rest();
  for (int i = 0; i < repeats && text.size() < 2 * kMaxTextBytes; ++i) text += piece;
  const std::string shown = readable(text);
  REQUIRE(fuzz::fit(shown));
  REQUIRE(shown.size() <= kMaxTextBytes, shown.size());
  REQUIRE((shown == text) == (fuzz::fit(text) && text.size() <= kMaxTextBytes));
  REQUIRE(readable(shown) == shown);
  return 0;
}
