/* What a guard promises about one limit, and every order of events in which the promise could break.
 *
 * A worker asks the store to hold the most a call can cost, sends the call to the provider, and settles what
 * it cost. What is sent to the store, and its answers, may be lost, doubled or delayed for as long as they
 * like. A worker may be killed between any two of its steps: it then takes no further one, and since every
 * state is checked, every state is one in which any of them may have died. Or it is so slow that it is taken
 * for dead, and goes on. The provider bills what has reached it, whether or not anybody is left to be told.
 * There are no clocks: an owner may lapse at any moment, which covers every clock there could be.
 *
 * Checked in every reachable state:
 *   BOUND      what was billed is never above LIMIT                          (ground truth: `billed`)
 *   CELL       used + held is never above LIMIT                              (what the store believes)
 *   ONCE       a call is never charged more than it may cost; settled in time, it is charged what its first
 *              settlement said, whatever arrives again
 *   COVERED    a settled call is never charged less than it was billed
 *   CANCELLED  a call that was cancelled in time holds nothing and is charged nothing, for good
 * and that a worker always has a next step. All allow for `excess`, which is 0 unless UNDERESTIMATES is given.
 *
 * Variants that keep all of them:
 *   (none)               every call is reserved in the store
 *   UNDERESTIMATES       a call may cost one unit more than was held for it
 *   LEASE                a worker reserves a chunk and spends it call by call without asking anybody; it
 *                        does not look whether its lease has lapsed, and goes on spending when it has
 * Mistakes, each of which breaks one:
 *   REFUND_ON_EXPIRY     what a lapsed owner held is given back; with LEASE, its chunks
 *   CHECK_THEN_RECORD    the limit is looked at before the call, the cost is added after it
 *   NO_TOMBSTONE         a call id is forgotten as soon as its call has ended
 *   SETTLE_TWICE         a settlement that arrives again is applied again
 *   HOLD_TWICE           a reserve that arrives again takes a second hold
 *   LATE_ON_TOP          a settlement after the lapse is charged on top of the lapsed hold
 *
 * `scripts/model` checks all of them, and that the mistakes are found.
 */

#define ALL 0
#define BOUND 1
#define CELL 2
#define ONCE 3
#define COVERED 4
#define CANCELLED 5
#ifndef WATCH
#define WATCH ALL           /* the property to check */
#endif
#define promise(property, truth) assert((WATCH != ALL && WATCH != property) || (truth))

#ifndef CALLS
#define CALLS 3             /* call ids; with LEASE, chunks */
#endif
#define OWNERS 2            /* processes; call i belongs to owner i % OWNERS, and lapses with it */
#define owner(i) ((i) % OWNERS)

#define COST 2              /* the most that one call may cost, so what is held for it */
#ifdef LEASE
#define SIZE 3              /* what a reservation takes: a chunk, and not a multiple of a call's cost */
#else
#define SIZE COST
#endif
#define LIMIT (CALLS * SIZE - COST + 1)     /* all but the last of them fit; that one if the others cost less */

/* The store: one cell, and one entry per call id. */
mtype = { NEVER, OPEN, EXPIRED, SETTLED, GONE };
byte used, held;
mtype state[CALLS] = NEVER;
byte holds[CALLS];

/* The wire: copies on their way, in no order; answers are the last one given. */
mtype = { NONE, YES, NO };
byte reserves[CALLS], settles[CALLS], cancels[CALLS];
mtype answer[CALLS] = NONE;
bit waits[CALLS];           /* somebody is there to read the answer */
byte actual[CALLS];         /* what the settlements of this call say */

/* The provider's door, and its books. */
bit asked[CALLS], answered[CALLS];
byte cost[CALLS];           /* of the request last answered */
byte bill[CALLS];           /* all that this call id was billed */
byte billed;
byte excess;

/* What only the checks know. */
byte charge[CALLS];         /* this call's part of `used` */
bit in_time[CALLS], dropped[CALLS];

inline verify(i) {
    promise(BOUND, billed <= LIMIT + excess);
    promise(CELL, used + held <= LIMIT + excess);
    promise(ONCE, charge[i] + holds[i] <= SIZE + excess);
    promise(ONCE, !in_time[i] || charge[i] == actual[i]);
    promise(COVERED, state[i] != SETTLED || charge[i] + excess >= bill[i]);
    promise(CANCELLED, !dropped[i] || (charge[i] == 0 && holds[i] == 0))
}

inline add(i, amount) {     /* used += amount, on behalf of call i */
    used = used + amount;
    charge[i] = charge[i] + amount
}

inline let_go(i) {
    held = held - holds[i];
    holds[i] = 0
}

inline end(i, how) {
#ifdef NO_TOMBSTONE
    state[i] = NEVER
#else
    state[i] = how
#endif
}

