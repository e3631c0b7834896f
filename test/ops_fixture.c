#include "test/ops_fixture.h"

#include <ctype.h>
#include <stdlib.h>

#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "kernels/cpu/cpu.h"
#include "kernels/kernels.h"

enum { GUARD = 64, GUARD_BYTE = 0xa5 };

/* Awkward on purpose: one element, odd widths, more than one block of elements and of rows. */
static const struct dims {
	int32_t B, T, C, M, K, F, V, vocab, H, G, D, R, P;
} sizes[SIZES] = {
        {1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 2, 2, 3},
        {1, 7, 7, 5, 9, 7, 11, 7, 2, 1, 6, 4, 9},
        {2, 31, 31, 33, 31, 31, 40, 33, 3, 3, 10, 6, 40},
        {3, 11, 33, 31, 127, 33, 127, 127, 4, 2, 16, 16, 64},
        {1, 127, 127, 127, 33, 127, 130, 129, 2, 2, 31, 30, 130},
        {2, 65, 1030, 70, 260, 1030, 1100, 1049, 4, 2, 64, 64, 300},
        {2, 24, 64, 48, 32, 72, 272, 265, 4, 2, 32, 16, 64},
};

static int32_t dim_of(char letter, int size)
{
	const struct dims *d = &sizes[size];
	const struct {
		char letter;
		int32_t dim;
	} letters[] = {{'1', 1},
	               {'9', HYPER_COUNT},
	               {'N', d->B * d->T},
	               {'B', d->B},
	               {'T', d->T},
	               {'C', d->C},
	               {'M', d->M},
	               {'K', d->K},
	               {'F', d->F},
	               {'W', 2 * d->F},
	               {'V', d->V},
	               {'H', d->H},
	               {'S', d->H + d->G},
	               {'D', d->D},
	               {'Q', (d->H + 2 * d->G) * d->D},
	               {'O', d->H * d->D},
	               {'A', d->G * d->D},
	               {'R', d->R},
	               {'P', d->P},
	               {'2', 2},
	               {'E', d->B + 1},
	               {'X', 3 * d->B * d->T}};
	for (size_t i = 0; i < sizeof letters / sizeof *letters; i++)
		if (letters[i].letter == letter)
			return letters[i].dim;
	ASSERT(!"a letter of op_cases.def");
}

/* What attention and its parts are tried with; attention itself in the first four, where its keys are the
 * rows of its queries. T is a multiple of 8 where ranks share samples. */
static const struct attending {
	struct context queries, rows;
	bool window, dropout, value, goes_on; /* value: V is not D */
} attendings[] = {
        {{0}, {0}, false, false, false, true},
        {{0}, {0}, true, true, true, false},
        {{2, 0, 2}, {2, 0, 2}, false, false, true, true},
        {{4, 0, 4}, {4, 0, 4}, true, true, false, false},
        {{4, 1, 1}, {4, 3, 1}, false, true, false, true},
        {{4, 1, 1}, {4, 0, 4}, true, true, true, false},
        {{4, 2, 1}, {4, 3, 2}, false, false, false, true},
        {{2, 1, 1}, {2, 1, 1}, true, false, true, false},
};

static int32_t attention_length(int size, int variant)
{
	return attendings[variant].queries.ranks ? (sizes[size].T + 7) / 8 * 8 : sizes[size].T;
}

static int32_t attention_rows(int size, int variant, struct context c)
{
	return sizes[size].B * attention_length(size, variant) / (c.ranks ? c.ranks : 1) *
	       (c.ranks ? c.count : 1);
}

/* Another size of value heads than D. */
static int32_t other_value(int size)
{
	return sizes[size].D / 2 + (sizes[size].D % 32 ? 3 : 8);
}

/* Widths of the three parts on a rank. */
static const struct heads_split {
	int32_t ranks;
	bool there[3];
} heads_splits[] = {{2, {true, true, true}}, {4, {true, false, false}}, {3, {true, false, true}}};

static int32_t heads_part(int size, int variant, int i)
{
	const struct dims *d = &sizes[size];
	const int32_t width[3] = {d->H * d->D, d->G * d->D, d->G * other_value(size)};
	return heads_splits[variant].there[i] ? width[i] : 0;
}

static int32_t heads_width(int size, int variant)
{
	return heads_part(size, variant, 0) + heads_part(size, variant, 1) + heads_part(size, variant, 2);
}

static int32_t attention_dim(char letter, int size, int variant)
{
	const struct dims *d = &sizes[size];
	const struct attending *a = &attendings[variant];
	int32_t value = a->value ? other_value(size) : d->D;
	return letter == 'n'   ? attention_rows(size, variant, a->queries)
	       : letter == 'g' ? attention_rows(size, variant, a->rows)
	       : letter == 'o' ? d->H * value
	       : letter == 'v' ? d->G * value
	       : letter == 't' ? d->G * (d->D + value)
	                       : (d->H + d->G) * d->D + d->G * value;
}

