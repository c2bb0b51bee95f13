// Descriptors, deadlines, processes that end.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <cstdint>

#include "native/harness.h"
#include "system/deadline.h"
#include "system/peer_watch.h"
#include "system/unique_fd.h"

namespace mnnvl::test {
namespace {

bool open_now(int fd) { return fcntl(fd, F_GETFD) >= 0; }

TEST(system_unique_fd) {
  int ends[2];
  CHECK(pipe(ends) == 0);
  {
    UniqueFd a(ends[0]), b(ends[1]);
    UniqueFd moved(std::move(a));
    CHECK(!a && moved.get() == ends[0]);
    CHECK(open_now(ends[0]) && open_now(ends[1]));
    b.reset();
    CHECK(!b && !open_now(ends[1]));
    const int released = moved.release();
    CHECK(released == ends[0] && !moved && open_now(released));
    a = UniqueFd(released);
  }
  CHECK(!open_now(ends[0]));
}

TEST(system_deadline) {
  CHECK(Deadline(0).passed());
  CHECK(Deadline(0).left_ms(1000) <= 1);
  const Deadline soon(60000);
  CHECK(!soon.passed());
  CHECK(soon.left_ms(1000) == 1000, "at most what is asked");
  CHECK(soon.left_ms(INT_MAX) > 50000 && soon.left_ms(INT_MAX) <= 60001);
  CHECK(soon.timeout_ms() == 60000);
  const Deadline brief(20);
  while (!brief.passed()) {
    CHECK(brief.left_ms(1000) >= 1 || brief.passed(), "a wait would spin");
  }
  CHECK(brief.left_ms(1000) <= 1);
}

// "Never", however it is said, is a time that can be added to a clock's.
TEST(system_deadline_saturates) {
  for (const int64_t never : {INT64_MAX, kLongestTimeoutMs, kLongestTimeoutMs + 1, INT64_MAX / 1000000}) {
    const Deadline deadline(never);
    CHECK(!deadline.passed(), never);
    CHECK(deadline.left_ms(INT_MAX) == INT_MAX, never);
    CHECK(deadline.timeout_ms() <= kLongestTimeoutMs, never);
  }
  for (const int64_t gone : {int64_t{-1}, INT64_MIN}) CHECK(Deadline(gone).passed(), gone);
}

TEST(system_peer_watch) {
  PeerWatch nobody(-1), self(getpid());
  CHECK(!nobody.ended() && !self.ended());
  const pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  CHECK(child > 0);
  PeerWatch watch(child);
  CHECK(watch.pid() == child && !watch.ended());
  kill(child, SIGKILL);
  siginfo_t info;
  CHECK(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT) == 0);  // a zombie until it is reaped
  CHECK(watch.ended(), "a zombie has ended");
  waitpid(child, nullptr, 0);
  PeerWatch moved(std::move(watch));
  CHECK(moved.ended());
  CHECK(PeerWatch(child).ended(), "a pid that doesn't exist has ended");
}

}  // namespace
}  // namespace mnnvl::test
