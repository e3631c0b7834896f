/* Placement rules. By example: what a builder may not write is refused with its layer and line. By force:
 * every combination of placements that a rule accepts is run as two ranks, and the recombined result must be
 * that of one rank. */
#include "base/err.h"
#include "base/rng.h"
#include "comm/comm.h"
#include "graph/exec.h"
#include "kernels/kernels.h"
#include "test/ranks.h"
#include "test/test.h"

#include <stdlib.h>

/* Refusals by example: a layer is cut over two tensor-parallel or data-parallel ranks. */

enum { N = 6, C = 4, F = 8 };

/* The line of the builder's mistake; NONE: it shows in backward, whose nodes carry the lines of their rules.
 */
static int here;

static int32_t value(struct prog *p, enum region r, int32_t rows, int32_t columns, enum place tp)
{
	int32_t dim[] = {rows, columns};
	int32_t v = prog_value(p, "v", r, DT_f32, columns ? 2 : 1, dim);
	prog_place(p, v, AXIS_tp, tp);
	return v;
}

/* Column-parallel, gated, row-parallel: partial sums over tp. */
static int32_t half_mlp_of(struct prog *p, int32_t x)
{
	int32_t w = value(p, R_PARAM, 2 * F, C, PLACE_SHARD0), w2 = value(p, R_PARAM, C, F, PLACE_SHARD1);
	int32_t h = EMIT(p, glu, ARG(.activation = {ACT_silu}), EMIT(p, linear, NO_ARG, x, w, NONE));
	return EMIT(p, linear, NO_ARG, h, w2, NONE);
}

static int32_t half_mlp(struct prog *p)
{
	return half_mlp_of(p, value(p, R_INPUT, N, C, PLACE_REPLICATED));
}

/* What the stage before sends. */
static int32_t stream(struct prog *p, enum place tp)
{
	int32_t x = value(p, R_TEMP, tp == PLACE_SHARD0 ? N / 2 : N, C, tp);
	p->value[x].given = p->value[x].want_grad = 1;
	return x;
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

static void bias_after_a_sum_that_was_forgotten(struct prog *p)
{
	int32_t y = half_mlp(p), b = value(p, R_PARAM, C, 0, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, bias_add, NO_ARG, y, b);
}

static void residual_without_reduce_scatter(struct prog *p)
{
	int32_t x = stream(p, PLACE_SHARD0);
	int32_t y = half_mlp_of(p, EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(tp)}), x));
	here = __LINE__ + 1;
	EMIT(p, add, NO_ARG, value(p, R_INPUT, N, C, PLACE_SHARD0), y);
}

static void product_without_all_gather(struct prog *p)
{
	int32_t x = stream(p, PLACE_SHARD0), w = value(p, R_PARAM, F, C, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, linear, NO_ARG, x, w);
}

/* Forward is right without it; the gradient of the norm's result is not. */
static void norm_without_fan_out(struct prog *p)
{
	int32_t x = stream(p, PLACE_REPLICATED), w = value(p, R_PARAM, C, 0, PLACE_REPLICATED);
	int32_t y = half_mlp_of(p, EMIT(p, rmsnorm, ARG(.norm = {.eps = 1e-5f}), x, w));
	y = EMIT(p, add, NO_ARG, x, EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(tp)}), y));
	here = NONE;
	prog_backward(p, &(struct seed){y, stream(p, PLACE_REPLICATED)}, 1);
}

static void residual_without_fan_out(struct prog *p)
{
	int32_t x = stream(p, PLACE_REPLICATED);
	int32_t y = EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(tp)}), half_mlp_of(p, x));
	y = EMIT(p, add, NO_ARG, x, y);
	here = NONE;
	prog_backward(p, &(struct seed){y, stream(p, PLACE_REPLICATED)}, 1);
}

static void fan_out_of_cut_rows(struct prog *p)
{
	int32_t x = stream(p, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, fan_out, ARG(.comm = {AXIS_BIT(tp)}), x);
}

static void all_gather_of_whole_rows(struct prog *p)
{
	int32_t x = stream(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(tp)}), x);
}

static void all_gather_of_cut_columns(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N, C, PLACE_SHARD1);
	here = __LINE__ + 1;
	EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(tp)}), x);
}

static void reduce_scatter_of_whole_rows(struct prog *p)
{
	int32_t x = stream(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, reduce_scatter, ARG(.comm = {AXIS_BIT(tp)}), x);
}

static void reduce_scatter_of_an_odd_row(struct prog *p)
{
	int32_t x = value(p, R_INPUT, N - 1, C, PLACE_PARTIAL);
	here = __LINE__ + 1;
	EMIT(p, reduce_scatter, ARG(.comm = {AXIS_BIT(tp)}), x);
}

static void share_of_shards(struct prog *p)
{
	int32_t w = value(p, R_PARAM, F, 0, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, share, ARG(.comm = {AXIS_BIT(tp)}), w);
}

static int32_t ids(struct prog *p)
{
	return prog_value(p, "ids", R_INPUT, DT_i32, 1, (int32_t[]){N});
}

static void look_up_in_a_cut_that_is_not_said(struct prog *p)
{
	int32_t table = value(p, R_PARAM, F, C, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, embedding, NO_ARG, table, ids(p));
}

static void look_up_in_a_cut_that_is_not_there(struct prog *p)
{
	int32_t table = value(p, R_PARAM, F, C, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, embedding, ARG(.embedding = {0, AXIS_BIT(tp)}), table, ids(p));
}

static void loss_of_columns_whose_cut_is_not_said(struct prog *p)
{
	int32_t logits = value(p, R_INPUT, N, F, PLACE_SHARD1);
	here = __LINE__ + 1;
	EMIT(p, cross_entropy, ARG(.cross_entropy = {F}), logits, ids(p));
}

