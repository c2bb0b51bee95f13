/* Lamport all-reduce over generations of slots: csrc/kernels/lamport, csrc/kernels/device/lamport.cuh.
 *
 * N ranks make calls without end, each in generation (call mod G) of every rank's memory. What a call is (one-shot or
 * two-shot, its packs) is chosen anew by the rank that begins it first. A rank is a set of actions that run in any
 * order as soon as they can: so each pack has a thread of its own, and a rank may be slow for any time at any place.
 *
 * Memory. A slot holds a pack of W words; 0 is the sentinel. A store has been issued (a bit in `flying`), and lands
 * later, word by word, in any order among all stores of its rank. A clearing store lands later too (`wiping`). The end
 * of a kernel waits for all of them: this is the kernel boundary. A word's value names its call and its source.
 *
 * Calls are counted modulo M, a multiple of G that tells call c from call c + G.
 *
 * MISTAKE  1 a taker compares the first word of a pack only     6 a publisher stores the bits of the sentinel as data
 *          2 a taker clears a slot that it has seen incomplete  7 waits don't look at the abort word
 *          3 a two-shot doesn't take the last owner's results   8 kernels don't look at the abort word at their start
 *          4 multicast: the own copy isn't taken                9 a rank that fails tells nobody
 *          5 no kernel boundary behind a clearing store
 */
#ifndef N
#define N 2 /* ranks */
#endif
#ifndef G
#define G 3 /* generations */
#endif
#ifndef ONE
#define ONE 1 /* packs of a one-shot call; 0: none is made */
#endif
#ifndef TWO
#define TWO 2 /* the same of a two-shot call */
#endif
#ifndef SMALL
#define SMALL 0 /* the same of another two-shot call */
#endif
#ifndef PER
#define PER 1 /* packs of one rank in one stage, at most */
#endif
#ifndef MULTICAST
#define MULTICAST 0 /* 1: one-shot packs and two-shot results also land in the own slot */
#endif
#ifndef FAIL
#define FAIL 0 /* 1: one wait gives up at any time; 2: one rank dies at any time; 3: both */
#endif
#ifndef MISTAKE
#define MISTAKE 0
#endif

#define W 2
#if G == 1
#define M 4
#else
#define M (2 * G)
#endif

#define SENTINEL 0
#define INPUT(call, rank) (8 * ((call) + 1) + (1 << (rank)))
#define SUM(call) (8 * N * ((call) + 1) + (1 << N) - 1)

/* A call: its packs, and whether it is a two-shot. A two-shot cuts them into slices, one for each owner. */
#define TWOSHOT 16
#define PACKS(kind) ((kind) & 15)
#define EACH(kind) ((kind) & TWOSHOT -> (PACKS(kind) + N - 1) / N : PACKS(kind))
#define EXISTS(kind, owner, j) ((j) < EACH(kind) && (!((kind) & TWOSHOT) || (owner) * EACH(kind) + (j) < PACKS(kind)))

/* Bits of `needed`, one for each slot, and of `flying` and `wiping`, one for each word. */
#define SLOT(rank, j) ((rank) * PER + (j))
#define SLOT_BIT(rank, j) (1 << SLOT(rank, j))
#define WORD_BITS(rank, j) (((1 << W) - 1) << (SLOT(rank, j) * W))

/* Where word w of pack j of `from` lies in a rank's memory: each call cuts its generation up anew. */
#define AT(call, stage, from, j, w) \
  (((((call) % G) * 2 + (stage)) * N * PER + (from) * EACH(kind[call]) + (j)) * W + (w))

typedef Memory {
  byte word[G * 2 * N * PER * W]
};
Memory memory[N];
byte kind[M];      /* of the calls under way */
byte front;        /* the next call that nobody has begun */
byte current[N];   /* the call that each rank is in */
bool aborted[N];   /* the ranks' abort words */
byte failed;       /* the call in which the first rank failed, plus one */
byte dead;         /* the rank that died, plus one */
bool gave_up;

/* One of the bits of `mask`, which isn't 0; any of them. */
inline pick(mask) {
  bit_ = 0;
  do
  :: ((mask) >> bit_) & 1 -> break
  :: ((mask) >> (bit_ + 1)) != 0 -> bit_++
  od
}

/* One word of a store under way lands in a peer's memory. */
inline land(mask, call, stage, value) {
  pick(mask);
  mask = mask & ~(1 << bit_);
  /* What lands here may only find a slot at rest: else data that nobody has taken are lost. */
  assert(memory[bit_ / W / PER].word[AT(call, stage, r, (bit_ / W) % PER, bit_ % W)] == SENTINEL);
  memory[bit_ / W / PER].word[AT(call, stage, r, (bit_ / W) % PER, bit_ % W)] = (MISTAKE == 6 -> SENTINEL : value);
  bit_ = 0
}

