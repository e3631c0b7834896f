/* Backward of attention: probabilities are computed again from lse. A thread has whole key-value heads of a
 * sample, so gradients of keys and values are summed in one place, in one order. */
#include "kernels/cpu/attention.h"

#include <string.h>

/* Working space of a thread, f32. */
struct space {
	float *keys_across, *values_across; /* [D][padded_length] */
	float *keys, *dk, *dv;              /* [padded_length][padded_size] */
	float *q, *dout, *dq;               /* [BLOCK_QUERIES][padded_size] */
	float *p, *ds;                      /* [BLOCK_QUERIES][BLOCK_KEYS] */
	float *delta, *lse;
};

static size_t space_bytes(const struct attention *a)
{
	int64_t block = BLOCK_QUERIES * a->padded_size, whole = a->padded_length * a->padded_size;
	return (size_t)(5 * whole + 3 * block + 2 * BLOCK_QUERIES * (BLOCK_KEYS + 1)) * sizeof(float);
}

static struct space space_of(const struct attention *a, struct stream *s, int part)
{
	int64_t block = BLOCK_QUERIES * a->padded_size, whole = a->padded_length * a->padded_size;
	struct space w = {.keys_across = cpu_scratch(s, part, space_bytes(a))};
	w.values_across = w.keys_across + whole;
	w.keys = w.values_across + whole;
	w.dk = w.keys + whole;
	w.dv = w.dk + whole;
	w.q = w.dv + whole;
	w.dout = w.q + block;
	w.dq = w.dout + block;
	w.p = w.dq + block;
	w.ds = w.p + BLOCK_QUERIES * BLOCK_KEYS;
	w.delta = w.ds + BLOCK_QUERIES * BLOCK_KEYS;
	w.lse = w.delta + BLOCK_QUERIES;
	return w;
}

struct backward {
	struct attention a;
	const struct tensor *dout, *o, *lse, *dqkv;
};

/* Queries, the gradient of their output, its product with the output, and lse in powers of two. */
static void load_queries(const struct backward *b, const struct space *w, int64_t sample, int64_t head,
                         int64_t query)
{
	const struct attention *a = &b->a;
	int64_t rows = a->length - query < BLOCK_QUERIES ? a->length - query : BLOCK_QUERIES;
	int64_t first = (sample * a->length + query) * a->heads + head;
	attention_load(a, b->o, first * a->size, a->heads * a->size, rows, BLOCK_QUERIES, 1, w->dq);
	attention_load(a, b->dout, first * a->size, a->heads * a->size, rows, BLOCK_QUERIES, 1, w->dout);
	attention_load(a, a->qkv, attention_query_at(a, sample, query, head), a->row, rows, BLOCK_QUERIES,
	               a->arg->attention.scale * ATTENTION_LOG2E, w->q);
	for (int64_t i = 0; i < BLOCK_QUERIES; i++) {
		int64_t at = i * a->padded_size;
		w->delta[i] = a->tile->dot(a->padded_size, w->dq + at, w->dout + at);
		w->lse[i] =
		        i < rows ? ((const float *)b->lse->data)[first + i * a->heads] * ATTENTION_LOG2E : 0;
	}
}

