/* Rows on their way to experts and back, and what stands between an expert's two products: copies of whole
 * rows, and blocks of CPU_BLOCK elements in f32. */
#include "kernels/cpu/cpu.h"
#include "op/experts.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/activation.h"

enum { GRAIN = 16384 }; /* elements below which a further thread costs more than it brings */

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t row_grain(int64_t width)
{
	return GRAIN / (width > 0 ? width : 1) + 1;
}

CPU_CLONES static void scale_row(const float *x, float scale, float *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] = x[i] * scale;
}

CPU_CLONES static void add_row(const float *x, float *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] += x[i];
}

CPU_CLONES static double dot(const float *a, const float *b, int64_t n)
{
	double sum = 0;
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < n; i++)
		sum += (double)a[i] * b[i];
	return sum;
}

struct job {
	const union op_arg *arg;
	const struct tensor *in, *out;
	int64_t width; /* of a row of y */
	size_t row_bytes;
	int32_t *token; /* permute: [rows of y], -1 none */
	const struct segment *segment;
	int64_t segments;
};

static struct job job_of(const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                         const struct tensor *y)
{
	int64_t width = tensor_row(y);
	return (struct job){.arg = arg,
	                    .in = in,
	                    .out = out,
	                    .width = width,
	                    .row_bytes = (size_t)width * dtype_rows[y->dtype].bytes};
}

static void *row_at(const struct job *j, const struct tensor *t, int64_t row)
{
	return (char *)t->data + (size_t)row * j->row_bytes;
}

static double gate(const struct tensor *g, int64_t row)
{
	return 1 / (1 + exp(-cpu_get(g, row)));
}

static void row_gate_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	float x[CPU_BLOCK], y[CPU_BLOCK];
	for (int64_t row = begin; row < end; row++) {
		float open = (float)gate(&j->in[1], row);
		for (int64_t c = 0; c < j->width; c += CPU_BLOCK) {
			int64_t n = least(CPU_BLOCK, j->width - c), at = row * j->width + c;
			float *to = cpu_place(&j->out[0], at, y);
			scale_row(cpu_read(&j->in[0], at, n, x), open, to, n);
			cpu_write(&j->out[0], at, n, to);
		}
	}
}

int cpu_fast_row_gate(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = job_of(arg, in, out, &out[0]);
	cpu_parallel(s, out[0].dim[0], row_grain(j.width), row_gate_part, &j);
	return 0;
}

static void row_gate_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	float dy[CPU_BLOCK], x[CPU_BLOCK], dx[CPU_BLOCK];
	for (int64_t row = begin; row < end; row++) {
		double open = gate(&j->in[2], row), sum = 0;
		for (int64_t c = 0; c < j->width; c += CPU_BLOCK) {
			int64_t n = least(CPU_BLOCK, j->width - c), at = row * j->width + c;
			float *to = cpu_place(&j->out[0], at, dx);
			const float *d = cpu_read(&j->in[0], at, n, dy);
			sum += dot(d, cpu_read(&j->in[1], at, n, x), n);
			scale_row(d, (float)open, to, n);
			cpu_write(&j->out[0], at, n, to);
		}
		cpu_set(&j->out[1], row, sum * open * (1 - open));
	}
}

int cpu_fast_row_gate_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = job_of(arg, in, out, &out[0]);
	cpu_parallel(s, out[0].dim[0], row_grain(j.width), row_gate_bwd_part, &j);
	return 0;
}

static void permute_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	for (int64_t row = begin; row < end; row++)
		if (j->token[row] < 0)
			memset(row_at(j, &j->out[0], row), 0, j->row_bytes);
		else
			memcpy(row_at(j, &j->out[0], row), row_at(j, &j->in[0], j->token[row]), j->row_bytes);
}

struct cpu_space cpu_space_permute(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                   const struct tensor *out)
{
	(void)s, (void)arg, (void)in;
	return (struct cpu_space){.shared = (size_t)out[0].dim[0] * sizeof(int32_t)};
}

/* By rows of y, so that each is written once and in order. */
int cpu_fast_permute(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	const int32_t *slot = in[1].data;
	int64_t rows = out[0].dim[0], topk = tensor_row(&in[1]);
	struct job j = job_of(arg, in, out, &out[0]);
	if (slot_check("permute", &in[1], rows, e))
		return e->code;
	j.token = cpu_scratch(s, CPU_SHARED, (size_t)rows * sizeof *j.token);
	memset(j.token, 0xff, (size_t)rows * sizeof *j.token);
	for (int32_t n = 0; n < in[1].dim[0]; n++)
		for (int64_t i = n * topk; i < (n + 1) * topk; i++)
			if (slot[i] >= 0)
				j.token[slot[i]] = n;
	cpu_parallel(s, rows, row_grain(j.width), permute_part, &j);
	return 0;
}

