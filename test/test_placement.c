/* Placement rules. By example: what a builder may not write is refused with its layer and line. By force:
 * every combination of placements that a rule accepts is run as two ranks, and the recombined result must be
 * that of one rank. */
#include "base/rng.h"
#include "graph/exec.h"
#include "kernels/kernels.h"
#include "test/test.h"

#include <stdlib.h>

/* Refusals by example: a layer is cut over two tensor-parallel or data-parallel ranks. */

enum { N = 6, C = 4, F = 8 };

static int here; /* the line of the builder's mistake */

static int32_t value(struct prog *p, enum region r, int32_t rows, int32_t columns, enum place tp)
{
	int32_t dim[] = {rows, columns};
	int32_t v = prog_value(p, "v", r, DT_f32, columns ? 2 : 1, dim);
	prog_place(p, v, AXIS_tp, tp);
	return v;
}

/* Column-parallel, gated, row-parallel: partial sums over tp. */
static int32_t half_mlp(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N, C, PLACE_REPLICATED);
	int32_t w = value(p, R_PARAM, 2 * F, C, PLACE_SHARD0), w2 = value(p, R_PARAM, C, F, PLACE_SHARD1);
	int32_t h = EMIT(p, glu, ARG(.activation = {ACT_silu}), EMIT(p, linear, NO_ARG, x, w, NONE));
	return EMIT(p, linear, NO_ARG, h, w2, NONE);
}

static void bias_on_partial_sums(struct prog *p)
{
	int32_t h = value(p, R_INPUT, N, F, PLACE_SHARD1), w = value(p, R_PARAM, C, F, PLACE_SHARD1);
	int32_t b = value(p, R_PARAM, C, 0, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, linear, NO_ARG, h, w, b);
}

static void bias_not_cut_like_its_weight(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N, C, PLACE_REPLICATED), w = value(p, R_PARAM, F, C, PLACE_SHARD0);
	int32_t b = value(p, R_PARAM, F, 0, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, linear, NO_ARG, x, w, b);
}

static void activation_of_partial_sums(struct prog *p)
{
	int32_t y = half_mlp(p);
	here = __LINE__ + 1;
	EMIT(p, activation, ARG(.activation = {ACT_relu}), y);
}

static void norm_of_partial_sums(struct prog *p)
{
	int32_t y = half_mlp(p), w = value(p, R_PARAM, C, 0, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, rmsnorm, ARG(.norm = {.eps = 1e-5f}), y, w);
}

static void product_of_partial_sums(struct prog *p)
{
	int32_t y = half_mlp(p), w = value(p, R_PARAM, F, C, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, linear, NO_ARG, y, w, NONE);
}

static void residual_without_all_reduce(struct prog *p)
{
	int32_t y = half_mlp(p), x = value(p, R_INPUT, N, C, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, add, NO_ARG, x, y);
}

static void all_reduce_of_whole_values(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N, C, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(tp)}), x);
}

static void all_reduce_of_shards(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N, C, PLACE_SHARD1);
	here = __LINE__ + 1;
	EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(tp)}), x);
}

static void all_reduce_over_another_axis(struct prog *p)
{
	int32_t y = EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(dp)}), half_mlp(p));
	(void)y;
}

static void norm_of_cut_rows(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N, C, PLACE_SHARD1), w = value(p, R_PARAM, C, 0, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, rmsnorm, ARG(.norm = {.eps = 1e-5f}), x, w);
}

static void the_layer_as_it_should_be(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N, C, PLACE_REPLICATED);
	int32_t y = EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(tp)}), half_mlp(p));
	int32_t b = value(p, R_PARAM, C, 0, PLACE_REPLICATED);
	EMIT(p, rmsnorm, ARG(.norm = {.eps = 1e-5f}), EMIT(p, add, NO_ARG, x, y), b);
}

/* The gradient of a linear layer over cut samples, up to the optimizer. */
struct update {
	int32_t w, m, v, hyper, norm2, grad;
};