static void loss_of_cut_columns_alone(struct prog *p)
{
	int32_t logits = value(p, R_INPUT, N, F, PLACE_SHARD1);
	here = __LINE__ + 1;
	EMIT(p, cross_entropy, ARG(.cross_entropy = {F, 0, AXIS_BIT(tp)}), logits, ids(p));
}

static void statistics_of_one_rank(struct prog *p)
{
	int32_t logits = value(p, R_INPUT, N, F, PLACE_SHARD1);
	union op_arg arg = {.cross_entropy = {F, 0, AXIS_BIT(tp)}};
	int32_t stats = EMIT(p, logit_stats, &arg, logits, ids(p));
	here = __LINE__ + 1;
	EMIT(p, cross_entropy, &arg, logits, ids(p), stats);
}

static void statistics_of_whole_columns(struct prog *p)
{
	int32_t logits = value(p, R_INPUT, N, F, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, logit_stats, ARG(.cross_entropy = {F, 0, AXIS_BIT(tp)}), logits, ids(p));
}

static int32_t keys(struct prog *p)
{
	return prog_value(p, "keys", R_INPUT, DT_i64, 1, (int32_t[]){N});
}

static void dropout_of_rows_whose_cut_is_not_said(struct prog *p)
{
	int32_t x = stream(p, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, dropout, ARG(.dropout = {0.5f, 0, 1, 0, 0}), x, keys(p));
}

static void dropout_of_rows_that_are_not_cut(struct prog *p)
{
	int32_t x = stream(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, dropout, ARG(.dropout = {0.5f, 0, 1, 0, AXIS_BIT(tp)}), x, keys(p));
}

static void dropout_beyond_its_samples(struct prog *p)
{
	int32_t x = stream(p, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, dropout, ARG(.dropout = {0.5f, 0, 1, N - 1, AXIS_BIT(tp)}), x, keys(p));
}

/* The second rank holds the same elements as the first. */
static void norm_that_counts_twice(struct prog *p)
{
	int32_t g = value(p, R_GRAD, F, C, PLACE_REPLICATED);
	p->axis_rank[AXIS_tp] = 1;
	EMIT(p, square_sum, ARG(.square_sum = {0}), g);
	here = __LINE__ + 1;
	EMIT(p, square_sum, ARG(.square_sum = {1}), g);
}

/* Norm, product, sum, bias, mask on cut rows; its gradients. */
static void the_layer_on_cut_rows(struct prog *p)
{
	int32_t x = stream(p, PLACE_SHARD0), w = value(p, R_PARAM, C, 0, PLACE_REPLICATED);
	int32_t b = value(p, R_PARAM, C, 0, PLACE_REPLICATED);
	const union op_arg *over = ARG(.comm = {AXIS_BIT(tp)});
	int32_t y = EMIT(p, all_gather, over, EMIT(p, rmsnorm, ARG(.norm = {.eps = 1e-5f}), x, w));
	y = EMIT(p, reduce_scatter, over, half_mlp_of(p, y));
	y = EMIT(p, dropout, ARG(.dropout = {0.5f, 0, 1, 0, AXIS_BIT(tp)}), EMIT(p, bias_add, NO_ARG, y, b),
	         keys(p));
	prog_backward(p, &(struct seed){EMIT(p, add, NO_ARG, x, y), stream(p, PLACE_SHARD0)}, 1);
	if (p->e.code)
		return;
	CHECK_INT(p->value[p->value[w].grad].place[AXIS_tp], PLACE_PARTIAL);
	CHECK_INT(p->value[p->value[b].grad].place[AXIS_tp], PLACE_PARTIAL);
	CHECK_INT(p->value[p->value[x].grad].place[AXIS_tp], PLACE_SHARD0);
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
	EMIT(p, square_sum, ARG(.square_sum = {1}), u.grad);
}

static void adamw_with_an_incomplete_norm(struct prog *p)
{
	struct update u = dp_gradient(p);
	u.grad = EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(dp)}), u.grad);
	EMIT_INTO(p, square_sum, ARG(.square_sum = {1}), (int32_t[OP_MAX_OUT]){u.norm2}, u.grad);
	here = __LINE__ + 1;
	EMIT(p, adamw, ARG(.adamw = {1}), u.w, u.grad, NONE, u.m, u.v, u.hyper, u.norm2);
}

static void the_update_as_it_should_be(struct prog *p)
{
	struct update u = dp_gradient(p);
	u.grad = EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(dp)}), u.grad);
	EMIT_INTO(p, square_sum, ARG(.square_sum = {1}), (int32_t[OP_MAX_OUT]){u.norm2}, u.grad);
	u.norm2 = EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(tp) | AXIS_BIT(dp)}), u.norm2);
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
        CASE(bias_after_a_sum_that_was_forgotten, "bias_add", "added once per rank"),
        CASE(residual_without_reduce_scatter, "add", "operands are placed differently"),
        CASE(product_without_all_gather, "linear", "sharded on dimensions that do not match"),
        CASE(norm_without_fan_out, "rmsnorm_bwd", "these are partial sums"),
        CASE(residual_without_fan_out, "add", "operands are placed differently"),
        CASE(fan_out_of_cut_rows, "fan_out", "must hold the same operand"),
        CASE(all_gather_of_whole_rows, "all_gather", "not cut over these ranks"),
        CASE(all_gather_of_cut_columns, "all_gather", "not cut over these ranks"),
        CASE(reduce_scatter_of_whole_rows, "reduce_scatter", "no partial sums"),
        CASE(reduce_scatter_of_an_odd_row, "reduce_scatter", "not a multiple of the ranks"),
        CASE(share_of_shards, "share", "makes copies equal, and these are none"),
        CASE(look_up_in_a_cut_that_is_not_said, "embedding", "looks nothing up"),
        CASE(look_up_in_a_cut_that_is_not_there, "embedding", "looks nothing up"),
        CASE(loss_of_columns_whose_cut_is_not_said, "cross_entropy", "whole rows of logits"),
        CASE(loss_of_cut_columns_alone, "cross_entropy", "need the statistics of all ranks"),
        CASE(statistics_of_one_rank, "cross_entropy", "statistics are placed differently"),
        CASE(statistics_of_whole_columns, "logit_stats", "columns are not cut over this axis"),
        CASE(dropout_of_rows_whose_cut_is_not_said, "dropout", "rows and keys are placed differently"),
        CASE(dropout_of_rows_that_are_not_cut, "dropout", "rows and keys are placed differently"),
        CASE(dropout_beyond_its_samples, "dropout", "one i64 key a sample"),
        CASE(norm_that_counts_twice, "square_sum", "counted on several ranks"),
        CASE(the_layer_on_cut_rows, NULL, NULL),
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
			/* NONE: an adjoint, which names a line of the forward pass. */
			snprintf(where, sizeof where, "layer 7: %s (test_placement.c:%.0d", examples[i].op,
			         here == NONE ? 0 : here);
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

