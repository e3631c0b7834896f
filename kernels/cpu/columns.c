/* Columns and heads that change places: copies of stretches of rows, whatever their type. */
#include <string.h>

#include "kernels/cpu/cpu.h"

/* Stretches of elements of x and where they lie in other tensors; to_x: x is what is written. */
struct job {
	const union op_arg *arg;
	const struct tensor *x, *other[2];
	bool to_x;
};

static void copy(const struct job *j, int64_t x_at, const struct tensor *other, int64_t at, int64_t n)
{
	size_t bytes = dtype_rows[j->x->dtype].bytes;
	char *x = (char *)j->x->data + (size_t)x_at * bytes, *y = (char *)other->data + (size_t)at * bytes;
	memcpy(j->to_x ? x : y, j->to_x ? y : x, (size_t)n * bytes);
}

/* Rows so that a thread gets at least 16384 elements. */
static void run(struct stream *s, struct job *j, cpu_part_fn *part)
{
	int64_t width = tensor_row(j->x);
	cpu_parallel(s, j->x->dim[0], 16384 / (width > 0 ? width : 1) + 1, part, j);
}

static void columns_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	int64_t width[2] = {tensor_row(j->other[0]), tensor_row(j->other[1])};
	for (int64_t n = begin; n < end; n++) {
		copy(j, n * (width[0] + width[1]), j->other[0], n * width[0], width[0]);
		copy(j, n * (width[0] + width[1]) + width[0], j->other[1], n * width[1], width[1]);
	}
}

int cpu_fast_split_columns(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {arg, &in[0], {&out[0], &out[1]}, false};
	run(s, &j, columns_part);
	return 0;
}

int cpu_fast_join_columns(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {arg, &out[0], {&in[0], &in[1]}, true};
	run(s, &j, columns_part);
	return 0;
}

static void heads_row(const struct job *j, int64_t n)
{
	const int32_t *width = j->arg->heads.part;
	int64_t ranks = j->arg->heads.ranks, row = tensor_row(j->x), rows = j->x->dim[0];
	for (int64_t r = 0; r < ranks; r++) {
		int64_t at = (r * rows + n) * (row / ranks), x_at = n * row;
		for (int i = 0; i < 3; i++) {
			int64_t part = width[i] / ranks;
			copy(j, x_at + r * part, j->other[0], at, part);
			x_at += width[i];
			at += part;
		}
	}
}

static void heads_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	for (int64_t n = begin; n < end; n++)
		heads_row(job, n);
}

int cpu_fast_split_heads(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {arg, &in[0], {&out[0]}, false};
	run(s, &j, heads_part);
	return 0;
}

int cpu_fast_join_heads(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {arg, &out[0], {&in[0]}, true};
	run(s, &j, heads_part);
	return 0;
}
