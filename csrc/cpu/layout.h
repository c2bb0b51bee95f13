// The layout of one rank's shared segment, and why the CPU protocol is safe.
//
//   [control area: kControlBytes][slot 0][slot 1] ... [slot kSlots - 1][a ring for each peer: channel.h]    S = kSlots
//
// Shared words. All lie in the segment of the rank that the table calls r; each has a cache line of its own, and no
// line has two writing ranks except the counters and the abort word, which nobody touches in a normal fast step.
//
//   word              writer            reader  protocol                                                   at rest
//   posted.epoch      r                 peers   e: slot e % S holds r's contribution to step e             last step
//   reduced.epoch     r                 peers   e: r's slice of slot e % S holds the reduced values        last step
//   done.epoch        r                 peers   e: r has read what it reads of any slot in steps <= e      last step
//   *.sleepers        peers, fetch_add  r       how many ranks are in, or about to enter, futex_wait on    0
//                                               the epoch beside it; r makes the wake call only if > 0
//   posted.calls[i]   r                 peers   what r's call of its last posting step e with e % S = i    0
//   posted.tags[i]                              was, and that step; stored before posted = e, see Calls    0
//   announcements[i]  r                 peers   plain bytes, as those of the slot e % S = i: see Slots         anything
//   abort             anyone, CAS       r       0, or protocol/failure.h's abort_word(...); never reset    0
//
// "Last step" means r's last step that had something to say with this word, or later.
//
// Epochs. A call is cut into steps; step numbers are 32 bits, continue from call to call, are never reset and are
// compared with reached(). Every rank counts the same steps, because a call's steps are a pure function of the segment
// size (plan.h) and of arguments that are the same on every rank, or that all have shown each other: an all_to_all
// takes one step, in which every rank reads everybody's largest size, and then as many more as the largest of those
// asks for. A rank finishes the steps it has taken before it takes more. A communicator starts from the values that it
// finds in its own words, 0 in a fresh segment. `posted` and `reduced` skip steps in which r has nothing to say
// (broadcast, scatter, one-shot); a later value includes all earlier, and every 2^20 steps at the latest they are
// brought up to date, since a word 2^31 steps behind would compare as ahead.
//
// Slots: why a peer never reads bytes that are being overwritten. r writes into slot e % S in step e only (its
// contribution; in two-shot then its reduced slice), and before the first such write has seen done >= e - S in every
// peer's segment. A peer reads r's slot in step e only between having seen posted (or reduced) of r >= e and storing
// its own done >= e. The slot's previous user was step e - S: all its readers have released it. All stores are seq_cst,
// loads acquire, so the slot's bytes are ordered by the words. This argument needs nothing about which operation a step
// belongs to, nor about who reads which bytes of a slot: the operations interleave freely, whether all peers read the
// whole slot (all_gather), one does (gather, reduce), or each a part of its own (scatter, reduce_scatter, all_to_all).
// Who only posts runs up to S steps ahead of those that read. announcements[e % S] belong to the slot in all of this.
//
// Calls: why ranks whose calls differ are found out before one uses the other's data. Beside `posted`, in its cache
// line, stand for each slot the descriptor of the call that filled it (CallDescriptor, packed) and a tag: the low 16
// bits of the step, and 16 bits of a digest of all calls that r made before this one, those without steps included. r
// stores both, relaxed, before posted = e (release), in every step that it posts; a barrier too waits for its slot
// first, though it writes none. A reader that has seen posted >= e compares both with its own call, before it touches
// the slot and before it stores done >= e. That read is safe by the argument of Slots, whatever r's call is and however
// many steps it takes: r overwrites them in step e + S, after done >= e from everybody. So:
// - If r posted e, the reader sees the call that r was in at e. Calls of different step counts part the ranks' steps,
//   and then the descriptors of the same step differ, at the latest where one rank has begun its next call.
// - If r did not post e (it was in a broadcast from another rank, or posted was brought up to date), the tag is of
//   another step, and the stale slot isn't used. r's last post, posted itself, is then a step in e + 1 .. e + S - 1,
//   not yet overwritten, and says which call r is in by now.
// - Two ranks that both think to be the root of a broadcast or scatter post to each other and read nothing. (In a
//   gather or reduce the roots wait for each other; they post too, for this alone.) The digests differ from there on:
//   the first later step in which one of them reads the other finds it. Digests are compared in 16 bits a step, so each
//   step misses it with a chance of 2^-16, and the next is another chance. What can't be found: calls that differ where
//   nobody reads from anybody until the end of the program.
// - A rank that waits for a post which never comes is told by a rank that found the difference, or times out.
// - The sizes of an all_to_all are no part of the call that stands beside `posted`. The reader compares what was
//   announced for it with what it expects, in the first step, before it touches the slot.
//
// The slice's second use. In a two-shot step r's own slice of its own slot is a hole: r doesn't publish to itself. r
// puts the reduced slice there, then stores reduced = e. Peers read the hole only after reduced >= e, and the rest of
// the slot only in the reduce before; the two never overlap, so a second stage costs no memory and no cache.
//
// Progress: why no cycle of waits can form. All ranks run the same program of posts, reductions and copies: per call,
// for i = 0, 1, ...: post(i + kPostAhead), reduce(i), copy(i - kCopyBehind), of which most operations leave out one or
// two (Steps::run()). Each wait is for something a peer publishes at a strictly earlier place of that program:
// reduce(i) needs post(i); copy(i) needs reduce(i); post(i) needs done(i - S), stored after copy(i - S), which comes
// earlier because S > kPostAhead + kCopyBehind. So the rank that is furthest behind can always go on.
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