static struct update dp_gradient(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N, C, PLACE_REPLICATED), dy = value(p, R_INPUT, N, F, PLACE_REPLICATED);
	int32_t one = 1;
	prog_place(p, x, AXIS_dp, PLACE_SHARD0);
	prog_place(p, dy, AXIS_dp, PLACE_SHARD0);
	return (struct update){.w = value(p, R_PARAM, F, C, PLACE_REPLICATED),
	                       .m = value(p, R_OPT, F, C, PLACE_REPLICATED),
	                       .v = value(p, R_OPT, F, C, PLACE_REPLICATED),
	                       .hyper = value(p, R_INPUT, HYPER_COUNT, 0, PLACE_REPLICATED),
	                       .norm2 = prog_value(p, "norm2", R_STAT, DT_f64, 1, &one),
	                       .grad = EMIT(p, linear_dw, NO_ARG, dy, x)};
}

static void adamw_on_a_partial_gradient(struct prog *p)
{
	struct update u = dp_gradient(p);
	here = __LINE__ + 1;
	EMIT(p, adamw, ARG(.adamw = {1}), u.w, u.grad, NONE, u.m, u.v, u.hyper, u.norm2);
}

static void norm_of_a_partial_gradient(struct prog *p)
{
	struct update u = dp_gradient(p);
	here = __LINE__ + 1;
	EMIT(p, square_sum, NO_ARG, u.grad);
}

static void adamw_with_an_incomplete_norm(struct prog *p)
{
	struct update u = dp_gradient(p);
	prog_place(p, u.norm2, AXIS_dp, PLACE_PARTIAL);
	u.grad = EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(dp)}), u.grad);
	here = __LINE__ + 1;
	EMIT(p, adamw, ARG(.adamw = {1}), u.w, u.grad, NONE, u.m, u.v, u.hyper, u.norm2);
}

static void the_update_as_it_should_be(struct prog *p)
{
	struct update u = dp_gradient(p);
	u.grad = EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(dp)}), u.grad);
	EMIT_INTO(p, square_sum, NO_ARG, (int32_t[OP_MAX_OUT]){u.norm2}, u.grad);
	EMIT(p, adamw, ARG(.adamw = {1}), u.w, u.grad, NONE, u.m, u.v, u.hyper, u.norm2);
}

static void two_placements_in_one_accumulator(struct prog *p)
{
	struct update u = dp_gradient(p);
	int32_t x = value(p, R_INPUT, N, C, PLACE_REPLICATED), dy = value(p, R_INPUT, N, F, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT_INTO(p, linear_dw, NO_ARG, (int32_t[OP_MAX_OUT]){u.grad}, dy, x);
}

#define CASE(name, op, part)          \
	{                             \
#name, name, op, part \
	}
static const struct example {
	const char *name;
	void (*build)(struct prog *p);
	const char *op, *part; /* NULL: accepted */
} examples[] = {
        CASE(bias_on_partial_sums, "linear", "added once per rank"),
        CASE(bias_not_cut_like_its_weight, "linear", "the bias is not sharded as w"),
        CASE(activation_of_partial_sums, "activation", "nonlinear operation on partial sums"),
        CASE(norm_of_partial_sums, "rmsnorm", "partial sums"),
        CASE(product_of_partial_sums, "linear", "an all-reduce is missing"),
        CASE(residual_without_all_reduce, "add", "operands are placed differently"),
        CASE(all_reduce_of_whole_values, "all_reduce", "no partial sums"),
        CASE(all_reduce_of_shards, "all_reduce", "no partial sums"),
        CASE(all_reduce_over_another_axis, "all_reduce", "no partial sums"),
        CASE(norm_of_cut_rows, "rmsnorm", "whole rows"),
        CASE(adamw_on_a_partial_gradient, "adamw", "the gradient is not placed as its parameter"),
        CASE(norm_of_a_partial_gradient, "square_sum", "an all-reduce is missing"),
        CASE(adamw_with_an_incomplete_norm, "adamw", "norm is not complete"),
        CASE(two_placements_in_one_accumulator, "linear_dw", "placed otherwise"),
        CASE(the_layer_as_it_should_be, NULL, NULL),
        CASE(the_update_as_it_should_be, NULL, NULL),
};

TEST(what_a_builder_forgets_is_refused_with_layer_and_line)
{
	for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
		struct prog p;
		char where[100];
		prog_init(&p);
		p.axis_size[AXIS_tp] = p.axis_size[AXIS_dp] = 2;
		p.layer = 7;
		here = 0;
		examples[i].build(&p);
		if (examples[i].op) {
			snprintf(where, sizeof where, "layer 7: %s (test_placement.c:%.0d", examples[i].op,
			         here);
			CHECK_INT(p.e.code, EXIT_INTERNAL);
			CHECK_HAS(p.e.text, where);
			CHECK_HAS(p.e.text, examples[i].part);
		} else if (p.e.code) {
			test_failed(__FILE__, __LINE__, "%s: %s", examples[i].name, p.e.text);
		}
		prog_free(&p);
	}
}