/* Columns [c, c + n) of a token. */
static void unpermute_block(const struct job *j, int64_t row, int64_t c, int64_t n)
{
	const int64_t topk = tensor_row(&j->in[1]), at = row * j->width + c;
	const int32_t *slot = (const int32_t *)j->in[1].data + row * topk;
	float x[CPU_BLOCK], y[CPU_BLOCK], *to = cpu_place(&j->out[0], at, y);
	memset(to, 0, (size_t)n * sizeof *to);
	for (int64_t k = 0; k < topk; k++)
		if (slot[k] >= 0)
			add_row(cpu_read(&j->in[0], slot[k] * j->width + c, n, x), to, n);
	cpu_write(&j->out[0], at, n, to);
}

static void unpermute_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	for (int64_t row = begin; row < end; row++)
		for (int64_t c = 0; c < j->width; c += CPU_BLOCK)
			unpermute_block(j, row, c, least(CPU_BLOCK, j->width - c));
}

int cpu_fast_unpermute(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	struct job j = job_of(arg, in, out, &out[0]);
	if (slot_check("unpermute", &in[1], in[0].dim[0], e))
		return e->code;
	cpu_parallel(s, out[0].dim[0], row_grain(j.width), unpermute_part, &j);
	return 0;
}

/* Rows that stay together: from row `sent` of those in order of rank to row `grouped`; sent -1: zeros. */
struct segment {
	int64_t sent, grouped, rows;
};

/* One of each expert and rank, and one of what an expert is filled up with, in order of expert. */
static int64_t segments_of(const union op_arg *arg, const struct tensor *sizes)
{
	return arg->expert.count * (sizes->dim[0] + (int64_t)1);
}

static void fill_segments(const union op_arg *arg, const struct tensor *sizes, struct segment *segment)
{
	const int32_t *size = (const int32_t *)sizes->data + arg->expert.first;
	const int32_t ranks = sizes->dim[0], experts = sizes->dim[1];
	int64_t sent = 0;
	for (int32_t r = 0; r < ranks; r++)
		for (int32_t i = 0; i < arg->expert.count; i++) {
			int64_t rows = size[(int64_t)r * experts + i];
			segment[i * (ranks + (int64_t)1) + r] = (struct segment){sent, 0, rows};
			sent += rows;
		}
	for (struct expert_walk w = expert_begin(arg, sizes); expert_next(&w); segment += ranks + 1) {
		int64_t at = w.first;
		for (int32_t r = 0; r < ranks; r++) {
			segment[r].grouped = at;
			at += segment[r].rows;
		}
		segment[ranks] = (struct segment){-1, at, w.first + w.rows - at};
	}
}

static void move_rows(const struct job *j, const struct segment *part)
{
	size_t bytes = (size_t)part->rows * j->row_bytes;
	if (part->sent >= 0 && j->arg->expert.back)
		memcpy(row_at(j, j->out, part->sent), row_at(j, j->in, part->grouped), bytes);
	else if (part->sent >= 0)
		memcpy(row_at(j, j->out, part->grouped), row_at(j, j->in, part->sent), bytes);
	else if (!j->arg->expert.back)
		memset(row_at(j, j->out, part->grouped), 0, bytes);
}

/* Rows [begin, end) in order of expert. */
static void regroup_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	for (int64_t k = 0; k < j->segments; k++) {
		struct segment own = j->segment[k];
		int64_t skip = begin > own.grouped ? begin - own.grouped : 0;
		own.rows = least(own.grouped + own.rows, end) - own.grouped - skip;
		own.grouped += skip;
		own.sent += own.sent < 0 ? 0 : skip;
		if (own.rows > 0)
			move_rows(j, &own);
	}
}

struct cpu_space cpu_space_regroup(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                   const struct tensor *out)
{
	(void)s, (void)out;
	return (struct cpu_space){.shared = (size_t)segments_of(arg, &in[1]) * sizeof(struct segment)};
}

int cpu_fast_regroup(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	bool back = arg->expert.back;
	struct job j = job_of(arg, in, out, out);
	j.segments = segments_of(arg, &in[1]);
	if (regroup_check(arg, &in[1], (back ? out : in)->dim[0], (back ? in : out)->dim[0], e))
		return e->code;
	struct segment *segment = cpu_scratch(s, CPU_SHARED, (size_t)j.segments * sizeof *segment);
	fill_segments(arg, &in[1], segment);
	j.segment = segment;
	cpu_parallel(s, expert_total(arg, &in[1]), row_grain(j.width), regroup_part, &j);
	return 0;
}