enum { AXES = 2, RANKS = 4, PIECES = 3, MOST = 8 * 32, RESULTS = 6, COMBINATIONS = 16 };
static const enum mesh_axis axes[AXES] = {AXIS_dp, AXIS_tp}; /* what dp has cut, tp cuts again */

struct shape {
	int32_t dim[2];        /* dim[1] 0: a vector */
	int32_t piece[PIECES]; /* widths of what lies side by side in a row and is cut piece by piece */
};

struct operand {
	uint8_t region, dtype;
	struct shape shape; /* dim[0] 0: absent */
	int32_t below;      /* integers: the limit; -1: floats above 0 */
};

/* Emits nodes; returns how many values of out[RESULTS] are to be compared. */
typedef int build_fn(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                     int32_t *out);

struct operation {
	build_fn *build;
	enum op op;
	const char *name;
	/* Combinations of placements that must be accepted, so many, no more: along dp, of which arg says
	 * nothing, and along tp. */
	int accepted[AXES];
	union op_arg arg;
	struct operand in[OP_MAX_IN];
	int32_t piece[RESULTS][PIECES];
};

static int one_node(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                    int32_t *out)
{
	int32_t outs[OP_MAX_OUT] = {NONE, NONE, NONE}, rows = 8;
	int n = op_rows[op].n_out;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (arg->embedding.axes >> a & 1)
			rows /= p->axis_size[a];
	if (op == OP_embedding_bwd)
		outs[0] = prog_value(p, "table", R_GRAD, DT_f32, 2, (int32_t[]){rows, 4});
	prog_emit(p, op, arg, HERE, in, n_in, outs);
	for (int k = 0; k < n; k++)
		out[k] = prog_out(p, k);
	for (size_t k = 0; k < n_in && op_rows[op].flags & UPDATES; k++)
		if (p->value[in[k]].region != R_INPUT && p->value[in[k]].region != R_STAT)
			out[n++] = in[k];
	return n;
}

/* A collective and the wait for it. */
static int await(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                 int32_t *out)
{
	int32_t y = prog_emit(p, op, arg, HERE, in, n_in, NULL);
	out[0] = EMIT(p, wait, NO_ARG, y, in[0]);
	return 1;
}

static int32_t differentiate(struct prog *p, int32_t y, int32_t adjoint)
{
	prog_backward(p, &(struct seed){y, adjoint}, 1);
	return y;
}

static int32_t grad_of(const struct prog *p, int32_t v)
{
	return p->e.code ? 0 : p->value[v].grad;
}

/* The gradient of what a stage receives lies as the value does. */
static int32_t adjoint_of(const struct prog *p, int32_t v)
{
	int32_t g = grad_of(p, v);
	if (!p->e.code && memcmp(p->value[g].place, p->value[v].place, sizeof p->value[v].place))
		test_failed(__FILE__, __LINE__, "an adjoint is placed otherwise than its value");
	return g;
}

/* y, dtable <- table, ids, dy: a vocabulary cut over tp, and the sum of what each rank found. */
static int look_up(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                   int32_t *out)
{
	int32_t y = EMIT(p, embedding, arg, in[0], in[1]);
	(void)n_in;
	y = prog_emit(p, op, ARG(.comm = {AXIS_BIT(tp)}), HERE, &y, 1, NULL);
	out[0] = differentiate(p, y, in[2]);
	out[1] = grad_of(p, in[0]);
	return 2;
}

/* loss, lse, row_loss, dlogits <- logits, targets, scale: columns cut over tp, whose statistics meet. */
static int lose(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                int32_t *out)
{
	int32_t stats = NONE;
	(void)op, (void)n_in;
	p->value[in[0]].want_grad = 1;
	if (p->axis_size[AXIS_tp] > 1)
		stats = EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(tp)}),
		             EMIT(p, logit_stats, arg, in[0], in[1]));
	EMIT(p, cross_entropy, arg, in[0], in[1], stats);
	for (int k = 0; k < 3; k++)
		out[k] = prog_out(p, k);
	differentiate(p, out[0], in[2]);
	out[3] = adjoint_of(p, in[0]);
	return 4;
}

/* y, dx, dw1, db1, dw2, db2 <- x, w1, b1, w2, b2, dy: the block between a collective and its conjugate. */
static int feed_forward(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                        int32_t *out)
{
	enum op back = op == OP_fan_out ? OP_all_reduce : OP_reduce_scatter;
	int32_t x = in[0];
	(void)n_in;
	p->value[x].want_grad = 1;
	int32_t h = prog_emit(p, op, arg, HERE, &x, 1, NULL);
	h = EMIT(p, activation, ARG(.activation = {ACT_silu}), EMIT(p, linear, NO_ARG, h, in[1], in[2]));
	h = EMIT(p, linear, NO_ARG, h, in[3]);
	out[0] = differentiate(
	        p, EMIT(p, bias_add, NO_ARG, prog_emit(p, back, arg, HERE, &h, 1, NULL), in[4]), in[5]);
	out[1] = adjoint_of(p, x);
	for (int k = 1; k < 5; k++)
		out[1 + k] = grad_of(p, in[k]);
	return 6;
}