/* Small letters: n, g rows of attention's queries and keys, o, v, t, i widths of its o, values, keys and
 * values, packed row; h the width of queries, l, z of kv and the packed row of MLA; e of joined columns; u,
 * y rows and width of split heads, d the width before. */
static int32_t small_dim(char letter, int size, int variant)
{
	const struct dims *d = &sizes[size];
	return strchr("ngovti", letter) ? attention_dim(letter, size, variant)
	       : letter == 'h'          ? d->H * d->D
	       : letter == 'l'          ? d->H * (d->D - d->R + other_value(size))
	       : letter == 'z'          ? d->H * (2 * d->D + other_value(size))
	       : letter == 'e'          ? d->C + d->M
	       : letter == 'u'          ? heads_splits[variant].ranks * d->B * d->T
	       : letter == 'd'          ? heads_splits[variant].ranks * heads_width(size, variant)
	                                : heads_width(size, variant);
}

static void arg_none(union op_arg *arg, int size, int variant)
{
	(void)arg, (void)size, (void)variant;
}

static void arg_embedding(union op_arg *arg, int size, int variant)
{
	(void)size, (void)variant;
	arg->embedding.first_row = 3;
}

static void arg_norm(union op_arg *arg, int size, int variant)
{
	const struct dims *d = &sizes[size];
	(void)variant;
	arg->norm.eps = 1e-5f;
	arg->norm.heads = d->H;
	arg->norm.groups = d->G;
	arg->norm.head_dim = d->D;
}

static void arg_rope(union op_arg *arg, int size, int variant)
{
	const struct dims *d = &sizes[size];
	arg->rope.heads = d->H;
	arg->rope.groups = d->G;
	arg->rope.head_dim = d->D;
	arg->rope.inverse = variant & 1;
	arg->rope.interleaved = variant >> 1;
}

static void arg_mla(union op_arg *arg, int size, int variant)
{
	const struct dims *d = &sizes[size];
	arg->mla.heads = d->H;
	arg->mla.head_dim = d->D;
	arg->mla.value_dim = other_value(size);
	arg->mla.interleaved = variant;
}

/* Dropout on heads that are not the model's first. */
static void arg_attention(union op_arg *arg, int size, int variant)
{
	const struct dims *d = &sizes[size];
	const struct attending *a = &attendings[variant];
	arg->attention.seq_length = attention_length(size, variant);
	arg->attention.heads = d->H;
	arg->attention.groups = d->G;
	arg->attention.head_dim = d->D;
	arg->attention.value_dim = a->value ? other_value(size) : 0;
	arg->attention.window = a->window ? d->T / 3 + 1 : 0;
	arg->attention.scale = 1 / sqrtf((float)d->D);
	arg->attention.dropout = a->dropout ? 0.25f : 0;
	arg->attention.salt = 17;
	arg->attention.first_head = a->dropout ? 3 : 0;
	arg->attention.queries = a->queries;
	arg->attention.rows = a->rows;
	arg->attention.goes_on = a->goes_on;
}

static void arg_columns(union op_arg *arg, int size, int variant)
{
	(void)variant;
	arg->columns.first = sizes[size].C;
}

static void arg_heads(union op_arg *arg, int size, int variant)
{
	arg->heads.ranks = heads_splits[variant].ranks;
	for (int i = 0; i < 3; i++)
		arg->heads.part[i] = heads_splits[variant].ranks * heads_part(size, variant, i);
}

static void arg_fp8(union op_arg *arg, int size, int variant)
{
	(void)size, (void)variant;
	arg->linear.fp8 = 1;
}

static void arg_linear_act(union op_arg *arg, int size, int variant)
{
	(void)size;
	arg->linear.kind = variant;
}

static void arg_activation(union op_arg *arg, int size, int variant)
{
	(void)size;
	arg->activation.kind = variant;
}

/* Variants: three probabilities, on all rows, then on rows that begin within a sample; then rows of a
 * context-parallel rank, the second time jitter. */
static void arg_dropout(union op_arg *arg, int size, int variant)
{
	static const struct context contexts[] = {{2, 1, 1}, {4, 2, 1}};
	bool whole = variant < 6;
	arg->dropout.p = 0.3f * (float)(whole ? variant % 3 : 1);
	arg->dropout.salt = 5;
	arg->dropout.seq_length = sizes[size].T * (whole ? 1 : 8);
	arg->dropout.first_row = variant < 3 ? 0 : sizes[size].T / 2 + 1;
	arg->dropout.rows = whole ? (struct context){0} : contexts[variant - 6];
	arg->dropout.jitter = variant == 7;
}

