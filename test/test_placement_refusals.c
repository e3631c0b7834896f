/* Placement rules by example: what a builder may not write is refused with its layer and line. */
#include "base/err.h"
#include "test/refusal.h"
#include "test/test.h"

/* A layer is cut over two tensor-parallel or data-parallel ranks. */

enum { N = 6, C = 4, F = 8 };

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
	EMIT(p, dropout, ARG(.dropout = {.p = 0.5f, .seq_length = 1}), x, keys(p));
}

static void dropout_of_rows_that_are_not_cut(struct prog *p)
{
	int32_t x = stream(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, dropout, ARG(.dropout = {.p = 0.5f, .seq_length = 1, .axes = AXIS_BIT(tp)}), x, keys(p));
}

static void dropout_beyond_its_samples(struct prog *p)
{
	int32_t x = stream(p, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, dropout,
	     ARG(.dropout = {.p = 0.5f, .seq_length = 1, .first_row = N - 1, .axes = AXIS_BIT(tp)}), x,
	     keys(p));
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
	y = EMIT(p, dropout, ARG(.dropout = {.p = 0.5f, .seq_length = 1, .axes = AXIS_BIT(tp)}),
	         EMIT(p, bias_add, NO_ARG, y, b), keys(p));
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

static const struct example examples[] = {
        EXAMPLE(bias_on_partial_sums, "linear", "added once per rank"),
        EXAMPLE(bias_not_cut_like_its_weight, "linear", "the bias is not sharded as w"),
        EXAMPLE(activation_of_partial_sums, "activation", "nonlinear operation on partial sums"),
        EXAMPLE(norm_of_partial_sums, "rmsnorm", "partial sums"),
        EXAMPLE(product_of_partial_sums, "linear", "an all-reduce is missing"),
        EXAMPLE(residual_without_all_reduce, "add", "operands are placed differently"),
        EXAMPLE(all_reduce_of_whole_values, "all_reduce", "no partial sums"),
        EXAMPLE(all_reduce_of_shards, "all_reduce", "no partial sums"),
        EXAMPLE(all_reduce_over_another_axis, "all_reduce", "no partial sums"),
        EXAMPLE(norm_of_cut_rows, "rmsnorm", "whole rows"),
        EXAMPLE(adamw_on_a_partial_gradient, "adamw", "the gradient is not placed as its parameter"),
        EXAMPLE(norm_of_a_partial_gradient, "square_sum", "an all-reduce is missing"),
        EXAMPLE(adamw_with_an_incomplete_norm, "adamw", "norm is not complete"),
        EXAMPLE(two_placements_in_one_accumulator, "linear_dw", "placed otherwise"),
        EXAMPLE(bias_after_a_sum_that_was_forgotten, "bias_add", "added once per rank"),
        EXAMPLE(residual_without_reduce_scatter, "add", "operands are placed differently"),
        EXAMPLE(product_without_all_gather, "linear", "sharded on dimensions that do not match"),
        EXAMPLE(norm_without_fan_out, "rmsnorm_bwd", "these are partial sums"),
        EXAMPLE(residual_without_fan_out, "add", "operands are placed differently"),
        EXAMPLE(fan_out_of_cut_rows, "fan_out", "must hold the same operand"),
        EXAMPLE(all_gather_of_whole_rows, "all_gather", "not cut over these ranks"),
        EXAMPLE(all_gather_of_cut_columns, "all_gather", "not cut over these ranks"),
        EXAMPLE(reduce_scatter_of_whole_rows, "reduce_scatter", "no partial sums"),
        EXAMPLE(reduce_scatter_of_an_odd_row, "reduce_scatter", "not a multiple of the ranks"),
        EXAMPLE(share_of_shards, "share", "makes copies equal, and these are none"),
        EXAMPLE(look_up_in_a_cut_that_is_not_said, "embedding", "looks nothing up"),
        EXAMPLE(look_up_in_a_cut_that_is_not_there, "embedding", "looks nothing up"),
        EXAMPLE(loss_of_columns_whose_cut_is_not_said, "cross_entropy", "whole rows of logits"),
        EXAMPLE(loss_of_cut_columns_alone, "cross_entropy", "need the statistics of all ranks"),
        EXAMPLE(statistics_of_one_rank, "cross_entropy", "statistics are placed differently"),
        EXAMPLE(statistics_of_whole_columns, "logit_stats", "columns are not cut over this axis"),
        EXAMPLE(dropout_of_rows_whose_cut_is_not_said, "dropout", "rows and keys are placed differently"),
        EXAMPLE(dropout_of_rows_that_are_not_cut, "dropout", "rows and keys are placed differently"),
        EXAMPLE(dropout_beyond_its_samples, "dropout", "one i64 key a sample"),
        EXAMPLE(norm_that_counts_twice, "square_sum", "counted on several ranks"),
        EXAMPLE(the_layer_on_cut_rows, NULL, NULL),
        EXAMPLE(the_layer_as_it_should_be, NULL, NULL),
        EXAMPLE(the_update_as_it_should_be, NULL, NULL),
};

TEST(what_a_builder_forgets_is_refused_with_layer_and_line)
{
	refusal_check(examples, sizeof examples / sizeof *examples);
}