/* clang-format off */
#define OF(n, c, ...) {{n, c}, {__VA_ARGS__}}
#define ROWS(n, c) {R_TEMP, DT_f32, OF(n, c, c), 0}
#define PACKED(n, c, ...) {R_TEMP, DT_f32, OF(n, c, __VA_ARGS__), 0}
#define PER_ROW(n) {R_TEMP, DT_f32, OF(n, 0, 0), 0}
#define WEIGHT(m, k) {R_PARAM, DT_f32, OF(m, k, k), 0}
#define TABLE(m, k) {R_CONST, DT_f32, OF(m, k, k), 0}
#define HOST(n) {R_INPUT, DT_f32, OF(n, 0, 0), 0}
#define IDS(n, limit) {R_INPUT, DT_i32, OF(n, 0, 0), limit}
#define KEYS(n) {R_INPUT, DT_i64, OF(n, 0, 0), 1 << 30}
#define EPS {.norm = {.eps = 1e-5f}}
#define SILU {.activation = {ACT_silu}}
#define ATTENTION(p) {.attention = {.seq_length = 4, .heads = 4, .groups = 2, .head_dim = 4, .scale = 0.5f, .dropout = p}}
#define QKV PACKED(8, 32, 16, 8, 8)
#define OVER_TP {.comm = {AXIS_BIT(tp)}}
#define VOCABULARY {.embedding = {0, AXIS_BIT(tp)}}
#define FEED_FORWARD ROWS(8, 4), WEIGHT(10, 4), WEIGHT(10, 0), WEIGHT(4, 10), WEIGHT(4, 0), ROWS(8, 4)
#define NODE(name) one_node, OP_##name, #name
#define BLOCK(build, name) build, OP_##name, #build " by " #name

