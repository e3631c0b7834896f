/* What every device must agree on about experts: whose rows are whose, in which order rows stand, and what
 * the operations refuse. Checks look at the data of `sizes` and `counts` where these have ranks (dim[0] > 0),
 * so a device asks with none of them what it can ask without. Local. Floor: op. */
#ifndef PENTAD_OP_EXPERTS_H
#define PENTAD_OP_EXPERTS_H

#include <stdbool.h>
#include <stdint.h>

#include "op/op.h"

#ifdef __cplusplus
extern "C" {
#endif

struct err;

/* The router */

/* EXIT_INTERNAL where topk experts cannot be chosen from so many, or from so many groups of them. */
int route_check(const union op_arg *arg, const struct tensor *logits, const struct tensor *index,
                struct err *e);
/* Where an index is not an expert. */
int index_check(const char *op, const struct tensor *index, int64_t experts, struct err *e);
/* Where a row belongs to none of the sequences that `counts` has. */
int sequence_check(const char *op, const union op_arg *arg, int64_t rows, const struct tensor *counts,
                   struct err *e);

ANYWHERE int64_t sequence_of(const union op_arg *arg, int64_t sequences, int64_t row)
{
	return sequences > 1 ? (arg->balance.first_row + row) / arg->balance.sequence_rows : 0;
}

/* How many of a group's experts speak for it. */
ANYWHERE int32_t group_best(const union op_arg *arg, int64_t group_size)
{
	int32_t best = arg->route.topk / arg->route.group_topk;
	return best < 1 ? 1 : best < group_size ? best : (int32_t)group_size;
}

/* The dispatch */

/* EXIT_INTERNAL where the rows are not as arg.capacity says. */
int capacity_check(const union op_arg *arg, const struct tensor *in, const struct tensor *out, struct err *e);
/* EXIT_INTERNAL where counts have other ranks or experts than arg.dispatch says. */
int plan_check(const union op_arg *arg, const struct tensor *counts, struct err *e);
/* Where a slot lies behind `rows`. */
int slot_check(const char *op, const struct tensor *slot, int64_t rows, struct err *e);

/* Number of row `row` of the inputs of capacity in the order of samples and positions. */
ANYWHERE int64_t capacity_order(const union op_arg *arg, int64_t rows, int64_t row)
{
	int32_t ranks = arg->capacity.context_ranks > 1 ? arg->capacity.context_ranks : 1,
	        length = arg->capacity.seq_length;
	int64_t block = rows / ranks, part = length / ranks, in_block = row % block;
	int32_t position =
	        context_position(length, ranks, (int32_t)(row / block), (int32_t)(in_block % part));
	return in_block / part * length + position;
}

/* Rows in order of expert, as the COUNTED operations see them */

/* Rows that all ranks send to own expert i. */
static inline int64_t expert_sent(const union op_arg *arg, const struct tensor *sizes, int32_t i)
{
	const int32_t *size = (const int32_t *)sizes->data;
	int64_t rows = 0;
	for (int32_t r = 0; r < sizes->dim[0]; r++)
		rows += size[(int64_t)r * sizes->dim[1] + arg->expert.first + i];
	return rows;
}

/* Walks what expert_rows tells, in one pass: while (expert_next(&w)) rows [w.first, w.first + w.rows) are
 * those of own expert w.i. */
struct expert_walk {
	const union op_arg *arg;
	const struct tensor *sizes;
	int32_t i;
	int64_t first, rows;
};

static inline struct expert_walk expert_begin(const union op_arg *arg, const struct tensor *sizes)
{
	struct expert_walk w = {arg, sizes, -1, 0, 0};
	return w;
}

static inline bool expert_next(struct expert_walk *w)
{
	w->first += w->rows;
	if (++w->i >= w->arg->expert.count)
		return false;
	w->rows = w->arg->expert.pad ? w->arg->expert.pad : expert_sent(w->arg, w->sizes, w->i);
	return true;
}

static inline int64_t expert_total(const union op_arg *arg, const struct tensor *sizes)
{
	struct expert_walk w = expert_begin(arg, sizes);
	while (expert_next(&w))
		;
	return w.first;
}

/* EXIT_INTERNAL where the own experts are not among those of `sizes`, a size is below 0, or their rows are
 * more than `rows`: sizes come from other ranks, and a kernel that goes on must stay within its tensors. */
int expert_check(const char *op, const union op_arg *arg, const struct tensor *sizes, int64_t rows,
                 struct err *e);
/* The same for regroup: `sent` rows in order of rank, `grouped` in order of expert. */
int regroup_check(const union op_arg *arg, const struct tensor *sizes, int64_t sent, int64_t grouped,
                  struct err *e);
/* The same for x[M,C], y[M,F] and w[e·F,C] of the grouped products; and where w has other shapes. */
int grouped_check(const char *op, const union op_arg *arg, const struct tensor *sizes, const struct tensor *x,
                  const struct tensor *y, const struct tensor *w, struct err *e);
/* The same for x[M,F or 2F], y[M,F] and w[M] of expert_activation. */
int activation_check(const char *op, const union op_arg *arg, const struct tensor *sizes,
                     const struct tensor *x, const struct tensor *y, const struct tensor *w, struct err *e);

#ifdef __cplusplus
}
#endif

#endif
