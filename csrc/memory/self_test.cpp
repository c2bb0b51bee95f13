#include "memory/self_test.h"

#include <cstdio>

#include "bootstrap/agreement.h"

namespace mnnvl {
namespace {

constexpr int kWords = 32;  // per writer and place: one line of 128 bytes
constexpr int kEverybody = 0xff;
constexpr uint32_t kMark = 0x5a000000u;  // the top byte of a pattern

// One word of the pattern: who wrote, for whom, and which word of the line.
constexpr uint32_t pattern(int writer, int reader, int word) {
  return kMark | static_cast<uint32_t>(writer) << 15 | static_cast<uint32_t>(reader) << 6 | static_cast<uint32_t>(word);
}
static_assert(kMaxWorldSize < kEverybody && kEverybody < 512 && kWords <= 64);

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", value);
  return text;
}

std::string explain(uint32_t seen, uint32_t fill) {
  if (seen == fill) return "the value at rest: nothing arrived";
  if ((seen & 0xff000000u) != kMark) return "no pattern of this test";
  return str("what rank ", seen >> 15 & 0x1ff, " wrote for ",
             (seen >> 6 & 0x1ff) == kEverybody ? std::string("all") : str("rank ", seen >> 6 & 0x1ff));
}

// Each writer has a line of its own in every buffer, once counted from its start and once from its end.
size_t line_offset(const SelfTest& test, int writer, bool at_end) {
  size_t line = kWords * sizeof(uint32_t);
  return at_end ? test.size - (writer + 1) * line : writer * line;
}

void store_lines(const SelfTest& test, CUdeviceptr address, int reader, bool multicast) {
  const int writer = test.context.rank();
  uint32_t line[kWords];
  for (int word = 0; word < kWords; ++word) line[word] = pattern(writer, reader, word);
  for (bool at_end : {false, true}) {
    test.ops.store_words(test.context.device, address + line_offset(test, writer, at_end), line, kWords, multicast);
  }
}

void verify_lines(const SelfTest& test, bool multicast) {
  const int self = test.context.rank();
  for (int writer = 0; writer < test.context.size(); ++writer) {
    for (bool at_end : {false, true}) {
      size_t offset = line_offset(test, writer, at_end);
      uint32_t seen[kWords];
      test.ops.load_words(test.context.device, test.addresses[self] + offset, seen, kWords);
      for (int word = 0; word < kWords; ++word) {
        uint32_t expected = pattern(writer, multicast ? kEverybody : self, word);
        if (seen[word] == expected) continue;
        std::string route = multicast ? std::string("by multicast") : str("through its mapping of rank ", self);
        fail(ErrorKind::kSystem, "what rank ", writer, " (", test.wheres[writer], ") stored ", route,
             " is not there: at byte ", offset + word * sizeof(uint32_t), " of ", test.size, " expected ",
             hex(expected), ", seen ", hex(seen[word]), " (", explain(seen[word], test.fill), ")");
      }
    }
  }
}

}  // namespace

void SelfTest::fill_own(const std::string& stage) const {
  agree(context.exchange, stage, context.where,
        [&] { ops.fill_words(context.device, addresses[context.rank()], fill, size / sizeof(uint32_t)); });
}

void SelfTest::check_peers() const {
  MNNVL_ASSERT(size >= 2 * kWords * sizeof(uint32_t) * context.size(), "buffer of ", size, " bytes");
  agree(context.exchange, "storing the self-test's patterns", context.where, [&] {
    for (int reader = 0; reader < context.size(); ++reader)
      store_lines(*this, addresses[reader], reader, /*multicast=*/false);
  });
  agree(context.exchange, "self-test", context.where, [&] { verify_lines(*this, /*multicast=*/false); });
}

void SelfTest::check_multicast(CUdeviceptr address) const {
  agree(context.exchange, "storing the multicast self-test's patterns", context.where,
        [&] { store_lines(*this, address, kEverybody, /*multicast=*/true); });
  agree(context.exchange, "multicast self-test", context.where, [&] { verify_lines(*this, /*multicast=*/true); });
}

}  // namespace mnnvl