static const struct operation operations[] = {
	{NODE(linear), {4, 4}, {{0}}, {ROWS(6, 4), WEIGHT(10, 4)}, {{10}}},
	{NODE(linear), {3, 3}, {{0}}, {ROWS(6, 4), WEIGHT(10, 4), WEIGHT(10, 0)}, {{10}}},
	{NODE(linear_dx), {4, 4}, {{0}}, {ROWS(6, 10), WEIGHT(10, 4)}, {{4}}},
	{NODE(linear_dw), {4, 4}, {{0}}, {ROWS(6, 10), ROWS(6, 4)}, {{4}}},
	{NODE(bias_grad), {3, 3}, {{0}}, {ROWS(6, 10)}, {{0}}},
	{NODE(bias_add), {3, 3}, {{0}}, {ROWS(6, 4), WEIGHT(4, 0)}, {{4}}},
	{NODE(embedding), {2, 2}, {{0}}, {WEIGHT(8, 4), IDS(6, 8)}, {{4}}},
	{NODE(embedding), {2, 1}, VOCABULARY, {WEIGHT(8, 4), IDS(6, 8)}, {{4}}},
	{NODE(embedding_bwd), {2, 2}, {{0}}, {ROWS(6, 4), IDS(6, 8)}, {{4}}},
	{NODE(embedding_bwd), {2, 1}, VOCABULARY, {ROWS(6, 4), IDS(6, 8)}, {{4}}},
	{NODE(add), {4, 4}, {{0}}, {ROWS(6, 4), ROWS(6, 4)}, {{4}}},
	{NODE(layernorm), {2, 2}, EPS, {ROWS(6, 4), WEIGHT(4, 0), WEIGHT(4, 0)}, {{4}}},
	{NODE(layernorm_bwd), {2, 2}, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), PER_ROW(6)}, {{4}}},
	{NODE(layernorm_bwd), {2, 2}, EPS,
	 {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), PER_ROW(6), ROWS(6, 4)}, {{4}}},
	{NODE(rmsnorm), {2, 2}, EPS, {ROWS(6, 4), WEIGHT(4, 0)}, {{4}}},
	{NODE(rmsnorm_bwd), {2, 2}, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6)}, {{4}}},
	{NODE(rmsnorm_bwd), {2, 2}, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), ROWS(6, 4)}, {{4}}},
	{NODE(activation), {3, 3}, SILU, {ROWS(6, 4)}, {{4}}},
	{NODE(activation_bwd), {3, 3}, SILU, {ROWS(6, 4), ROWS(6, 4)}, {{4}}},
	{NODE(glu), {3, 3}, SILU, {PACKED(6, 8, 4, 4)}, {{4}}},
	{NODE(glu_bwd), {3, 3}, SILU, {ROWS(6, 4), PACKED(6, 8, 4, 4)}, {{4, 4}}},
	{NODE(dropout), {2, 2}, {.dropout = {0.5f, 3, 2, 0, 0}}, {ROWS(8, 4), KEYS(4)}, {{4}}},
	{NODE(dropout), {2, 1}, {.dropout = {0.5f, 3, 4, 0, AXIS_BIT(tp)}}, {ROWS(8, 4), KEYS(2)}, {{4}}},
	{NODE(dropout), {1, 1}, {.dropout = {0.5f, 3, 8, 0, AXIS_BIT(tp)}}, {ROWS(8, 4), KEYS(1)}, {{4}}},
	{NODE(rope), {3, 3}, {.rope = {4, 2, 4, 0}}, {QKV, TABLE(10, 4), IDS(8, 10)}, {{16, 8, 8}}},
	{NODE(qk_norm), {3, 3}, {.norm = {1e-5f, 4, 2, 4}}, {QKV, WEIGHT(4, 0), WEIGHT(4, 0)}, {{16, 8, 8}, {4, 2}}},
	{NODE(qk_norm_bwd), {3, 3}, {.norm = {1e-5f, 4, 2, 4}},
	 {QKV, QKV, WEIGHT(4, 0), WEIGHT(4, 0), PACKED(8, 6, 4, 2)}, {{16, 8, 8}}},
	{NODE(attention), {3, 3}, ATTENTION(0), {QKV}, {{16}, {4}}},
	{NODE(attention), {3, 3}, ATTENTION(0.3f), {QKV, KEYS(2)}, {{16}, {4}}},
	{NODE(attention_bwd), {3, 3}, ATTENTION(0), {ROWS(8, 16), QKV, ROWS(8, 16), ROWS(8, 4)}, {{16, 8, 8}}},
	{NODE(attention_bwd), {3, 3}, ATTENTION(0.3f),
	 {ROWS(8, 16), QKV, ROWS(8, 16), ROWS(8, 4), KEYS(2)}, {{16, 8, 8}}},
	{NODE(logit_stats), {2, 2}, {.cross_entropy = {9, 0, 0}}, {ROWS(6, 10), IDS(6, 9)}, {{2}}},
	{NODE(cross_entropy), {2, 2}, {.cross_entropy = {9, 0, 0}}, {ROWS(6, 10), IDS(6, 9)}, {{0}}},
	{NODE(cross_entropy), {2, 2}, {.cross_entropy = {9, 0, 0}}, {ROWS(6, 10), IDS(6, 9), ROWS(6, 2)}, {{0}}},
	{NODE(cross_entropy_bwd), {2, 2}, {.cross_entropy = {9, 0, 0}},
	 {ROWS(6, 10), IDS(6, 9), PER_ROW(6), HOST(1)}, {{10}}},
	{NODE(cross_entropy_bwd), {2, 1}, {.cross_entropy = {9, 0, AXIS_BIT(tp)}},
	 {ROWS(6, 10), IDS(6, 9), PER_ROW(6), HOST(1)}, {{10}}},
	{NODE(cast), {4, 4}, {.cast = {DT_bf16}}, {ROWS(6, 4)}, {{4}}},
	{NODE(cast), {4, 4}, {.cast = {DT_f32}}, {{R_TEMP, DT_bf16, OF(6, 4, 4), 0}}, {{4}}},
	{NODE(accumulate), {4, 4}, {{0}}, {ROWS(6, 4)}, {{4}}},
	{NODE(square_sum), {3, 3}, {{0}}, {ROWS(6, 4)}, {{0}}},
	{NODE(fan_out), {4, 1}, OVER_TP, {ROWS(8, 4)}, {{4}}},
	{NODE(all_reduce), {4, 1}, OVER_TP, {ROWS(8, 4)}, {{4}}},
	{NODE(all_gather), {4, 1}, OVER_TP, {ROWS(8, 4)}, {{4}}},
	{NODE(reduce_scatter), {4, 1}, OVER_TP, {ROWS(8, 4)}, {{4}}},
	{NODE(share), {4, 1}, OVER_TP, {ROWS(8, 4)}, {{4}}},
	{NODE(adamw), {3, 3}, {.adamw = {1}},
	 {WEIGHT(6, 4), ROWS(6, 4), TABLE(6, 4), TABLE(6, 4), {R_OPT, DT_f32, OF(6, 4, 4), -1},
	  {R_INPUT, DT_f32, OF(8, 0, 0), -1}, {R_STAT, DT_f64, OF(1, 0, 0), -1}}, {{4}, {4}, {4}, {4}, {4}}},
	{NODE(attention_cache), {2, 2}, ATTENTION(0),
	 {PACKED(4, 32, 16, 8, 8), {R_STATE, DT_f32, OF(8, 8, 8), 0}, {R_STATE, DT_f32, OF(8, 8, 8), 0}, IDS(4, 8)},
	 {{16}, {16, 8, 8}, {8}, {8}}},
	{BLOCK(await, all_reduce), {4, 1}, OVER_TP, {ROWS(8, 4)}, {{4}}},
	{BLOCK(look_up, all_reduce), {2, 1}, VOCABULARY, {WEIGHT(8, 4), IDS(8, 8), ROWS(8, 4)}, {{4}, {4}}},
	{BLOCK(look_up, reduce_scatter), {2, 1}, VOCABULARY, {WEIGHT(8, 4), IDS(8, 8), ROWS(8, 4)}, {{4}, {4}}},
	{BLOCK(lose, all_gather), {2, 1}, {.cross_entropy = {9, 0, AXIS_BIT(tp)}},
	 {ROWS(6, 10), IDS(6, 9), HOST(1)}, {{0}, {0}, {0}, {10}}},
	{BLOCK(feed_forward, fan_out), {2, 1}, OVER_TP, {FEED_FORWARD}, {{4}, {4}, {4}, {0}, {10}, {0}}},
	{BLOCK(feed_forward, all_gather), {2, 1}, OVER_TP, {FEED_FORWARD}, {{4}, {4}, {4}, {0}, {10}, {0}}},
};
/* clang-format on */

struct result { /* of one rank */
	struct shape shape;
	uint8_t place[AXES];
	double data[MOST];
};

struct trial { /* an operation on the ranks of a mesh, its operands placed in some way */
	const struct operation *o;
	int size[AXES];
	uint8_t at[OP_MAX_IN][AXES];
	struct result result[RANKS][RESULTS];
	int n_result;
};

struct built { /* the program of one rank */
	struct prog p;
	int32_t in[OP_MAX_IN], out[RESULTS];
	size_t n_in;
	int n_out;
};

static int ranks_of(const struct trial *t)
{
	return t->size[0] * t->size[1];
}

static int coordinate(const struct trial *t, int rank, int axis)
{
	return axis ? rank % t->size[1] : rank / t->size[1];
}