/* By force. */

enum { RANKS = 2, PIECES = 3, MOST = 8 * 32 };

struct operand {
	uint8_t region, dtype;
	int32_t dim[2];        /* dim[1] 0: a vector */
	int32_t piece[PIECES]; /* widths of what lies side by side in a row and is cut piece by piece */
	int32_t below;         /* integers: the limit */
};

struct operation {
	enum op op;
	int accepted; /* combinations of placements that the rule must accept: so many, no more */
	union op_arg arg;
	struct operand in[OP_MAX_IN]; /* dim[0] 0: absent */
	int32_t piece[OP_MAX_OUT][PIECES];
};

/* clang-format off */
#define ROWS(n, c) {R_TEMP, DT_f32, {n, c}, {c}, 0}
#define PACKED(n, c, ...) {R_TEMP, DT_f32, {n, c}, {__VA_ARGS__}, 0}
#define PER_ROW(n) {R_TEMP, DT_f32, {n}, {0}, 0}
#define WEIGHT(m, k) {R_PARAM, DT_f32, {m, k}, {k}, 0}
#define TABLE(m, k) {R_CONST, DT_f32, {m, k}, {k}, 0}
#define HOST(n) {R_INPUT, DT_f32, {n}, {0}, 0}
#define IDS(n, limit) {R_INPUT, DT_i32, {n}, {0}, limit}
#define KEYS(n) {R_INPUT, DT_i64, {n}, {0}, 1 << 30}
#define EPS {.norm = {.eps = 1e-5f}}
#define SILU {.activation = {ACT_silu}}
#define ATTENTION {.attention = {.seq_length = 4, .heads = 4, .groups = 2, .head_dim = 4, .scale = 0.5f}}
#define QKV PACKED(8, 32, 16, 8, 8)

