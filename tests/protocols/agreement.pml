/* The agreements of a group's set-up: csrc/bootstrap/agreement.cpp, csrc/memory/symmetric_buffer.cpp.
 *
 * N ranks go through STAGES stages. In each a rank does its part, which may fail, puts its outcome into the exchange,
 * and waits for everybody's. Stage FALLBACK stands for multicast: when it fails by an agreement, all drop multicast and
 * go on without; every other failure ends the set-up on that rank.
 *
 * The exchange keeps what was put into it. DIE: one rank may die anywhere. LATE: a wait may pass its deadline although
 * everybody is well; else only when what it waits for can't come any more, because that rank is dead or has left. So a
 * rank that would wait for ever but for a deadline that nothing explains is a deadlock here.
 *
 * MISTAKE  1 a rank goes on without hearing from all: it counts a missing outcome as good
 *          2 a rank that failed by itself leaves without telling
 *          3 an exchange that broke counts as an agreed failure: multicast is dropped by those who noticed alone
 *          4 a rank reports the first failure that it hears of, not the lowest rank's
 *          5 a wait has no deadline
 */
#ifndef N
#define N 3
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef FALLBACK
#define FALLBACK 1 /* a stage, or STAGES for none */
#endif
#ifndef DIE
#define DIE 0
#endif
#ifndef LATE
#define LATE 0
#endif
#ifndef MISTAKE
#define MISTAKE 0
#endif

mtype = { missing, good, bad };
mtype = { under_way, complete, agreed_error, own_error, is_dead };

typedef Outcomes {
  mtype by[N] = missing
};
Outcomes exchange[STAGES];
mtype state[N] = under_way;       /* how each rank's set-up ended */
byte blamed[N];       /* with agreed_error: the rank that it names */
byte ended_in[N];     /* with agreed_error: the stage */
bool multicast[N] = (FALLBACK < STAGES);
bool died;

#define CANNOT_COME(rank, stage) (exchange[stage].by[rank] == missing && state[rank] != under_way)

active [N] proctype Rank() {
  byte me = _pid, stage, peer, heard, root, i;
  bool broken;
  mtype outcome;

  do
  :: stage < STAGES ->
    /* No rank is in a stage before all have been good in the one before it (or all have dropped multicast). */
    d_step {
      i = 0;
      do
      :: i < N && stage > 0 ->
        assert(exchange[stage - 1].by[i] == good || (stage - 1 == FALLBACK && exchange[stage - 1].by[i] == bad));
        i++
      :: else -> break
      od;
      i = 0
    };
    if
    :: outcome = good
    :: outcome = bad
    :: DIE && !died -> died = true; state[me] = is_dead; goto over
    fi;
    if
    :: MISTAKE == 2 && outcome == bad -> state[me] = own_error; goto over
    :: else -> exchange[stage].by[me] = outcome
    fi;
    /* The all-gather: outcomes come in any order; `heard` has a bit for each rank. */
    heard = 1 << me;
    root = (outcome == bad -> me : N);
    broken = false;
    do
    :: heard == (1 << N) - 1 || broken -> break
    :: else ->
      atomic {
        if
        :: !(heard & 1) && exchange[stage].by[0] != missing -> peer = 0
        :: !(heard & 2) && exchange[stage].by[1] != missing -> peer = 1
#if N > 2
        :: !(heard & 4) && exchange[stage].by[2] != missing -> peer = 2
#endif
        :: MISTAKE != 5 && (CANNOT_COME(0, stage) || CANNOT_COME(1, stage) || CANNOT_COME(N - 1, stage)) -> peer = N
        :: LATE && heard != (1 << N) - 1 -> peer = N
        :: DIE && !died -> died = true; state[me] = is_dead; goto over
        fi;
        if
        :: peer == N -> broken = true
        :: else ->
          heard = heard | (1 << peer);
          if
          :: exchange[stage].by[peer] == bad && (root == N || (peer < root && MISTAKE != 4)) -> root = peer
          :: else
          fi
        fi;
        peer = 0
      }
    od;
    if
    :: broken && MISTAKE == 1
    :: broken && MISTAKE == 3 && stage == FALLBACK -> multicast[me] = false
    :: broken && MISTAKE != 1 && !(MISTAKE == 3 && stage == FALLBACK) -> state[me] = own_error; goto over
    :: !broken && root < N && stage == FALLBACK -> multicast[me] = false
    :: !broken && root < N && stage != FALLBACK ->
      d_step { state[me] = agreed_error; blamed[me] = root; ended_in[me] = stage };
      goto over
    :: !broken && root == N
    fi;
    d_step { stage++; heard = 0; root = 0; outcome = missing }
  :: else -> state[me] = complete; break
  od;
over:
  skip;
  /* Whom this rank has come to the same end with. */
  d_step {
    i = 0;
    do
    :: i < N ->
      assert(!(state[me] == complete && state[i] == complete) || multicast[me] == multicast[i]);
      assert(!(state[me] == agreed_error && state[i] == agreed_error) ||
             (blamed[me] == blamed[i] && ended_in[me] == ended_in[i]));
      /* Everybody's outcome of the last stage was good, or this rank wouldn't have completed. */
      assert(!(state[me] == complete && state[i] == agreed_error));
#if !DIE && !LATE
      /* All ranks are well: then nobody ends by anything but an agreement. */
      assert(state[i] != own_error);
#endif
      i++
    :: else -> break
    od
  }
}
