#include "kernels/cpu/attention.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/mask.h"

static int64_t round_up(int64_t n, int64_t multiple)
{
	return (n + multiple - 1) / multiple * multiple;
}

static struct attention_rows rows_of(const union op_arg *arg, struct context context, int64_t rows)
{
	int64_t length = arg->attention.seq_length;
	struct attention_rows r = {
	        .context = context, .seq_length = length, .stretches = 1, .length = length};
	if (context.ranks > 1) {
		r.stretches = 2 * context.count;
		r.length = length / (2 * context.ranks);
	}
	r.samples = r.length ? rows / (r.stretches * r.length) : 0;
	return r;
}

static struct attention_heads heads_of(const struct tensor *t, int64_t row, int64_t column, int64_t size)
{
	return (struct attention_heads){t, row, column, size, round_up(size, 16)};
}

static struct attention attention_on(const union op_arg *arg, const struct tensor *q, struct context rows,
                                     const struct tensor *kv)
{
	struct attention a = {.tile = tile_best(),
	                      .arg = arg,
	                      .queries = rows_of(arg, arg->attention.queries, q->dim[0]),
	                      .rows = rows_of(arg, rows, kv->dim[0]),
	                      .length = arg->attention.seq_length,
	                      .heads = arg->attention.heads,
	                      .groups = arg->attention.groups};
	a.padded_length = round_up(a.rows.length, BLOCK_KEYS);
	return a;
}

/* Keys and values begin at `column` of kv's rows. */
static void place_heads(struct attention *a, const struct tensor *q, const struct tensor *kv, int64_t column)
{
	const union op_arg *arg = a->arg;
	int64_t size = arg->attention.head_dim;
	int64_t value = arg->attention.value_dim ? arg->attention.value_dim : size;
	int64_t row = column + a->groups * (size + value);
	a->q = heads_of(q, column ? row : a->heads * size, 0, size);
	a->k = heads_of(kv, row, column, size);
	a->v = heads_of(kv, row, column + a->groups * size, value);
}

struct attention attention_of(const union op_arg *arg, const struct tensor *qkv, const struct tensor *keys,
                              const struct tensor *begins)
{
	struct attention a = attention_on(arg, qkv, arg->attention.queries, qkv);
	a.keys = keys;
	a.begins = begins;
	place_heads(&a, qkv, qkv, a.heads * arg->attention.head_dim);
	return a;
}

struct attention attention_of_part(const union op_arg *arg, const struct tensor *q, const struct tensor *kv,
                                   const struct tensor *keys, const struct tensor *begins)
{
	struct attention a = attention_on(arg, q, arg->attention.rows, kv);
	a.keys = keys;
	a.begins = begins;
	place_heads(&a, q, kv, 0);
	return a;
}

int attention_check(const struct attention *a, enum op op, struct err *e)
{
	const struct tensor *t[] = {a->q.t, a->k.t};
	for (int i = 0; i < 2; i++)
		if (t[i]->dtype != DT_f32 && !dtype_is_half(t[i]->dtype))
			return err_set(e, EXIT_INTERNAL, "%s: %s are %s; f32, bf16 and f16 are allowed",
			               op_rows[op].name, i ? "keys" : "queries",
			               dtype_rows[t[i]->dtype].name);
	return 0;
}

struct attention_heads attention_output(const struct attention *a, const struct tensor *t)
{
	return heads_of(t, a->heads * a->v.size, 0, a->v.size);
}

int64_t attention_position(const struct attention_rows *r, int64_t i)
{
	int32_t ranks = r->context.ranks;
	if (ranks <= 1)
		return 0;
	int32_t rank = (int32_t)((r->context.first + i / 2) % ranks);
	return context_position((int32_t)r->seq_length, ranks, rank, (int32_t)(i % 2 * r->length));
}

int64_t attention_row(const struct attention_rows *r, int64_t sample, int64_t i)
{
	int64_t each = r->context.ranks > 1 ? 2 : 1; /* stretches that a rank has of a sample */
	return ((i / each * r->samples + sample) * each + i % each) * r->length;
}

CPU_CLONES static void scale_row(int64_t n, float scale, const float *from, float *to)
{
	for (int64_t i = 0; i < n; i++)
		to[i] = from[i] * scale;
}

void attention_load(const struct attention_heads *h, int64_t row, int64_t head, int64_t rows,
                    int64_t padded_rows, float scale, float *to)
{
	int64_t at = row * h->row + h->column + head * h->size;
	for (int64_t i = 0; i < rows; i++, at += h->row, to += h->padded) {
		scale_row(h->size, scale, cpu_read(h->t, at, h->size, to), to);
		memset(to + h->size, 0, (size_t)(h->padded - h->size) * sizeof *to);
	}
	memset(to, 0, (size_t)((padded_rows - rows) * h->padded) * sizeof *to);
}

