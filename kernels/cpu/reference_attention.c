#include "kernels/cpu/cpu.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "kernels/cpu/mask.h"

/* Queries, keys and values of one call: where the heads of a row begin, and which row has a position's key.
 */
struct call {
	const union op_arg *arg;
	const struct tensor *q, *kv, *keys, *begins;
	int64_t q_row, kv_row, key, value; /* elements of rows; columns of kv */
	int64_t samples, length, size, value_size;
	int64_t *key_row; /* [samples][length]: -1 where the key is not here */
};

static int64_t value_dim(const union op_arg *arg)
{
	return arg->attention.value_dim ? arg->attention.value_dim : arg->attention.head_dim;
}

/* Row n of a tensor of `samples` samples belongs to the one returned and stands at *position of it. */
static int64_t place_of(const union op_arg *arg, struct context c, int64_t samples, int64_t n,
                        int64_t *position)
{
	int64_t length = arg->attention.seq_length, each = length / (c.ranks > 1 ? c.ranks : 1);
	int64_t block = n / (samples * each);
	int32_t rank = (int32_t)(c.ranks > 1 ? (c.first + block) % c.ranks : 0);
	*position = context_position((int32_t)length, c.ranks, rank, (int32_t)(n % each));
	return n / each % samples;
}

static struct call call_open(const union op_arg *arg, const struct tensor *q, const struct tensor *kv,
                             struct context rows, int64_t key)
{
	int64_t size = arg->attention.head_dim, groups = arg->attention.groups;
	struct call c = {arg, q, kv, .length = arg->attention.seq_length, .size = size};
	c.value_size = value_dim(arg);
	c.q_row = tensor_row(q);
	c.kv_row = tensor_row(kv);
	c.key = key;
	c.value = key + groups * size;
	c.samples =
	        kv->dim[0] * (rows.ranks > 1 ? rows.ranks : 1) / c.length / (rows.ranks > 1 ? rows.count : 1);
	c.key_row = mem_array((size_t)(c.samples * c.length), sizeof *c.key_row);
	for (int64_t i = 0; i < c.samples * c.length; i++)
		c.key_row[i] = -1;
	for (int64_t n = 0; n < kv->dim[0]; n++) {
		int64_t position, sample = place_of(arg, rows, c.samples, n, &position);
		c.key_row[sample * c.length + position] = n;
	}
	return c;
}

static struct call call_packed(const union op_arg *arg, const struct tensor *qkv, const struct tensor *keys,
                               const struct tensor *begins)
{
	int64_t key = (int64_t)arg->attention.heads * arg->attention.head_dim;
	struct call c = call_open(arg, qkv, qkv, arg->attention.queries, key);
	c.keys = keys;
	c.begins = begins;
	return c;
}

static struct call call_part(const union op_arg *arg, const struct tensor *q, const struct tensor *kv,
                             const struct tensor *keys, const struct tensor *begins)
{
	struct call c = call_open(arg, q, kv, arg->attention.rows, 0);
	c.keys = keys;
	c.begins = begins;
	return c;
}

/* One query of one head. */
struct query {
	const struct call *c;
	int64_t n, head, sample, t; /* row, head, where it stands */
	int64_t at, group, begin;   /* where its elements begin; the first key it sees */
};

static int64_t window_begin(const union op_arg *arg, int64_t t)
{
	int64_t window = arg->attention.window;
	return window > 0 && t >= window ? t - window + 1 : 0;
}

static struct query query_at(const struct call *c, int64_t n, int64_t head)
{
	struct query q = {c, .n = n, .head = head, .at = n * c->q_row + head * c->size};
	q.group = head / (c->arg->attention.heads / c->arg->attention.groups);
	q.sample = place_of(c->arg, c->arg->attention.queries, c->samples, n, &q.t);
	q.begin = window_begin(c->arg, q.t);
	const int32_t *begins = c->begins->data;
	if (begins && begins[n] > q.begin)
		q.begin = begins[n];
	return q;
}

/* The row of the key at position j, -1 where it is not here. */
static int64_t key_row(const struct query *q, int64_t j)
{
	return q->c->key_row[q->sample * q->c->length + j];
}

static int64_t key_at(const struct query *q, int64_t j)
{
	return key_row(q, j) * q->c->kv_row + q->c->key + q->group * q->c->size;
}

static int64_t value_at(const struct query *q, int64_t j)
{
	return key_row(q, j) * q->c->kv_row + q->c->value + q->group * q->c->value_size;
}

static double score(const struct query *q, int64_t j)
{
	double sum = 0;
	for (int64_t d = 0; d < q->c->size; d++)
		sum += cpu_get(q->c->q, q->at + d) * cpu_get(q->c->kv, key_at(q, j) + d);
	return sum * q->c->arg->attention.scale;
}