/* The share of each rank along one axis, false where it does not come out even. */
static bool cut_once(struct shape *s, enum place at, int parts)
{
	if (at != PLACE_SHARD0 && at != PLACE_SHARD1)
		return true;
	int k = at == PLACE_SHARD1;
	bool even = s->dim[k] && s->dim[k] % parts == 0;
	s->dim[k] /= parts;
	for (int i = 0; i < PIECES && k; i++) {
		even &= s->piece[i] % parts == 0;
		s->piece[i] /= parts;
	}
	return even;
}

static bool cut(const struct shape *whole, const uint8_t *at, const int *parts, struct shape *share)
{
	*share = *whole;
	return cut_once(share, at[0], parts[0]) && cut_once(share, at[1], parts[1]);
}

static int32_t columns_of(const struct shape *s)
{
	return s->dim[1] ? s->dim[1] : 1;
}

/* Where element (r, c) of a rank's share stands in the whole: what the last axis has cut is joined first. */
static int64_t in_whole(const struct trial *t, const struct shape *whole, const uint8_t *at, int rank,
                        int32_t r, int32_t c)
{
	struct shape before[AXES] = {*whole, *whole};
	cut_once(&before[1], at[0], t->size[0]);
	for (int a = AXES; a-- > 0;) {
		const struct shape *s = &before[a];
		int which = coordinate(t, rank, a), parts = t->size[a];
		if (at[a] == PLACE_SHARD0)
			r += which * s->dim[0] / parts;
		if (at[a] == PLACE_SHARD1) {
			int k = 0, left = 0;
			for (; c >= s->piece[k] / parts; k++) {
				c -= s->piece[k] / parts;
				left += s->piece[k];
			}
			c += left + which * s->piece[k] / parts;
		}
	}
	return (int64_t)r * columns_of(whole) + c;
}

/* Which of the summands of partial sums a rank holds, of how many. */
static int summand(const struct trial *t, const uint8_t *at, int rank, int *of)
{
	int index = 0;
	*of = 1;
	for (int a = 0; a < AXES; a++)
		if (at[a] == PLACE_PARTIAL) {
			index = index * t->size[a] + coordinate(t, rank, a);
			*of *= t->size[a];
		}
	return index;
}

/* Element i of operand k on a rank: of partial sums, all but the first rank have random summands; of partial
 * ids, nothing. */
static double content(const struct trial *t, int k, int rank, int64_t i)
{
	const struct operand *o = &t->o->in[k];
	uint64_t key = (uint64_t)k, at = (uint64_t)i;
	double x = o->below > 0   ? (double)(rng_bits(key, at) % (uint64_t)o->below)
	           : o->below < 0 ? 0.1 + rng_uniform(key, at)
	                          : 2 * rng_uniform(key, at) - 1;
	int of, index = summand(t, t->at[k], rank, &of);
	double rest = 0;
	for (int j = 1; j < of && o->below <= 0; j++) {
		double one = rng_uniform(key + 100 * (uint64_t)j, at);
		if (j == index)
			return one;
		rest += one;
	}
	return index ? 0 : x - rest;
}

static void store(void *data, enum dtype dtype, int64_t i, double x)
{
	if (dtype == DT_f32)
		((float *)data)[i] = (float)x;
	else if (dtype == DT_bf16)
		((uint16_t *)data)[i] = bf16_from_f32((float)x);
	else if (dtype == DT_f64)
		((double *)data)[i] = x;
	else if (dtype == DT_i32)
		((int32_t *)data)[i] = (int32_t)x;
	else
		((int64_t *)data)[i] = (int64_t)x;
}

static double load(const void *data, enum dtype dtype, int64_t i)
{
	return dtype == DT_f32    ? (double)((const float *)data)[i]
	       : dtype == DT_bf16 ? (double)bf16_to_f32(((const uint16_t *)data)[i])
	                          : ((const double *)data)[i];
}

static void fill(const struct trial *t, int rank, struct exec *x, const struct built *b)
{
	for (size_t k = 0; k < b->n_in; k++) {
		uint64_t data[MOST];
		const struct value *v = &b->p.value[b->in[k]];
		for (int32_t r = 0; r < v->dim[0]; r++) {
			/* Of what ranks share, each has written its rows. */
			int which = coordinate(t, rank, 1), rows = v->dim[0] / t->size[1];
			bool unwritten = t->o->op == OP_share && r / rows != which;
			for (int32_t c = 0; c < v->dim[1]; c++) {
				int64_t i = in_whole(t, &t->o->in[k].shape, t->at[k], rank, r, c);
				double value = unwritten ? NAN : content(t, (int)k, rank, i);
				store(data, (enum dtype)v->dtype, (int64_t)r * v->dim[1] + c, value);
			}
		}
		exec_upload(x, b->in[k], data);
	}
}

/* What differs in an operation's argument from rank to rank. */
static union op_arg argument(const struct trial *t, int rank)
{
	const struct operation *o = t->o;
	union op_arg arg = o->arg;
	int tp = coordinate(t, rank, 1), parts = t->size[1];
	int32_t *heads = o->op == OP_rope                                 ? &arg.rope.heads
	                 : o->op == OP_qk_norm || o->op == OP_qk_norm_bwd ? &arg.norm.heads
	                 : o->op == OP_attention || o->op == OP_attention_bwd || o->op == OP_attention_cache
	                         ? &arg.attention.heads
	                         : NULL;
	for (int a = 0, first = 0; a < AXES && heads; a++)
		if (t->at[0][a] == PLACE_SHARD1) {
			heads[0] /= t->size[a];
			heads[1] /= t->size[a];
			first = first * t->size[a] + coordinate(t, rank, a);
			if (heads == &arg.attention.heads)
				arg.attention.first_head = first * heads[0];
		}
	if (o->op == OP_embedding || o->op == OP_embedding_bwd || o->build == look_up)
		arg.embedding.first_row = arg.embedding.axes ? 8 / parts * tp : 0;
	if (o->op == OP_cross_entropy_bwd || o->build == lose)
		arg.cross_entropy.first_column = arg.cross_entropy.axes ? 10 / parts * tp : 0;
	if (o->op == OP_square_sum)
		arg.square_sum.counts = (t->at[0][0] != PLACE_REPLICATED || !coordinate(t, rank, 0)) &&
		                        (t->at[0][1] != PLACE_REPLICATED || !tp);
	if (o->op == OP_dropout && arg.dropout.axes && t->at[0][1] == PLACE_SHARD0) {
		struct shape share;
		cut(&o->in[0].shape, t->at[0], t->size, &share);
		arg.dropout.first_row = share.dim[0] * tp;
	}
	return arg;
}

