/* The ranks of a run as threads of one process. */
#ifndef PENTAD_TEST_RANKS_H
#define PENTAD_TEST_RANKS_H

#include <stdbool.h>

struct comm;

/* What one rank does; world is NULL where there is one. A rank that leaves while the others meet makes them
 * wait, so it leaves only where all do: on what a collective call returned. */
typedef void rank_fn(int rank, struct comm *world, void *shared);

/* Runs `body` on all ranks at once and closes the world behind them. False, as a failed case, where they
 * could not start. */
bool ranks_run(int ranks, rank_fn *body, void *shared);

#endif