static const struct operation operations[] = {
	{OP_linear, 4, {{0}}, {ROWS(6, 4), WEIGHT(10, 4)}, {{10}}},
	{OP_linear, 3, {{0}}, {ROWS(6, 4), WEIGHT(10, 4), WEIGHT(10, 0)}, {{10}}},
	{OP_linear_dx, 4, {{0}}, {ROWS(6, 10), WEIGHT(10, 4)}, {{4}}},
	{OP_linear_dw, 4, {{0}}, {ROWS(6, 10), ROWS(6, 4)}, {{4}}},
	{OP_bias_grad, 3, {{0}}, {ROWS(6, 10)}, {{0}}},
	{OP_embedding, 3, {{0}}, {WEIGHT(8, 4), IDS(6, 8)}, {{4}}},
	{OP_embedding_bwd, 2, {{0}}, {ROWS(6, 4), IDS(6, 8)}, {{4}}},
	{OP_add, 4, {{0}}, {ROWS(6, 4), ROWS(6, 4)}, {{4}}},
	{OP_layernorm, 2, EPS, {ROWS(6, 4), WEIGHT(4, 0), WEIGHT(4, 0)}, {{4}}},
	{OP_layernorm_bwd, 2, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), PER_ROW(6)}, {{4}}},
	{OP_layernorm_bwd, 2, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), PER_ROW(6), ROWS(6, 4)},
	 {{4}}},
	{OP_rmsnorm, 2, EPS, {ROWS(6, 4), WEIGHT(4, 0)}, {{4}}},
	{OP_rmsnorm_bwd, 2, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6)}, {{4}}},
	{OP_rmsnorm_bwd, 2, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), ROWS(6, 4)},
	 {{4}}},
	{OP_activation, 3, SILU, {ROWS(6, 4)}, {{4}}},
	{OP_activation_bwd, 3, SILU, {ROWS(6, 4), ROWS(6, 4)}, {{4}}},
	{OP_glu, 3, SILU, {PACKED(6, 8, 4, 4)}, {{4}}},
	{OP_glu_bwd, 3, SILU, {ROWS(6, 4), PACKED(6, 8, 4, 4)}, {{4, 4}}},
	{OP_dropout, 2, {.dropout = {0.5f, 3, 2}}, {ROWS(8, 4), KEYS(4)}, {{4}}},
	{OP_rope, 3, {.rope = {4, 2, 4, 0}}, {QKV, TABLE(10, 4), IDS(8, 10)}, {{16, 8, 8}}},
	{OP_qk_norm, 3, {.norm = {1e-5f, 4, 2, 4}}, {QKV, WEIGHT(4, 0), WEIGHT(4, 0)}, {{16, 8, 8}, {4, 2}}},
	{OP_qk_norm_bwd, 3, {.norm = {1e-5f, 4, 2, 4}},
	 {QKV, QKV, WEIGHT(4, 0), WEIGHT(4, 0), PACKED(8, 6, 4, 2)}, {{16, 8, 8}}},
	{OP_attention, 3, ATTENTION, {QKV}, {{16}, {4}}},
	{OP_attention_bwd, 3, ATTENTION, {ROWS(8, 16), QKV, ROWS(8, 16), ROWS(8, 4)}, {{16, 8, 8}}},
	{OP_cross_entropy, 2, {.cross_entropy = {9}}, {ROWS(6, 10), IDS(6, 9)}, {{0}}},
	{OP_cross_entropy_bwd, 2, {.cross_entropy = {9}},
	 {ROWS(6, 10), IDS(6, 9), PER_ROW(6), HOST(1)}, {{10}}},
	{OP_square_sum, 3, {{0}}, {ROWS(6, 4)}, {{0}}},
};
/* clang-format on */

static int32_t columns_of(const int32_t *dim)
{
	return dim[1] ? dim[1] : 1;
}

/* This rank's share, false where there is none. */
static bool cut(const int32_t *whole, enum place at, int32_t *share)
{
	memcpy(share, whole, 2 * sizeof *share);
	if (at != PLACE_SHARD0 && at != PLACE_SHARD1)
		return true;
	int32_t *along = &share[at == PLACE_SHARD1];
	bool even = *along && *along % RANKS == 0;
	*along /= RANKS;
	return even;
}

/* Where element (r, c) of a rank's share stands in the whole. */
static int64_t in_whole(const int32_t *whole, const int32_t *piece, enum place at, int rank, int32_t r,
                        int32_t c)
{
	if (at == PLACE_SHARD0)
		r += rank * whole[0] / RANKS;
	if (at == PLACE_SHARD1) {
		int k = 0, before = 0;
		for (; c >= piece[k] / RANKS; k++) {
			c -= piece[k] / RANKS;
			before += piece[k];
		}
		c += before + rank * piece[k] / RANKS;
	}
	return (int64_t)r * columns_of(whole) + c;
}

static void store(void *data, enum dtype dtype, int64_t i, double x)
{
	if (dtype == DT_f32)
		((float *)data)[i] = (float)x;
	else if (dtype == DT_i32)
		((int32_t *)data)[i] = (int32_t)x;
	else
		((int64_t *)data)[i] = (int64_t)x;
}

