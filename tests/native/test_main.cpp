// The native tests: the C++ below torch, without Python, so that it runs under sanitizers and emulators.
//
//   native_tests [--percent N] [name...]     tests whose names contain one of the given words, or not when it begins
//                                            with '-'; without any word, all
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "native/harness.h"

namespace mnnvl::test {
namespace {

constexpr unsigned kTestSeconds = 100;  // a test that hangs is ended by SIGALRM; its name has been printed

struct Test {
  const char* name;
  void (*body)();
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

int percent = 100;

bool selected(const char* name, const std::vector<std::string>& words) {
  bool wanted = std::all_of(words.begin(), words.end(), [](const std::string& word) { return word[0] == '-'; });
  for (const std::string& word : words) {
    if (word[0] != '-') wanted = wanted || std::strstr(name, word.c_str()) != nullptr;
  }
  for (const std::string& word : words) {
    if (word[0] == '-' && std::strstr(name, word.c_str() + 1) != nullptr) return false;
  }
  return wanted;
}

bool passes(const Test& test) {
  std::printf("%-56s", test.name);
  std::fflush(stdout);
  alarm(kTestSeconds);
  const auto begin = std::chrono::steady_clock::now();
  std::string failure;
  try {
    test.body();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  alarm(0);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%s %6.2f s\n", failure.empty() ? "ok    " : "FAILED", seconds);
  if (!failure.empty()) std::printf("    %s\n", failure.c_str());
  std::fflush(stdout);
  return failure.empty();
}

}  // namespace

Registration::Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }

int iterations(int wanted) { return std::max(1, static_cast<int>(int64_t{wanted} * percent / 100)); }

int run(int argc, char** argv) {
  std::vector<std::string> words;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--percent") == 0 && i + 1 < argc) {
      percent = std::atoi(argv[++i]);
    } else if (argv[i][0] != '\0') {
      words.emplace_back(argv[i]);
    }
  }
  std::sort(tests().begin(), tests().end(),
            [](const Test& a, const Test& b) { return std::strcmp(a.name, b.name) < 0; });
  int run = 0, failed = 0;
  for (const Test& test : tests()) {
    if (!selected(test.name, words)) continue;
    ++run;
    failed += !passes(test);
  }
  std::printf("%d native tests, %d failed\n", run, failed);
  return failed == 0 && run > 0 ? 0 : 1;
}

}  // namespace mnnvl::test

int main(int argc, char** argv) { return mnnvl::test::run(argc, argv); }