void attention_load_transposed(const struct attention *a, const struct attention_heads *h, int64_t row,
                               int64_t head, float *to)
{
	size_t bytes = dtype_rows[h->t->dtype].bytes;
	int64_t at = row * h->row + h->column + head * h->size;
	const struct tile_source source = {(const char *)h->t->data + (size_t)at * bytes, h->row, false};
	enum tile_word word = tile_word_of((enum dtype)h->t->dtype);
	a->tile->pack[word](&source, 0, (int)a->rows.length, (int)a->padded_length, 0, h->size,
	                    (uint32_t *)to);
}

void attention_store(const struct attention_heads *h, int64_t row, int64_t head, int64_t rows, float scale,
                     float *from)
{
	int64_t at = row * h->row + h->column + head * h->size;
	for (int64_t i = 0; i < rows; i++, at += h->row, from += h->padded) {
		float *to = cpu_place(h->t, at, from);
		scale_row(h->size, scale, from, to);
		cpu_write(h->t, at, h->size, to);
	}
}

/* The first key that the query at position t sees, but for `begins`. */
static int64_t window_begin(const struct attention *a, int64_t t)
{
	int64_t window = a->arg->attention.window;
	return window > 0 && t >= window ? t - window + 1 : 0;
}

/* Blocks do not reach over the end of a stretch. */
static int64_t stretch_blocks(const struct attention *a)
{
	return (a->queries.length + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
}

int64_t attention_blocks(const struct attention *a)
{
	return a->queries.stretches * stretch_blocks(a);
}

struct attention_block attention_block_of(const struct attention *a, int64_t sample, int64_t head, int64_t n)
{
	int64_t stretch = n / stretch_blocks(a), at = n % stretch_blocks(a) * BLOCK_QUERIES,
	        left = a->queries.length - at;
	struct attention_block b = {.sample = sample,
	                            .head = head,
	                            .row = attention_row(&a->queries, sample, stretch) + at,
	                            .position = attention_position(&a->queries, stretch) + at,
	                            .rows = left < BLOCK_QUERIES ? left : BLOCK_QUERIES,
	                            .lowest = INT64_MAX};
	b.padded = round_up(b.rows, TILE_ROWS);
	const int32_t *begins = a->begins->data;
	for (int64_t i = 0; i < b.rows; i++) {
		int64_t first = window_begin(a, b.position + i);
		if (begins && begins[b.row + i] > first)
			first = begins[b.row + i];
		b.first[i] = first;
		b.lowest = first < b.lowest ? first : b.lowest;
		b.highest = first > b.highest ? first : b.highest;
	}
	return b;
}

struct attention_span attention_span_of(const struct attention *a, const struct attention_block *b,
                                        int64_t stretch, int64_t unit)
{
	int64_t position = attention_position(&a->rows, stretch);
	int64_t begin = b->lowest > position ? b->lowest - position : 0,
	        end = b->position + b->rows - position;
	end = end < a->rows.length ? end : a->rows.length;
	return begin < end ? (struct attention_span){begin / unit * unit, round_up(end, unit)}
	                   : (struct attention_span){0, 0};
}

bool attention_sees(const struct attention *a, int64_t stretch)
{
	int64_t key = attention_position(&a->rows, stretch);
	bool sees = false;
	for (int64_t i = 0; i < a->queries.stretches; i++) {
		int64_t query = attention_position(&a->queries, i);
		sees |= query + a->queries.length > key && window_begin(a, query) < key + a->rows.length;
	}
	return sees;
}

void attention_hide(const struct attention *a, const struct attention_block *b, int64_t stretch, int64_t key,
                    int columns, float *s)
{
	int64_t position = attention_position(&a->rows, stretch) + key, left = a->rows.length - key;
	bool all_seen = columns <= left && position + columns - 1 <= b->position && position >= b->highest;
	for (int64_t i = 0; !all_seen && i < b->rows; i++, s += BLOCK_KEYS) {
		int64_t begin = b->first[i] - position, end = b->position + i + 1 - position;
		end = end < left ? end : left;
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

void attention_drop(const struct attention *a, const struct attention_block *b, int64_t stretch, int64_t key,
                    int columns, float *x)
{
	float p = a->arg->attention.dropout, mask[BLOCK_KEYS];
	if (!(p > 0) || !a->keys->data)
		return;
	uint64_t sample_key = (uint64_t)((const int64_t *)a->keys->data)[b->sample];
	int64_t number = a->arg->attention.first_head + b->head,
	        position = attention_position(&a->rows, stretch) + key;
	for (int64_t i = 0; i < b->rows; i++, x += BLOCK_KEYS) {
		uint64_t first = (uint64_t)((number * a->length + b->position + i) * a->length + position);
		mask_row(sample_key, a->arg->attention.salt, first, columns, p, mask);
		multiply_row(columns, mask, x);
	}
}

/* Working space of a thread, f32. */
struct space {
	float *keys;   /* [stretches][D][padded_length] */
	float *values; /* [stretches][padded_length][padded V] */
	float *q, *o;  /* [BLOCK_QUERIES][padded D or V] */
	float *scores; /* [BLOCK_QUERIES][BLOCK_KEYS] */
	float *top, *sum, *shrink;
};

static size_t space_bytes(const struct attention *a)
{
	int64_t keys = a->rows.stretches * a->padded_length;
	return (size_t)((keys + BLOCK_QUERIES) * (a->k.padded + a->v.padded) +
	                BLOCK_QUERIES * (BLOCK_KEYS + 3)) *
	       sizeof(float);
}

static struct space space_of(const struct attention *a, struct stream *s, int part)
{
	int64_t keys = a->rows.stretches * a->padded_length;
	struct space p = {.keys = cpu_scratch(s, part, space_bytes(a))};
	p.values = p.keys + keys * a->k.padded;
	p.q = p.values + keys * a->v.padded;
	p.o = p.q + BLOCK_QUERIES * a->q.padded;
	p.scores = p.o + BLOCK_QUERIES * a->v.padded;
	p.top = p.scores + BLOCK_QUERIES * BLOCK_KEYS;
	p.sum = p.top + BLOCK_QUERIES;
	p.shrink = p.sum + BLOCK_QUERIES;
	return p;
}

struct forward {
	struct attention a;
	struct attention_heads o, before;
	const struct tensor *lse, *lse_before;
	int64_t cuts; /* parts that the queries of a key-value head are dealt to */
};

/* What other parts gave is one term of the sum, with weight e^lse. Returns whether o holds anything. */
static bool begin_queries(const struct forward *f, const struct space *p, const struct attention_block *b)
{
	const struct attention *a = &f->a;
	const float *lse = f->lse_before->data;
	attention_load(&a->q, b->row, b->head, b->rows, b->padded, a->arg->attention.scale * ATTENTION_LOG2E,
	               p->q);
	for (int64_t i = 0; i < BLOCK_QUERIES; i++) {
		p->top[i] = -1e30f; /* finite, so that a row whose keys are all hidden stays free of NaN */
		p->sum[i] = 0;
	}
	if (!lse)
		return false;
	memset(p->o, 0, (size_t)(BLOCK_QUERIES * f->o.padded) * sizeof *p->o);
	for (int64_t i = 0; i < b->rows; i++) {
		float before = lse[(b->row + i) * a->heads + b->head];
		if (before == -INFINITY)
			continue;
		p->top[i] = before * ATTENTION_LOG2E;
		p->sum[i] = 1;
		attention_load(&f->before, b->row + i, b->head, 1, 1, 1, p->o + i * f->o.padded);
	}
	return true;
}

static void write_queries(const struct forward *f, const struct space *p, const struct attention_block *b)
{
	for (int64_t i = 0; i < b->rows; i++) {
		bool none = p->sum[i] == 0; /* and not NaN, which stays one */
		attention_store(&f->o, b->row + i, b->head, 1, none ? 0 : 1 / p->sum[i],
		                p->o + i * f->o.padded);
		((float *)f->lse->data)[(b->row + i) * f->a.heads + b->head] =
		        none ? -INFINITY : (p->top[i] + log2f(p->sum[i])) * ATTENTION_LN2;
	}
}

static void attend_block(const struct forward *f, const struct space *p, const struct attention_block *b,
                         int64_t stretch, int64_t key, int columns, bool add)
{
	const struct attention *a = &f->a;
	const struct tile *tile = a->tile;
	const int rows = (int)b->padded, size = (int)a->q.padded, value = (int)a->v.padded;
	tile->multiply(rows, columns, (int)a->q.size, p->q, size, 1,
	               p->keys + stretch * a->padded_length * size + key, a->padded_length, p->scores,
	               BLOCK_KEYS, false);
	attention_hide(a, b, stretch, key, columns, p->scores);
	tile->softmax(rows, columns, p->scores, BLOCK_KEYS, p->top, p->sum, p->shrink);
	attention_drop(a, b, stretch, key, columns, p->scores);
	for (int64_t i = 0; add && i < rows; i++)
		scale_row(value, p->shrink[i], p->o + i * value, p->o + i * value);
	tile->multiply(rows, value, columns, p->scores, BLOCK_KEYS, 1,
	               p->values + (stretch * a->padded_length + key) * value, value, p->o, value, add);
}

static void attend(const struct forward *f, const struct space *p, const struct attention_block *b)
{
	const struct attention *a = &f->a;
	bool holds = begin_queries(f, p, b);
	for (int64_t i = 0; i < a->rows.stretches; i++) {
		struct attention_span span = attention_span_of(a, b, i, 16);
		for (int64_t key = span.begin; key < span.end; key += BLOCK_KEYS) {
			int64_t left = span.end - key;
			attend_block(f, p, b, i, key, left < BLOCK_KEYS ? (int)left : BLOCK_KEYS, holds);
			holds = true;
		}
	}
	if (!holds)
		memset(p->o, 0, (size_t)(BLOCK_QUERIES * f->o.padded) * sizeof *p->o);
	write_queries(f, p, b);
}

static void load_keys(const struct attention *a, const struct space *p, int64_t sample, int64_t group)
{
	for (int64_t i = 0; i < a->rows.stretches; i++) {
		int64_t row = attention_row(&a->rows, sample, i), at = i * a->padded_length;
		if (!attention_sees(a, i))
			continue;
		attention_load_transposed(a, &a->k, row, group, p->keys + at * a->k.padded);
		attention_load(&a->v, row, group, a->rows.length, a->padded_length, 1,
		               p->values + at * a->v.padded);
	}
}

/* Items are (sample, key-value head, cut): every cuts-th block of queries, since late ones see more keys. */
static void forward_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct forward *f = job;
	const struct attention *a = &f->a;
	const int64_t share = a->heads / a->groups, blocks = attention_blocks(a);
	struct space p = space_of(a, s, part);
	for (int64_t i = begin, loaded = -1; i < end; i++) {
		int64_t pair = i / f->cuts, sample = pair / a->groups, group = pair % a->groups;
		if (pair != loaded)
			load_keys(a, &p, sample, group);
		loaded = pair;
		for (int64_t head = group * share; head < (group + 1) * share; head++)
			for (int64_t n = i % f->cuts; n < blocks; n += f->cuts) {
				struct attention_block b = attention_block_of(a, sample, head, n);
				attend(f, &p, &b);
			}
	}
}

/* Few or uneven pairs of sample and key-value head: each is cut so that threads get the same. */
static int64_t cuts_of(const struct stream *s, const struct attention *a)
{
	int64_t pairs = a->rows.samples * a->groups;
	return pairs % s->num_threads ? s->num_threads : 1;
}

static struct cpu_space space_for(const struct stream *s, const struct attention *a)
{
	int64_t items = a->rows.samples * a->groups * cuts_of(s, a);
	return (struct cpu_space){.part = space_bytes(a), .parts = cpu_parts(s, items, 1)};
}

struct cpu_space cpu_space_attention(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                     const struct tensor *out)
{
	(void)out;
	struct attention a = attention_of(arg, &in[0], &in[1], &in[2]);
	return space_for(s, &a);
}

struct cpu_space cpu_space_attention_part(const struct stream *s, const union op_arg *arg,
                                          const struct tensor *in, const struct tensor *out)
{
	(void)out;
	struct attention a = attention_of_part(arg, &in[0], &in[1], &in[4], &in[5]);
	return space_for(s, &a);
}

static void run(struct stream *s, struct forward *f, const struct tensor *out)
{
	const struct attention *a = &f->a;
	f->o = attention_output(a, &out[0]);
	f->lse = &out[1];
	f->cuts = cuts_of(s, a);
	cpu_parallel(s, a->rows.samples * a->groups * f->cuts, 1, forward_part, f);
}

int cpu_fast_attention(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	static const struct tensor absent;
	struct forward f = {.a = attention_of(arg, &in[0], &in[1], &in[2]), .lse_before = &absent};
	if (attention_check(&f.a, OP_attention, e))
		return e->code;
	run(s, &f, out);
	return 0;
}

int cpu_fast_attention_part(struct stream *s, const union op_arg *arg, const struct tensor *in,
                            const struct tensor *out, struct err *e)
{
	struct forward f = {.a = attention_of_part(arg, &in[0], &in[1], &in[4], &in[5]),
	                    .lse_before = &in[3]};
	if (attention_check(&f.a, OP_attention_part, e))
		return e->code;
	f.before = attention_output(&f.a, &in[2]);
	run(s, &f, out);
	return 0;
}