/* What the probability of key j is multiplied by: 1 without dropout, else 0 or 1/(1-p). */
static double survival(const struct query *q, int64_t j)
{
	const union op_arg *arg = q->c->arg;
	float p = arg->attention.dropout;
	if (!(p > 0) || !q->c->keys->data)
		return 1;
	uint64_t key = (uint64_t)((const int64_t *)q->c->keys->data)[q->sample];
	int64_t head = arg->attention.first_head + q->head;
	uint64_t i = (uint64_t)((head * q->c->length + q->t) * q->c->length + j);
	return mask_survives(key, arg->attention.salt, i, mask_threshold(p)) ? mask_scale(p) : 0;
}

/* sum[V] <- o of the query, where sum holds what was before with weight e^before. weight[T] is working space.
 * Returns log-sum-exp: -inf where nothing is seen. */
static double attend(const struct query *q, double before, double *weight, double *sum)
{
	double top = before, total = 0;
	bool sees = before != -INFINITY;
	for (int64_t j = q->begin; j <= q->t; j++) {
		bool here = key_row(q, j) >= 0;
		weight[j] = here ? score(q, j) : -INFINITY;
		top = fmax(top, weight[j]);
		sees |= here;
	}
	if (!sees) {
		memset(sum, 0, (size_t)q->c->value_size * sizeof *sum);
		return -INFINITY;
	}
	total = exp(before - top);
	for (int64_t j = q->begin; j <= q->t; j++)
		total += exp(weight[j] - top);
	for (int64_t d = 0; d < q->c->value_size; d++)
		sum[d] = before == -INFINITY ? 0 : sum[d] * exp(before - top) / total;
	for (int64_t j = q->begin; j <= q->t; j++) {
		if (key_row(q, j) < 0)
			continue;
		double p = exp(weight[j] - top) / total * survival(q, j);
		for (int64_t d = 0; d < q->c->value_size; d++)
			sum[d] += p * cpu_get(q->c->kv, value_at(q, j) + d);
	}
	return top + log(total);
}

/* All queries; before and its lse may be absent. */
static void attend_all(const struct call *c, const struct tensor *before, const struct tensor *lse_before,
                       const struct tensor *out)
{
	int64_t heads = c->arg->attention.heads, size = c->value_size;
	double *weight = mem_array((size_t)c->length, sizeof *weight),
	       *sum = mem_array((size_t)size, sizeof *sum);
	for (int64_t at = 0; at < c->q->dim[0] * heads; at++) {
		struct query q = query_at(c, at / heads, at % heads);
		double lse = lse_before->data ? cpu_get(lse_before, at) : -INFINITY;
		for (int64_t d = 0; d < size && before->data; d++)
			sum[d] = cpu_get(before, at * size + d);
		cpu_set(&out[1], at, attend(&q, lse, weight, sum));
		for (int64_t d = 0; d < size; d++)
			cpu_set(&out[0], at * size + d, sum[d]);
	}
	free(weight);
	free(sum);
}

int cpu_ref_attention(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	static const struct tensor absent;
	struct call c = call_packed(arg, &in[0], &in[1], &in[2]);
	attend_all(&c, &absent, &absent, out);
	free(c.key_row);
	return 0;
}

int cpu_ref_attention_part(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	struct call c = call_part(arg, &in[0], &in[1], &in[4], &in[5]);
	attend_all(&c, &in[2], &in[3], out);
	free(c.key_row);
	return 0;
}

/* The gradient of what a call gave: its inputs, and sums in double shaped like q and kv. */
struct gradient {
	const struct tensor *dout, *o, *lse;
	double *dq, *dkv;
};

/* With P = exp(S - lse) and dropout mask Z, dV += P Z do; dS = P (Z do·v - do·o). Dao et al. 2022,
 * algorithm 4. */
static void attend_backward(const struct query *q, const struct gradient *g)
{
	const struct call *c = q->c;
	int64_t at = q->n * c->arg->attention.heads + q->head, o_at = at * c->value_size;
	double delta = 0, lse = cpu_get(g->lse, at);
	for (int64_t d = 0; d < c->value_size; d++)
		delta += cpu_get(g->dout, o_at + d) * cpu_get(g->o, o_at + d);
	for (int64_t j = q->begin; j <= q->t; j++) {
		if (key_row(q, j) < 0)
			continue;
		int64_t key = key_at(q, j), value = value_at(q, j);
		double p = exp(score(q, j) - lse), z = survival(q, j), dp = 0;
		for (int64_t d = 0; d < c->value_size; d++) {
			dp += cpu_get(g->dout, o_at + d) * cpu_get(c->kv, value + d);
			g->dkv[value + d] += p * z * cpu_get(g->dout, o_at + d);
		}
		double ds = p * (z * dp - delta) * c->arg->attention.scale;
		for (int64_t d = 0; d < c->size; d++) {
			g->dq[q->at + d] += ds * cpu_get(c->kv, key + d);
			g->dkv[key + d] += ds * cpu_get(c->q, q->at + d);
		}
	}
}

