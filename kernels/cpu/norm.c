/* LayerNorm, RMSNorm and the norm of query and key heads. A row is computed in f32; weight gradients are
 * partial sums over blocks of rows, added in the order of the blocks. */
#include "kernels/cpu/cpu.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/fold.h"

struct job {
	const union op_arg *arg;
	const struct tensor *in, *out;
	int64_t rows, width;
	struct fold fold;
};

/* Rows in f32 that a part works in. */
enum { LAYERNORM_ROWS = 4, RMSNORM_ROWS = 3, NORM_BWD_ROWS = 5 };

/* `count` buffers of this part, each of `width` elements. */
static float *part_buffers(struct stream *s, int part, int count, int64_t width)
{
	return cpu_scratch(s, part, (size_t)count * (size_t)width * sizeof(float));
}

/* Below it a further thread costs more than it brings. */
static int64_t row_grain(int64_t width)
{
	return 8192 / width + 1;
}

/* A kernel over the rows of x that works in `elements` of f32 a part. */
static struct cpu_space rows_space(const struct stream *s, const struct tensor *x, int64_t elements)
{
	return (struct cpu_space){.part = (size_t)elements * sizeof(float),
	                          .parts = cpu_parts(s, x->dim[0], row_grain(tensor_row(x)))};
}

/* A gradient of the same, and the sums over all rows: `sums` for each of the gradients it ends in, `width` in
 * all. */
static struct cpu_space rows_bwd_space(const struct stream *s, const struct tensor *x, int64_t elements,
                                       int64_t width, int64_t sums)
{
	struct cpu_space need = fold_space(s, x->dim[0], width, sums);
	size_t part = (size_t)elements * sizeof(float);
	need.part = part > need.part ? part : need.part;
	return need;
}

CPU_CLONES static float row_sum(const float *x, int64_t n)
{
	float sum = 0;
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < n; i++)
		sum += x[i];
	return sum;
}

CPU_CLONES static float row_squares(const float *x, float mean, int64_t n)
{
	float sum = 0;
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < n; i++)
		sum += (x[i] - mean) * (x[i] - mean);
	return sum;
}

CPU_CLONES static void layernorm_apply(const float *x, const float *w, const float *b, float *y, float mean,
                                       float rstd, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] = (x[i] - mean) * rstd * w[i] + b[i];
}

CPU_CLONES static void rmsnorm_apply(const float *x, const float *w, float *y, float rstd, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] = x[i] * rstd * w[i];
}

/* sums[0] = sum of dy · w, sums[1] = sum of dy · w · h, h the normalised row. */
CPU_CLONES static void gradient_sums(const float *dy, const float *x, const float *w, float mean, float rstd,
                                     int64_t n, float sums[2])
{
	float g_sum = 0, gh_sum = 0;
#pragma omp simd reduction(+ : g_sum, gh_sum)
	for (int64_t i = 0; i < n; i++) {
		float g = dy[i] * w[i];
		g_sum += g;
		gh_sum += g * ((x[i] - mean) * rstd);
	}
	sums[0] = g_sum;
	sums[1] = gh_sum;
}

/* dx = rstd · (dy w - a - h b), dw += dy h, and db += dy where db is there. */
CPU_CLONES static void gradient_apply(const float *dy, const float *x, const float *w, float *dx, float *dw,
                                      float *db, float mean, float rstd, float a, float b, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++) {
		float h = (x[i] - mean) * rstd;
		dw[i] += dy[i] * h;
		dx[i] = rstd * (dy[i] * w[i] - a - h * b);
	}
	if (!db)
		return;
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		db[i] += dy[i];
}

CPU_CLONES static void row_add(const float *x, float *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] += x[i];
}

static void layernorm_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	int64_t width = j->width;
	float *buffer = part_buffers(s, part, LAYERNORM_ROWS, width), *mean = j->out[1].data,
	      *rstd = j->out[2].data;
	const float *w = cpu_read(&j->in[1], 0, width, buffer);
	const float *b = cpu_read(&j->in[2], 0, width, buffer + width);
	for (int64_t n = begin; n < end; n++) {
		const float *x = cpu_read(&j->in[0], n * width, width, buffer + 2 * width);
		float *y = cpu_place(&j->out[0], n * width, buffer + 3 * width);
		mean[n] = row_sum(x, width) / (float)width;
		rstd[n] = 1 / sqrtf(row_squares(x, mean[n], width) / (float)width + j->arg->norm.eps);
		layernorm_apply(x, w, b, y, mean[n], rstd[n], width);
		cpu_write(&j->out[0], n * width, width, y);
	}
}

struct cpu_space cpu_space_layernorm(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                     const struct tensor *out)
{
	(void)arg, (void)out;
	return rows_space(s, &in[0], LAYERNORM_ROWS * tensor_row(&in[0]));
}

