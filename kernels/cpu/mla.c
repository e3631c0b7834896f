/* Multi-head latent attention (DeepSeek-AI 2024): queries, the keys of all heads, their rotated part and the
 * values, as attention wants them. Heads are copied as they are but for what is rotated. */
#include <string.h>

#include "kernels/cpu/rope.h"

/* Columns: of a packed row queries | keys | values. */
struct job {
	const union op_arg *arg;
	const struct tensor *in, *out;
	const struct tensor *table, *position;
	int64_t heads, plain, turned, value; /* H, D-R, R, V */
};

static struct job job_of(const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                         int first_table)
{
	int64_t turned = tensor_row(&in[first_table]);
	return (struct job){arg,
	                    in,
	                    out,
	                    &in[first_table],
	                    &in[first_table + 1],
	                    arg->mla.heads,
	                    arg->mla.head_dim - turned,
	                    turned,
	                    arg->mla.value_dim};
}

static void copy(const struct tensor *from, int64_t at, const struct tensor *to, int64_t to_at, int64_t n)
{
	size_t bytes = dtype_rows[from->dtype].bytes;
	memcpy((char *)to->data + (size_t)to_at * bytes, (const char *)from->data + (size_t)at * bytes,
	       (size_t)n * bytes);
}

static void rotate(const struct job *j, int64_t n, bool inverse, float *x)
{
	const float *table = j->table->data;
	int64_t position = ((const int32_t *)j->position->data)[n];
	cpu_rotate(x, table + position * j->turned, inverse, j->arg->mla.interleaved, j->turned / 2);
}

/* R elements of y <- R of x, rotated. */
static void turn(const struct job *j, int64_t n, bool inverse, const struct tensor *x, int64_t from,
                 const struct tensor *y, int64_t to, float *buffer)
{
	const float *in = cpu_read(x, from, j->turned, buffer);
	float *place = cpu_place(y, to, buffer);
	if (in != place)
		memcpy(place, in, (size_t)j->turned * sizeof *place);
	rotate(j, n, inverse, place);
	cpu_write(y, to, j->turned, place);
}

static void pack_row(const struct job *j, int64_t n, float *buffer)
{
	const struct tensor *q = &j->in[0], *kv = &j->in[1], *y = &j->out[0];
	const int64_t heads = j->heads, size = j->plain + j->turned;
	const int64_t row = n * heads * (2 * size + j->value), first_key = row + heads * size,
	              first_value = first_key + heads * size;
	for (int64_t h = 0; h < heads; h++) {
		int64_t from = (n * heads + h) * size, latent = (n * heads + h) * (j->plain + j->value);
		int64_t query = row + h * size, key = first_key + h * size;
		copy(q, from, y, query, j->plain);
		turn(j, n, false, q, from + j->plain, y, query + j->plain, buffer);
		copy(kv, latent, y, key, j->plain);
		if (h)
			copy(y, first_key + j->plain, y, key + j->plain, j->turned);
		else
			turn(j, n, false, &j->in[2], n * j->turned, y, key + j->plain, buffer);
		copy(kv, latent + j->plain, y, first_value + h * j->value, j->value);
	}
}

CPU_CLONES static void add_row(const float *x, float *sum, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		sum[i] += x[i];
}

static void unpack_row(const struct job *j, int64_t n, float *buffer, float *sum)
{
	const struct tensor *y = &j->in[0], *dq = &j->out[0], *dkv = &j->out[1], *dkey = &j->out[2];
	const int64_t heads = j->heads, size = j->plain + j->turned;
	const int64_t row = n * heads * (2 * size + j->value), first_key = row + heads * size,
	              first_value = first_key + heads * size;
	memset(sum, 0, (size_t)j->turned * sizeof *sum);
	for (int64_t h = 0; h < heads; h++) {
		int64_t to = (n * heads + h) * size, latent = (n * heads + h) * (j->plain + j->value);
		int64_t query = row + h * size, key = first_key + h * size;
		copy(y, query, dq, to, j->plain);
		turn(j, n, true, y, query + j->plain, dq, to + j->plain, buffer);
		copy(y, key, dkv, latent, j->plain);
		add_row(cpu_read(y, key + j->plain, j->turned, buffer), sum, j->turned);
		copy(y, first_value + h * j->value, dkv, latent + j->plain, j->value);
	}
	const struct tensor sums = {.data = sum, .dtype = DT_f32};
	turn(j, n, true, &sums, 0, dkey, n * j->turned, sum);
}

static void pack_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	float *buffer = cpu_scratch(s, part, (size_t)j->turned * sizeof *buffer);
	for (int64_t n = begin; n < end; n++)
		pack_row(j, n, buffer);
}

static void unpack_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	float *buffer = cpu_scratch(s, part, 2 * (size_t)j->turned * sizeof *buffer);
	for (int64_t n = begin; n < end; n++)
		unpack_row(j, n, buffer, buffer + j->turned);
}

/* Rows so that a thread gets at least 8192 elements. */
static int64_t row_grain(const struct tensor *packed)
{
	return 8192 / tensor_row(packed) + 1;
}

struct cpu_space cpu_space_mla_pack(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                    const struct tensor *out)
{
	(void)arg;
	return (struct cpu_space){.part = (size_t)tensor_row(&in[3]) * sizeof(float),
	                          .parts = cpu_parts(s, in[0].dim[0], row_grain(&out[0]))};
}

struct cpu_space cpu_space_mla_unpack(const struct stream *s, const union op_arg *arg,
                                      const struct tensor *in, const struct tensor *out)
{
	(void)arg, (void)out;
	return (struct cpu_space){.part = 2 * (size_t)tensor_row(&in[1]) * sizeof(float),
	                          .parts = cpu_parts(s, in[0].dim[0], row_grain(&in[0]))};
}

int cpu_fast_mla_pack(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	struct job j = job_of(arg, in, out, 3);
	if (in[3].dtype != DT_f32)
		return cpu_ref_mla_pack(s, arg, in, out, e);
	if (cpu_rope_check(OP_mla_pack, j.table, j.position, e))
		return e->code;
	cpu_parallel(s, in[0].dim[0], row_grain(&out[0]), pack_part, &j);
	return 0;
}

int cpu_fast_mla_unpack(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	struct job j = job_of(arg, in, out, 1);
	if (in[1].dtype != DT_f32)
		return cpu_ref_mla_unpack(s, arg, in, out, e);
	if (cpu_rope_check(OP_mla_unpack, j.table, j.position, e))
		return e->code;
	cpu_parallel(s, in[0].dim[0], row_grain(&in[0]), unpack_part, &j);
	return 0;
}
