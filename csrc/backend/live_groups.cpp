#include "backend/live_groups.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <sstream>

#include "backend/process_group.h"
#include "system/on_signal.h"

namespace mnnvl {
namespace {

// At once, so that the lines of several processes on one terminal or in one pipe stay apart as well as they can.
void write_whole(int fd, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t count = write(fd, text.data() + done, text.size() - done);
    if (count < 0 && errno != EINTR) return;  // there is nobody to tell
    if (count > 0) done += size_t(count);
  }
}

void write_operations() {
  try {
    write_whole(STDERR_FILENO, LiveGroups::get().operations());
  } catch (const std::exception& error) {
    write_whole(STDERR_FILENO, str("mnnvl: cannot tell the last operations: ", error.what(), "\n"));
  }
}

}  // namespace

// A fork finds the list whole, as the child needs it. The other lock may be held through a wait, perhaps for a callback
// that forks; nobody in the child holds it.
LiveGroups::LiveGroups() {
  pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                 [] {
                   get().leave_to_parent();
                   get().mutex_.unlock();
                   new (&get().coming_and_going_) std::mutex;
                 });
}

// The child keeps what it can't end: a destructor would wait for threads that it doesn't have.
void LiveGroups::leave_to_parent() {
  for (const Live& one : groups_) c10::raw::intrusive_ptr::incref(one.group);
  groups_.clear();
}

LiveGroups& LiveGroups::get() {
  static auto* live = new LiveGroups;  // outlives everything
  return *live;
}

void LiveGroups::add(ProcessGroupMNNVL* group) {
  std::scoped_lock lock(coming_and_going_, mutex_);
  groups_.push_back({group, group->recorder()});
}

void LiveGroups::remove(ProcessGroupMNNVL* group) {
  std::scoped_lock lock(coming_and_going_, mutex_);
  const auto is_it = [group](const Live& one) { return one.group == group; };
  groups_.erase(std::remove_if(groups_.begin(), groups_.end(), is_it), groups_.end());
}

void LiveGroups::finish(std::chrono::milliseconds grace) {
  std::lock_guard<std::mutex> lock(coming_and_going_);
  for (const Live& one : groups_) one.group->finish(grace);
}

std::string LiveGroups::operations() {
  std::vector<std::shared_ptr<FlightRecorder>> recorders;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Live& one : groups_) recorders.push_back(one.recorder);
  }
  std::ostringstream out;
  out << "mnnvl: the groups of process " << getpid() << ": " << recorders.size() << '\n';
  for (const auto& recorder : recorders) out << recorder->table() << '\n';
  return out.str();
}

void LiveGroups::write_on_signal(int signum) { on_signal(signum, &write_operations); }

}  // namespace mnnvl