/* One word of a clearing store lands in the own memory. */
inline wipe(mask, stage) {
  pick(mask);
  mask = mask & ~(1 << bit_);
  memory[r].word[AT(c, stage, bit_ / W / PER, (bit_ / W) % PER, bit_ % W)] = SENTINEL;
  bit_ = 0
}

/* Says what the next call is that nobody has begun. */
inline begin_front(what) {
  kind[front] = what;
  kind[(front + M - 3) % M] = 0; /* nobody is in it any more */
  front = (front + 1) % M
}
inline choose(call) {
  if
  :: call == front && ONE > 0 -> begin_front(ONE)
  :: call == front && TWO > 0 -> begin_front(TWOSHOT + TWO)
  :: call == front && SMALL > 0 -> begin_front(TWOSHOT + SMALL)
  :: call != front
  fi
}

/* The stores of the first stage: one-shot, to slot [r] of each rank; two-shot, to the owners. */
inline publish(mask, call) {
  i = 0;
  do
  :: i < N * PER ->
    if
    :: EXISTS(kind[call], i / PER, i % PER) && (i / PER != r || (MULTICAST && !(kind[call] & TWOSHOT))) ->
      mask = mask | WORD_BITS(i / PER, i % PER)
    :: else
    fi;
    i++
  :: else -> break
  od;
  i = 0
}

/* What this rank waits for in its current call. */
inline expect() {
  i = 0;
  do
  :: i < N * PER ->
    if
    :: EXISTS(kind[c], r, i % PER) && (i / PER != r || (MULTICAST && !(kind[c] & TWOSHOT))) ->
      needed0 = needed0 | (1 << i)
    :: else
    fi;
    if
    :: (kind[c] & TWOSHOT) && EXISTS(kind[c], i / PER, i % PER) && (i / PER != r || (MULTICAST && MISTAKE != 4)) &&
       !(MISTAKE == 3 && i / PER == N - 1) ->
      needed1 = needed1 | (1 << i)
    :: else
    fi;
    i++
  :: else -> break
  od;
  i = 0;
  do
  :: i < PER -> sum[i] = ((MULTICAST && !(kind[c] & TWOSHOT)) -> 0 : INPUT(c, r)); i++
  :: else -> break
  od;
  i = 0
}

/* A look at a pack in the own memory. */
#define SEEN(stage, from, j, w) (memory[r].word[AT(c, stage, from, j, w)] != SENTINEL)
#define COMPLETE(stage, from, j) (SEEN(stage, from, j, 0) && (MISTAKE == 1 || SEEN(stage, from, j, 1)))
#define PARTLY(stage, from, j) (SEEN(stage, from, j, 0) != SEEN(stage, from, j, 1))

/* Stage 0: a thread looks at its packs of all ranks, and takes them when none is missing. */
#define HERE(from, j) (!(needed0 & SLOT_BIT(from, j)) || COMPLETE(0, from, j))
#if N == 2
#define WAITS(j) (needed0 & (SLOT_BIT(0, j) | SLOT_BIT(1, j)))
#define ALL_HERE(j) (WAITS(j) && HERE(0, j) && HERE(1, j))
#else
#define WAITS(j) (needed0 & (SLOT_BIT(0, j) | SLOT_BIT(1, j) | SLOT_BIT(2, j)))
#define ALL_HERE(j) (WAITS(j) && HERE(0, j) && HERE(1, j) && HERE(2, j))
#endif

inline take_and_sum(j) {
  i = 0;
  do
  :: i < N ->
    if
    :: needed0 & SLOT_BIT(i, j) ->
      /* What was stored in this call, whole. */
      assert(memory[r].word[AT(c, 0, i, j, 0)] == INPUT(c, i) && memory[r].word[AT(c, 0, i, j, 1)] == INPUT(c, i));
      sum[j] = sum[j] + memory[r].word[AT(c, 0, i, j, 0)];
      needed0 = needed0 & ~SLOT_BIT(i, j);
      wiping0 = wiping0 | WORD_BITS(i, j)
    :: else
    fi;
    i++
  :: else -> break
  od;
  assert(sum[j] == SUM(c));
  i = 0;
  do
  :: i < N && (kind[c] & TWOSHOT) ->
    if
    :: i != r || MULTICAST -> flying1 = flying1 | WORD_BITS(i, j)
    :: else
    fi;
    i++
  :: else -> break
  od;
  i = 0
}

#define READY(owner, j) ((needed1 & SLOT_BIT(owner, j)) && COMPLETE(1, owner, j))
inline collect(owner, j) {
  assert(memory[r].word[AT(c, 1, owner, j, 0)] == SUM(c) && memory[r].word[AT(c, 1, owner, j, 1)] == SUM(c));
  needed1 = needed1 & ~SLOT_BIT(owner, j);
  wiping1 = wiping1 | WORD_BITS(owner, j)
}

