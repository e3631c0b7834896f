/* The loss over the vocabulary: memory is read once forward (a running maximum and sum: Milakov &
 * Gimelshein 2018), once backward, where the gradient may replace the logits. */
#include "kernels/cpu/cpu.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/cpu/vmath.h"

struct job {
	const struct tensor *in, *out;
	int64_t width;
	int64_t columns; /* of logits that count: padding lies behind them */
	int64_t first;   /* number of column 0 in the whole vocabulary */
	float scale;
};

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static struct job job_of(const union op_arg *arg, const struct tensor *in, const struct tensor *out)
{
	struct job j = {
	        .in = in, .out = out, .width = tensor_row(&in[0]), .first = arg->cross_entropy.first_column};
	int64_t counted = least(arg->cross_entropy.vocab_size - j.first, j.width);
	j.columns = counted > 0 ? counted : 0;
	return j;
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

/* What exponents are taken from: the largest, but not -inf, so that exp(-inf - it) is 0. */
static float finite_top(float top)
{
	return top > -INFINITY ? top : 0;
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
		sum += block_exp_sum(block, n, finite_top(top));
	}
	return finite_top(top) + log(sum);
}

static void logit_stats_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	float *stats = j->out[0].data;
	for (int64_t n = begin; n < end; n++) {
		int64_t target = ((const int32_t *)j->in[1].data)[n] - j->first;
		bool ours = target >= 0 && target < j->columns;
		stats[2 * n] = (float)row_lse(j, n);
		stats[2 * n + 1] = ours ? (float)cpu_get(&j->in[0], n * j->width + target) : 0;
	}
}

/* The log-sum-exp of row n over all shards; the sum of their target logits is added to *logit. */
static double shards_lse(const struct tensor *stats, int64_t rows, int64_t n, double *logit)
{
	const float *shard = (const float *)stats->data + 2 * n;
	int64_t shards = stats->dim[0] / rows;
	float top = -INFINITY;
	double sum = 0;
	for (int64_t r = 0; r < shards; r++)
		top = fmaxf(top, shard[2 * r * rows]);
	for (int64_t r = 0; r < shards; r++) {
		sum += exp((double)shard[2 * r * rows] - finite_top(top));
		*logit += shard[2 * r * rows + 1];
	}
	return finite_top(top) + log(sum);
}

static void cross_entropy_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	const int32_t *targets = j->in[1].data;
	for (int64_t n = begin; n < end; n++) {
		double logit = 0, lse;
		if (j->in[2].data) {
			lse = shards_lse(&j->in[2], tensor_count(&j->in[1]), n, &logit);
		} else {
			lse = row_lse(j, n);
			logit = targets[n] < 0 ? 0 : cpu_get(&j->in[0], n * j->width + targets[n]);
		}
		cpu_set(&j->out[1], n, lse);
		cpu_set(&j->out[2], n, targets[n] < 0 ? 0 : lse - logit);
	}
}

static int targets_check(const char *op, const struct tensor *targets, int32_t vocab_size, struct err *e)
{
	const int32_t *target = targets->data;
	int64_t rows = tensor_count(targets);
	for (int64_t n = 0; n < rows; n++)
		if (target[n] >= vocab_size)
			return err_set(e, EXIT_BAD_DATA,
			               "%s: target %d of row %lld is outside the vocabulary of %d", op,
			               target[n], (long long)n, vocab_size);
	return 0;
}

int cpu_fast_logit_stats(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	struct job j = job_of(arg, in, out);
	if (targets_check("logit_stats", &in[1], arg->cross_entropy.vocab_size, e))
		return e->code;
	cpu_parallel(s, in[0].dim[0], 8192 / j.width + 1, logit_stats_part, &j);
	return 0;
}

int cpu_fast_cross_entropy(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	struct job j = job_of(arg, in, out);
	int64_t rows = tensor_count(&in[1]),
	        read = in[2].data ? in[2].dim[0] / rows : j.width; /* elements a row */
	if (targets_check("cross_entropy", &in[1], arg->cross_entropy.vocab_size, e))
		return e->code;
	cpu_parallel(s, rows, 8192 / read + 1, cross_entropy_part, &j);
	double loss = 0;
	for (int64_t n = 0; n < rows; n++)
		loss += cpu_get(&out[2], n);
	cpu_accumulate(&out[0], 0, loss);
	return 0;
}

/* target: a column of these logits, or outside of them. */
static void row_gradient(const struct job *j, int64_t row, int64_t target)
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
			row_gradient(j, n, targets[n] - j->first);
		memset((char *)j->out[0].data + (size_t)(n * j->width + kept) * bytes, 0,
		       (size_t)(j->width - kept) * bytes);
	}
}

int cpu_fast_cross_entropy_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                               const struct tensor *out, struct err *e)
{
	struct job j = job_of(arg, in, out);
	j.scale = (float)cpu_get(&in[3], 0);
	if (targets_check("cross_entropy", &in[1], arg->cross_entropy.vocab_size, e))
		return e->code;
	cpu_parallel(s, in[0].dim[0], 8192 / j.width + 1, cross_entropy_bwd_part, &j);
	return 0;
}