int cpu_fast_layernorm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .rows = in[0].dim[0], .width = tensor_row(&in[0])};
	cpu_parallel(s, j.rows, row_grain(j.width), layernorm_part, &j);
	return 0;
}

/* One row of either norm's gradient; `buffer` holds 4 rows. mean is 0 and db NULL for RMSNorm. */
static void norm_row_bwd(const struct job *j, const struct tensor *addend, int64_t n, const float *w,
                         float mean, float rstd, float *dw, float *db, float *buffer)
{
	int64_t width = j->width, at = n * width;
	const float *dy = cpu_read(&j->in[0], at, width, buffer);
	const float *x = cpu_read(&j->in[1], at, width, buffer + width);
	float *dx = cpu_place(&j->out[0], at, buffer + 2 * width), sums[2];
	gradient_sums(dy, x, w, mean, rstd, width, sums);
	gradient_apply(dy, x, w, dx, dw, db, mean, rstd, db ? sums[0] / (float)width : 0,
	               sums[1] / (float)width, width);
	if (addend->data)
		row_add(cpu_read(addend, at, width, buffer + 3 * width), dx, width);
	cpu_write(&j->out[0], at, width, dx);
}

static void layernorm_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	struct job *j = job;
	float *buffer = part_buffers(s, part, NORM_BWD_ROWS, j->width);
	const float *mean = j->in[3].data, *rstd = j->in[4].data;
	const float *w = cpu_read(&j->in[2], 0, j->width, buffer);
	for (int64_t k = begin; k < end; k++) {
		float *dw = fold_block(&j->fold, k), *db = dw + j->width;
		for (int64_t n = fold_first(&j->fold, k); n < fold_first(&j->fold, k + 1); n++)
			norm_row_bwd(j, &j->in[5], n, w, mean[n], rstd[n], dw, db, buffer + j->width);
	}
}

struct cpu_space cpu_space_layernorm_bwd(const struct stream *s, const union op_arg *arg,
                                         const struct tensor *in, const struct tensor *out)
{
	(void)arg, (void)out;
	int64_t width = tensor_row(&in[0]);
	return rows_bwd_space(s, &in[0], NORM_BWD_ROWS * width, 2 * width, width);
}

int cpu_fast_layernorm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .rows = in[0].dim[0], .width = tensor_row(&in[0])};
	fold_open(&j.fold, s, j.rows, 2 * j.width);
	cpu_parallel(s, j.fold.blocks, 1, layernorm_bwd_part, &j);
	fold_sum(&j.fold, s, 0, &out[1]);
	fold_sum(&j.fold, s, j.width, &out[2]);
	return 0;
}

static float rms_rstd(const float *x, int64_t width, float eps)
{
	return 1 / sqrtf(row_squares(x, 0, width) / (float)width + eps);
}

static void rmsnorm_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	int64_t width = j->width;
	float *buffer = part_buffers(s, part, RMSNORM_ROWS, width), *rstd = j->out[1].data;
	const float *w = cpu_read(&j->in[1], 0, width, buffer);
	for (int64_t n = begin; n < end; n++) {
		const float *x = cpu_read(&j->in[0], n * width, width, buffer + width);
		float *y = cpu_place(&j->out[0], n * width, buffer + 2 * width);
		rstd[n] = rms_rstd(x, width, j->arg->norm.eps);
		rmsnorm_apply(x, w, y, rstd[n], width);
		cpu_write(&j->out[0], n * width, width, y);
	}
}

struct cpu_space cpu_space_rmsnorm(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                   const struct tensor *out)
{
	(void)arg, (void)out;
	return rows_space(s, &in[0], RMSNORM_ROWS * tensor_row(&in[0]));
}

int cpu_fast_rmsnorm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .rows = in[0].dim[0], .width = tensor_row(&in[0])};
	cpu_parallel(s, j.rows, row_grain(j.width), rmsnorm_part, &j);
	return 0;
}

static void rmsnorm_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	struct job *j = job;
	float *buffer = part_buffers(s, part, NORM_BWD_ROWS, j->width);
	const float *rstd = j->in[3].data, *w = cpu_read(&j->in[2], 0, j->width, buffer);
	for (int64_t k = begin; k < end; k++) {
		float *dw = fold_block(&j->fold, k);
		for (int64_t n = fold_first(&j->fold, k); n < fold_first(&j->fold, k + 1); n++)
			norm_row_bwd(j, &j->in[4], n, w, 0, rstd[n], dw, NULL, buffer + j->width);
	}
}

struct cpu_space cpu_space_rmsnorm_bwd(const struct stream *s, const union op_arg *arg,
                                       const struct tensor *in, const struct tensor *out)
{
	(void)arg, (void)out;
	int64_t width = tensor_row(&in[0]);
	return rows_bwd_space(s, &in[0], NORM_BWD_ROWS * width, width, width);
}

