#include <stdbool.h>
#include <stdlib.h>

#include "base/mem.h"
#include "kernels/cpu/rope.h"

static void copy(const struct tensor *from, int64_t at, const struct tensor *to, int64_t to_at, int64_t n)
{
	for (int64_t i = 0; i < n; i++)
		cpu_set(to, to_at + i, cpu_get(from, at + i));
}

/* Where head h of row n lies: `packed` in the first queries, keys and values of attention. */
struct latent {
	int64_t plain, turned, size, value; /* D-R, R, D, V */
	int64_t q, kv, key;                 /* in q, kv, key */
	int64_t packed, packed_key, packed_value;
};

static struct latent latent_at(const union op_arg *arg, int64_t turned, int64_t n, int64_t h)
{
	int64_t heads = arg->mla.heads, size = arg->mla.head_dim, value = arg->mla.value_dim;
	struct latent l = {.plain = size - turned, .turned = turned, .size = size, .value = value};
	l.q = (n * heads + h) * size;
	l.kv = (n * heads + h) * (l.plain + value);
	l.key = n * turned;
	l.packed = n * heads * (2 * size + value) + h * size;
	l.packed_key = l.packed + heads * size;
	l.packed_value = n * heads * (2 * size + value) + 2 * heads * size + h * value;
	return l;
}

int cpu_ref_mla_pack(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)s;
	const int32_t *position = in[4].data;
	bool interleaved = arg->mla.interleaved;
	if (cpu_rope_check(OP_mla_pack, &in[3], &in[4], e))
		return e->code;
	for (int64_t i = 0; i < in[0].dim[0] * arg->mla.heads; i++) {
		int64_t n = i / arg->mla.heads;
		struct latent l = latent_at(arg, tensor_row(&in[3]), n, i % arg->mla.heads);
		copy(&in[0], l.q, out, l.packed, l.plain);
		cpu_ref_rotate(&in[0], l.q + l.plain, out, l.packed + l.plain, &in[3], position[n], false,
		               interleaved);
		copy(&in[1], l.kv, out, l.packed_key, l.plain);
		cpu_ref_rotate(&in[2], l.key, out, l.packed_key + l.plain, &in[3], position[n], false,
		               interleaved);
		copy(&in[1], l.kv + l.plain, out, l.packed_value, l.value);
	}
	return 0;
}

/* dkey of one row: the heads' gradients summed, rotated back in their sum. */
static void key_backward(const union op_arg *arg, const struct tensor *in, const struct tensor *dkey,
                         int64_t n, double *sum)
{
	int64_t turned = tensor_row(&in[1]);
	struct tensor sums = {.data = sum, .dtype = DT_f64};
	for (int64_t c = 0; c < turned; c++)
		sum[c] = 0;
	for (int64_t h = 0; h < arg->mla.heads; h++) {
		struct latent l = latent_at(arg, turned, n, h);
		for (int64_t c = 0; c < turned; c++)
			sum[c] += cpu_get(&in[0], l.packed_key + l.plain + c);
	}
	cpu_ref_rotate(&sums, 0, dkey, n * turned, &in[1], ((const int32_t *)in[2].data)[n], true,
	               arg->mla.interleaved);
}

int cpu_ref_mla_unpack(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)s;
	const int32_t *position = in[2].data;
	if (cpu_rope_check(OP_mla_unpack, &in[1], &in[2], e))
		return e->code;
	for (int64_t i = 0; i < in[0].dim[0] * arg->mla.heads; i++) {
		int64_t n = i / arg->mla.heads;
		struct latent l = latent_at(arg, tensor_row(&in[1]), n, i % arg->mla.heads);
		copy(&in[0], l.packed, &out[0], l.q, l.plain);
		cpu_ref_rotate(&in[0], l.packed + l.plain, &out[0], l.q + l.plain, &in[1], position[n], true,
		               arg->mla.interleaved);
		copy(&in[0], l.packed_key, &out[1], l.kv, l.plain);
		copy(&in[0], l.packed_value, &out[1], l.kv + l.plain, l.value);
	}
	double *sum = mem_array((size_t)tensor_row(&in[1]), sizeof *sum);
	for (int64_t n = 0; n < in[0].dim[0]; n++)
		key_backward(arg, in, &out[2], n, sum);
	free(sum);
	return 0;
}

int cpu_ref_split_columns(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t width = tensor_row(&in[0]), first = arg->columns.first;
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		copy(&in[0], n * width, &out[0], n * first, first);
		copy(&in[0], n * width + first, &out[1], n * (width - first), width - first);
	}
	return 0;
}

int cpu_ref_join_columns(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t a = tensor_row(&in[0]), b = tensor_row(&in[1]);
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		copy(&in[0], n * a, &out[0], n * (a + b), a);
		copy(&in[1], n * b, &out[0], n * (a + b) + a, b);
	}
	return 0;
}

/* Which element of split_heads' output, of `rows` rows before, column c of row n is. */
static int64_t split_at(const union op_arg *arg, int64_t rows, int64_t n, int64_t c)
{
	const int32_t *width = arg->heads.part;
	int64_t ranks = arg->heads.ranks, all = width[0] + width[1] + width[2], before = 0;
	int i = 0;
	for (; c >= width[i]; i++) {
		c -= width[i];
		before += width[i] / ranks;
	}
	int64_t part = width[i] / ranks, rank = c / part;
	return (rank * rows + n) * (all / ranks) + before + c % part;
}

int cpu_ref_split_heads(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	for (int64_t i = 0; i < rows * width; i++)
		cpu_set(&out[0], split_at(arg, rows, i / width, i % width), cpu_get(&in[0], i));
	return 0;
}

int cpu_ref_join_heads(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t rows = out[0].dim[0], width = tensor_row(&out[0]);
	for (int64_t i = 0; i < rows * width; i++)
		cpu_set(&out[0], i, cpu_get(&in[0], split_at(arg, rows, i / width, i % width)));
	return 0;
}