static void arg_cross_entropy(union op_arg *arg, int size, int variant)
{
	(void)variant;
	arg->cross_entropy.vocab_size = sizes[size].vocab;
}

/* Variants: the whole vocabulary, columns from its middle on, padding alone. */
static void arg_vocabulary_shard(union op_arg *arg, int size, int variant)
{
	arg->cross_entropy.vocab_size = sizes[size].vocab;
	arg->cross_entropy.first_column = variant * sizes[size].vocab / 2;
}

static enum dtype cast_dtype(int variant)
{
	static const enum dtype types[] = {DT_bf16, DT_f32, DT_f16};
	return types[variant];
}

static void arg_cast(union op_arg *arg, int size, int variant)
{
	(void)size;
	arg->cast.dtype = (int32_t)cast_dtype(variant);
}

static void arg_square_sum(union op_arg *arg, int size, int variant)
{
	(void)size;
	arg->square_sum.counts = !variant;
}

static void arg_adamw(union op_arg *arg, int size, int variant)
{
	(void)size;
	arg->adamw.decay = variant;
}

/* Experts: as many as a router chooses from, ranks that send them rows, those that are here, how many rows at
 * most one rank sends one of them; samples of capacity and the blocks that they are cut into. */
static const struct expert_dims {
	int32_t experts, topk, groups, group_topk;
	int32_t ranks, first, count, most, C, F;
	int32_t samples, length, context, blocks;
} expert_sizes[SIZES] = {
        {1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 2, 1, 1},       {4, 2, 2, 1, 2, 2, 2, 3, 7, 5, 1, 4, 2, 2},
        {8, 2, 4, 2, 4, 2, 2, 6, 31, 33, 2, 8, 2, 4},     {16, 4, 4, 2, 2, 8, 8, 4, 33, 31, 3, 12, 3, 3},
        {24, 6, 6, 3, 3, 16, 8, 25, 70, 90, 2, 64, 1, 2}, {60, 3, 12, 4, 3, 40, 20, 1, 257, 40, 4, 32, 2, 8},
        {16, 2, 4, 2, 2, 8, 8, 5, 64, 72, 2, 16, 2, 2},
};

static uint32_t expert_draw(int size, const char *name, int64_t i, int64_t n)
{
	uint64_t key = rng_subkey(rng_key(3, name), (uint64_t)size);
	return (uint32_t)(rng_uniform(key, (uint64_t)i) * (double)n);
}

/* What rank r sends expert x: a third of the experts get nothing. */
static int32_t sent_rows(int size, int32_t r, int32_t x)
{
	const struct expert_dims *d = &expert_sizes[size];
	return x % 3 == 1 ? 0 : (int32_t)expert_draw(size, "sizes", r * d->experts + x, d->most + 1);
}

/* Rows that own experts get, and one more than the most that one of them gets. */
static int32_t own_rows(int size, int32_t *pad)
{
	const struct expert_dims *d = &expert_sizes[size];
	int32_t all = 0;
	*pad = 1;
	for (int32_t x = d->first; x < d->first + d->count; x++) {
		int32_t rows = 0;
		for (int32_t r = 0; r < d->ranks; r++)
			rows += sent_rows(size, r, x);
		*pad = rows + 1 > *pad ? rows + 1 : *pad;
		all += rows;
	}
	return all;
}

/* A token's choices differ; a fifth of all is nowhere. */
static int32_t chosen_expert(int size, int64_t choice)
{
	const struct expert_dims *d = &expert_sizes[size];
	int64_t token = choice / d->topk, k = choice % d->topk;
	bool nowhere = expert_draw(size, "nowhere", choice, 5) == 0;
	return nowhere ? -1 : (int32_t)((expert_draw(size, "expert", token, d->experts) + k) % d->experts);
}

/* Counts of rank r, of which that of arg_dispatch has the index's. */
static int32_t counted_rows(int size, int64_t r, int32_t x)
{
	const struct expert_dims *d = &expert_sizes[size];
	int64_t choices = (int64_t)sizes[size].B * sizes[size].T * d->topk;
	int32_t count = 0;
	if (r != d->ranks - 1)
		return (int32_t)expert_draw(size, "counts", r * d->experts + x, 2 * d->most);
	for (int64_t i = 0; i < choices; i++)
		count += chosen_expert(size, i) == x;
	return count;
}

