/* The loss over the vocabulary: memory is read once forward (a running maximum and sum: Milakov &
 * Gimelshein 2018), once backward, where the gradient may replace the logits. */
#include "kernels/cpu/cpu.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/vmath.h"

struct job {
	const struct tensor *in, *out;
	int64_t width, columns;
	float scale;
};

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

CPU_CLONES static float block_top(const float *x, int64_t n, float top)
{
#pragma omp simd reduction(max : top)
	for (int64_t i = 0; i < n; i++)
		top = x[i] > top ? x[i] : top;
	return top;
}

CPU_CLONES static float block_exp_sum(const float *x, int64_t n, float top)
{
	float sum = 0;
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < n; i++)
		sum += vexp(x[i] - top);
	return sum;
}

CPU_CLONES static void block_gradient(const float *x, float *dx, int64_t n, float lse, float scale)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		dx[i] = scale * vexp(x[i] - lse);
}

static double row_lse(const struct job *j, int64_t row)
{
	float x[CPU_BLOCK], top = -INFINITY;
	double sum = 0;
	for (int64_t v = 0; v < j->columns; v += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, j->columns - v);
		const float *block = cpu_read(&j->in[0], row * j->width + v, n, x);
		float higher = block_top(block, n, top);
		if (higher > top) {
			sum *= exp((double)top - higher);
			top = higher;
		}
		sum += block_exp_sum(block, n, top);
	}
	return top + log(sum);
}

static void cross_entropy_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	const int32_t *targets = j->in[1].data;
	for (int64_t n = begin; n < end; n++) {
		double lse = row_lse(j, n);
		cpu_set(&j->out[1], n, lse);
		cpu_set(&j->out[2], n,
		        targets[n] < 0 ? 0 : lse - cpu_get(&j->in[0], n * j->width + targets[n]));
	}
}

static int targets_check(const struct tensor *targets, int32_t vocab_size, int64_t rows, struct err *e)
{
	const int32_t *target = targets->data;
	for (int64_t n = 0; n < rows; n++)
		if (target[n] >= vocab_size)
			return err_set(e, EXIT_BAD_DATA,
			               "cross_entropy: target %d of row %lld is outside the vocabulary of %d",
			               target[n], (long long)n, vocab_size);
	return 0;
}

int cpu_fast_cross_entropy(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	struct job j = {in, out, tensor_row(&in[0]), arg->cross_entropy.vocab_size, 0};
	int64_t rows = in[0].dim[0];
	if (targets_check(&in[1], arg->cross_entropy.vocab_size, rows, e))
		return e->code;
	cpu_parallel(s, rows, 8192 / j.width + 1, cross_entropy_part, &j);
	double loss = 0;
	for (int64_t n = 0; n < rows; n++)
		loss += cpu_get(&out[2], n);
	cpu_accumulate(&out[0], 0, loss);
	return 0;
}

static void row_gradient(const struct job *j, int64_t row, int32_t target)
{
	float x[CPU_BLOCK], dx[CPU_BLOCK], lse = (float)cpu_get(&j->in[2], row);
	for (int64_t v = 0; v < j->columns; v += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, j->columns - v), at = row * j->width + v;
		float *to = cpu_place(&j->out[0], at, dx);
		block_gradient(cpu_read(&j->in[0], at, n, x), to, n, lse, j->scale);
		if (target >= v && target < v + n)
			to[target - v] -= j->scale;
		cpu_write(&j->out[0], at, n, to);
	}
}

static void cross_entropy_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	const int32_t *targets = j->in[1].data;
	size_t bytes = dtype_rows[j->out[0].dtype].bytes;
	for (int64_t n = begin; n < end; n++) {
		int64_t kept = targets[n] < 0 ? 0 : j->columns;
		if (kept)
			row_gradient(j, n, targets[n]);
		memset((char *)j->out[0].data + (size_t)(n * j->width + kept) * bytes, 0,
		       (size_t)(j->width - kept) * bytes);
	}
}

int cpu_fast_cross_entropy_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                               const struct tensor *out, struct err *e)
{
	struct job j = {in, out, tensor_row(&in[0]), arg->cross_entropy.vocab_size,
	                (float)cpu_get(&in[3], 0)};
	if (targets_check(&in[1], arg->cross_entropy.vocab_size, in[0].dim[0], e))
		return e->code;
	cpu_parallel(s, in[0].dim[0], 8192 / j.width + 1, cross_entropy_bwd_part, &j);
	return 0;
}