int cpu_fast_rmsnorm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .rows = in[0].dim[0], .width = tensor_row(&in[0])};
	fold_open(&j.fold, s, j.rows, j.width);
	cpu_parallel(s, j.fold.blocks, 1, rmsnorm_bwd_part, &j);
	fold_sum(&j.fold, s, 0, &out[1]);
	return 0;
}

static void qk_norm_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	int64_t heads = j->arg->norm.heads, size = j->arg->norm.head_dim,
	        normed = heads + j->arg->norm.groups;
	int64_t width = j->width;
	float *buffer = part_buffers(s, part, 2, width + size), *rstd = j->out[1].data;
	float *x_buffer = buffer + 2 * size, *y_buffer = x_buffer + width;
	const float *w[2] = {cpu_read(&j->in[1], 0, size, buffer),
	                     cpu_read(&j->in[2], 0, size, buffer + size)};
	for (int64_t n = begin; n < end; n++) {
		const float *x = cpu_read(&j->in[0], n * width, width, x_buffer);
		float *y = cpu_place(&j->out[0], n * width, y_buffer);
		for (int64_t h = 0; h < normed; h++) {
			float r = rms_rstd(x + h * size, size, j->arg->norm.eps);
			rmsnorm_apply(x + h * size, w[h >= heads], y + h * size, r, size);
			rstd[n * normed + h] = r;
		}
		memcpy(y + normed * size, x + normed * size, (size_t)(width - normed * size) * sizeof *y);
		cpu_write(&j->out[0], n * width, width, y);
	}
}

struct cpu_space cpu_space_qk_norm(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                   const struct tensor *out)
{
	(void)out;
	return rows_space(s, &in[0], 2 * (tensor_row(&in[0]) + arg->norm.head_dim));
}

int cpu_fast_qk_norm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .rows = in[0].dim[0], .width = tensor_row(&in[0])};
	cpu_parallel(s, j.rows, row_grain(j.width), qk_norm_part, &j);
	return 0;
}

/* One row: every normed head, then the values as they are. w and dw: of queries, of keys. */
static void qk_row_bwd(const struct job *j, int64_t n, const float *const w[2], float *const dw[2],
                       float *buffer)
{
	int64_t heads = j->arg->norm.heads, size = j->arg->norm.head_dim,
	        normed = heads + j->arg->norm.groups;
	int64_t width = j->width;
	const float *rstd = (const float *)j->in[4].data + n * normed;
	const float *dy = cpu_read(&j->in[0], n * width, width, buffer);
	const float *x = cpu_read(&j->in[1], n * width, width, buffer + width);
	float *dx = cpu_place(&j->out[0], n * width, buffer + 2 * width), sums[2];
	for (int64_t h = 0; h < normed; h++) {
		int64_t c = h * size;
		int key = h >= heads;
		gradient_sums(dy + c, x + c, w[key], 0, rstd[h], size, sums);
		gradient_apply(dy + c, x + c, w[key], dx + c, dw[key], NULL, 0, rstd[h], 0,
		               sums[1] / (float)size, size);
	}
	memcpy(dx + normed * size, dy + normed * size, (size_t)(width - normed * size) * sizeof *dx);
	cpu_write(&j->out[0], n * width, width, dx);
}

static void qk_norm_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	struct job *j = job;
	int64_t size = j->arg->norm.head_dim;
	float *buffer = part_buffers(s, part, 1, 3 * j->width + 2 * size);
	const float *w[2] = {cpu_read(&j->in[2], 0, size, buffer),
	                     cpu_read(&j->in[3], 0, size, buffer + size)};
	for (int64_t k = begin; k < end; k++) {
		float *dw[2] = {fold_block(&j->fold, k), NULL};
		dw[1] = dw[0] + size;
		for (int64_t n = fold_first(&j->fold, k); n < fold_first(&j->fold, k + 1); n++)
			qk_row_bwd(j, n, w, dw, buffer + 2 * size);
	}
}

struct cpu_space cpu_space_qk_norm_bwd(const struct stream *s, const union op_arg *arg,
                                       const struct tensor *in, const struct tensor *out)
{
	(void)out;
	int64_t size = arg->norm.head_dim, width = tensor_row(&in[0]);
	return rows_bwd_space(s, &in[0], 3 * width + 2 * size, 2 * size, size);
}

int cpu_fast_qk_norm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {.arg = arg, .in = in, .out = out, .rows = in[0].dim[0], .width = tensor_row(&in[0])};
	fold_open(&j.fold, s, j.rows, 2 * (int64_t)arg->norm.head_dim);
	cpu_parallel(s, j.fold.blocks, 1, qk_norm_bwd_part, &j);
	fold_sum(&j.fold, s, 0, &out[1]);
	fold_sum(&j.fold, s, arg->norm.head_dim, &out[2]);
	return 0;
}