/* Whether a pack of `from` is missing in a stage. */
#define MISSING(stage, needed, from, j) ((needed & SLOT_BIT(from, j)) && !COMPLETE(stage, from, j))
#define MISSES(from) (MISSING(0, needed0, from, 0) || MISSING(1, needed1, from, 0) || \
  (PER > 1 && (MISSING(0, needed0, from, PER - 1) || MISSING(1, needed1, from, PER - 1))))

inline check_clean() {
  i = 0;
  do
  :: i < 2 * N * PER * W -> assert(memory[r].word[(c % G) * 2 * N * PER * W + i] == SENTINEL); i++
  :: else -> break
  od;
  i = 0
}

inline check_everybody_has_begun() {
  i = 0;
  do
  :: i < N -> assert((current[i] + M - c) % M <= 1); i++
  :: else -> break
  od;
  i = 0
}

active [N] proctype Rank() {
  byte r = _pid;
  byte c;                      /* the call */
  short flying0, flying1;      /* words of stores under way, by destination, pack and word */
  short needed0, needed1;      /* packs not yet taken, by source and pack */
  short wiping0, wiping1;      /* words of clearing stores under way */
  byte sum[PER];
  byte telling;                /* of a failure: 1 + the next rank to tell; 0: no failure here */
  byte late;                   /* MISTAKE 5: a clearing store that is left over: 1 + where */
  byte i, bit_;

begin:
  atomic {
    if
    :: aborted[r] && MISTAKE != 8 -> goto over
    :: else
    fi;
    choose(c);
    current[r] = c;
    publish(flying0, c);
    expect()
  };

  do
  :: atomic { flying0 != 0 -> land(flying0, c, 0, INPUT(c, r)) }
  :: atomic { flying1 != 0 -> land(flying1, c, 1, SUM(c)) }
  :: atomic { wiping0 != 0 -> wipe(wiping0, 0) }
  :: atomic { wiping1 != 0 -> wipe(wiping1, 1) }
  :: d_step { ALL_HERE(0) -> take_and_sum(0) }
  :: d_step { READY(0, 0) -> collect(0, 0) }
  :: d_step { READY(1, 0) -> collect(1, 0) }
#if PER > 1
  :: d_step { ALL_HERE(1) -> take_and_sum(1) }
  :: d_step { READY(0, 1) -> collect(0, 1) }
  :: d_step { READY(1, 1) -> collect(1, 1) }
#endif
#if N > 2
  :: d_step { READY(2, 0) -> collect(2, 0) }
#endif
#if MISTAKE == 2
  :: d_step { (needed0 & SLOT_BIT(1 - r, 0)) && PARTLY(0, 1 - r, 0) ->
      memory[r].word[AT(c, 0, 1 - r, 0, 0)] = SENTINEL; memory[r].word[AT(c, 0, 1 - r, 0, 1)] = SENTINEL }
#endif
#if MISTAKE == 5
  :: late != 0 -> memory[r].word[late - 1] = SENTINEL; late = 0
  :: atomic { wiping0 != 0 && late == 0 ->
      pick(wiping0);
      wiping0 = wiping0 & ~(1 << bit_);
      late = 1 + AT(c, 0, bit_ / W / PER, (bit_ / W) % PER, bit_ % W);
      bit_ = 0 }
#endif
#if FAIL & 1
  :: atomic { !gave_up && telling == 0 && (needed0 | needed1) != 0 ->
      gave_up = true; telling = 1; failed = (failed == 0 -> c + 1 : failed) }
#endif
#if FAIL & 2
  :: atomic { dead == 0 -> dead = r + 1; failed = (failed == 0 -> c + 1 : failed); goto over }
  :: dead != 0 && telling == 0 && MISSES(dead - 1) -> telling = 1
#endif
#if FAIL
  :: d_step { telling > 0 && telling <= N -> aborted[telling - 1] = (MISTAKE != 9); telling++ }
  :: d_step { aborted[r] && MISTAKE != 7 && (needed0 | needed1) != 0 ->
      /* Its threads leave, and so the failure is this rank's too. */
      needed0 = 0; needed1 = 0; telling = (telling == 0 -> 1 : telling) }
  :: d_step { telling > N && (needed0 | needed1) != 0 && (MISTAKE == 7 || MISTAKE == 9) -> needed0 = 0; needed1 = 0 }
#endif
  :: atomic { (flying0 | flying1 | wiping0 | wiping1 | needed0 | needed1) == 0 && (telling == 0 || telling > N) ->
      if
      :: telling == 0 ->
        /* No rank gets past the call after the one that failed. */
        assert(failed == 0 || c == failed - 1 || c == (failed + M - 2) % M);
#if G > 1 && MISTAKE != 5
        check_clean();
#endif
        check_everybody_has_begun();
      :: else
      fi;
      telling = 0;
      sum[0] = 0; sum[PER - 1] = 0;
      c = (c + 1) % M;
      goto begin }
  od;
over:
  skip
}
