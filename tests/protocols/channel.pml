/* One lane of a pair channel on the GPU: csrc/kernels/channel (roles.cuh, lane.cuh), csrc/kernels/device/channel.cuh.
 *
 * A source sends messages without end to a destination. Both make the same sequence; each message is chosen anew by
 * the end that comes to it first: EMPTY (a header alone), LINE, or some pieces through slots. Lane 0 is meant, which
 * has the headers.
 *
 * Memory. What the source stores is issued first and lands later, in any order: each of a slot's two words, each of a
 * header's two lines, a line with its flag (one access). `posted` alone is stored with release: it lands behind all
 * pieces that it speaks of. Credit is a relaxed store, and lands at any time after the destination's loads, which it
 * depends on. The destination loads the two words of a slot one after the other. Stores to one word keep their order.
 *
 * Kernels. The destination's kernel may end behind any message. The credit of a line or an empty message that it took
 * last is then left to the start of the next kernel. A kernel may take a line, or nothing, before it has seen the
 * header; that message's credit waits for the header.
 *
 * Counters and values run modulo MOD, in the place of 32 bits.
 *
 * MISTAKE  1 credit is given before the slot has been read    5 `posted` doesn't wait for the data (no release)
 *          2 the source uses a slot too many                  6 what a kernel took last is never credited
 *          3 flags don't name the message                     7 an empty message is credited before its header is there
 *          4 of a header the first line only is looked at     8 waits don't look at the abort word
 *          9 the source begins a message too many
 */
#ifndef SLOTS
#define SLOTS 2
#endif
#ifndef ENTRIES
#define ENTRIES 2 /* of the line ring and of the header ring */
#endif
#ifndef PIECES
#define PIECES 1 /* of a message through slots, at most; 0: there are none */
#endif
#ifndef LINES
#define LINES 1 /* 0: all messages go through slots */
#endif
#ifndef MOD
#define MOD 4 /* a multiple of SLOTS and ENTRIES, and larger */
#endif
#ifndef FAIL
#define FAIL 0 /* 1: one of the two gives up in a wait, at any time */
#endif
#ifndef MISTAKE
#define MISTAKE 0
#endif

#define EMPTY 8
#define LINE 9
#define VALUE(n) ((n) + 1)
#define FLAG(n) (MISTAKE == 3 -> 1 : (n) + 1)
#define AHEAD(a, b) (((a) + MOD - (b)) % MOD)

typedef Slot {
  byte word[2];
  byte due[2];       /* values on their way here; 0: none */
};
typedef Line {       /* of data, or of a header */
  byte flag, data;
  byte flag_due, data_due;
};

/* In the destination's memory. */
Slot slot[SLOTS];
Line line[ENTRIES], call[ENTRIES], tag[ENTRIES];
byte posted;
byte posted_due;
bool posted_flies;

/* In the source's memory: one word. */
byte credit_messages, credit_slots;
byte due_messages, due_slots;
bool credit_flies;

byte kind[MOD];      /* the program, of the messages under way: how many pieces, or LINE or EMPTY; 0: not yet */
bool aborted[2];     /* of source and destination */
bool gave_up;

inline choose(message) {
  atomic {
    if
    :: kind[message] == 0 && LINES -> kind[message] = EMPTY
    :: kind[message] == 0 && LINES -> kind[message] = LINE
    :: kind[message] == 0 && PIECES > 0 -> kind[message] = 1
    :: kind[message] == 0 && PIECES > 1 -> kind[message] = PIECES
    :: kind[message] != 0
    fi
  }
}

/* Waits until `condition`; a wait may also be the one that gives up, or end by the abort word. */
#if FAIL
#define UNTIL(condition, me, peer) \
  atomic { \
    if \
    :: condition \
    :: aborted[me] && MISTAKE != 8 -> goto failed \
    :: !gave_up -> gave_up = true; goto failed \
    fi \
  }
#else
#define UNTIL(condition, me, peer) condition
#endif

inline store_line(l, value) {
  l.data_due = value;
  l.flag_due = FLAG(messages)
}

