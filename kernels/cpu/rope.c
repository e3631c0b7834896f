/* Rotary positions (Su et al. 2021) of every query and key head. */
#include "kernels/cpu/rope.h"

#include <string.h>

struct job {
	const union op_arg *arg;
	const struct tensor *in, *out;
	int64_t width, half;
};

CPU_CLONES static void rotate_halves(float *x, const float *cosine, const float *sine, float sign,
                                     int64_t half)
{
	float *y = x + half;
#pragma omp simd
	for (int64_t i = 0; i < half; i++) {
		float a = x[i], b = y[i], t = sign * sine[i];
		x[i] = a * cosine[i] - b * t;
		y[i] = a * t + b * cosine[i];
	}
}

CPU_CLONES static void rotate_neighbours(float *x, const float *cosine, const float *sine, float sign,
                                         int64_t half)
{
#pragma omp simd
	for (int64_t i = 0; i < half; i++) {
		float a = x[2 * i], b = x[2 * i + 1], t = sign * sine[i];
		x[2 * i] = a * cosine[i] - b * t;
		x[2 * i + 1] = a * t + b * cosine[i];
	}
}

void cpu_rotate(float *x, const float *table, bool inverse, bool interleaved, int64_t half)
{
	(interleaved ? rotate_neighbours : rotate_halves)(x, table, table + half, inverse ? -1 : 1, half);
}

int cpu_rope_check(enum op op, const struct tensor *table, const struct tensor *position, struct err *e)
{
	const int32_t *p = position->data;
	for (int64_t n = 0; n < position->dim[0]; n++)
		if (p[n] < 0 || p[n] >= table->dim[0])
			return err_set(e, EXIT_INTERNAL,
			               "%s: position %d of row %lld is outside the table of %d",
			               op_rows[op].name, p[n], (long long)n, table->dim[0]);
	return 0;
}

/* Row n as f32 where it can be changed: in the output, or in a buffer that is written back. */
static float *row_open(const struct job *j, int64_t n, float *buffer)
{
	const float *x = cpu_read(&j->in[0], n * j->width, j->width, buffer);
	float *y = cpu_place(&j->out[0], n * j->width, buffer);
	if (x != y)
		memcpy(y, x, (size_t)j->width * sizeof *y);
	return y;
}

static int64_t row_grain(int64_t width)
{
	return 8192 / width + 1;
}

static void rope_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	const int32_t *position = j->in[2].data;
	float *buffer = cpu_scratch(s, part, (size_t)j->width * sizeof *buffer);
	int64_t rotated = (int64_t)j->arg->rope.heads + j->arg->rope.groups;
	for (int64_t n = begin; n < end; n++) {
		const float *table = (const float *)j->in[1].data + position[n] * 2 * j->half;
		float *y = row_open(j, n, buffer);
		for (int64_t h = 0; h < rotated; h++)
			cpu_rotate(y + h * j->arg->rope.head_dim, table, j->arg->rope.inverse,
			           j->arg->rope.interleaved, j->half);
		cpu_write(&j->out[0], n * j->width, j->width, y);
	}
}

struct cpu_space cpu_space_rope(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                const struct tensor *out)
{
	(void)arg, (void)out;
	int64_t width = tensor_row(&in[0]);
	return (struct cpu_space){.part = (size_t)width * sizeof(float),
	                          .parts = cpu_parts(s, in[0].dim[0], row_grain(width))};
}

int cpu_fast_rope(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	if (in[1].dtype != DT_f32)
		return cpu_ref_rope(s, arg, in, out, e);
	if (cpu_rope_check(OP_rope, &in[1], &in[2], e))
		return e->code;
	struct job j = {arg, in, out, tensor_row(&in[0]), tensor_row(&in[1]) / 2};
	cpu_parallel(s, in[0].dim[0], row_grain(j.width), rope_part, &j);
	return 0;
}