/* The store as one call id sees it. Each step is one script or transaction. */
proctype store(byte i) {
end_store:
    do
    :: atomic { reserves[i] > 0 ->
        reserves[i]--;
        if
#ifdef HOLD_TWICE
        :: (state[i] == NEVER || state[i] == OPEN) && used + held + SIZE <= LIMIT ->
#else
        :: state[i] == NEVER && used + held + SIZE <= LIMIT ->
#endif
#ifndef CHECK_THEN_RECORD
            held = held + SIZE;
            holds[i] = holds[i] + SIZE;
#endif
            state[i] = OPEN;
            answer[i] = YES
        :: state[i] == NEVER && used + held + SIZE > LIMIT -> answer[i] = NO
        :: else -> answer[i] = (state[i] == OPEN -> YES : NO)       /* a replay, or too late */
        fi;
        answer[i] = (waits[i] -> answer[i] : NONE);
        verify(i) }

    :: atomic { settles[i] > 0 ->
        settles[i]--;
        if
        :: state[i] == OPEN ->
            let_go(i);
            add(i, actual[i]);
            in_time[i] = 1;
            end(i, SETTLED)
        :: state[i] == EXPIRED ->                                   /* late: only what the hold did not cover */
#if defined(REFUND_ON_EXPIRY) || defined(LATE_ON_TOP) || defined(CHECK_THEN_RECORD)
            add(i, actual[i]);
#elif defined(UNDERESTIMATES)
            if
            :: actual[i] > SIZE -> add(i, actual[i] - SIZE)
            :: else
            fi;
#endif
            end(i, SETTLED)
#ifdef NO_TOMBSTONE
        :: state[i] == NEVER ->                                     /* it looks lost: its receipts are believed */
            add(i, actual[i])
#endif
        :: else ->                                                  /* a duplicate */
#ifdef SETTLE_TWICE
            add(i, actual[i])
#else
            skip
#endif
        fi;
        verify(i) }

    :: atomic { cancels[i] > 0 ->
        cancels[i]--;
        if
        :: state[i] == OPEN || state[i] == NEVER ->                 /* NEVER: it has overtaken its reserve */
            let_go(i);
            dropped[i] = 1;
            end(i, GONE)
        :: else                                                     /* lapsed or ended: nothing to give back */
        fi;
        verify(i) }
    od
}

/* Any process, at any time, finds that an owner has sent no heartbeat: all its holds end. */
proctype reaper(byte o) {
    byte i;
end_reaper:
    do
    :: atomic { state[0] == OPEN && owner(0) == o ||
                state[1] == OPEN && owner(1) == o ||
                state[CALLS - 1] == OPEN && owner(CALLS - 1) == o ->
        i = 0;
        do
        :: i < CALLS ->
            if
            :: state[i] == OPEN && owner(i) == o ->
#ifndef REFUND_ON_EXPIRY
                add(i, holds[i]);
#endif
                let_go(i);
                end(i, EXPIRED);
                verify(i)
            :: else
            fi;
            i++
        :: else -> break
        od;
        i = 0 }
    od
}

/* Bills what reaches it: anything up to COST. */
proctype provider(byte i) {
    byte price;
end_provider:
    do
    :: atomic { asked[i] ->
        select(price : 0 .. COST);
#ifdef UNDERESTIMATES
        if
        :: price = COST + 1; excess++
        :: skip
        fi;
#endif
        asked[i] = 0;
        answered[i] = 1;
        cost[i] = price;
        bill[i] = bill[i] + price;
        billed = billed + price;
        price = 0;
        verify(i) }
    od
}

inline send(copies) {       /* one, or another because no answer came; what is sent early may arrive late */
    if
    :: copies = 1
    :: copies = 2
    fi
}

inline hear() {             /* an answer is heard, or waited for no longer */
    waits[me] = 0;
    answer[me] = NONE
}

inline ask() {              /* the reserve, or at last a cancel of whatever may still arrive */
    atomic { waits[me] = 1; send(reserves[me]) };
    if
    :: atomic { answer[me] == YES -> hear() }
    :: atomic { answer[me] == NO -> hear(); goto over }
    :: atomic { answer[me] != NO -> hear(); cancels[me] = 1; goto over }
    fi
}

#ifdef LEASE
/* Spends a chunk call by call. What a call did not use is there for the next one. */
proctype worker(byte me) {
    byte left = SIZE;
    ask();
    do
    :: atomic { left >= COST -> left = left - COST; asked[me] = 1 };
        if
        :: atomic { answered[me] -> answered[me] = 0; left = left + COST - cost[me]; cost[me] = 0 }
        :: atomic { asked[me] -> break }                        /* no answer: what it may cost stays spent */
        fi
    :: break
    od;
    atomic { actual[me] = SIZE - left; send(settles[me]) };
over:
    skip
}
#else
/* Makes one call. */
proctype worker(byte me) {
    ask();
    asked[me] = 1;
    if
    :: answered[me] -> actual[me] = cost[me]
    :: asked[me] -> actual[me] = SIZE                           /* no answer: it may be billed yet */
    fi;
    atomic { send(settles[me]) };
over:
    skip
}
#endif

init {
    byte i;
    atomic {
        i = 0;
        do
        :: i < CALLS -> run store(i); run provider(i); run worker(i); i++
        :: else -> break
        od;
        i = 0;
        do
        :: i < OWNERS -> run reaper(i); i++
        :: else -> break
        od
    }
}