active proctype Source() {
  byte messages, slots;
  byte begun, piece; /* begun: the current message has a header; its pieces, plus 1 */
  byte told;         /* of slots, by `posted` */
  do
  :: kind[messages] == 0 -> choose(messages)
  :: d_step { begun == 0 && kind[messages] != 0 && AHEAD(messages, credit_messages) < ENTRIES + (MISTAKE == 9) ->
      store_line(call[messages % ENTRIES], kind[messages]);
      store_line(tag[messages % ENTRIES], VALUE(messages));
      if
      :: kind[messages] == LINE -> store_line(line[messages % ENTRIES], VALUE(messages))
      :: else
      fi;
      if
      :: kind[messages] > PIECES -> messages = (messages + 1) % MOD
      :: else -> begun = kind[messages] + 1
      fi }
  :: d_step { begun != 0 && AHEAD(slots, credit_slots) < SLOTS + (MISTAKE == 2) ->
      slot[slots % SLOTS].due[0] = VALUE(slots);
      slot[slots % SLOTS].due[1] = VALUE(slots);
      slots = (slots + 1) % MOD;
      piece++;
      if
      :: piece + 1 == begun -> piece = 0; begun = 0; messages = (messages + 1) % MOD
      :: else
      fi }
  :: d_step { told != slots -> /* at any time, and several pieces by one post */
      posted_due = slots; posted_flies = true; told = slots }
#if FAIL
  :: aborted[0] && MISTAKE != 8 -> break
  :: atomic { !gave_up -> gave_up = true; break }
#endif
  od;
  aborted[0] = true;
  aborted[1] = true
}

#define HERE(l) (l.flag == FLAG(messages))
#define HEADER_HERE (HERE(call[messages % ENTRIES]) && (MISTAKE == 4 || HERE(tag[messages % ENTRIES])))

inline check_header() {
  UNTIL(HEADER_HERE, 1, 0);
  d_step {
    assert(call[messages % ENTRIES].data == kind[messages]);
    assert(tag[messages % ENTRIES].data == VALUE(messages))
  }
}
inline take_line() {
  if
  :: kind[messages] == LINE ->
    UNTIL(HERE(line[messages % ENTRIES]), 1, 0);
    assert(line[messages % ENTRIES].data == VALUE(messages))
  :: else
  fi
}
inline give_credit(m, s) {
  d_step { due_messages = m; due_slots = s; credit_flies = true }
}

active proctype Destination() {
  byte messages, slots, piece;
  bool last;         /* the message ends the kernel, and is not credited in it */
  do
  :: true ->
    choose(messages);
    if
    :: kind[messages] <= PIECES ->
      check_header();
      do
      :: piece < kind[messages] ->
        UNTIL(posted != slots, 1, 0);
        if
        :: MISTAKE == 1 -> give_credit(messages, (slots + 1) % MOD)
        :: else
        fi;
        assert(slot[slots % SLOTS].word[0] == VALUE(slots));
        assert(slot[slots % SLOTS].word[1] == VALUE(slots));
        d_step { slots = (slots + 1) % MOD; piece++ };
        give_credit((messages + (piece == kind[messages])) % MOD, slots)
      :: else -> break
      od;
      piece = 0
    :: else ->
      if
      :: check_header(); take_line()
      :: /* No other lane has anything left: the data warps wait for the line while the signal warp sees the header. */
        take_line();
        if
        :: MISTAKE == 7 -> give_credit((messages + 1) % MOD, slots)
        :: else
        fi;
        check_header()
      fi;
      if
      :: true -> give_credit((messages + 1) % MOD, slots)
      :: last = true
      fi
    fi;
    d_step { kind[messages] = 0; messages = (messages + 1) % MOD };
    if
    :: last && MISTAKE != 6 -> give_credit(messages, slots) /* the next kernel begins */
    :: else
    fi;
    last = false
  od;
failed:
  aborted[1] = true;
  aborted[0] = true
}

/* A piece on its way that `posted` speaks of. */
#define COVERED(value) (value != 0 && AHEAD(posted_due, value - 1) >= 1 && AHEAD(posted_due, value - 1) <= SLOTS)
#define COVERS(s) (COVERED(slot[s].due[0]) || COVERED(slot[s].due[1]))
#define WORD(s, w) slot[s].word[w] = slot[s].due[w]; slot[s].due[w] = 0
#define ENTRY(l) l.flag = l.flag_due; l.data = l.data_due; l.flag_due = 0; l.data_due = 0
#define LAND_WORD(s, w) :: d_step { slot[s].due[w] != 0 -> WORD(s, w) }
#define LAND_LINE(l) :: d_step { l.flag_due != 0 -> ENTRY(l) }

active proctype Wires() {
end:
  do
  LAND_LINE(line[0])
  LAND_LINE(line[1])
  LAND_WORD(0, 0)
  LAND_WORD(0, 1)
  LAND_WORD(1, 0)
  LAND_WORD(1, 1)
  LAND_LINE(call[0])
  LAND_LINE(call[1])
  LAND_LINE(tag[0])
  LAND_LINE(tag[1])
  :: d_step { posted_flies && (MISTAKE == 5 || !(COVERS(0) || COVERS(1))) ->
      posted = posted_due; posted_due = 0; posted_flies = false }
  :: d_step { credit_flies ->
      credit_messages = due_messages; credit_slots = due_slots; due_messages = 0; due_slots = 0; credit_flies = false }
  od
}