static void expert_activation_row(const struct job *j, int64_t row)
{
	const struct activation_rows *f = &cpu_activation_rows[j->arg->expert.kind];
	const struct tensor *x = &j->in[0];
	const float weight = ((const float *)j->in[1].data)[row];
	const int64_t from = row * tensor_row(x);
	float gate[CPU_BLOCK], up[CPU_BLOCK], y[CPU_BLOCK];
	for (int64_t c = 0; c < j->width; c += CPU_BLOCK) {
		int64_t n = least(CPU_BLOCK, j->width - c), at = row * j->width + c;
		float *to = cpu_place(&j->out[0], at, y);
		if (j->arg->expert.gated)
			f->glu(cpu_read(x, from + c, n, gate), cpu_read(x, from + j->width + c, n, up), to,
			       n);
		else
			f->value(cpu_read(x, from + c, n, gate), to, n);
		scale_row(to, weight, to, n);
		cpu_write(&j->out[0], at, n, to);
	}
}

static void expert_activation_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	for (int64_t row = begin; row < end; row++)
		expert_activation_row(job, row);
}

int cpu_fast_expert_activation(struct stream *s, const union op_arg *arg, const struct tensor *in,
                               const struct tensor *out, struct err *e)
{
	struct job j = job_of(arg, in, out, out);
	if (activation_check("expert_activation", arg, &in[2], &in[0], out, &in[1], e))
		return e->code;
	cpu_parallel(s, expert_total(arg, &in[2]), row_grain(j.width), expert_activation_part, &j);
	return 0;
}

/* Columns [c, c + n) of dx; returns their part of dw. */
static double activation_bwd_block(const struct job *j, int64_t row, int64_t c, int64_t n)
{
	const struct activation_rows *f = &cpu_activation_rows[j->arg->expert.kind];
	const float weight = ((const float *)j->in[2].data)[row];
	const int64_t at = row * tensor_row(&j->in[1]) + c;
	float dy[CPU_BLOCK], x[CPU_BLOCK], y[CPU_BLOCK], dx[CPU_BLOCK];
	const float *d = cpu_read(&j->in[0], row * j->width + c, n, dy), *g = cpu_read(&j->in[1], at, n, x);
	float *to = cpu_place(&j->out[0], at, dx);
	f->value(g, y, n);
	double sum = dot(d, y, n);
	scale_row(d, weight, dy, n);
	f->value_bwd(dy, g, to, n);
	cpu_write(&j->out[0], at, n, to);
	return sum;
}

static double gated_bwd_block(const struct job *j, int64_t row, int64_t c, int64_t n)
{
	const struct activation_rows *f = &cpu_activation_rows[j->arg->expert.kind];
	const float weight = ((const float *)j->in[2].data)[row];
	const int64_t at = row * tensor_row(&j->in[1]) + c;
	float dy[CPU_BLOCK], gate[CPU_BLOCK], up[CPU_BLOCK], y[CPU_BLOCK], dgate[CPU_BLOCK], dup[CPU_BLOCK];
	const float *d = cpu_read(&j->in[0], row * j->width + c, n, dy),
	            *g = cpu_read(&j->in[1], at, n, gate), *u = cpu_read(&j->in[1], at + j->width, n, up);
	float *to_gate = cpu_place(&j->out[0], at, dgate), *to_up = cpu_place(&j->out[0], at + j->width, dup);
	f->glu(g, u, y, n);
	double sum = dot(d, y, n);
	scale_row(d, weight, dy, n);
	f->glu_bwd(dy, g, u, to_gate, to_up, n);
	cpu_write(&j->out[0], at, n, to_gate);
	cpu_write(&j->out[0], at + j->width, n, to_up);
	return sum;
}

static void expert_activation_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	for (int64_t row = begin; row < end; row++) {
		double dw = 0;
		for (int64_t c = 0; c < j->width; c += CPU_BLOCK) {
			int64_t n = least(CPU_BLOCK, j->width - c);
			dw += j->arg->expert.gated ? gated_bwd_block(j, row, c, n)
			                           : activation_bwd_block(j, row, c, n);
		}
		((float *)j->out[1].data)[row] = (float)dw;
	}
}

int cpu_fast_expert_activation_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                                   const struct tensor *out, struct err *e)
{
	struct job j = job_of(arg, in, out, &in[0]);
	if (activation_check("expert_activation_bwd", arg, &in[3], &in[1], &in[0], &in[2], e))
		return e->code;
	cpu_parallel(s, expert_total(arg, &in[3]), row_grain(j.width), expert_activation_bwd_part, &j);
	return 0;
}
