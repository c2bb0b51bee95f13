// A signal of this process made known to a thread of its own, which can act whatever the other threads wait for. What
// Python installs for a signal runs in the main thread alone, and not before that has left C++.
#pragma once

namespace mnnvl {

// From now on `act` runs on that thread soon after each `signum`. It must not throw. A handler that was there before
// runs too, as if called directly; the signal's default action doesn't. One that comes later and doesn't call the one
// that it replaces ends this. Again with the same signal does nothing. Forked children get back what was there before.
// Any thread; the same `act` each time.
//
// Error(kInvalidArgument) for any other signal than SIGUSR1, SIGUSR2 and the real-time ones, Error(kUnsupported) if it
// was given before and another handler has taken its place since, which may call this one: the two would call each
// other for ever. Where there is none any more, it is installed anew.
void on_signal(int signum, void (*act)());

}  // namespace mnnvl