/* Element i of operand k: of partial sums, rank 0 has a random part; of ids, all. */
static double content(const struct operand *o, int k, enum place at, int rank, int64_t i)
{
	double x = o->below ? (double)(rng_bits((uint64_t)k, (uint64_t)i) % (uint64_t)o->below)
	                    : 2 * rng_uniform((uint64_t)k, (uint64_t)i) - 1;
	if (at != PLACE_PARTIAL)
		return x;
	double part = o->below ? 0 : rng_uniform((uint64_t)k + 100, (uint64_t)i);
	return rank ? part : x - part;
}

static void fill(struct exec *x, const struct prog *p, int32_t id, const struct operand *o, int k,
                 enum place at, int rank)
{
	uint64_t data[MOST];
	const struct value *v = &p->value[id];
	for (int32_t r = 0; r < v->dim[0]; r++)
		for (int32_t c = 0; c < v->dim[1]; c++)
			store(data, (enum dtype)o->dtype, (int64_t)r * v->dim[1] + c,
			      content(o, k, at, rank, in_whole(o->dim, o->piece, at, rank, r, c)));
	exec_upload(x, id, data);
}

/* What differs in an operation's argument from rank to rank. */
static union op_arg argument(const struct operation *o, const enum place *at, int rank)
{
	union op_arg arg = o->arg;
	if (o->op == OP_embedding && at[0] == PLACE_SHARD0)
		arg.embedding.first_row = rank * o->in[0].dim[0] / RANKS;
	int32_t *heads = o->op == OP_rope                                     ? &arg.rope.heads
	                 : o->op == OP_qk_norm || o->op == OP_qk_norm_bwd     ? &arg.norm.heads
	                 : o->op == OP_attention || o->op == OP_attention_bwd ? &arg.attention.heads
	                                                                      : NULL;
	if (heads && at[0] == PLACE_SHARD1) {
		heads[0] /= RANKS;
		heads[1] /= RANKS;
	}
	return arg;
}

struct result {
	int n;
	int32_t dim[OP_MAX_OUT][2];
	enum place place[OP_MAX_OUT];
	double data[OP_MAX_OUT][MOST];
};

static void fetch(struct exec *x, const struct prog *p, struct result *out)
{
	const struct node *n = &p->node[p->n_node - 1];
	out->n = op_rows[n->op].n_out;
	for (int k = 0; k < out->n; k++) {
		const struct value *v = &p->value[n->out[k]];
		double raw[MOST];
		exec_download(x, n->out[k], raw);
		for (int64_t i = 0; i < value_count(v); i++)
			out->data[k][i] = v->dtype == DT_f64 ? raw[i] : (double)((float *)raw)[i];
		out->place[k] = (enum place)v->place[AXIS_tp];
		out->dim[k][0] = v->dim[0];
		out->dim[k][1] = v->nd > 1 ? v->dim[1] : 0;
	}
}

/* Every value has memory of its own: what the planner does with it is another test. */
static void give_memory(struct prog *p)
{
	for (size_t v = 0; v < p->n_value; v++) {
		p->value[v].region = R_SAVED;
		p->value[v].offset_bytes = p->bytes[R_SAVED];
		p->bytes[R_SAVED] += (value_bytes(&p->value[v]) + 63) / 64 * 64;
	}
}

/* One rank's run (ranks = 1: the whole); false where the rules refuse. */
static bool run(const struct operation *o, const enum place *at, int ranks, int rank, struct stream *stream,
                struct result *out)
{
	struct prog p;
	int32_t in[OP_MAX_IN], outs[OP_MAX_OUT] = {NONE, NONE, NONE}, table[] = {8, 4};
	size_t n_in = 0;
	prog_init(&p);
	p.axis_size[AXIS_tp] = ranks;
	for (; n_in < OP_MAX_IN && o->in[n_in].dim[0]; n_in++) {
		int32_t dim[2];
		if (!cut(o->in[n_in].dim, at[n_in], dim))
			break;
		in[n_in] = prog_value(&p, "operand", (enum region)o->in[n_in].region,
		                      (enum dtype)o->in[n_in].dtype, dim[1] ? 2 : 1, dim);
		prog_place(&p, in[n_in], AXIS_tp, at[n_in]);
	}
	bool good = n_in == OP_MAX_IN || !o->in[n_in].dim[0];
	if (o->op == OP_embedding_bwd)
		outs[0] = prog_value(&p, "table", R_GRAD, DT_f32, 2, table);
	union op_arg arg = argument(o, at, rank);
	if (good)
		prog_emit(&p, o->op, &arg, HERE, in, n_in, outs);
	good = good && !p.e.code;
	struct exec *x = NULL;
	struct err e = {0};
	give_memory(&p);
	if (good && CHECK(!exec_create(&x, &p, &cpu_reference_backend, stream, NULL, &e))) {
		for (size_t k = 0; k < n_in; k++)
			fill(x, &p, in[k], &o->in[k], (int)k, at[k], rank);
		CHECK(!exec_run(x, SEG_FWD, true, &e));
		fetch(x, &p, out);
		exec_free(x);
	}
	prog_free(&p);
	return good;
}

