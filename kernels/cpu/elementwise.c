/* add, bias_add, cast, accumulate, zero, activation, glu, dropout, square_sum and their gradients: blocks of
 * CPU_BLOCK elements, computed in f32. */
#include "kernels/cpu/cpu.h"

#include <string.h>

#include "kernels/cpu/activation.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/vmath.h"

enum { GRAIN = 16384 }; /* elements below which a further thread costs more than it brings */

struct job {
	const union op_arg *arg;
	const struct tensor *in, *out;
	int64_t width; /* elements in a row, where rows matter */
	double *partial;
	int64_t count, chunk;
};

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

/* Rows of `width` elements so that a thread gets at least GRAIN elements. */
static int64_t row_grain(int64_t width)
{
	return GRAIN / (width > 0 ? width : 1) + 1;
}

CPU_CLONES static void add_row(const float *a, const float *b, float *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] = a[i] + b[i];
}

static void add_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	float a[CPU_BLOCK], b[CPU_BLOCK], y[CPU_BLOCK];
	for (int64_t i = begin; i < end; i += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, end - i);
		float *to = cpu_place(&j->out[0], i, y);
		add_row(cpu_read(&j->in[0], i, n, a), cpu_read(&j->in[1], i, n, b), to, n);
		cpu_write(&j->out[0], i, n, to);
	}
}

int cpu_fast_add(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	(void)arg, (void)e;
	struct job j = {.in = in, .out = out};
	cpu_parallel(s, tensor_count(&in[0]), GRAIN, add_part, &j);
	return 0;
}

static void bias_add_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	float x[CPU_BLOCK], y[CPU_BLOCK];
	const float *bias =
	        cpu_read(&j->in[1], 0, j->width, cpu_scratch(s, part, (size_t)j->width * sizeof *bias));
	for (int64_t row = begin; row < end; row++)
		for (int64_t c = 0; c < j->width; c += CPU_BLOCK) {
			int64_t n = least(CPU_BLOCK, j->width - c), at = row * j->width + c;
			float *to = cpu_place(&j->out[0], at, y);
			add_row(cpu_read(&j->in[0], at, n, x), bias + c, to, n);
			cpu_write(&j->out[0], at, n, to);
		}
}

struct cpu_space cpu_space_bias_add(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                    const struct tensor *out)
{
	(void)arg, (void)out;
	int64_t width = tensor_row(&in[0]);
	return (struct cpu_space){.part = (size_t)width * sizeof(float),
	                          .parts = cpu_parts(s, in[0].dim[0], row_grain(width))};
}

int cpu_fast_bias_add(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)arg, (void)e;
	struct job j = {.in = in, .out = out, .width = tensor_row(&in[0])};
	cpu_parallel(s, in[0].dim[0], row_grain(j.width), bias_add_part, &j);
	return 0;
}

static void cast_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	const struct tensor *x = &j->in[0], *y = &j->out[0];
	const int64_t bytes = dtype_rows[x->dtype].bytes;
	float buffer[CPU_BLOCK];
	if (x->dtype == y->dtype) {
		memcpy((char *)y->data + begin * bytes, (const char *)x->data + begin * bytes,
		       (size_t)((end - begin) * bytes));
		return;
	}
	for (int64_t i = begin; i < end; i += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, end - i);
		cpu_write(y, i, n, cpu_read(x, i, n, cpu_place(y, i, buffer)));
	}
}

int cpu_fast_cast(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	(void)arg, (void)e;
	struct job j = {.in = in, .out = out};
	cpu_parallel(s, tensor_count(&in[0]), GRAIN, cast_part, &j);
	return 0;
}

/* Counts wrap around as the processor's do: what comes of bad data must not be undefined. */
CPU_CLONES static void add_integers(const uint32_t *x, uint32_t *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] += x[i];
}

static void accumulate_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	const float *x = (const float *)j->in[0].data + begin;
	float *y = (float *)j->out[0].data + begin;
	if (!j->out[0].acc)
		memcpy(y, x, (size_t)(end - begin) * sizeof *y);
	else if (j->out[0].dtype == DT_i32)
		add_integers((const uint32_t *)x, (uint32_t *)y, end - begin);
	else
		add_row(y, x, y, end - begin);
}

int cpu_fast_accumulate(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)arg, (void)e;
	struct job j = {.in = in, .out = out};
	cpu_parallel(s, tensor_count(&in[0]), GRAIN, accumulate_part, &j);
	return 0;
}

