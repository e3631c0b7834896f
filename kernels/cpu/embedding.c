/* Rows of a table, and the sum of gradients into it. */
#include "kernels/cpu/cpu.h"

#include <string.h>

struct job {
	const union op_arg *arg;
	const struct tensor *in, *out;
	int64_t width;
};

/* The table's row for token n, -1 where another rank holds it. */
static int64_t table_row(const struct job *j, const struct tensor *table, int64_t n)
{
	int64_t id = (int64_t)((const int32_t *)j->in[1].data)[n] - j->arg->embedding.first_row;
	return id >= 0 && id < table->dim[0] ? id : -1;
}

static void embedding_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	size_t bytes = (size_t)j->width * dtype_rows[j->out[0].dtype].bytes;
	for (int64_t n = begin; n < end; n++) {
		int64_t id = table_row(j, &j->in[0], n);
		char *y = (char *)j->out[0].data + (size_t)n * bytes;
		if (id < 0)
			memset(y, 0, bytes);
		else
			memcpy(y, (const char *)j->in[0].data + (size_t)id * bytes, bytes);
	}
}

int cpu_fast_embedding(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	if (in[0].dtype != out[0].dtype)
		return cpu_ref_embedding(s, arg, in, out, e);
	struct job j = {arg, in, out, tensor_row(&out[0])};
	cpu_parallel(s, out[0].dim[0], 8192 / j.width + 1, embedding_part, &j);
	return 0;
}

CPU_CLONES static void add_row(const float *x, float *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] += x[i];
}

/* A part owns columns [begin, end) of the whole table, so tokens are added in their order by one thread. */
static void embedding_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	float buffer[CPU_BLOCK], *table = j->out[0].data;
	for (int64_t c = begin; c < end; c += CPU_BLOCK) {
		int64_t count = end - c < CPU_BLOCK ? end - c : CPU_BLOCK;
		for (int64_t n = 0; n < j->in[0].dim[0]; n++) {
			int64_t id = table_row(j, &j->out[0], n);
			if (id >= 0)
				add_row(cpu_read(&j->in[0], n * j->width + c, count, buffer),
				        table + id * j->width + c, count);
		}
	}
}

static void zero_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	memset((float *)job + begin, 0, (size_t)(end - begin) * sizeof(float));
}

int cpu_fast_embedding_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	(void)e;
	struct job j = {arg, in, out, tensor_row(&in[0])};
	if (!out[0].acc)
		cpu_parallel(s, tensor_count(&out[0]), 1 << 16, zero_part, out[0].data);
	cpu_parallel(s, j.width, 64, embedding_bwd_part, &j);
	return 0;
}
