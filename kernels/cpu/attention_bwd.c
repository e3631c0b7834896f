/* Backward of attention: probabilities are computed again from lse. A thread has whole key-value heads of a
 * sample, so gradients of keys and values are summed in one place, in one order. */
#include "kernels/cpu/attention.h"

#include <math.h>
#include <string.h>

/* Working space of a thread, f32. */
struct space {
	float *keys_across, *values_across; /* [stretches][D or V][padded_length] */
	float *keys, *dk, *dv;              /* [stretches][padded_length][padded D or V] */
	float *q, *dout, *dq;               /* [BLOCK_QUERIES][padded D or V]; dq holds o at first */
	float *p, *ds;                      /* [BLOCK_QUERIES][BLOCK_KEYS] */
	float *delta, *lse;
};

static int64_t widest(const struct attention *a)
{
	return a->q.padded > a->v.padded ? a->q.padded : a->v.padded;
}

static size_t space_bytes(const struct attention *a)
{
	int64_t keys = a->rows.stretches * a->padded_length, size = a->q.padded, value = a->v.padded;
	return (size_t)(keys * (3 * size + 2 * value) + BLOCK_QUERIES * (size + value + widest(a)) +
	                2 * BLOCK_QUERIES * (BLOCK_KEYS + 1)) *
	       sizeof(float);
}

static struct space space_of(const struct attention *a, struct stream *s, int part)
{
	int64_t keys = a->rows.stretches * a->padded_length, size = a->q.padded, value = a->v.padded;
	struct space w = {.keys_across = cpu_scratch(s, part, space_bytes(a))};
	w.values_across = w.keys_across + keys * size;
	w.keys = w.values_across + keys * value;
	w.dk = w.keys + keys * size;
	w.dv = w.dk + keys * size;
	w.q = w.dv + keys * value;
	w.dout = w.q + BLOCK_QUERIES * size;
	w.dq = w.dout + BLOCK_QUERIES * value;
	w.p = w.dq + BLOCK_QUERIES * widest(a);
	w.ds = w.p + BLOCK_QUERIES * BLOCK_KEYS;
	w.delta = w.ds + BLOCK_QUERIES * BLOCK_KEYS;
	w.lse = w.delta + BLOCK_QUERIES;
	return w;
}

struct backward {
	struct attention a;
	struct attention_heads dout, o, dq, dk, dv;
	const struct tensor *lse;
};

/* Queries, the gradient of their output, its product with the output, and lse in powers of two: a finite one
 * where no key is seen, so that 2^(-inf - lse) is 0. */
static void load_queries(const struct backward *b, const struct space *w, const struct attention_block *q)
{
	const struct attention *a = &b->a;
	const int64_t value = a->v.padded;
	attention_load(&b->o, q->row, q->head, q->rows, q->padded, 1, w->dq);
	attention_load(&b->dout, q->row, q->head, q->rows, q->padded, 1, w->dout);
	attention_load(&a->q, q->row, q->head, q->rows, q->padded, a->arg->attention.scale * ATTENTION_LOG2E,
	               w->q);
	const float *lse = (const float *)b->lse->data + q->row * a->heads + q->head;
	for (int64_t i = 0; i < q->padded; i++) {
		w->delta[i] = a->tile->dot(value, w->dq + i * value, w->dout + i * value);
		bool sees = i < q->rows && lse[i * a->heads] != -INFINITY;
		w->lse[i] = sees ? lse[i * a->heads] * ATTENTION_LOG2E : 0;
	}
	memset(w->dq, 0, (size_t)(q->padded * a->q.padded) * sizeof *w->dq);
}

/* One block of scores: P, dS, and what they add to dq, dk, dv. */
static void block_backward(const struct backward *b, const struct space *w, const struct attention_block *q,
                           int64_t stretch, int64_t key, int columns)
{
	const struct attention *a = &b->a;
	const struct tile *tile = a->tile;
	const int rows = (int)q->padded, size = (int)a->q.padded, value = (int)a->v.padded;
	const int64_t first = stretch * a->padded_length, at = first + key;
	tile->multiply(rows, columns, (int)a->q.size, w->q, size, 1, w->keys_across + first * size + key,
	               a->padded_length, w->p, BLOCK_KEYS, false);
	attention_hide(a, q, stretch, key, columns, w->p);
	tile->exponent(rows, columns, w->p, BLOCK_KEYS, w->lse);
	tile->multiply(rows, columns, (int)a->v.size, w->dout, value, 1,
	               w->values_across + first * value + key, a->padded_length, w->ds, BLOCK_KEYS, false);
	attention_drop(a, q, stretch, key, columns, w->ds);
	tile->score_grad(rows, columns, w->p, w->ds, BLOCK_KEYS, w->delta);
	attention_drop(a, q, stretch, key, columns, w->p);
	tile->multiply(columns, value, rows, w->p, 1, BLOCK_KEYS, w->dout, value, w->dv + at * value, value,
	               true);
	tile->multiply(columns, size, rows, w->ds, 1, BLOCK_KEYS, w->q, size, w->dk + at * size, size, true);
	tile->multiply(rows, size, columns, w->ds, BLOCK_KEYS, 1, w->keys + at * size, size, w->dq, size,
	               true);
}