static void zero_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	memset((char *)job + begin, 0, (size_t)(end - begin));
}

int cpu_fast_zero(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	(void)arg, (void)in, (void)e;
	cpu_parallel(s, tensor_bytes(&out[0]), 1 << 18, zero_part, out[0].data);
	return 0;
}

/* The four leaf functions of one activation. */
#define ACTIVATION_ROW(name, doc)                                                                            \
	CPU_CLONES static void name##_row(const float *x, float *y, int64_t n)                               \
	{                                                                                                    \
		_Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = v##name##_value(x[i]);            \
	}                                                                                                    \
	CPU_CLONES static void name##_row_bwd(const float *dy, const float *x, float *dx, int64_t n)         \
	{                                                                                                    \
		_Pragma("omp simd") for (int64_t i = 0; i < n; i++) dx[i] = dy[i] * v##name##_slope(x[i]);   \
	}                                                                                                    \
	CPU_CLONES static void name##_glu_row(const float *gate, const float *up, float *y, int64_t n)       \
	{                                                                                                    \
		_Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = v##name##_value(gate[i]) * up[i]; \
	}                                                                                                    \
	CPU_CLONES static void name##_glu_row_bwd(const float *dy, const float *gate, const float *up,       \
	                                          float *dgate, float *dup, int64_t n)                       \
	{                                                                                                    \
		_Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                          \
		{                                                                                            \
			float g = gate[i], u = up[i], d = dy[i];                                             \
			dgate[i] = d * u * v##name##_slope(g);                                               \
			dup[i] = d * v##name##_value(g);                                                     \
		}                                                                                            \
	}
ACTIVATIONS(ACTIVATION_ROW)
#undef ACTIVATION_ROW

const struct activation_rows cpu_activation_rows[ACT_COUNT] = {
#define ACTIVATION_ROW(name, doc) {name##_row, name##_row_bwd, name##_glu_row, name##_glu_row_bwd},
        ACTIVATIONS(ACTIVATION_ROW)
#undef ACTIVATION_ROW
};

static const struct activation_rows *activation_rows(const union op_arg *arg)
{
	return &cpu_activation_rows[arg->activation.kind];
}

static void activation_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	float x[CPU_BLOCK], y[CPU_BLOCK];
	for (int64_t i = begin; i < end; i += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, end - i);
		float *to = cpu_place(&j->out[0], i, y);
		activation_rows(j->arg)->value(cpu_read(&j->in[0], i, n, x), to, n);
		cpu_write(&j->out[0], i, n, to);
	}
}

int cpu_fast_activation(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out};
	cpu_parallel(s, tensor_count(&in[0]), GRAIN, activation_part, &j);
	return 0;
}

static void activation_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	float dy[CPU_BLOCK], x[CPU_BLOCK], dx[CPU_BLOCK];
	for (int64_t i = begin; i < end; i += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, end - i);
		float *to = cpu_place(&j->out[0], i, dx);
		activation_rows(j->arg)->value_bwd(cpu_read(&j->in[0], i, n, dy),
		                                   cpu_read(&j->in[1], i, n, x), to, n);
		cpu_write(&j->out[0], i, n, to);
	}
}

int cpu_fast_activation_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                            const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out};
	cpu_parallel(s, tensor_count(&in[0]), GRAIN, activation_bwd_part, &j);
	return 0;
}

static void glu_row(const struct job *j, int64_t row)
{
	float gate[CPU_BLOCK], up[CPU_BLOCK], y[CPU_BLOCK];
	for (int64_t f = 0; f < j->width; f += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, j->width - f), at = row * j->width + f,
		        from = 2 * row * j->width + f;
		float *to = cpu_place(&j->out[0], at, y);
		activation_rows(j->arg)->glu(cpu_read(&j->in[0], from, n, gate),
		                             cpu_read(&j->in[0], from + j->width, n, up), to, n);
		cpu_write(&j->out[0], at, n, to);
	}
}

static void glu_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	for (int64_t row = begin; row < end; row++)
		glu_row(job, row);
}

int cpu_fast_glu(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .width = tensor_row(&out[0])};
	cpu_parallel(s, out[0].dim[0], row_grain(j.width), glu_part, &j);
	return 0;
}