/* Kinds in capitals, see op_cases.def. */
static double expert_element(char kind, int size, int64_t i, double normal)
{
	const struct expert_dims *d = &expert_sizes[size];
	int64_t choices = (int64_t)sizes[size].B * sizes[size].T * d->topk;
	int32_t x = (int32_t)(i % d->experts);
	switch (kind) {
	case 'I':
		return chosen_expert(size, i);
	case 'S':
		return expert_draw(size, "none", i, 5) ? (double)((i * 7919 + 3) % choices) : -1;
	case 'Z':
		return sent_rows(size, (int32_t)(i / d->experts), x);
	case 'D':
		return counted_rows(size, i / d->experts, x);
	case 'K':
		return expert_draw(size, "balance", i, 9);
	case 'J':
		return (double)expert_draw(size, "integers", i, 1 << 20) - (1 << 19);
	default:
		return normal;
	}
}

static bool is_gated(int variant)
{
	return variant % 2 == 0;
}

/* Dimensions in small letters, 0 for others; `w` and `s` depend on the variant. */
static int32_t expert_dim(char letter, struct setup setup)
{
	const struct expert_dims *d = &expert_sizes[setup.size];
	int32_t pad, rows = own_rows(setup.size, &pad);
	switch (letter) {
	case 'x':
		return d->experts;
	case 'k':
		return d->topk;
	case 'p':
		return sizes[setup.size].B * sizes[setup.size].T * d->topk;
	case 'r':
		return d->ranks;
	case 's':
		return setup.variant / SCORE_COUNT ? 3 : 1;
	case 'm':
		return (rows > pad * d->count ? rows : pad * d->count) + 3;
	case 'c':
		return d->C;
	case 'f':
		return d->F;
	case 'q':
		return d->count * d->F;
	case 'w':
		return (is_gated(setup.variant) ? 2 : 1) * sizes[setup.size].F;
	case 'a':
		return d->samples * d->length;
	case 'b':
		return d->samples * d->length / d->blocks;
	default:
		return 0;
	}
}

/* Variants: softmax over the chosen, over all, the other scores; then the same of the best groups. */
static void arg_route(union op_arg *arg, int size, int variant)
{
	const struct expert_dims *d = &expert_sizes[size];
	int how = variant % (SCORE_COUNT + 1);
	arg->route.score = how ? how - 1 : SCORE_softmax;
	arg->route.pre_softmax = how == 1;
	arg->route.topk = d->topk;
	arg->route.num_groups = variant > SCORE_COUNT ? d->groups : 0;
	arg->route.group_topk = variant > SCORE_COUNT ? d->group_topk : 0;
	arg->route.scaling_factor = 2.5f;
}

/* Variants: the scores; then rows of three sequences, the first of which began before them. */
static void arg_balance(union op_arg *arg, int size, int variant)
{
	bool sequences = variant / SCORE_COUNT;
	arg->balance.experts = expert_sizes[size].experts;
	arg->balance.score = variant % SCORE_COUNT;
	arg->balance.aux_coeff = 0.3f;
	arg->balance.z_coeff = variant % 2 ? 0.01f : 0;
	arg->balance.sequences = sequences ? 3 : 1;
	arg->balance.sequence_rows = sequences ? sizes[size].B * sizes[size].T / 3 + 1 : 0;
	arg->balance.first_row = sequences;
}

static void arg_bias_update(union op_arg *arg, int size, int variant)
{
	(void)size, (void)variant;
	arg->bias_update.rate = 0.001f;
}

/* Variants: the first come, the best weights; of the last block. */
static void arg_capacity(union op_arg *arg, int size, int variant)
{
	const struct expert_dims *d = &expert_sizes[size];
	arg->capacity.experts = d->experts;
	arg->capacity.limit = d->samples * d->length * d->topk / (2 * d->experts);
	arg->capacity.by_position = !variant;
	arg->capacity.ranks = d->blocks;
	arg->capacity.rank = d->blocks - 1;
	arg->capacity.context_ranks = d->context;
	arg->capacity.seq_length = d->length;
}

/* Variants: all rows, what a rank has room for. */
static void arg_dispatch(union op_arg *arg, int size, int variant)
{
	const struct expert_dims *d = &expert_sizes[size];
	arg->dispatch.experts = d->experts;
	arg->dispatch.ranks = d->ranks;
	arg->dispatch.rank = d->ranks - 1;
	arg->dispatch.capacity = variant ? d->experts * d->most / 2 + 1 : 0;
}

static void arg_permute(union op_arg *arg, int size, int variant)
{
	(void)size;
	arg->permute.back = variant;
}

/* Variants: bit 0 as many rows for every expert, bit 1 back. */
static void arg_expert(union op_arg *arg, int size, int variant)
{
	int32_t pad;
	own_rows(size, &pad);
	arg->expert.first = expert_sizes[size].first;
	arg->expert.count = expert_sizes[size].count;
	arg->expert.pad = variant & 1 ? pad : 0;
	arg->expert.back = variant >> 1;
}

