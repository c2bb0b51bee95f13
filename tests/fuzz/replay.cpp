// In the place of libFuzzer, where the compiler has none: runs a harness once over each of the given files.
#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz/fuzz.h"

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    REQUIRE(file.is_open(), arguments[i]);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};

    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  }
  std::printf("%s: %d files\n", std::filesystem::path(arguments[0]).filename().c_str(), count - 1);
  return count > 1 ? 0 : 1;
}
