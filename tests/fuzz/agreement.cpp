// What the other ranks say at the end of a stage.
#include "bootstrap/agreement.h"

#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mnnvl;
  fuzz::Input input(data, size);
  fuzz::HostileExchange exchange(input, 1 + input.below(5));
  const bool fails = input.below(4) == 0;
  fuzz::only_errors([&] {
    const std::vector<std::string> said = agree_gather(exchange, "a stage", "here", [&]() -> std::string {
      if (fails) fail(ErrorKind::kSystem, "own failure");
      return "mine";
    });
    REQUIRE(!fails);
    REQUIRE(static_cast<int>(said.size()) == exchange.size(), said.size());
    REQUIRE(said[0] == "mine");
  });
  return 0;
}
