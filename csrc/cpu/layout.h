// The layout of one rank's shared segment, and why the CPU protocol is safe.
//
//   [control area: kControlBytes][slot of generation 0][slot 1] ... [slot kGenerations - 1]
//
// Shared words. All lie in the segment of the rank that the table calls r; each has a cache line of its own, and no
// line has two writing ranks except the counters and the abort word, which nobody touches in a normal fast step.
//
//   word              writer            reader  protocol                                                   at rest
//   posted.epoch      r                 peers   e: slot e % G holds r's contribution to step e             last step
//   reduced.epoch     r                 peers   e: r's slice of slot e % G holds the reduced values        last step
//   done.epoch        r                 peers   e: r has read what it reads of any slot in steps <= e      last step
//   *.sleepers        peers, fetch_add  r       how many ranks are in, or about to enter, futex_wait on    0
//                                               the epoch beside it; r makes the wake call only if > 0
//   abort             anyone, CAS       r       0, or protocol/failure.h's abort_word(root); never reset   0
//
// "Last step" means r's last step that had something to say with this word, or later.
//
// Epochs. A call is cut into steps; step numbers are 32 bits, continue from call to call, are never reset and are
// compared with reached(). Every rank counts the same steps, because a call's steps are a pure function of its
// arguments and of the segment size (plan.h). A communicator starts from the values that it finds in its own words, 0
// in a fresh segment. `posted` and `reduced` skip steps in which r has nothing to say (broadcast, one-shot); a later
// value includes all earlier, and every 2^20 steps at the latest they are brought up to date, since a word 2^31 steps
// behind would compare as ahead.
//
// Slots: why a peer never reads bytes that are being overwritten. r writes into slot e % G in step e only (its
// contribution; in two-shot then its reduced slice), and before the first such write has seen done >= e - G in every
// peer's segment. A peer reads r's slot in step e only between having seen posted (or reduced) of r >= e and storing
// its own done >= e. The slot's previous user was step e - G: all its readers have released it. All stores are seq_cst,
// loads acquire, so the slot's bytes are ordered by the words. This argument needs nothing about which operation a step
// belongs to: all_reduce, all_gather, broadcast and barrier interleave freely, and a broadcast's root may run up to G
// steps ahead of its readers.
//
// The slice's second use. In a two-shot step r's own slice of its own slot is a hole: r doesn't publish to itself. r
// puts the reduced slice there, then stores reduced = e. Peers read the hole only after reduced >= e, and the rest of
// the slot only in the reduce before; the two never overlap, so a second stage costs no memory and no cache.
//
// Progress: why no cycle of waits can form. All ranks run the same program of posts, reductions and copies: per call,
// for i = 0, 1, ...: post(i + kPostAhead), reduce(i), copy(i - kCopyBehind). Each wait is for something a peer
// publishes at a strictly earlier place of that program: reduce(i) needs post(i); copy(i) needs reduce(i); post(i)
// needs done(i - G), stored after copy(i - G), which comes earlier because G > kPostAhead + kCopyBehind. So the rank
// that is furthest behind can always go on.
//
// Sleeping: why no wake-up is lost. The sleeper does sleepers.fetch_add(1), then futex_wait(epoch, value seen before);
// the writer does epoch.store(e), then loads sleepers. These four are seq_cst. If the writer loads 0, its store
// precedes the sleeper's fetch_add in the total order, and the kernel's compare inside futex_wait finds a changed word
// and returns at once. Otherwise the writer wakes, either before the kernel's compare (which then fails likewise) or
// after the sleeper is queued. A rank that dies asleep leaves its count behind: extra wake calls, no harm. Each sleep
// is bounded by kMaxSleepMs in any case, for the abort word and dead peers, which change no epoch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace mnnvl::cpu {

constexpr int kGenerations = 4;
constexpr int kPostAhead = 1;
constexpr int kCopyBehind = 1;
static_assert(kGenerations > kPostAhead + kCopyBehind, "see Progress above");
static_assert((kGenerations & (kGenerations - 1)) == 0, "e % G must not jump where the epoch wraps");

constexpr size_t kControlBytes = 4096;
constexpr size_t kCacheLine = 64;

struct Signal {
  alignas(kCacheLine) std::atomic<uint32_t> epoch;
  alignas(kCacheLine) std::atomic<uint32_t> sleepers;
};

struct Control {
  Signal posted;
  Signal reduced;
  Signal done;
  alignas(kCacheLine) std::atomic<uint32_t> abort;
};

static_assert(sizeof(Control) <= kControlBytes);
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4,
              "the words are futexes shared between processes");

inline Control* control_of(std::byte* segment) { return reinterpret_cast<Control*>(segment); }

// Bytes of one slot: whole cache lines.
constexpr int64_t slot_bytes(size_t segment_bytes) {
  return segment_bytes <= kControlBytes
             ? 0
             : static_cast<int64_t>((segment_bytes - kControlBytes) / kGenerations / kCacheLine * kCacheLine);
}

inline std::byte* slot_of(std::byte* segment, int64_t slot_size, uint32_t epoch) {
  return segment + kControlBytes + static_cast<int64_t>(epoch % kGenerations) * slot_size;
}

}  // namespace mnnvl::cpu
