#include "system/on_signal.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>

#include <mutex>
#include <system_error>
#include <thread>

#include "common/error.h"

namespace mnnvl {
namespace {

// What the handler reads. Before it is installed for a signal, `previous` of that signal is written.
sem_t bell;  // a child has its own, and no descriptor that others could close
struct sigaction previous[NSIG];
bool installed[NSIG], listening;  // with `mutex`, as is what installs

std::mutex& mutex() {
  static auto* one = new std::mutex;  // outlives everything
  return *one;
}

bool has_handler(const struct sigaction& action) {
  return action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN;  // whatever the flags say
}

// Async-signal-safe, as far as the previous handler is.
void handle(int signum, siginfo_t* info, void* context) {
  const int saved = errno;
  sem_post(&bell);
  errno = saved;
  const struct sigaction& before = previous[signum];
  if (!has_handler(before)) return;
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signum, info, context);
  } else {
    before.sa_handler(signum);
  }
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == &handle;
}

// A child has no such thread. Where another handler stands over this one, which it may call, nobody hears.
void leave_in_child() {
  for (int signum = 1; signum < NSIG; ++signum) {
    struct sigaction now;
    if (!installed[signum] || sigaction(signum, nullptr, &now) != 0 || !is_ours(now)) continue;
    sigaction(signum, &previous[signum], nullptr);
    installed[signum] = false;
  }
  listening = false;
}

void answer(void (*act)()) {
  for (;;) {
    if (sem_wait(&bell) == 0) act();
  }
}

// With `mutex`. The thread takes no signals, which others may want to be interrupted by, but those of its own faults.
void start(void (*act)()) {
  if (listening) return;
  sem_init(&bell, /*pshared=*/0, 0);
  static const int once = pthread_atfork(nullptr, nullptr, &leave_in_child);
  if (once != 0) fail(ErrorKind::kSystem, "mnnvl: pthread_atfork: ", strerror(once));
  sigset_t all, before;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread(answer, act).detach();
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    fail(ErrorKind::kSystem, "mnnvl: no thread to listen for a signal: ", error.what());
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  listening = true;
}

}  // namespace

void on_signal(int signum, void (*act)()) {
  if (signum != SIGUSR1 && signum != SIGUSR2 && (signum < SIGRTMIN || signum > SIGRTMAX)) {
    fail(ErrorKind::kInvalidArgument, "signum: expected SIGUSR1, SIGUSR2 or a real-time signal, got ", signum);
  }
  std::lock_guard<std::mutex> lock(mutex());
  struct sigaction now;
  if (sigaction(signum, nullptr, &now) != 0) fail(ErrorKind::kSystem, "mnnvl: sigaction: ", strerror(errno));
  if (installed[signum] && is_ours(now)) return;
  if (installed[signum] && has_handler(now)) {
    fail(ErrorKind::kUnsupported, "mnnvl: signal ", signum,
         " has another handler now, which took the place of the one that tells the last operations");
  }
  start(act);
  previous[signum] = now;
  struct sigaction ours{};
  ours.sa_sigaction = &handle;
  ours.sa_mask = now.sa_mask;
  // A handler that was there decides whether system calls go on, Python's for one says that they don't.
  ours.sa_flags =
      SA_SIGINFO | SA_ONSTACK | (has_handler(now) ? now.sa_flags & (SA_RESTART | SA_NODEFER) : int(SA_RESTART));
  if (sigaction(signum, &ours, nullptr) != 0) fail(ErrorKind::kSystem, "mnnvl: sigaction: ", strerror(errno));
  installed[signum] = true;
}

}  // namespace mnnvl
