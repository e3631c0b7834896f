#include "kernels/cpu/cpu.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/mem.h"

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

/* Rotary positions: Su et al. 2021, in the halves (i, i + R/2) of GPT-NeoX. */
int cpu_ref_rope(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	(void)s;
	const int32_t *position = in[2].data;
	int64_t size = arg->rope.head_dim, rotated = arg->rope.heads + arg->rope.groups;
	int64_t row = (rotated + arg->rope.groups) * size, half = tensor_row(&in[1]) / 2;
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		if (position[n] < 0 || position[n] >= in[1].dim[0])
			return err_set(e, EXIT_INTERNAL,
			               "rope: position %d of row %lld is outside the table of %d",
			               position[n], (long long)n, in[1].dim[0]);
		for (int64_t c = 0; c < row; c++) {
			int64_t i = c % size, at = n * row + c;
			if (c >= rotated * size || i >= 2 * half) {
				cpu_set(&out[0], at, cpu_get(&in[0], at));
			} else if (i < half) {
				double cosine = cpu_get(&in[1], position[n] * 2 * half + i);
				double sine = cpu_get(&in[1], position[n] * 2 * half + half + i);
				double a = cpu_get(&in[0], at), b = cpu_get(&in[0], at + half);
				sine = arg->rope.inverse ? -sine : sine;
				cpu_set(&out[0], at, a * cosine - b * sine);
				cpu_set(&out[0], at + half, a * sine + b * cosine);
			}
		}
	}
	return 0;
}

static int target_check(const struct tensor *targets, int64_t row, int32_t vocab_size, struct err *e)
{
	int32_t target = ((const int32_t *)targets->data)[row];
	return target < vocab_size
	               ? 0
	               : err_set(e, EXIT_BAD_DATA,
	                         "cross_entropy: target %d of row %lld is outside the vocabulary of %d",
	                         target, (long long)row, vocab_size);
}

int cpu_ref_cross_entropy(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s;
	const int32_t *targets = in[1].data, columns = arg->cross_entropy.vocab_size;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	double loss = 0;
	for (int64_t n = 0; n < rows; n++) {
		if (target_check(&in[1], n, columns, e))
			return e->code;
		double top = -INFINITY, sum = 0;
		for (int64_t v = 0; v < columns; v++)
			top = fmax(top, cpu_get(&in[0], n * width + v));
		for (int64_t v = 0; v < columns; v++)
			sum += exp(cpu_get(&in[0], n * width + v) - top);
		double lse = top + log(sum);
		double row_loss = targets[n] < 0 ? 0 : lse - cpu_get(&in[0], n * width + targets[n]);
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
	const int32_t *targets = in[1].data, columns = arg->cross_entropy.vocab_size;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	double scale = cpu_get(&in[3], 0);
	for (int64_t n = 0; n < rows; n++) {
		if (target_check(&in[1], n, columns, e))
			return e->code;
		for (int64_t v = 0; v < width; v++) {
			double p =
			        exp(cpu_get(&in[0], n * width + v) - cpu_get(&in[2], n)) - (v == targets[n]);
			cpu_set(&out[0], n * width + v, targets[n] < 0 || v >= columns ? 0 : scale * p);
		}
	}
	return 0;
}
