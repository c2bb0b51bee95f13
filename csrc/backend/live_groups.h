// The groups of this process that live, in the order in which they were made.
#pragma once

#include <chrono>
#include <mutex>
#include <string>
#include <vector>

namespace mnnvl {

class ProcessGroupMNNVL;

// Any thread.
class LiveGroups {
 public:
  static LiveGroups& get();

  void add(ProcessGroupMNNVL* group);
  void remove(ProcessGroupMNNVL* group);

  // ProcessGroupMNNVL::finish() of each.
  void finish(std::chrono::milliseconds grace);
  // Each one's FlightRecorder::table(), under a line that says whose they are; ends with a newline.
  std::string operations();
  // Writes operations() to the standard error stream whenever the signal comes, without the GIL; errors as on_signal().
  static void write_on_signal(int signum);

 private:
  std::mutex mutex_;  // held while they are finished, so that none goes meanwhile
  std::vector<ProcessGroupMNNVL*> groups_;  // plain pointers: a weak reference would put off the destructor
};

}  // namespace mnnvl
