/* What the router's kernels refuse, and how rows belong to sequences. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_ROUTER_H
#define PENTAD_KERNELS_CPU_ROUTER_H

#include "kernels/cpu/cpu.h"

/* EXIT_INTERNAL where topk experts cannot be chosen from so many, or from so many groups of them. */
int route_check(const union op_arg *arg, const struct tensor *logits, const struct tensor *index,
                struct err *e);
/* Where an index is not an expert. */
int index_check(const char *op, const struct tensor *index, int64_t experts, struct err *e);

/* Where a row belongs to none of the sequences that `counts` has. */
int sequence_check(const char *op, const union op_arg *arg, int64_t rows, const struct tensor *counts,
                   struct err *e);

static inline int64_t sequence_of(const union op_arg *arg, const struct tensor *counts, int64_t row)
{
	return counts->dim[0] > 1 ? (arg->balance.first_row + row) / arg->balance.sequence_rows : 0;
}

/* How many of a group's experts speak for it. */
static inline int32_t group_best(const union op_arg *arg, int64_t group_size)
{
	int32_t best = arg->route.topk / arg->route.group_topk;
	return best < 1 ? 1 : best < group_size ? best : (int32_t)group_size;
}

#endif
