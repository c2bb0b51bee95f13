// The groups of this process that live, in the order in which they were made.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace mnnvl {

class FlightRecorder;
class ProcessGroupMNNVL;

// Any thread.
class LiveGroups {
 public:
  static LiveGroups& get();

  void add(ProcessGroupMNNVL* group);
  void remove(ProcessGroupMNNVL* group);

  // ProcessGroupMNNVL::finish() of each. A child by fork() has none of its parent's.
  void finish(std::chrono::milliseconds grace);
  // Each one's FlightRecorder::table(), under a line that says whose they are; ends with a newline.
  std::string operations();
  // Writes operations() to the standard error stream whenever the signal comes, without the GIL; errors as on_signal().
  static void write_on_signal(int signum);

 private:
  LiveGroups();
  void leave_to_parent();

  struct Live {
    ProcessGroupMNNVL* group;  // a weak reference would put off the destructor
    std::shared_ptr<FlightRecorder> recorder;
  };
  std::mutex coming_and_going_;  // also held while they are finished, so that none goes meanwhile
  std::mutex mutex_;  // behind it, and never through a wait: what hangs at the end can still be told
  std::vector<Live> groups_;
};

}  // namespace mnnvl