/* Compares output k, recombined from the shares, with the whole. */
static bool same(const struct operation *o, int k, const struct result *whole, const struct result *share)
{
	enum place at = share[0].place[k];
	double sum[MOST] = {0}, worst = 0;
	int32_t dim[2], columns = columns_of(share[0].dim[k]);
	if (!cut(whole->dim[k], at, dim) || memcmp(dim, share[0].dim[k], sizeof dim))
		return false;
	for (int rank = 0; rank < RANKS; rank++)
		for (int32_t r = 0; r < dim[0]; r++)
			for (int32_t c = 0; c < columns; c++) {
				double x = share[rank].data[k][r * columns + c];
				int64_t i = in_whole(whole->dim[k], o->piece[k], at, rank, r, c);
				if (at == PLACE_REPLICATED)
					worst = fmax(worst, fabs(x - whole->data[k][i]));
				else
					sum[i] += x;
			}
	for (int32_t i = 0; at != PLACE_REPLICATED && i < whole->dim[k][0] * columns_of(whole->dim[k]); i++)
		worst = fmax(worst, fabs(sum[i] - whole->data[k][i]));
	return worst < 2e-5;
}

static void describe(const struct operation *o, const enum place *at, char *text, size_t cap)
{
	size_t n = (size_t)snprintf(text, cap, "%s", op_rows[o->op].name);
	for (int k = 0; k < OP_MAX_IN && o->in[k].dim[0]; k++)
		n += (size_t)snprintf(text + n, cap - n, " %s", place_names[at[k]]);
}

static void try_all(const struct operation *o, struct stream *stream)
{
	static struct result whole, share[RANKS];
	int n_in = 0, combinations = 1, accepted = 0, wrong = 0;
	while (n_in < OP_MAX_IN && o->in[n_in].dim[0]) {
		combinations *= PLACE_COUNT;
		n_in++;
	}
	enum place at[OP_MAX_IN] = {0};
	MUST(run(o, at, 1, 0, stream, &whole));
	for (int i = 0; i < combinations; i++) {
		char text[200];
		for (int k = 0, rest = i; k < n_in; k++, rest /= PLACE_COUNT)
			at[k] = (enum place)(rest % PLACE_COUNT);
		if (!run(o, at, RANKS, 0, stream, &share[0]) || !run(o, at, RANKS, 1, stream, &share[1]))
			continue;
		accepted++;
		describe(o, at, text, sizeof text);
		for (int k = 0; k < whole.n; k++)
			if (!same(o, k, &whole, share) && !wrong++)
				test_failed(__FILE__, __LINE__,
				            "%s is accepted, but output %d as %s is wrong", text, k,
				            place_names[share[0].place[k]]);
	}
	if (accepted != o->accepted)
		test_failed(__FILE__, __LINE__, "%s accepts %d combinations, not %d", op_rows[o->op].name,
		            accepted, o->accepted);
}

TEST(what_the_rules_accept_is_right_on_two_ranks)
{
	struct stream *stream;
	struct err e = {0};
	MUST(!cpu_reference_backend.open(&stream, 1, &e));
	for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
		try_all(&operations[i], stream);
	cpu_reference_backend.close(stream);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