static void queries_backward(const struct backward *b, const struct space *w, const struct attention_block *q)
{
	const struct attention *a = &b->a;
	load_queries(b, w, q);
	for (int64_t i = 0; i < a->rows.stretches; i++) {
		/* keys are rows of what is multiplied here, and columns */
		struct attention_span span = attention_span_of(a, q, i, BLOCK_KEYS / 2);
		for (int64_t key = span.begin; key < span.end; key += BLOCK_KEYS) {
			int64_t left = span.end - key;
			block_backward(b, w, q, i, key, left < BLOCK_KEYS ? (int)left : BLOCK_KEYS);
		}
	}
	attention_store(&b->dq, q->row, q->head, q->rows, a->arg->attention.scale, w->dq);
}

static void load_keys(const struct attention *a, const struct space *w, int64_t sample, int64_t group)
{
	int64_t size = a->k.padded, value = a->v.padded, keys = a->rows.stretches * a->padded_length;
	for (int64_t i = 0; i < a->rows.stretches; i++) {
		int64_t row = attention_row(&a->rows, sample, i), at = i * a->padded_length;
		if (!attention_sees(a, i))
			continue;
		attention_load_transposed(a, &a->k, row, group, w->keys_across + at * size);
		attention_load_transposed(a, &a->v, row, group, w->values_across + at * value);
		attention_load(&a->k, row, group, a->rows.length, a->padded_length, 1, w->keys + at * size);
	}
	memset(w->dk, 0, (size_t)(keys * size) * sizeof *w->dk);
	memset(w->dv, 0, (size_t)(keys * value) * sizeof *w->dv);
}

/* The queries carried scale · log2(e). */
static void store_keys(const struct backward *b, const struct space *w, int64_t sample, int64_t group)
{
	const struct attention *a = &b->a;
	for (int64_t i = 0; i < a->rows.stretches; i++) {
		int64_t row = attention_row(&a->rows, sample, i), at = i * a->padded_length;
		attention_store(&b->dk, row, group, a->rows.length, ATTENTION_LN2, w->dk + at * a->k.padded);
		attention_store(&b->dv, row, group, a->rows.length, 1, w->dv + at * a->v.padded);
	}
}

/* Items are (sample, key-value head). */
static void backward_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct backward *b = job;
	const struct attention *a = &b->a;
	const int64_t share = a->heads / a->groups, blocks = attention_blocks(a);
	struct space w = space_of(a, s, part);
	for (int64_t i = begin; i < end; i++) {
		int64_t sample = i / a->groups, group = i % a->groups;
		load_keys(a, &w, sample, group);
		for (int64_t head = group * share; head < (group + 1) * share; head++)
			for (int64_t n = 0; n < blocks; n++) {
				struct attention_block q = attention_block_of(a, sample, head, n);
				queries_backward(b, &w, &q);
			}
		store_keys(b, &w, sample, group);
	}
}

static struct cpu_space space_for(const struct stream *s, const struct attention *a)
{
	return (struct cpu_space){.part = space_bytes(a),
	                          .parts = cpu_parts(s, a->rows.samples * a->groups, 1)};
}

struct cpu_space cpu_space_attention_bwd(const struct stream *s, const union op_arg *arg,
                                         const struct tensor *in, const struct tensor *out)
{
	(void)out;
	struct attention a = attention_of(arg, &in[1], &in[4], &in[5]);
	return space_for(s, &a);
}

struct cpu_space cpu_space_attention_part_bwd(const struct stream *s, const union op_arg *arg,
                                              const struct tensor *in, const struct tensor *out)
{
	(void)out;
	struct attention a = attention_of_part(arg, &in[1], &in[2], &in[5], &in[6]);
	return space_for(s, &a);
}

/* Gradients lie as what they are gradients of. */
static void run(struct stream *s, const struct attention *a, const struct tensor *dout,
                const struct tensor *o, const struct tensor *lse, const struct tensor *dq,
                const struct tensor *dkv)
{
	struct backward b = {*a, attention_output(a, dout), attention_output(a, o), a->q, a->k, a->v, lse};
	b.dq.t = dq;
	b.dk.t = b.dv.t = dkv;
	cpu_parallel(s, a->rows.samples * a->groups, 1, backward_part, &b);
}

int cpu_fast_attention_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	struct attention a = attention_of(arg, &in[1], &in[4], &in[5]);
	if (attention_check(&a, OP_attention_bwd, e))
		return e->code;
	run(s, &a, &in[0], &in[2], &in[3], &out[0], &out[0]);
	return 0;
}

int cpu_fast_attention_part_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                                const struct tensor *out, struct err *e)
{
	struct attention a = attention_of_part(arg, &in[1], &in[2], &in[5], &in[6]);
	if (attention_check(&a, OP_attention_part_bwd, e))
		return e->code;
	run(s, &a, &in[0], &in[3], &in[4], &out[0], &out[1]);
	return 0;
}
