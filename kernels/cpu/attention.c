#include "kernels/cpu/attention.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/mask.h"

struct attention attention_of(const union op_arg *arg, const struct tensor *qkv, const struct tensor *keys)
{
	int64_t heads = arg->attention.heads, groups = arg->attention.groups, size = arg->attention.head_dim;
	int64_t length = arg->attention.seq_length;
	return (struct attention){.tile = tile_best(),
	                          .arg = arg,
	                          .qkv = qkv,
	                          .keys = keys,
	                          .samples = length ? qkv->dim[0] / length : 0,
	                          .length = length,
	                          .heads = heads,
	                          .groups = groups,
	                          .size = size,
	                          .row = (heads + 2 * groups) * size,
	                          .padded_size = (size + 15) / 16 * 16,
	                          .padded_length = (length + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS};
}

CPU_CLONES static void scale_row(int64_t n, float scale, const float *from, float *to)
{
	for (int64_t i = 0; i < n; i++)
		to[i] = from[i] * scale;
}

void attention_load(const struct attention *a, const struct tensor *t, int64_t at, int64_t pitch,
                    int64_t rows, int64_t padded_rows, float scale, float *to)
{
	for (int64_t i = 0; i < rows; i++, to += a->padded_size) {
		scale_row(a->size, scale, cpu_read(t, at + i * pitch, a->size, to), to);
		memset(to + a->size, 0, (size_t)(a->padded_size - a->size) * sizeof *to);
	}
	memset(to, 0, (size_t)((padded_rows - rows) * a->padded_size) * sizeof *to);
}

void attention_load_transposed(const struct attention *a, int64_t at, float *to)
{
	size_t bytes = dtype_rows[a->qkv->dtype].bytes;
	const struct tile_source source = {(const char *)a->qkv->data + (size_t)at * bytes, a->row, false};
	enum tile_word word = a->qkv->dtype == DT_bf16 ? WORD_BF16_WIDE : WORD_F32;
	a->tile->pack[word](&source, 0, (int)a->length, (int)a->padded_length, 0, a->size, (uint32_t *)to);
}

void attention_store(const struct attention *a, const struct tensor *t, int64_t at, int64_t pitch,
                     int64_t rows, float scale, float *from)
{
	for (int64_t i = 0; i < rows; i++, from += a->padded_size) {
		float *to = cpu_place(t, at + i * pitch, from);
		scale_row(a->size, scale, from, to);
		cpu_write(t, at + i * pitch, a->size, to);
	}
}

/* The first key that query t sees. */
static int64_t first_key(const struct attention *a, int64_t t)
{
	int64_t window = a->arg->attention.window;
	return window > 0 && t >= window ? t - window + 1 : 0;
}

struct attention_span attention_span_of(const struct attention *a, int64_t query)
{
	return (struct attention_span){first_key(a, query) / BLOCK_KEYS * BLOCK_KEYS, query + BLOCK_QUERIES};
}

void attention_hide(const struct attention *a, int64_t query, int64_t key, int columns, float *s)
{
	bool all_seen = key + columns - 1 <= query && key >= first_key(a, query + BLOCK_QUERIES - 1);
	for (int64_t i = 0; !all_seen && i < BLOCK_QUERIES; i++, s += BLOCK_KEYS) {
		int64_t begin = first_key(a, query + i) - key, end = query + i + 1 - key;
		for (int64_t j = 0; j < begin && j < columns; j++)
			s[j] = -INFINITY;
		for (int64_t j = end > 0 ? end : 0; j < columns; j++)
			s[j] = -INFINITY;
	}
}

CPU_CLONES static void multiply_row(int64_t n, const float *mask, float *x)
{
	for (int64_t i = 0; i < n; i++)
		x[i] *= mask[i];
}

void attention_drop(const struct attention *a, int64_t sample, int64_t head, int64_t query, int64_t key,
                    int columns, float *x)
{
	float p = a->arg->attention.dropout, mask[BLOCK_KEYS];
	if (!(p > 0) || !a->keys->data)
		return;
	uint64_t sample_key = (uint64_t)((const int64_t *)a->keys->data)[sample];
	int64_t number = a->arg->attention.first_head + head;
	for (int64_t t = query; t < query + BLOCK_QUERIES && t < a->length; t++, x += BLOCK_KEYS) {
		uint64_t first = (uint64_t)((number * a->length + t) * a->length + key);
		mask_row(sample_key, a->arg->attention.salt, first, columns, p, mask);
		multiply_row(columns, mask, x);
	}
}

/* Working space of a thread, f32. */
struct space {
	float *keys;   /* [D][padded_length] */
	float *values; /* [padded_length][padded_size] */
	float *q, *o;  /* [BLOCK_QUERIES][padded_size] */
	float *scores; /* [BLOCK_QUERIES][BLOCK_KEYS] */
	float *top, *sum, *shrink;
};

static size_t space_bytes(const struct attention *a)
{
	int64_t block = BLOCK_QUERIES * a->padded_size, whole = a->padded_length * a->padded_size;
	return (size_t)(2 * whole + 2 * block + BLOCK_QUERIES * (BLOCK_KEYS + 3)) * sizeof(float);
}

static struct space space_of(const struct attention *a, struct stream *s, int part)
{
	int64_t block = BLOCK_QUERIES * a->padded_size, whole = a->padded_length * a->padded_size;
	struct space p = {.keys = cpu_scratch(s, part, space_bytes(a))};
	p.values = p.keys + whole;
	p.q = p.values + whole;
	p.o = p.q + block;
	p.scores = p.o + block;
	p.top = p.scores + BLOCK_QUERIES * BLOCK_KEYS;
	p.sum = p.top + BLOCK_QUERIES;
	p.shrink = p.sum + BLOCK_QUERIES;
	return p;
}

struct forward {
	struct attention a;
	const struct tensor *o, *lse;
	int64_t cuts; /* parts that the queries of a key-value head are dealt to */
};

static void write_queries(const struct forward *f, const struct space *p, int64_t sample, int64_t head,
                          int64_t query)
{
	const struct attention *a = &f->a;
	for (int64_t i = 0; i < BLOCK_QUERIES && query + i < a->length; i++) {
		int64_t at = (sample * a->length + query + i) * a->heads + head;
		attention_store(a, f->o, at * a->size, 0, 1, 1 / p->sum[i], p->o + i * a->padded_size);
		((float *)f->lse->data)[at] = (p->top[i] + log2f(p->sum[i])) * ATTENTION_LN2;
	}
}

static void attend(const struct forward *f, const struct space *p, int64_t sample, int64_t head,
                   int64_t query)
{
	const struct attention *a = &f->a;
	const struct tile *tile = a->tile;
	int64_t rows = a->length - query < BLOCK_QUERIES ? a->length - query : BLOCK_QUERIES;
	attention_load(a, a->qkv, attention_query_at(a, sample, query, head), a->row, rows, BLOCK_QUERIES,
	               a->arg->attention.scale * ATTENTION_LOG2E, p->q);
	for (int i = 0; i < BLOCK_QUERIES; i++) {
		p->top[i] = -1e30f; /* finite, so that a row whose keys are all hidden stays free of NaN */
		p->sum[i] = 0;
	}
	struct attention_span span = attention_span_of(a, query);
	for (int64_t key = span.begin; key < span.end; key += BLOCK_KEYS) {
		int columns = (int)(span.end - key < BLOCK_KEYS ? span.end - key : BLOCK_KEYS);
		tile->multiply(BLOCK_QUERIES, columns, (int)a->size, p->q, a->padded_size, 1, p->keys + key,
		               a->padded_length, p->scores, BLOCK_KEYS, false);
		attention_hide(a, query, key, columns, p->scores);
		tile->softmax(BLOCK_QUERIES, columns, p->scores, BLOCK_KEYS, p->top, p->sum, p->shrink);
		attention_drop(a, sample, head, query, key, columns, p->scores);
		for (int64_t i = 0; key > span.begin && i < BLOCK_QUERIES; i++)
			scale_row(a->padded_size, p->shrink[i], p->o + i * a->padded_size,
			          p->o + i * a->padded_size);
		tile->multiply(BLOCK_QUERIES, (int)a->padded_size, columns, p->scores, BLOCK_KEYS, 1,
		               p->values + key * a->padded_size, a->padded_size, p->o, a->padded_size,
		               key > span.begin);
	}
	write_queries(f, p, sample, head, query);
}

/* Items are (sample, key-value head, cut): every cuts-th block of queries, since late ones see more keys. */
static void forward_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct forward *f = job;
	const struct attention *a = &f->a;
	struct space p = space_of(a, s, part);
	for (int64_t i = begin, loaded = -1; i < end; i++) {
		int64_t pair = i / f->cuts, sample = pair / a->groups, group = pair % a->groups;
		if (pair != loaded) {
			attention_load_transposed(a, attention_key_at(a, sample, 0, group), p.keys);
			attention_load(a, a->qkv, attention_value_at(a, sample, 0, group), a->row, a->length,
			               a->padded_length, 1, p.values);
			loaded = pair;
		}
		for (int64_t h = 0; h < a->heads / a->groups; h++)
			for (int64_t q = i % f->cuts * BLOCK_QUERIES; q < a->length;
			     q += f->cuts * BLOCK_QUERIES)
				attend(f, &p, sample, group * (a->heads / a->groups) + h, q);
	}
}

/* Few or uneven pairs of sample and key-value head: each is cut so that threads get the same. */
static int64_t cuts_of(const struct stream *s, const struct attention *a)
{
	int64_t pairs = a->samples * a->groups;
	return pairs % s->num_threads ? s->num_threads : 1;
}

struct cpu_space cpu_space_attention(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                     const struct tensor *out)
{
	(void)out;
	struct attention a = attention_of(arg, &in[0], &in[1]);
	return (struct cpu_space){0, space_bytes(&a), cpu_parts(s, a.samples * a.groups * cuts_of(s, &a), 1)};
}

int cpu_fast_attention(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	struct forward f = {attention_of(arg, &in[0], &in[1]), &out[0], &out[1], 0};
	if (in[0].dtype != DT_f32 && in[0].dtype != DT_bf16)
		return err_set(e, EXIT_INTERNAL, "attention: qkv is %s; f32 and bf16 are allowed",
		               dtype_rows[in[0].dtype].name);
	f.cuts = cuts_of(s, &f.a);
	cpu_parallel(s, f.a.samples * f.a.groups * f.cuts, 1, forward_part, &f);
	return 0;
}