/* Variants: the activations, every other one gated, the last ones with as many rows for every expert. */
static void arg_expert_activation(union op_arg *arg, int size, int variant)
{
	arg_expert(arg, size, variant > ACT_COUNT / 2);
	arg->expert.kind = variant % ACT_COUNT;
	arg->expert.gated = is_gated(variant);
}

/* Rows of the outputs that a COUNTED operation writes. */
static int64_t rows_written(const struct fixture *f)
{
	union op_arg arg = f->arg;
	int64_t rows;
	if (f->c->op == OP_regroup && arg.expert.back)
		arg.expert.pad = 0;
	expert_rows(&arg, &f->in[op_rows[f->c->op].n_in - 1], arg.expert.count, &rows);
	return rows;
}

static void check_counted(const struct fixture *f, const struct fixture *before, const char *backend)
{
	for (int k = 0; k < op_rows[f->c->op].n_out; k++) {
		const struct tensor *now = &f->out[k];
		int64_t from = rows_written(f) * tensor_row(now) * dtype_rows[now->dtype].bytes;
		if (memcmp((const char *)now->data + from, (const char *)before->out[k].data + from,
		           (size_t)(tensor_bytes(now) - from)) != 0)
			test_failed(__FILE__, __LINE__, "%s: %s wrote rows of output %d that do not count",
			            fixture_text(f), backend, k);
	}
}

/* The gradient of a row that does not count is 0, and left as it is. */
static void clear_outputs(struct fixture *f)
{
	for (int k = 0; k < op_rows[f->c->op].n_out; k++)
		memset(f->out[k].data, 0, (size_t)tensor_bytes(&f->out[k]));
}

