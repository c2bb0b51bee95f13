// What a rank says of itself in the store, which anybody who reaches the store can write.
#include "bootstrap/presence.h"

#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mnnvl;
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  fuzz::only_errors([&] {
    const Presence presence = Presence::parse(bytes, 3);
    REQUIRE(presence.litter.size() <= size / sizeof(uint32_t), presence.litter.size());
    REQUIRE(presence.kind >= ErrorKind::kInvalidArgument && presence.kind <= ErrorKind::kAborted);
    const Presence again = Presence::parse(presence.serialise(), 3);
    REQUIRE(again.count == presence.count && again.nonce == presence.nonce && again.litter == presence.litter);
    REQUIRE(again.word == presence.word || presence.word.size() > kMaxTextBytes);
  });
  return 0;
}