static void glu_bwd_row(const struct job *j, int64_t row)
{
	float dy[CPU_BLOCK], gate[CPU_BLOCK], up[CPU_BLOCK], dgate[CPU_BLOCK], dup[CPU_BLOCK];
	for (int64_t f = 0; f < j->width; f += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, j->width - f), at = 2 * row * j->width + f;
		float *to_gate = cpu_place(&j->out[0], at, dgate),
		      *to_up = cpu_place(&j->out[0], at + j->width, dup);
		activation_rows(j->arg)->glu_bwd(
		        cpu_read(&j->in[0], row * j->width + f, n, dy), cpu_read(&j->in[1], at, n, gate),
		        cpu_read(&j->in[1], at + j->width, n, up), to_gate, to_up, n);
		cpu_write(&j->out[0], at, n, to_gate);
		cpu_write(&j->out[0], at + j->width, n, to_up);
	}
}

static void glu_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	for (int64_t row = begin; row < end; row++)
		glu_bwd_row(job, row);
}

int cpu_fast_glu_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .width = tensor_row(&in[0])};
	cpu_parallel(s, in[0].dim[0], row_grain(j.width), glu_bwd_part, &j);
	return 0;
}

/* A dropped element is 0 even where x is not finite. */
CPU_CLONES static void mask_apply(const float *x, const float *mask, float *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] = mask[i] > 0 ? x[i] * mask[i] : 0;
}

static void dropout_row(const struct job *j, int64_t row)
{
	float x[CPU_BLOCK], y[CPU_BLOCK], mask[CPU_BLOCK];
	struct mask_place place = mask_place_of(j->arg, row);
	uint64_t key = (uint64_t)((const int64_t *)j->in[1].data)[place.sample];
	for (int64_t c = 0; c < j->width; c += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, j->width - c), at = row * j->width + c;
		float *to = cpu_place(&j->out[0], at, y);
		(j->arg->dropout.jitter ? mask_row_jitter : mask_row)(
		        key, j->arg->dropout.salt, (uint64_t)(place.position * j->width + c), n,
		        j->arg->dropout.p, mask);
		mask_apply(cpu_read(&j->in[0], at, n, x), mask, to, n);
		cpu_write(&j->out[0], at, n, to);
	}
}

static void dropout_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	for (int64_t row = begin; row < end; row++)
		dropout_row(job, row);
}

int cpu_fast_dropout(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .width = tensor_row(&in[0])};
	cpu_parallel(s, in[0].dim[0], row_grain(j.width), dropout_part, &j);
	return 0;
}

CPU_CLONES static double square_sum_row(const float *x, int64_t n)
{
	double sum = 0;
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < n; i++)
		sum += (double)x[i] * x[i];
	return sum;
}

static void square_sum_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	float x[CPU_BLOCK];
	for (int64_t k = begin; k < end; k++) {
		int64_t stop = least(j->count, (k + 1) * j->chunk);
		j->partial[k] = 0;
		for (int64_t i = k * j->chunk; i < stop; i += CPU_BLOCK) {
			int64_t n = least(CPU_BLOCK, stop - i);
			j->partial[k] += square_sum_row(cpu_read(&j->in[0], i, n, x), n);
		}
	}
}

/* Elements of one partial sum, of which there are at most 512. */
static int64_t square_sum_chunk(int64_t count)
{
	return CPU_BLOCK * (count / (CPU_BLOCK * 512) + 1);
}

/* The same on a rank that does not count x: ranks of a stage plan alike. */
static size_t square_sum_bytes(const struct tensor *x)
{
	int64_t count = tensor_count(x), chunk = square_sum_chunk(count);
	return (size_t)((count + chunk - 1) / chunk + 1) * sizeof(double);
}

struct cpu_space cpu_space_square_sum(const struct stream *s, const union op_arg *arg,
                                      const struct tensor *in, const struct tensor *out)
{
	(void)s, (void)arg, (void)out;
	return (struct cpu_space){.shared = square_sum_bytes(&in[0])};
}

int cpu_fast_square_sum(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.in = in, .out = out, .count = arg->square_sum.counts ? tensor_count(&in[0]) : 0};
	j.chunk = square_sum_chunk(j.count);
	j.partial = cpu_scratch(s, CPU_SHARED, square_sum_bytes(&in[0]));
	int64_t chunks = (j.count + j.chunk - 1) / j.chunk;
	cpu_parallel(s, chunks, GRAIN / j.chunk, square_sum_part, &j);
	double sum = 0;
	for (int64_t k = 0; k < chunks; k++)
		sum += j.partial[k];
	cpu_accumulate(&out[0], 0, sum);
	return 0;
}