static void attend_all_backward(const struct call *c, const struct gradient *g)
{
	int64_t heads = c->arg->attention.heads;
	for (int64_t head = 0; head < heads; head++)
		for (int64_t n = 0; n < c->q->dim[0]; n++) {
			struct query q = query_at(c, n, head);
			attend_backward(&q, g);
		}
}

static double *zeros_like(const struct tensor *t)
{
	return mem_array((size_t)tensor_count(t), sizeof(double));
}

static void store(double *from, const struct tensor *to)
{
	for (int64_t i = 0; i < tensor_count(to); i++)
		cpu_set(to, i, from[i]);
	free(from);
}

int cpu_ref_attention_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	struct call c = call_packed(arg, &in[1], &in[4], &in[5]);
	struct gradient g = {&in[0], &in[2], &in[3], zeros_like(&in[1]), NULL};
	g.dkv = g.dq;
	attend_all_backward(&c, &g);
	store(g.dq, &out[0]);
	free(c.key_row);
	return 0;
}

int cpu_ref_attention_part_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                               const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	struct call c = call_part(arg, &in[1], &in[2], &in[5], &in[6]);
	struct gradient g = {&in[0], &in[3], &in[4], zeros_like(&in[1]), zeros_like(&in[2])};
	attend_all_backward(&c, &g);
	store(g.dq, &out[0]);
	store(g.dkv, &out[1]);
	free(c.key_row);
	return 0;
}

/* The rows' keys and values go to their places in the caches before anything is read. */
static int cache_store(const union op_arg *arg, const struct tensor *in, struct err *e)
{
	int64_t groups = arg->attention.groups, size = arg->attention.head_dim;
	int64_t width[2] = {groups * size, groups * value_dim(arg)}, row = tensor_row(&in[0]);
	const int32_t *position = in[3].data;
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		if (position[n] < 0 || position[n] >= in[1].dim[0])
			return err_set(e, EXIT_INTERNAL,
			               "attention_cache: position %d of row %lld is outside the cache of %d",
			               position[n], (long long)n, in[1].dim[0]);
		int64_t at = n * row + arg->attention.heads * size;
		for (int which = 0; which < 2; which++)
			for (int64_t c = 0; c < width[which]; c++, at++)
				cpu_set(&in[1 + which], position[n] * width[which] + c, cpu_get(&in[0], at));
	}
	return 0;
}

/* o of one query head of row n into out; weight[P] is working space. */
static void cache_attend(const union op_arg *arg, const struct tensor *in, const struct tensor *o, int64_t n,
                         int64_t head, double *weight)
{
	int64_t heads = arg->attention.heads, groups = arg->attention.groups, size = arg->attention.head_dim;
	int64_t value = value_dim(arg), group = head / (heads / groups),
	        at = n * tensor_row(&in[0]) + head * size;
	int64_t last = ((const int32_t *)in[3].data)[n], begin = window_begin(arg, last);
	double top = -INFINITY, total = 0;
	for (int64_t j = begin; j <= last; j++) {
		weight[j] = 0;
		for (int64_t d = 0; d < size; d++)
			weight[j] += cpu_get(&in[0], at + d) *
			             cpu_get(&in[1], (j * groups + group) * size + d) * arg->attention.scale;
		top = fmax(top, weight[j]);
	}
	for (int64_t j = begin; j <= last; j++)
		total += weight[j] = exp(weight[j] - top);
	for (int64_t d = 0; d < value; d++) {
		double sum = 0;
		for (int64_t j = begin; j <= last; j++)
			sum += weight[j] / total * cpu_get(&in[2], (j * groups + group) * value + d);
		cpu_set(o, (n * heads + head) * value + d, sum);
	}
}

int cpu_ref_attention_cache(struct stream *s, const union op_arg *arg, const struct tensor *in,
                            const struct tensor *out, struct err *e)
{
	(void)s;
	if (cache_store(arg, in, e))
		return e->code;
	double *weight = mem_array((size_t)in[1].dim[0], sizeof *weight);
	for (int64_t n = 0; n < in[0].dim[0]; n++)
		for (int64_t h = 0; h < arg->attention.heads; h++)
			cache_attend(arg, in, &out[0], n, h, weight);
	free(weight);
	return 0;
}