/* One block of scores: P, dS, and what they add to dq, dk, dv. */
static void block_backward(const struct backward *b, const struct space *w, int64_t sample, int64_t head,
                           int64_t query, int64_t key, int columns, bool first)
{
	const struct attention *a = &b->a;
	const struct tile *tile = a->tile;
	const int size = (int)a->size, padded = (int)a->padded_size;
	tile->multiply(BLOCK_QUERIES, columns, size, w->q, padded, 1, w->keys_across + key, a->padded_length,
	               w->p, BLOCK_KEYS, false);
	attention_hide(a, query, key, columns, w->p);
	tile->exponent(BLOCK_QUERIES, columns, w->p, BLOCK_KEYS, w->lse);
	tile->multiply(BLOCK_QUERIES, columns, size, w->dout, padded, 1, w->values_across + key,
	               a->padded_length, w->ds, BLOCK_KEYS, false);
	attention_drop(a, sample, head, query, key, columns, w->ds);
	tile->score_grad(BLOCK_QUERIES, columns, w->p, w->ds, BLOCK_KEYS, w->delta);
	attention_drop(a, sample, head, query, key, columns, w->p);
	tile->multiply(columns, padded, BLOCK_QUERIES, w->p, 1, BLOCK_KEYS, w->dout, padded,
	               w->dv + key * padded, padded, true);
	tile->multiply(columns, padded, BLOCK_QUERIES, w->ds, 1, BLOCK_KEYS, w->q, padded,
	               w->dk + key * padded, padded, true);
	tile->multiply(BLOCK_QUERIES, padded, columns, w->ds, BLOCK_KEYS, 1, w->keys + key * padded, padded,
	               w->dq, padded, !first);
}

static void queries_backward(const struct backward *b, const struct space *w, int64_t sample, int64_t head,
                             int64_t query)
{
	const struct attention *a = &b->a;
	int64_t rows = a->length - query < BLOCK_QUERIES ? a->length - query : BLOCK_QUERIES;
	load_queries(b, w, sample, head, query);
	struct attention_span span = attention_span_of(a, query);
	for (int64_t key = span.begin; key < span.end; key += BLOCK_KEYS) {
		int64_t left = span.end - key;
		block_backward(b, w, sample, head, query, key, left < BLOCK_KEYS ? (int)left : BLOCK_KEYS,
		               key == span.begin);
	}
	attention_store(a, b->dqkv, attention_query_at(a, sample, query, head), a->row, rows,
	                a->arg->attention.scale, w->dq);
}

/* Items are (sample, key-value head). */
static void backward_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct backward *b = job;
	const struct attention *a = &b->a;
	const int64_t share = a->heads / a->groups;
	struct space w = space_of(a, s, part);
	for (int64_t i = begin; i < end; i++) {
		int64_t sample = i / a->groups, group = i % a->groups;
		int64_t key = attention_key_at(a, sample, 0, group),
		        value = attention_value_at(a, sample, 0, group);
		attention_load_transposed(a, key, w.keys_across);
		attention_load_transposed(a, value, w.values_across);
		attention_load(a, a->qkv, key, a->row, a->length, a->padded_length, 1, w.keys);
		memset(w.dk, 0, (size_t)(2 * a->padded_length * a->padded_size) * sizeof *w.dk); /* and dv */
		for (int64_t head = group * share; head < (group + 1) * share; head++)
			for (int64_t query = 0; query < a->length; query += BLOCK_QUERIES)
				queries_backward(b, &w, sample, head, query);
		/* The queries carried scale · log2(e). */
		attention_store(a, b->dqkv, key, a->row, a->length, ATTENTION_LN2, w.dk);
		attention_store(a, b->dqkv, value, a->row, a->length, 1, w.dv);
	}
}

struct cpu_space cpu_space_attention_bwd(const struct stream *s, const union op_arg *arg,
                                         const struct tensor *in, const struct tensor *out)
{
	(void)out;
	struct attention a = attention_of(arg, &in[1], &in[4]);
	return (struct cpu_space){0, space_bytes(&a), cpu_parts(s, a.samples * a.groups, 1)};
}

int cpu_fast_attention_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	struct backward b = {attention_of(arg, &in[1], &in[4]), &in[0], &in[2], &in[3], &out[0]};
	if (in[1].dtype != DT_f32 && in[1].dtype != DT_bf16)
		return err_set(e, EXIT_INTERNAL, "attention_bwd: qkv is %s; f32 and bf16 are allowed",
		               dtype_rows[in[1].dtype].name);
	cpu_parallel(s, b.a.samples * b.a.groups, 1, backward_part, &b);
	return 0;
}
