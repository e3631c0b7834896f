/* parallel.layout auto: the layout that is likely fastest among the legal ones whose ranks fit their node.
 *
 * All legal layouts of the sizes that are not given are listed and guessed at from the sizes of the model;
 * the most promising are built as programs, so their memory, operations and traffic are exact (estimate.h).
 * Time is operations / a rank's rate, and bytes / the bandwidth of the links that a group's ranks have
 * between them, played through the pipeline's schedule. What it leaves out: work that no matrix product does,
 * and ranks that wait for each other for other reasons. Floor: train. */
#ifndef PENTAD_TRAIN_AUTO_H
#define PENTAD_TRAIN_AUTO_H

#include "train/estimate.h"

struct comm;

/* A layout. int64_t throughout: rank 0 sends its choice to the others. */
struct auto_layout {
	int64_t tp, cp, pp, chunks, ep, etp; /* the values of config_layout_keys, in their order */
	int64_t sequence_parallel;           /* 0 or 1 */
	int64_t exchange;                    /* enum parallel_cp_comm */
	int64_t schedule;                    /* enum parallel_schedule */
};

/* What layouts are judged by. */
struct auto_machine {
	int world, ranks_per_node;
	double rate;                       /* flop/s of a rank */
	double within_node, between_nodes; /* bytes/s that a rank sends while all ranks do */
	double latency_s;                  /* of a collective */
	int64_t node_bytes;                /* memory of a node */
};

struct auto_cost {
	double step_s, sample_s; /* of a step; of one of its samples, which is what layouts are compared by */
	double bubble;           /* as in struct estimate */
	double wire_bytes[AXIS_COUNT];  /* sent in a step by the rank that sends most along the axis */
	int64_t rank_bytes, node_bytes; /* of the fullest rank and the fullest node */
	bool fits;
};

struct auto_candidate {
	struct auto_layout layout;
	size_t index;         /* in auto_list's order */
	double guessed_s;     /* of a sample */
	double least_bytes;   /* of a rank on average: weights, gradients, optimizer, nothing else */
	double guessed_bytes; /* of the fullest rank */
	int fit;              /* by that guess: 0 yes, 1 in doubt, 2 no */
	bool tried;
	struct auto_cost cost; /* once it is examined */
};

struct auto_search {
	struct auto_machine machine;
	size_t legal;     /* layouts */
	size_t too_large; /* of them: weights, gradients and optimizer state alone exceed a node */
	size_t n;         /* examined: built as programs */
	struct auto_candidate *examined; /* those that fit, the chosen one and then the
	                                    fastest first; then the others by time */
	size_t fitting;                  /* of those examined */
};

/* c: checked, its layout open, where not said otherwise. */

/* All legal layouts in a fixed order, the plainest first; *out is freed with free(). Returns how many. Local.
 */
size_t auto_list(const struct config *c, int world, struct auto_layout **out);
bool auto_is_possible(const struct config *c, int world); /* whether there is one */
/* Gives c the layout's sizes, as far as they are open, and checks it. Where layers are not a multiple of the
 * virtual stages and nothing says how they are split, it chooses pipeline_model_parallel_layout too.
 * EXIT_CONFIG where the rules refuse it. Local. */
int auto_apply(struct config *c, const struct auto_layout *l, int world, struct err *e);
/* The layout that a checked configuration has. */
struct auto_layout auto_layout_of(const struct config *c);
/* Opens the layout of a loaded configuration: all that the group parallel says, but what --set said, is
 * forgotten. A configuration that says auto stays as it is. */
int auto_open(struct config *c, struct err *e);
/* The fewest ranks that the sizes of c can do with, or a number above `most`. An open size counts as 1. Any
 * configuration. Local. */
int64_t auto_smallest_world(const struct config *c, int64_t most);

/* What the group dist says of the machine and what is usual else, rate 0. Any configuration. Local. */
struct auto_machine auto_machine_of(const struct config *c, int world, int ranks_per_node);
/* Of a layout whose estimate is known. EXIT_INTERNAL where its schedule cannot be played. Local. */
int auto_price(struct auto_cost *cost, const struct auto_machine *m, const struct config *chosen,
               const struct estimate *x, struct err *e);
/* Fills guessed_s, least_bytes, guessed_bytes of the candidates. Local. */
void auto_guess(struct auto_candidate *list, size_t n, const struct auto_machine *m, const struct config *c);

/* EXIT_CONFIG where no layout is legal, with what is wrong and the nearest numbers of ranks that have one;
 * that none fits is no error. auto_free is due whatever it returns. Local. */
int auto_search(struct auto_search *s, const struct config *c, const struct auto_machine *m, struct err *e);
void auto_free(struct auto_search *s);
/* The chosen one; where none fits, the one that takes the least memory. NULL where none could be built. */
const struct auto_candidate *auto_best(const struct auto_search *s);
/* Appends "tp 2 · cp 1 · pp 2 · dp 8". */
void auto_put_layout(struct buf *b, const struct config *c, const struct auto_layout *l, int world);
/* Appends why: a line of the choice, lines of those that come next. Some layout fits. */
void auto_put_reason(struct buf *b, const struct auto_search *s, const struct config *c);
/* Appends one line: none fits, how much is missing, and what would fit. */
void auto_put_remedies(struct buf *b, const struct auto_search *s, const struct config *c);

/* Chooses on rank 0, for all; nothing where the layout is not open. *why, in c's arena: lines for people, on
 * rank 0 alone; NULL elsewhere and where nothing was chosen. world NULL: for world_size ranks that are not
 * here. EXIT_CONFIG where no layout is legal or none fits. Collective over world. */
int auto_choose(struct config *c, struct comm *world, int world_size, struct rank_on_host host,
                const char **why, struct err *e);
/* Logs its lines; NULL has none. */
void auto_say(const char *why);

#endif
