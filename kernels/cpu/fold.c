#include "kernels/cpu/fold.h"

#include <string.h>

enum { SUM_GRAIN = 1024 };

static struct fold fold_of(int64_t rows, int64_t width)
{
	int64_t block_rows = rows > 64 * 64 ? (rows + 63) / 64 : 64;
	return (struct fold){.rows = rows,
	                     .width = width,
	                     .block_rows = block_rows,
	                     .blocks = (rows + block_rows - 1) / block_rows};
}

static size_t fold_bytes(const struct fold *f)
{
	return (size_t)(f->blocks * f->width) * sizeof *f->partial;
}

void fold_open(struct fold *f, struct stream *s, int64_t rows, int64_t width)
{
	*f = fold_of(rows, width);
	f->partial = cpu_scratch(s, CPU_SHARED, fold_bytes(f));
}

struct cpu_space fold_space(const struct stream *s, int64_t rows, int64_t width, int64_t most)
{
	struct fold f = fold_of(rows, width);
	int parts = cpu_parts(s, most, SUM_GRAIN), fillers = cpu_parts(s, f.blocks, 1);
	return (struct cpu_space){.shared = fold_bytes(&f),
	                          .part = (size_t)((most + parts - 1) / parts) * sizeof *f.partial,
	                          .parts = parts > fillers ? parts : fillers};
}

float *fold_block(const struct fold *f, int64_t k)
{
	return memset(f->partial + k * f->width, 0, (size_t)f->width * sizeof *f->partial);
}

int64_t fold_first(const struct fold *f, int64_t k)
{
	int64_t first = k * f->block_rows;
	return first < f->rows ? first : f->rows;
}

struct job {
	const struct fold *fold;
	const struct tensor *out;
	int64_t first;
};

CPU_CLONES static void add_row(const float *x, float *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] += x[i];
}

/* Sums the blocks first and adds once to what is there, as the reference does. */
static void fold_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	int64_t n = end - begin;
	float *sum = cpu_scratch(s, part, (size_t)n * sizeof *sum), *out = (float *)j->out->data + begin;
	memset(sum, 0, (size_t)n * sizeof *sum);
	for (int64_t k = 0; k < j->fold->blocks; k++)
		add_row(j->fold->partial + k * j->fold->width + j->first + begin, sum, n);
	if (!j->out->acc)
		memset(out, 0, (size_t)n * sizeof *out);
	add_row(sum, out, n);
}

void fold_sum(struct fold *f, struct stream *s, int64_t first, const struct tensor *out)
{
	struct job j = {f, out, first};
	cpu_parallel(s, tensor_count(out), SUM_GRAIN, fold_part, &j);
}
