#include "kernels/cpu/fold.h"

#include <string.h>

void fold_open(struct fold *f, struct stream *s, int64_t rows, int64_t width)
{
	f->rows = rows;
	f->width = width;
	f->block_rows = rows > 64 * 64 ? (rows + 63) / 64 : 64;
	f->blocks = (rows + f->block_rows - 1) / f->block_rows;
	f->partial = cpu_scratch(s, CPU_SHARED, (size_t)(f->blocks * width) * sizeof *f->partial);
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
	cpu_parallel(s, tensor_count(out), 1024, fold_part, &j);
}
