#include "kernels/cpu/cpu.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/mem.h"
#include "kernels/cpu/rope.h"

int cpu_ref_embedding(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	const int32_t *ids = in[1].data;
	int64_t rows = out[0].dim[0], width = tensor_row(&out[0]);
	for (int64_t n = 0; n < rows; n++) {
		int64_t id = (int64_t)ids[n] - arg->embedding.first_row;
		bool ours = id >= 0 && id < in[0].dim[0];
		for (int64_t c = 0; c < width; c++)
			cpu_set(&out[0], n * width + c, ours ? cpu_get(&in[0], id * width + c) : 0);
	}
	return 0;
}

int cpu_ref_embedding_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	const int32_t *ids = in[1].data;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]), count = tensor_count(&out[0]);
	double *sum = mem_array((size_t)count, sizeof *sum);
	for (int64_t n = 0; n < rows; n++) {
		int64_t id = (int64_t)ids[n] - arg->embedding.first_row;
		for (int64_t c = 0; c < width && id >= 0 && id < out[0].dim[0]; c++)
			sum[id * width + c] += cpu_get(&in[0], n * width + c);
	}
	for (int64_t i = 0; i < count; i++)
		cpu_accumulate(&out[0], i, sum[i]);
	free(sum);
	return 0;
}

/* Rotary positions: Su et al. 2021, in the halves (i, i + R/2) of GPT-NeoX, or in neighbours (2i, 2i + 1). */
void cpu_ref_rotate(const struct tensor *x, int64_t from, const struct tensor *y, int64_t to,
                    const struct tensor *table, int64_t position, bool inverse, bool interleaved)
{
	int64_t half = tensor_row(table) / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
	for (int64_t i = 0; i < half; i++) {
		double cosine = cpu_get(table, position * 2 * half + i);
		double sine = cpu_get(table, position * 2 * half + half + i) * (inverse ? -1 : 1);
		double a = cpu_get(x, from + i * step), b = cpu_get(x, from + i * step + apart);
		cpu_set(y, to + i * step, a * cosine - b * sine);
		cpu_set(y, to + i * step + apart, a * sine + b * cosine);
	}
}

int cpu_ref_rope(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	(void)s;
	int64_t size = arg->rope.head_dim, rotated = arg->rope.heads + arg->rope.groups;
	int64_t width = tensor_row(&in[0]), turned = tensor_row(&in[1]);
	if (cpu_rope_check(OP_rope, &in[1], &in[2], e))
		return e->code;
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		for (int64_t c = 0; c < width; c++)
			if (c >= rotated * size || c % size >= turned)
				cpu_set(&out[0], n * width + c, cpu_get(&in[0], n * width + c));
		for (int64_t h = 0; h < rotated; h++)
			cpu_ref_rotate(&in[0], n * width + h * size, &out[0], n * width + h * size, &in[1],
			               ((const int32_t *)in[2].data)[n], arg->rope.inverse,
			               arg->rope.interleaved);
	}
	return 0;
}

static int target_check(const char *op, const struct tensor *targets, int64_t row, int32_t vocab_size,
                        struct err *e)
{
	int32_t target = ((const int32_t *)targets->data)[row];
	return target < vocab_size ? 0
	                           : err_set(e, EXIT_BAD_DATA,
	                                     "%s: target %d of row %lld is outside the vocabulary of %d", op,
	                                     target, (long long)row, vocab_size);
}

/* Log-sum-exp of the n elements at, at + step, …; -inf where there are none, or none above -inf. */
static double log_sum_exp(const struct tensor *t, int64_t at, int64_t step, int64_t n)
{
	double top = -INFINITY, sum = 0;
	for (int64_t i = 0; i < n; i++)
		top = fmax(top, cpu_get(t, at + i * step));
	if (top == -INFINITY)
		top = 0;
	for (int64_t i = 0; i < n; i++)
		sum += exp(cpu_get(t, at + i * step) - top);
	return top + log(sum);
}

/* How many of the columns of `logits` are columns of the vocabulary: padding lies behind them. */
static int64_t counted_columns(const union op_arg *arg, const struct tensor *logits)
{
	int64_t count = (int64_t)arg->cross_entropy.vocab_size - arg->cross_entropy.first_column;
	int64_t width = tensor_row(logits);
	return count < 0 ? 0 : count < width ? count : width;
}

int cpu_ref_logit_stats(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)s;
	int64_t width = tensor_row(&in[0]), columns = counted_columns(arg, &in[0]);
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		if (target_check("logit_stats", &in[1], n, arg->cross_entropy.vocab_size, e))
			return e->code;
		int64_t target = (int64_t)((const int32_t *)in[1].data)[n] - arg->cross_entropy.first_column;
		bool ours = target >= 0 && target < columns;
		cpu_set(&out[0], 2 * n, log_sum_exp(&in[0], n * width, 1, columns));
		cpu_set(&out[0], 2 * n + 1, ours ? cpu_get(&in[0], n * width + target) : 0);
	}
	return 0;
}

/* Of row n: its log-sum-exp and the logit of its target, from the logits or from the shards' statistics. */
static void row_stats(const union op_arg *arg, const struct tensor *in, int64_t n, double *lse, double *logit)
{
	int64_t rows = tensor_count(&in[1]), width = tensor_row(&in[0]);
	int32_t target = ((const int32_t *)in[1].data)[n];
	if (!in[2].data) {
		*lse = log_sum_exp(&in[0], n * width, 1, arg->cross_entropy.vocab_size);
		*logit = target < 0 ? 0 : cpu_get(&in[0], n * width + target);
		return;
	}
	int64_t shards = in[2].dim[0] / rows;
	*lse = log_sum_exp(&in[2], 2 * n, 2 * rows, shards);
	*logit = 0;
	for (int64_t r = 0; r < shards; r++)
		*logit += cpu_get(&in[2], 2 * (r * rows + n) + 1);
}

int cpu_ref_cross_entropy(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s;
	const int32_t *targets = in[1].data;
	int64_t rows = tensor_count(&in[1]);
	double loss = 0, lse, logit;
	for (int64_t n = 0; n < rows; n++) {
		if (target_check("cross_entropy", &in[1], n, arg->cross_entropy.vocab_size, e))
			return e->code;
		row_stats(arg, in, n, &lse, &logit);
		double row_loss = targets[n] < 0 ? 0 : lse - logit;
		cpu_set(&out[1], n, lse);
		cpu_set(&out[2], n, row_loss);
		loss += row_loss;
	}
	cpu_accumulate(&out[0], 0, loss);
	return 0;
}

int cpu_ref_cross_entropy_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                              const struct tensor *out, struct err *e)
{
	(void)s;
	const int32_t *targets = in[1].data;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]), columns = counted_columns(arg, &in[0]);
	double scale = cpu_get(&in[3], 0);
	for (int64_t n = 0; n < rows; n++) {
		if (target_check("cross_entropy", &in[1], n, arg->cross_entropy.vocab_size, e))
			return e->code;
		int64_t target = (int64_t)targets[n] - arg->cross_entropy.first_column;
		for (int64_t v = 0; v < width; v++) {
			double p = exp(cpu_get(&in[0], n * width + v) - cpu_get(&in[2], n)) - (v == target);
			cpu_set(&out[0], n * width + v, targets[n] < 0 || v >= columns ? 0 : scale * p);
		}
	}
	return 0;
}
