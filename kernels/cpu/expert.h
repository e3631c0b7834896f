/* Rows in order of expert, as the COUNTED operations see them, and what they refuse. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_EXPERT_H
#define PENTAD_KERNELS_CPU_EXPERT_H

#include "kernels/cpu/cpu.h"

/* Rows that all ranks send to own expert i. */
static inline int64_t expert_sent(const union op_arg *arg, const struct tensor *sizes, int32_t i)
{
	const int32_t *size = sizes->data;
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
	return (struct expert_walk){arg, sizes, -1, 0, 0};
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
/* Where a slot lies behind `rows`. */
int slot_check(const char *op, const struct tensor *slot, int64_t rows, struct err *e);

#endif
