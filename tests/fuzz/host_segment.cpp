// A whole set-up of host memory among hostile ranks: who is where, the addresses of sockets, and what comes there.
#include "memory/host_segment.h"

#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mnnvl;
  const int free_before = fuzz::lowest_free_descriptor();
  fuzz::Input input(data, size);
  fuzz::HostileExchange exchange(input, 1 + input.below(4));
  HostSegmentsOptions options;
  options.bytes = 4096;
  options.timeout_ms = 20;
  fuzz::only_errors([&] { HostSegments::create(exchange, options); });
  REQUIRE(fuzz::lowest_free_descriptor() == free_before);
  return 0;
}