/* Every value has memory of its own (what the planner does with it is another test), but for other names. */
static void give_memory(struct prog *p)
{
	for (size_t v = 0; v < p->n_value; v++) {
		p->value[v].region = R_SAVED;
		p->value[v].offset_bytes = p->bytes[R_SAVED];
		p->bytes[R_SAVED] += prog_aligned(value_bytes(&p->value[v]));
	}
	for (size_t i = 0; i < p->n_node; i++)
		if (op_rows[p->node[i].op].flags & ALIAS)
			p->value[p->node[i].out[0]].offset_bytes = p->value[p->node[i].in[0]].offset_bytes;
}

/* False where a rule refuses. */
static bool build(const struct trial *t, int rank, struct built *b)
{
	const struct operation *o = t->o;
	*b = (struct built){0};
	prog_init(&b->p);
	for (int a = 0; a < AXES; a++) {
		b->p.axis_size[axes[a]] = t->size[a];
		b->p.axis_rank[axes[a]] = coordinate(t, rank, a);
	}
	for (; b->n_in < OP_MAX_IN && o->in[b->n_in].shape.dim[0]; b->n_in++) {
		const struct operand *from = &o->in[b->n_in];
		struct shape share;
		if (!cut(&from->shape, t->at[b->n_in], t->size, &share))
			return false;
		int32_t v = prog_value(&b->p, "operand", (enum region)from->region, (enum dtype)from->dtype,
		                       share.dim[1] ? 2 : 1, share.dim);
		for (int a = 0; a < AXES; a++)
			prog_place(&b->p, v, axes[a], (enum place)t->at[b->n_in][a]);
		b->in[b->n_in] = v;
	}
	union op_arg arg = argument(t, rank);
	b->n_out = o->build(&b->p, o->op, &arg, b->in, b->n_in, b->out);
	return !b->p.e.code;
}

static void fetch(const struct operation *o, struct exec *x, const struct built *b, struct result *out)
{
	for (int k = 0; k < b->n_out; k++) {
		const struct value *v = &b->p.value[b->out[k]];
		double raw[MOST];
		exec_download(x, b->out[k], raw);
		for (int64_t i = 0; i < value_count(v); i++)
			out[k].data[i] = load(raw, (enum dtype)v->dtype, i);
		out[k].shape = (struct shape){{v->dim[0], v->nd > 1 ? v->dim[1] : 0}, {0}};
		memcpy(out[k].shape.piece, o->piece[k], sizeof o->piece[k]);
		for (int a = 0; a < AXES; a++)
			out[k].place[a] = v->place[axes[a]];
	}
}

static void execute(struct trial *t, int rank, struct built *b, const struct exec_comm *comm)
{
	struct stream *stream;
	struct exec *x;
	struct err e = {0};
	struct exec_options options = {.comm = comm, .n_comm = comm ? 1 : 0};
	CHECK(!cpu_reference_backend.open(&stream, 1, &e));
	give_memory(&b->p);
	if (CHECK(!exec_create(&x, &b->p, &cpu_reference_backend, stream, &options, &e))) {
		struct exec_part part = {.segments = SEG_BIT(FWD) | SEG_BIT(BWD), .first = true};
		fill(t, rank, x, b);
		CHECK(!exec_run(x, &part, &e));
		fetch(t->o, x, b, t->result[rank]);
		exec_free(x);
	}
	cpu_reference_backend.close(stream);
}

/* One rank's thread. The group of tp: the only one that communicates here. */
static void execute_among_others(int rank, struct comm *world, void *shared)
{
	struct trial *t = shared;
	struct built b;
	struct err e = {0};
	struct comm *self = NULL, *group = NULL;
	if (world)
		CHECK(!comm_split(world, &group, coordinate(t, rank, 0), "tp", &e));
	else
		CHECK(!comm_self(&self, &e));
	struct exec_comm comm = {AXIS_BIT(tp), world ? group : self};
	build(t, rank, &b);
	execute(t, rank, &b, &comm);
	prog_free(&b.p);
	comm_close(group);
	comm_close(self);
}

static bool communicates(const struct prog *p)
{
	for (size_t i = 0; i < p->n_node; i++)
		if (op_rows[p->node[i].op].flags & COMM)
			return true;
	return false;
}

static void describe(const struct trial *t, char *text, size_t cap)
{
	size_t n = (size_t)snprintf(text, cap, "%s", t->o->name);
	for (int k = 0; k < OP_MAX_IN && t->o->in[k].shape.dim[0]; k++) {
		n += (size_t)snprintf(text + n, cap - n, " %s", place_names[t->at[k][0]]);
		n += (size_t)snprintf(text + n, cap - n, "/%s", place_names[t->at[k][1]]);
	}
}

