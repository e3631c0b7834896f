/* Attention of a few new rows to cached keys and values: one query at a time, for generation. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/attention.h"

struct cached {
	struct attention a;
	const struct tensor *keys, *values, *o;
	const int32_t *position;
};

static int check_positions(const struct tensor *position, int32_t limit, struct err *e)
{
	const int32_t *p = position->data;
	for (int32_t n = 0; n < position->dim[0]; n++)
		if (p[n] < 0 || p[n] >= limit)
			return err_set(e, EXIT_INTERNAL,
			               "attention_cache: position %d of row %d is outside the cache of %d",
			               p[n], n, limit);
	return 0;
}

static void store_row(const struct cached *c, int64_t n)
{
	const struct attention *a = &c->a;
	const struct tensor *caches[] = {c->keys, c->values};
	const struct attention_heads *heads[] = {&a->k, &a->v};
	float buffer[CPU_BLOCK];
	for (int which = 0; which < 2; which++) {
		const struct attention_heads *h = heads[which];
		int64_t width = a->groups * h->size;
		for (int64_t i = 0; i < width; i += CPU_BLOCK) {
			int64_t count = width - i < CPU_BLOCK ? width - i : CPU_BLOCK;
			int64_t to = c->position[n] * width + i;
			float *place = cpu_place(caches[which], to, buffer);
			const float *row = cpu_read(h->t, n * h->row + h->column + i, count, place);
			if (row != place)
				memcpy(place, row, (size_t)count * sizeof *place);
			cpu_write(caches[which], to, count, place);
		}
	}
}

/* weight[j] <- scores of keys [begin, begin + count) in powers of two, then -inf up to a multiple of 16. */
static void score(const struct cached *c, const float *q, int64_t at, int64_t count, float *buffer,
                  float *weight)
{
	const struct attention *a = &c->a;
	for (int64_t j = 0; j < count; j++)
		weight[j] = a->tile->dot(
		        a->k.size, q, cpu_read(c->keys, at + j * a->groups * a->k.size, a->k.size, buffer));
	for (int64_t j = count; j % 16; j++)
		weight[j] = -INFINITY;
}

static int64_t row_buffer(const struct attention *a)
{
	return a->k.padded > a->v.padded ? a->k.padded : a->v.padded;
}

/* Row n, one head; space holds q, o, a row of either cache, and the weights. */
static void attend(const struct cached *c, int64_t n, int64_t head, float *space)
{
	const struct attention *a = &c->a;
	float *q = space, *o = q + a->q.padded, *buffer = o + a->v.padded, *weight = buffer + row_buffer(a);
	float top = -1e30f, sum = 0, shrink;
	int64_t last = c->position[n], window = a->arg->attention.window;
	int64_t begin = window > 0 && last >= window ? last - window + 1 : 0, count = last - begin + 1;
	int64_t key = begin * a->groups + head / (a->heads / a->groups); /* in heads of the caches */
	attention_load(&a->q, n, head, 1, 1, a->arg->attention.scale * ATTENTION_LOG2E, q);
	score(c, q, key * a->k.size, count, buffer, weight);
	a->tile->softmax(1, (int)((count + 15) / 16 * 16), weight, 0, &top, &sum, &shrink);
	memset(o, 0, (size_t)a->v.padded * sizeof *o);
	for (int64_t j = 0; j < count; j++, key += a->groups)
		a->tile->add_scaled(a->v.size, weight[j],
		                    cpu_read(c->values, key * a->v.size, a->v.size, buffer), o);
	struct attention_heads to = attention_output(a, c->o);
	attention_store(&to, n, head, 1, 1 / sum, o);
}

static size_t space_bytes(const struct attention *a, const struct tensor *keys)
{
	return ((size_t)(a->q.padded + a->v.padded + row_buffer(a)) + ((size_t)keys->dim[0] + 15) / 16 * 16) *
	       sizeof(float);
}

static void cache_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct cached *c = job;
	float *space = cpu_scratch(s, part, space_bytes(&c->a, c->keys));
	for (int64_t i = begin; i < end; i++)
		attend(c, i / c->a.heads, i % c->a.heads, space);
}

struct cpu_space cpu_space_attention_cache(const struct stream *s, const union op_arg *arg,
                                           const struct tensor *in, const struct tensor *out)
{
	(void)out;
	struct attention a = attention_of(arg, &in[0], NULL, NULL);
	return (struct cpu_space){.part = space_bytes(&a, &in[1]),
	                          .parts = cpu_parts(s, in[0].dim[0] * a.heads, 1)};
}

int cpu_fast_attention_cache(struct stream *s, const union op_arg *arg, const struct tensor *in,
                             const struct tensor *out, struct err *e)
{
	struct cached c = {attention_of(arg, &in[0], NULL, NULL), &in[1], &in[2], &out[0], in[3].data};
	if (attention_check(&c.a, OP_attention_cache, e))
		return e->code;
	if (check_positions(&in[3], in[1].dim[0], e))
		return e->code;
	for (int64_t n = 0; n < in[0].dim[0]; n++)
		store_row(&c, n);
	cpu_parallel(s, in[0].dim[0] * c.a.heads, 1, cache_part, &c);
	return 0;
}