const struct op_case op_cases[] = {
#define CASE(op, in, out, arg, variants, exact, f32, bf16) \
	{OP_##op, in, out, arg_##arg, variants, exact, f32, bf16},
#define GRAD(forward, backward, in, of)
#include "test/op_cases.def"
#undef CASE
#undef GRAD
};
const int op_case_count = sizeof op_cases / sizeof *op_cases;

const struct grad_case grad_cases[] = {
#define CASE(op, in, out, arg, variants, exact, f32, bf16)
#define GRAD(forward, backward, in, of) {OP_##forward, OP_##backward, in, of},
#include "test/op_cases.def"
#undef CASE
#undef GRAD
};
const int grad_case_count = sizeof grad_cases / sizeof *grad_cases;

const struct op_case *op_case_of(enum op op)
{
	for (int i = 0; i < op_case_count; i++)
		if (op_cases[i].op == op)
			return &op_cases[i];
	return NULL;
}

double case_tolerance(const struct op_case *c, enum dtype dtype)
{
	return dtype == DT_bf16  ? c->bf16_tolerance
	       : dtype == DT_f16 ? fmax(c->f32_tolerance, c->bf16_tolerance / 8)
	                         : c->f32_tolerance;
}

double tensor_at(const struct tensor *t, int64_t i)
{
	return t->dtype == DT_i32   ? ((const int32_t *)t->data)[i]
	       : t->dtype == DT_i64 ? (double)((const int64_t *)t->data)[i]
	                            : cpu_get(t, i);
}

void tensor_put(const struct tensor *t, int64_t i, double x)
{
	if (t->dtype == DT_i32)
		((int32_t *)t->data)[i] = (int32_t)x;
	else if (t->dtype == DT_i64)
		((int64_t *)t->data)[i] = (int64_t)x;
	else
		cpu_set(t, i, x);
}

struct tensor tensor_make(enum dtype dtype, int nd, const int32_t *dim, uint64_t seed)
{
	struct tensor t = {.dim = {1, 1, 1, 1}, .nd = (uint8_t)nd, .dtype = (uint8_t)dtype};
	memcpy(t.dim, dim, (size_t)nd * sizeof *dim);
	size_t bytes = (size_t)tensor_bytes(&t);
	char *base = mem_aligned(bytes + 2 * GUARD);
	memset(base, GUARD_BYTE, bytes + 2 * GUARD);
	t.data = base + GUARD;
	int64_t n = tensor_count(&t);
	float *normal = mem_array((size_t)n, sizeof *normal);
	rng_normal(seed, 0, (size_t)n, 0, 1, normal);
	for (int64_t i = 0; i < n; i++)
		tensor_put(&t, i, normal[i]);
	free(normal);
	return t;
}

struct tensor tensor_copy(const struct tensor *t)
{
	struct tensor copy = *t;
	if (!t->data)
		return copy;
	size_t bytes = (size_t)tensor_bytes(t) + 2 * GUARD;
	char *base = mem_aligned(bytes);
	memcpy(base, (const char *)t->data - GUARD, bytes);
	copy.data = base + GUARD;
	return copy;
}

void tensor_free(struct tensor *t)
{
	if (t->data)
		free((char *)t->data - GUARD);
	t->data = NULL;
}

bool tensor_guarded(const struct tensor *t)
{
	const unsigned char *before = t->data;
	size_t bytes = (size_t)tensor_bytes(t);
	bool whole = true;
	for (size_t i = 0; t->data && i < GUARD; i++)
		whole &= before[-1 - (ptrdiff_t)i] == GUARD_BYTE && before[bytes + i] == GUARD_BYTE;
	return whole;
}

static uint32_t below(uint64_t seed, int64_t i, int64_t n)
{
	return (uint32_t)(rng_uniform(seed, (uint64_t)i) * (double)n);
}

/* What element i of a tensor of this kind holds. */
static double element(char kind, int size, uint64_t seed, int64_t i, double normal)
{
	static const float hyper[HYPER_COUNT] = {0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.5f, 2.5f, 4.0f, 0.6f};
	const struct dims *d = &sizes[size];
	if (kind >= 'A' && kind <= 'Z')
		return expert_element(kind, size, i, normal);
	if (kind == 'u' || kind == 'v' || kind == 'n')
		return 0.5 + rng_uniform(seed, (uint64_t)i);
	if (kind == 'e')
		return below(seed, i, d->V + 6);
	if (kind == 'g')
		return (double)below(seed, i, d->vocab + 1) - 1;
	if (kind == 'p')
		return below(seed, i, d->P);
	if (kind == 'b')
		return (double)below(seed, i, d->T / 2 + 1) - 1;
	if (kind == 'q')
		return (double)((d->P - d->T) / 2 + i);
	if (kind == 'l')
		return (double)(rng_bits(seed, (uint64_t)i) >> 12);
	return kind == 'h' ? hyper[i] : normal;
}

static enum dtype kind_dtype(char kind, struct setup setup)
{
	enum dtype f = setup.dtype == DT_f64 ? DT_f64 : DT_f32;
	return kind == 't'           ? setup.dtype
	       : kind == 'a'         ? (attendings[setup.variant].goes_on ? f : setup.dtype)
	       : kind == 'c'         ? (setup.dtype == DT_f64 ? f : cast_dtype(setup.variant))
	       : strchr("fuh", kind) ? f
	       : strchr("mv", kind)  ? (setup.dtype == DT_f64 ? f : DT_bf16)
	       : strchr("dn", kind)  ? DT_f64
	       : kind == 'l'         ? DT_i64
	                             : DT_i32;
}

/* One word of a row: "tNC?". */
static struct tensor make(const char *word, struct setup setup, uint64_t seed)
{
	size_t length = strcspn(word, " ?~+");
	int32_t dim[TENSOR_MAX_DIM];
	struct tensor absent = {.dim = {1, 1, 1, 1}, .dtype = (uint8_t)kind_dtype(*word, setup)};
	bool gradient = setup.dtype == DT_f64;
	if ((word[length] == '?' && !setup.optional) ||
	    (word[length] == '~' && (gradient || !setup.optional)))
		return absent;
	for (size_t k = 1; k < length; k++)
		dim[k - 1] = !islower(word[k]) ? dim_of(word[k], setup.size)
		             : strchr("dgeinotuvyzhl", word[k])
		                     ? small_dim(word[k], setup.size, setup.variant)
		                     : expert_dim(word[k], setup);
	struct tensor t = tensor_make(absent.dtype, (int)length - 1, dim, seed);
	t.acc = word[length] == '+' && setup.acc;
	int64_t n = tensor_count(&t);
	for (int64_t i = 0; i < n; i++)
		tensor_put(&t, i, element(*word, setup.size, seed, i, tensor_at(&t, i)));
	return t;
}

static void make_all(const char *words, struct setup setup, uint64_t seed, struct tensor *t)
{
	for (int k = 0; *words; k++) {
		t[k] = make(words, setup, rng_subkey(seed, (uint64_t)k));
		words += strcspn(words, " ");
		words += *words == ' ';
	}
}

struct fixture fixture_open(const struct op_case *c, struct setup setup)
{
	struct fixture f = {.c = c, .setup = setup};
	uint64_t seed = rng_subkey(rng_key(1, op_rows[c->op].name), (uint64_t)setup.size);
	c->arg(&f.arg, setup.size, setup.variant);
	make_all(c->in, setup, rng_subkey(seed, 1), f.in);
	make_all(c->out, setup, rng_subkey(seed, 2), f.out);
	if (op_rows[c->op].flags & COUNTED && setup.dtype == DT_f64)
		clear_outputs(&f);
	return f;
}

struct fixture fixture_copy(const struct fixture *f)
{
	struct fixture copy = *f;
	for (int k = 0; k < OP_MAX_IN; k++)
		copy.in[k] = tensor_copy(&f->in[k]);
	for (int k = 0; k < OP_MAX_OUT; k++)
		copy.out[k] = tensor_copy(&f->out[k]);
	return copy;
}

void fixture_close(struct fixture *f)
{
	for (int k = 0; k < OP_MAX_IN; k++)
		tensor_free(&f->in[k]);
	for (int k = 0; k < OP_MAX_OUT; k++)
		tensor_free(&f->out[k]);
}

const char *fixture_text(const struct fixture *f)
{
	static char text[200];
	const struct setup *s = &f->setup;
	snprintf(text, sizeof text, "%s, size %d, %s, variant %d, %s optional inputs, %s",
	         op_rows[f->c->op].name, s->size, dtype_rows[s->dtype].name, s->variant,
	         s->optional ? "with" : "without", s->acc ? "adding" : "overwriting");
	return text;
}

static void check_memory(const struct fixture *f, const struct fixture *before, const char *backend)
{
	bool updates = op_rows[f->c->op].flags & UPDATES;
	for (int k = 0; k < OP_MAX_IN; k++) {
		const struct tensor *now = &f->in[k], *old = &before->in[k];
		if (!now->data)
			continue;
		if (!tensor_guarded(now))
			test_failed(__FILE__, __LINE__, "%s: %s wrote outside input %d", fixture_text(f),
			            backend, k);
		if (!updates && memcmp(now->data, old->data, (size_t)tensor_bytes(now)))
			test_failed(__FILE__, __LINE__, "%s: %s changed input %d", fixture_text(f), backend,
			            k);
	}
	if (op_rows[f->c->op].flags & COUNTED)
		check_counted(f, before, backend);
	for (int k = 0; k < OP_MAX_OUT; k++)
		if (f->out[k].data && !tensor_guarded(&f->out[k]))
			test_failed(__FILE__, __LINE__, "%s: %s wrote outside output %d", fixture_text(f),
			            backend, k);
}

/* A device with memory of its own works on copies, guards included; tensors that share memory share theirs.
 */
static void lend(struct stream *s, const struct backend *b, struct tensor *t, int n, void **host)
{
	for (int k = 0; k < n; k++) {
		host[k] = t[k].data;
		for (int j = 0; host[k] && j < k && t[k].data == host[k]; j++)
			if (host[j] == host[k])
				t[k].data = t[j].data;
		if (!host[k] || t[k].data != host[k])
			continue;
		size_t bytes = (size_t)tensor_bytes(&t[k]) + 2 * GUARD;
		char *base = b->alloc(s, bytes);
		b->upload(s, base, (char *)host[k] - GUARD, bytes);
		t[k].data = base + GUARD;
	}
}

static void give_back(struct stream *s, const struct backend *b, struct tensor *t, int n, void **host)
{
	for (int k = 0; k < n; k++) {
		bool again = !host[k];
		for (int j = 0; j < k; j++)
			again |= host[j] == host[k];
		if (again)
			continue;
		char *base = (char *)t[k].data - GUARD;
		b->download(s, (char *)host[k] - GUARD, base, (size_t)tensor_bytes(&t[k]) + 2 * GUARD);
		b->free(s, base);
	}
}

static int run_lent(struct stream *s, const struct backend *b, enum op op, const union op_arg *arg,
                    const struct tensor *in, const struct tensor *out, struct err *e)
{
	enum { ALL = OP_MAX_IN + OP_MAX_OUT };
	struct tensor t[ALL] = {{0}};
	void *host[ALL];
	memcpy(t, in, op_rows[op].n_in * sizeof *in);
	memcpy(t + OP_MAX_IN, out, op_rows[op].n_out * sizeof *out);
	lend(s, b, t, ALL, host);
	int rc = b->kernel[op](s, arg, t, t + OP_MAX_IN, e);
	give_back(s, b, t, ALL, host);
	return rc ? rc : b->status(s, e);
}

/* A device takes its time to open: one stream serves all. */
static struct stream *stream_of(const struct backend *b, int num_threads)
{
	static struct stream *device;
	struct stream *s = b->counts ? device : NULL;
	struct err e = {0};
	if (!s && b->open(&s, THREADS(num_threads), &e)) {
		test_failed(__FILE__, __LINE__, "%s: %s", b->name, e.text);
		exit(EXIT_FAILURE);
	}
	device = b->counts ? s : device;
	return s;
}

static void run_op(const struct backend *b, int num_threads, enum op op, const union op_arg *arg,
                   const struct tensor *in, const struct tensor *out, const char *what)
{
	struct stream *s = stream_of(b, num_threads);
	struct err e = {0};
	int rc = b->counts ? run_lent(s, b, op, arg, in, out, &e) : b->kernel[op](s, arg, in, out, &e);
	if (rc)
		test_failed(__FILE__, __LINE__, "%s: %s: %s", what, b->name, e.text);
	if (!b->counts)
		b->close(s);
}

static void run(struct fixture *f, const struct backend *b, int num_threads)
{
	run_op(b, num_threads, f->c->op, &f->arg, f->in, f->out, fixture_text(f));
}

void fixture_run(struct fixture *f, const struct backend *b, int num_threads, int in_place)
{
	struct fixture before = fixture_copy(f);
	if (in_place < 0) {
		run(f, b, num_threads);
	} else {
		void *kept = f->in[in_place].data;
		size_t bytes = (size_t)tensor_bytes(&f->out[0]);
		struct fixture placed = *f;
		placed.out[0].data = kept;
		run(&placed, b, num_threads);
		memcpy(f->out[0].data, kept, bytes);
		memcpy(kept, before.in[in_place].data, (size_t)tensor_bytes(&f->in[in_place]));
	}
	check_memory(f, &before, b->name);
	fixture_close(&before);
}

/* The word's tensor is "i0" … "o2" of the forward operation, NULL for d and -. */
static const struct tensor *forward_tensor(const struct fixture *forward, const char *word)
{
	return *word == 'i'   ? &forward->in[word[1] - '0']
	       : *word == 'o' ? &forward->out[word[1] - '0']
	                      : NULL;
}

/* Walks "d i0 o1": into the tensors of either side. */
static void exchange(const char *words, struct fixture *backward, struct fixture *forward, bool to_forward)
{
	for (int k = 0; *words; k++) {
		const struct tensor *t = forward_tensor(forward, words);
		bool given = t && (to_forward ? *words == 'i' : *words == 'o');
		if (given && t->data && backward->in[k].data)
			memcpy(to_forward ? t->data : backward->in[k].data,
			       to_forward ? backward->in[k].data : t->data, (size_t)tensor_bytes(t));
		words += strcspn(words, " ");
		words += *words == ' ';
	}
}

void fixture_consistent(struct fixture *f)
{
	for (int i = 0; i < grad_case_count; i++) {
		const struct grad_case *g = &grad_cases[i];
		if (g->backward != f->c->op || !strchr(g->in, 'o'))
			continue;
		struct fixture forward = fixture_open(op_case_of(g->forward), f->setup);
		exchange(g->in, f, &forward, true);
		run(&forward, &cpu_reference_backend, 1);
		exchange(g->in, f, &forward, false);
		fixture_close(&forward);
	}
}

void tensor_compare(const struct tensor *a, const struct tensor *b, double tolerance, const char *what)
{
	int64_t n = a->data ? tensor_count(a) : 0;
	double squares = 0;
	for (int64_t i = 0; i < n; i++)
		squares += isfinite(tensor_at(a, i)) ? tensor_at(a, i) * tensor_at(a, i) : 0;
	double rms = n ? sqrt(squares / (double)n) : 0;
	for (int64_t i = 0; i < n; i++) {
		double x = tensor_at(a, i), y = tensor_at(b, i);
		bool near = isfinite(x) && fabs(x - y) <= tolerance * (fabs(x) + rms + 0.01);
		if (x != y && !near) {
			test_failed(__FILE__, __LINE__,
			            "%s: element %lld is %.9g, not %.9g (rms %.3g, allowed %g)", what,
			            (long long)i, y, x, rms, tolerance);
			return;
		}
	}
}

void op_run(const struct backend *b, enum op op, union op_arg arg, const struct tensor *in,
            const struct tensor *out)
{
	run_op(b, 2, op, &arg, in, out, op_rows[op].name);
}

bool fixture_same_bits(const struct fixture *a, const struct fixture *b)
{
	bool same = true;
	for (int k = 0; k < OP_MAX_IN; k++)
		same &= !a->in[k].data ||
		        !memcmp(a->in[k].data, b->in[k].data, (size_t)tensor_bytes(&a->in[k]));
	for (int k = 0; k < OP_MAX_OUT; k++)
		same &= !a->out[k].data ||
		        !memcmp(a->out[k].data, b->out[k].data, (size_t)tensor_bytes(&a->out[k]));
	return same;
}

void fixture_check_in_place(const struct fixture *start, const struct fixture *result,
                            const struct backend *b)
{
	static const uint8_t flags[] = {IN_PLACE_0, IN_PLACE_1};
	for (int k = 0; k < 2; k++) {
		if (!(op_rows[start->c->op].flags & flags[k]))
			continue;
		struct fixture f = fixture_copy(start);
		fixture_run(&f, b, 2, k);
		if (!fixture_same_bits(result, &f))
			test_failed(__FILE__, __LINE__, "%s: %s differs when it writes over input %d",
			            fixture_text(&f), b->name, k);
		fixture_close(&f);
	}
}