/* Builds on all ranks, and runs what they accept; all must say the same. */
static bool run(struct trial *t)
{
	int n = ranks_of(t), accepted = 0;
	bool meet = false;
	for (int rank = 0; rank < n; rank++) {
		struct built b;
		if (build(t, rank, &b)) {
			accepted++;
			meet = communicates(&b.p);
			t->n_result = b.n_out;
			if (!meet)
				execute(t, rank, &b, NULL);
		}
		prog_free(&b.p);
		if (!accepted)
			return false;
	}
	char text[300];
	describe(t, text, sizeof text);
	if (accepted != n)
		test_failed(__FILE__, __LINE__, "%s: %d of %d ranks accept", text, accepted, n);
	return accepted == n && (!meet || ranks_run(n, execute_among_others, t));
}

/* The ranks that hold the same copy: those with equal coordinates on the axes where it is replicated. */
static int copy_of(const struct trial *t, const uint8_t *at, int rank)
{
	int copy = 0;
	for (int a = 0; a < AXES; a++)
		if (at[a] == PLACE_REPLICATED)
			copy = copy * t->size[a] + coordinate(t, rank, a);
	return copy;
}

/* The difference between result k, put together from the shares, and the whole; -1 where shapes differ. */
static double difference(const struct trial *t, int k, const struct result *whole)
{
	static double sum[RANKS][MOST];
	const uint8_t *at = t->result[0][k].place;
	struct shape share, whole_shape = whole[k].shape;
	double worst = 0;
	memset(sum, 0, sizeof sum);
	if (!cut(&whole_shape, at, t->size, &share))
		return -1;
	for (int rank = 0; rank < ranks_of(t); rank++) {
		const struct result *mine = &t->result[rank][k];
		if (memcmp(mine->shape.dim, share.dim, sizeof share.dim) ||
		    memcmp(mine->place, at, sizeof mine->place))
			return -1;
		for (int32_t r = 0; r < share.dim[0]; r++)
			for (int32_t c = 0; c < columns_of(&share); c++)
				sum[copy_of(t, at, rank)][in_whole(t, &whole_shape, at, rank, r, c)] +=
				        mine->data[r * columns_of(&share) + c];
	}
	for (int rank = 0; rank < ranks_of(t); rank++)
		for (int32_t i = 0; i < whole_shape.dim[0] * columns_of(&whole_shape); i++) {
			double gap = fabs(sum[copy_of(t, at, rank)][i] - whole[k].data[i]);
			if (!(gap <= worst))
				worst = isnan(gap) ? INFINITY : gap;
		}
	return worst;
}

/* Runs the combination and compares it; false where it is refused. */
static bool attempt(struct trial *t, const struct trial *whole, int *wrong)
{
	if (!run(t))
		return false;
	char text[300];
	double allowed = t->o->op == OP_cast ? 2e-2 : 2e-5; /* a sum of rounded summands */
	describe(t, text, sizeof text);
	for (int k = 0; k < t->n_result; k++) {
		double gap = difference(t, k, whole->result[0]);
		if (!(gap >= 0 && gap <= allowed) && !(*wrong)++)
			test_failed(__FILE__, __LINE__,
			            "%s is accepted, but result %d as %s/%s differs by %g", text, k,
			            place_names[t->result[0][k].place[0]],
			            place_names[t->result[0][k].place[1]], gap);
	}
	return true;
}

static int count_operands(const struct operation *o)
{
	int n = 0;
	while (n < OP_MAX_IN && o->in[n].shape.dim[0])
		n++;
	return n;
}

/* Every combination along one axis of two ranks; lists those that are accepted. */
static int try_axis(struct trial *t, int axis, const struct trial *whole, uint8_t (*good)[OP_MAX_IN],
                    int *wrong)
{
	int n_in = count_operands(t->o), combinations = 1, accepted = 0;
	memset(t->at, 0, sizeof t->at);
	t->size[axis] = 2;
	t->size[!axis] = 1;
	for (int k = 0; k < n_in; k++)
		combinations *= PLACE_COUNT;
	for (int i = 0; i < combinations; i++) {
		for (int k = 0, rest = i; k < n_in; k++, rest /= PLACE_COUNT)
			t->at[k][axis] = (uint8_t)(rest % PLACE_COUNT);
		if (!attempt(t, whole, wrong))
			continue;
		for (int k = 0; k < n_in && accepted < COMBINATIONS; k++)
			good[accepted][k] = t->at[k][axis];
		accepted++;
	}
	if (accepted != t->o->accepted[axis])
		test_failed(__FILE__, __LINE__, "%s accepts %d combinations along %s, not %d", t->o->name,
		            accepted, mesh_axis_name(axes[axis]), t->o->accepted[axis]);
	return accepted < COMBINATIONS ? accepted : COMBINATIONS;
}

/* What is right along either axis is right along both. */
static void try_all(const struct operation *o)
{
	static struct trial whole, t;
	uint8_t good[AXES][COMBINATIONS][OP_MAX_IN];
	int n[AXES], wrong = 0, both = 0;
	whole = (struct trial){.o = o, .size = {1, 1}};
	t = whole;
	MUST(run(&whole));
	for (int a = 0; a < AXES; a++)
		n[a] = try_axis(&t, a, &whole, good[a], &wrong);
	t.size[0] = t.size[1] = 2;
	for (int i = 0; i < n[0] * n[1]; i++) {
		for (int k = 0; k < OP_MAX_IN; k++) {
			t.at[k][0] = good[0][i / n[1]][k];
			t.at[k][1] = good[1][i % n[1]][k];
		}
		both += attempt(&t, &whole, &wrong);
	}
	CHECK(both > 0);
}

TEST(every_operation_is_tried)
{
	for (enum op op = 0; op < OP_COUNT; op++) {
		bool tried = op == OP_zero || op == OP_wait; /* no operands; see await */
		for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
			tried |= operations[i].build == one_node && operations[i].op == op;
		if (!tried)
			test_failed(__FILE__, __LINE__, "%s", op_rows[op].name);
	}
}

TEST(what_the_rules_accept_is_right_on_two_ranks_and_on_four)
{
	for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
		try_all(&operations[i]);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
