/* A two-shot in windows: csrc/kernels/device/windows.cuh; csrc/README.md, "Windows".
 *
 * Two ranks make calls without end, of one window or of WINDOWS. A call begins with a generation of PER_GENERATION
 * windows, of which memory has G: a slot is used again after R windows, and the next call may begin anew before all
 * were used. A rank has K threads, in blocks of T; each serves one position of both slices. The tensor ends before the
 * last position of rank 1's slice in the last SHORT windows of a large call.
 *
 * Memory. A slot is one word; 0 is the sentinel. Stores land at once (a late one is like a slow thread), but a clearing
 * store may land at any time later: one of them all at a time, as one is enough to do harm. A fence waits for it, if
 * its block has stored it; so does the end of its rank's kernel.
 *
 * MISTAKE  1 no fence   2 a block counts as finished when its first thread is   3 nobody waits at the gate
 */
#ifndef PER_GENERATION
#define PER_GENERATION 2
#endif
#ifndef G
#define G 3
#endif
#ifndef LAG
#define LAG 2
#endif
#ifndef WINDOWS
#define WINDOWS 5
#endif
#ifndef ONE
#define ONE 1 /* 0: no calls of one window */
#endif
#ifndef K
#define K 2
#endif
#ifndef T
#define T 2
#endif
#ifndef SHORT
#define SHORT 0
#endif
#ifndef MISTAKE
#define MISTAKE 0
#endif

#define R (G * PER_GENERATION)
#define M (2 * R) /* windows are counted modulo this */
#define CALLS 4   /* and calls modulo this */

#define SLOT(rank, stage, x, k) ((((rank) * 2 + (stage)) * R + (x) % R) * K + (k))
#define HAS(rank, k, w) (!((rank) == 1 && (k) == K - 1 && windows[c] > 1 && (w) + SHORT >= windows[c]))

byte word[4 * R * K];
byte windows[CALLS];      /* of the calls under way; 0: nobody has begun it */
byte call[2], base[2];    /* each rank's call, and the window where it begins */
byte done[2 * K];         /* of each thread: its windows that it has finished */
byte ended[2];            /* of each rank: its threads that have ended the call */
byte ordered[2 * K / T];  /* of each block: its windows that are finished and behind a fence */
byte late;                /* a clearing store that hasn't landed: one more than its slot; 0: none, as to all below */
byte late_thread, late_window;

inline store(to, stage, w) {
  /* What lands may only find a slot at rest: else data that nobody has taken are lost, or will be. */
  assert(word[SLOT(to, stage, base[rank] + w, k)] == 0);
  word[SLOT(to, stage, base[rank] + w, k)] = 1 + (base[rank] + w) % M
}
#define HERE(stage) (word[SLOT(rank, stage, base[rank] + w, k)] != 0)
inline take(stage) {
  assert(word[SLOT(rank, stage, base[rank] + w, k)] == 1 + (base[rank] + w) % M);
  if
  :: word[SLOT(rank, stage, base[rank] + w, k)] = 0
  :: late == 0 -> late = 1 + SLOT(rank, stage, base[rank] + w, k); late_thread = 1 + _pid; late_window = w
  fi
}

active [2 * K] proctype Thread() {
  byte rank = _pid / K, k = _pid % K, peer = 1 - (_pid / K);
  byte c, w;

begin:
  atomic {
    if
    :: windows[c] != 0
    :: windows[c] == 0 && ONE -> windows[c] = 1; windows[(c + 2) % CALLS] = 0
    :: windows[c] == 0 -> windows[c] = WINDOWS; windows[(c + 2) % CALLS] = 0
    fi;
    if
    :: HAS(peer, k, 0) -> store(peer, 0, 0)
    :: else
    fi
  };
  do
  :: w < windows[c] ->
    if
    :: atomic { w + 1 < windows[c] && (MISTAKE == 3 || w + 1 < LAG || ordered[_pid / T] > w + 1 - LAG) ->
        if
        :: HAS(peer, k, w + 1) -> store(peer, 0, w + 1)
        :: else
        fi }
    :: w + 1 >= windows[c]
    fi;
    if
    :: atomic { HAS(rank, k, w) && HERE(0) -> take(0); store(peer, 1, w) }
    :: !HAS(rank, k, w)
    fi;
    if
    :: atomic { HAS(peer, k, w) && HERE(1) -> take(1); w++; done[_pid] = w }
    :: atomic { !HAS(peer, k, w) -> w++; done[_pid] = w }
    fi
  :: else -> break
  od;
  atomic { ended[rank]++; w = 0 };
  atomic { call[rank] != c -> c = call[rank] };
  goto begin
}

#define LEAST(a, b) ((a) < (b) -> (a) : (b))
#define FINISHED(b) (MISTAKE == 2 -> done[(b) * T] : LEAST(done[(b) * T], done[(b) * T + T - 1]))
#define LATE_OF(b) (late != 0 && (late_thread - 1) / T == (b) && late_window <= ordered[b])
#define ORDER(b) :: d_step { FINISHED(b) > ordered[b] && (MISTAKE == 1 || !LATE_OF(b)) -> ordered[b]++ }
#define BOUNDARY(r) \
  :: d_step { ended[r] == K && (late == 0 || (late_thread - 1) / K != (r)) -> \
      base[r] = (base[r] + (windows[call[r]] + PER_GENERATION - 1) / PER_GENERATION * PER_GENERATION) % M; \
      for (i : 0 .. K - 1) { done[(r) * K + i] = 0 } \
      for (i : 0 .. K / T - 1) { ordered[(r) * K / T + i] = 0 } \
      i = 0; ended[r] = 0; call[r] = (call[r] + 1) % CALLS }

active proctype Memory() {
  byte i;
  do
  :: d_step { late != 0 -> word[late - 1] = 0; late = 0; late_thread = 0; late_window = 0 }
  ORDER(0) ORDER(1)
#if K / T > 1
  ORDER(2) ORDER(3)
#endif
  BOUNDARY(0) BOUNDARY(1)
  od
}