#include "protocol/requests.h"

namespace mnnvl::cpu {

constexpr int kSlots = 4;
constexpr int kPostAhead = 1;
constexpr int kCopyBehind = 1;
static_assert(kSlots > kPostAhead + kCopyBehind, "see Progress above");
static_assert((kSlots & (kSlots - 1)) == 0, "e % S must not jump where the epoch wraps");

constexpr size_t kControlBytes = 4096;
constexpr size_t kCacheLine = 64;

struct Signal {
  alignas(kCacheLine) std::atomic<uint32_t> epoch;
  std::atomic<uint32_t> tags[kSlots];  // these two of `posted` alone
  std::atomic<uint64_t> calls[kSlots];
  alignas(kCacheLine) std::atomic<uint32_t> sleepers;
};

struct Bell {  // channel.h
  alignas(kCacheLine) std::atomic<uint32_t> rings;
  std::atomic<uint32_t> sleepers;
};

// What a rank of an all_to_all says of the whole call, beside its first slot.
struct Announcement {
  alignas(kCacheLine) int64_t largest;  // of what follows
  int64_t bytes[kMaxWorldSize];  // for each destination
};

struct Control {
  Signal posted;
  Signal reduced;
  Signal done;
  alignas(kCacheLine) std::atomic<uint32_t> abort;
  Bell bell;
  Announcement announcements[kSlots];
};

static_assert(sizeof(Control) <= kControlBytes);
static_assert(sizeof(Signal) == 2 * kCacheLine, "epoch, tags and calls share a line: reading them costs one transfer");
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4,
              "the words are futexes shared between processes");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "shared between processes");

// A digest of a sequence of calls. Each step is a bijection of `digest`, so sequences that differ once differ for ever.
constexpr uint64_t extend_digest(uint64_t digest, const CallDescriptor& call) {
  digest ^= pack(call) ^ static_cast<uint64_t>(call.bytes) >> 40;
  digest *= 0x9e3779b97f4a7c15u;  // odd, so invertible; mixes upwards
  return digest ^ digest >> 32;  // and downwards
}

constexpr uint32_t tag_of(uint64_t digest, uint32_t epoch) {
  return static_cast<uint32_t>(digest >> 48) << 16 | (epoch & 0xffffu);
}

inline Control* control_of(std::byte* segment) { return reinterpret_cast<Control*>(segment); }

inline std::byte* slot_of(std::byte* segment, int64_t slot_size, uint32_t epoch) {
  return segment + kControlBytes + static_cast<int64_t>(epoch % kSlots) * slot_size;
}

}  // namespace mnnvl::cpu
