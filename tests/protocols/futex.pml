/* Sleeping and waking on the CPU: csrc/cpu/wait.h, wait.cpp (KIND 0: the futex is the word itself) and
 * csrc/cpu/channel.h, messenger.cpp (KIND 1: the futex is a bell of its own, for words of any channel).
 *
 * One poster stores POSTS values, each to one of WORDS words; WAITERS threads each wait for one of these values. KIND
 * 0 has a word's waiters sleep on that word; KIND 1 has them sleep on `rings`. A sleep ends when somebody wakes it, and
 * not by itself: so a lost wake-up is a deadlock here, where the code would go on after kMaxSleepMs. With ABORT the
 * poster may stop at any time and set the abort word instead. That changes no epoch: so in KIND 0 sleeps must then be
 * BOUNDED (they end by themselves once there is an abort word). In KIND 1 the bell is rung for it, and needs no bound.
 *
 * Memory. All is sequentially consistent, except with MISTAKE 2: there the poster's store stands in a store buffer.
 *
 * MISTAKE  1 the poster looks for sleepers before it stores
 *          2 the poster's store isn't seq_cst
 *          3 KIND 1: the sleeper looks at the words before it has counted itself in and loaded `rings`
 *          4 the poster wakes one sleeper only
 *          5 the kernel queues the sleeper without comparing the futex with what it had seen
 */
#ifndef KIND
#define KIND 0
#endif
#ifndef WAITERS
#define WAITERS 2
#endif
#ifndef POSTS
#define POSTS 2
#endif
#ifndef ABORT
#define ABORT 0
#endif
#ifndef BOUNDED
#define BOUNDED 0
#endif
#ifndef MISTAKE
#define MISTAKE 0
#endif

#if KIND == 0
#define WORDS 1 /* each word has sleepers and a futex of its own, so one stands for all */
#else
#define WORDS 2
#endif

byte word[WORDS];       /* epoch, or posted and taken */
byte rings;             /* KIND 1: the bell */
byte sleepers;
bool asleep[WAITERS];   /* queued on the futex, in the kernel */
bool abort;
byte buffered;          /* MISTAKE 2: a value on its way to `word` [buffered_at]; 0: none */
byte buffered_at;
bool posted_all;

#define FUTEX (KIND == 0 -> word[0] : rings)

inline wake() {
  d_step {
    i = 0;
    do
    :: i < WAITERS && !(MISTAKE == 4 && woken) -> woken = woken || asleep[i]; asleep[i] = false; i++
    :: else -> break
    od;
    i = 0;
    woken = false
  }
}

inline look_for_sleepers() {
  found = (sleepers != 0)
}

inline wake_found() {
  if
  :: found && KIND == 1 -> rings++; wake()
  :: found && KIND == 0 -> wake()
  :: else
  fi;
  found = false
}

active proctype Poster() {
  byte n, at, i;
  bool found, woken;
  do
  :: n < POSTS ->
#if WORDS > 1
    if
    :: at = 0
    :: at = 1
    fi;
#endif
    n++;
#if MISTAKE == 1
    look_for_sleepers();
    word[at] = n;
#elif MISTAKE == 2
    atomic { buffered == 0 -> buffered = n; buffered_at = at };
    look_for_sleepers();
#else
    word[at] = n;
    look_for_sleepers();
#endif
    wake_found()
#if ABORT
  :: n < POSTS ->
    /* tell_peers(): the abort word, then whoever is asleep at this moment. */
    abort = true;
#if KIND == 0
    wake();
#else
    look_for_sleepers();
    wake_found();
#endif
    break
#endif
  :: n == POSTS -> break
  od;
  buffered == 0;
  posted_all = true
}

#if MISTAKE == 2
active proctype StoreBuffer() {
end:
  do
  :: atomic { buffered != 0 -> word[buffered_at] = buffered; buffered = 0 }
  od
}
#endif

active [WAITERS] proctype Waiter() {
  byte me = _pid - 1 - (MISTAKE == 2 -> 1 : 0);
  byte wanted = 1, seen;
  bool here;
#define LOOK here = (word[0] >= wanted || word[WORDS - 1] >= wanted)

  do
  :: wanted < POSTS -> wanted++
  :: break
  od;
#if MISTAKE == 3 && KIND == 1
  LOOK;
#endif
  sleepers++;
  do
  :: true ->
#if KIND == 0
    seen = word[0];
    here = (seen >= wanted);
#else
    seen = rings;
#if MISTAKE != 3
    /* The look at two channels isn't one step. */
    here = (word[0] >= wanted);
    here = here || (word[1] >= wanted);
#endif
#endif
    if
    :: here -> break
    :: abort -> break
    :: else
    fi;
    /* futex_wait: the kernel compares and queues in one step. */
    atomic {
      if
      :: FUTEX == seen || MISTAKE == 5 -> asleep[me] = true
      :: else
      fi
    };
    if
    :: !asleep[me]
    :: BOUNDED && abort -> asleep[me] = false
    fi;
#if MISTAKE == 3 && KIND == 1
    LOOK;
#endif
  od;
  sleepers--;
  assert(here || abort)
}
