/* Placement rules by example, where ranks share samples and experts. */
#include "base/err.h"
#include "test/refusal.h"
#include "test/test.h"

enum { N = 8, C = 4, E = 4, K = 2, F = 4, H = 4, G = 2, D = 4 };

/* A value of this rank's size, placed along one axis. */
static int32_t lying(struct prog *p, enum region region, enum dtype dtype, int32_t rows, int32_t columns,
                     enum mesh_axis axis, enum place place)
{
	int32_t dim[] = {rows, columns};
	int32_t v = prog_value(p, "v", region, dtype, columns ? 2 : 1, dim);
	prog_place(p, v, axis, place);
	return v;
}

static int32_t floats(struct prog *p, int32_t rows, int32_t columns, enum mesh_axis axis, enum place place)
{
	return lying(p, R_INPUT, DT_f32, rows, columns, axis, place);
}

static int32_t ints(struct prog *p, int32_t rows, int32_t columns, enum mesh_axis axis, enum place place)
{
	return lying(p, R_INPUT, DT_i32, rows, columns, axis, place);
}

static int32_t weight(struct prog *p, int32_t rows, int32_t columns, enum mesh_axis axis, enum place place)
{
	return lying(p, R_PARAM, DT_f32, rows, columns, axis, place);
}

/* Samples on two ranks */

static union op_arg attention(struct prog *p)
{
	p->axis_size[AXIS_cp] = 2;
	return (union op_arg){.attention = {.seq_length = 2 * N,
	                                    .heads = H,
	                                    .groups = G,
	                                    .head_dim = D,
	                                    .scale = 0.5f,
	                                    .queries = {2, 0, 1},
	                                    .rows = {2, 0, 1},
	                                    .covered = 1,
	                                    .goes_on = 1,
	                                    .axes = AXIS_BIT(cp)}};
}

static int32_t queries(struct prog *p)
{
	return floats(p, N, H * D, AXIS_cp, PLACE_SHARD0);
}

static int32_t keys_and_values(struct prog *p, int32_t rows, enum place place)
{
	return floats(p, rows, 2 * G * D, AXIS_cp, place);
}

/* Of this rank's keys alone. */
static int32_t first_part(struct prog *p)
{
	union op_arg arg = attention(p);
	return EMIT(p, attention_part, &arg, queries(p), keys_and_values(p, N, PLACE_SHARD0));
}

static void attention_on_part_of_a_sample(struct prog *p)
{
	union op_arg arg = attention(p);
	arg.attention.seq_length = N;
	arg.attention.queries = (struct context){0};
	int32_t qkv = floats(p, N, (H + 2 * G) * D, AXIS_cp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, attention, &arg, qkv);
}

static void product_of_a_part(struct prog *p)
{
	int32_t o = first_part(p), w = weight(p, C, H * D, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, linear, NO_ARG, o, w);
}

static void sum_of_parts(struct prog *p)
{
	int32_t o = first_part(p);
	here = __LINE__ + 1;
	EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(cp)}), o);
}

static void statistics_of_a_part(struct prog *p)
{
	first_part(p);
	int32_t lse = prog_out(p, 1);
	here = __LINE__ + 1;
	EMIT(p, add, NO_ARG, lse, lse);
}

static void part_that_claims_to_have_seen_all(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_SHARD0);
	arg.attention.covered = 2;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void next_part(struct prog *p, int32_t rank, int32_t covered)
{
	int32_t before = first_part(p), lse = prog_out(p, 1), q = p->node[p->n_node - 1].in[0];
	union op_arg arg = attention(p);
	arg.attention.rows.first = rank;
	arg.attention.covered = covered;
	arg.attention.goes_on = covered < 2;
	int32_t kv = EMIT(p, shift, ARG(.comm = {.axes = AXIS_BIT(cp), .step = 1}),
	                  keys_and_values(p, N, PLACE_SHARD0));
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv, before, lse);
}

static void the_same_keys_twice(struct prog *p)
{
	next_part(p, 0, 2);
}

static void all_keys_after_those_of_one_rank(struct prog *p)
{
	int32_t before = first_part(p), lse = prog_out(p, 1), q = p->node[p->n_node - 1].in[0];
	union op_arg arg = attention(p);
	arg.attention.rows = (struct context){2, 1, 2};
	arg.attention.covered = 3;
	int32_t kv = EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(cp)}), keys_and_values(p, N, PLACE_SHARD0));
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv, before, lse);
}

static void part_that_forgets_the_one_before(struct prog *p)
{
	next_part(p, 1, 1);
}

static void two_parts_as_it_should_be(struct prog *p)
{
	next_part(p, 1, 2);
	const struct node *last = &p->node[p->n_node - 1];
	CHECK_INT(p->value[last->in[2]].place[AXIS_cp], PLACE_PARTIAL);
	CHECK_INT(p->value[last->out[0]].place[AXIS_cp], PLACE_SHARD0);
}

static void part_after_something_else(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_SHARD0),
	        lse = floats(p, N, H, AXIS_cp, PLACE_SHARD0);
	arg.attention.rows.first = 1;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv, q, lse);
}

static void gathered_keys_as_those_of_one_rank(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p),
	        kv = EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(cp)}), keys_and_values(p, N, PLACE_SHARD0));
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void keys_that_all_ranks_hold_as_those_of_one(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void keys_that_were_not_gathered(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, 2 * N, PLACE_SHARD0);
	arg.attention.rows.count = arg.attention.covered = 2;
	arg.attention.goes_on = 0;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void queries_of_all_ranks(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = floats(p, N, H * D, AXIS_cp, PLACE_REPLICATED), kv = keys_and_values(p, N, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void begins_of_other_rows(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_SHARD0);
	int32_t begins = ints(p, N, 0, AXIS_cp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv, NONE, NONE, NONE, begins);
}

static void part_whose_axis_is_not_said(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_SHARD0);
	arg.attention.axes = 0;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void shift_of_what_all_ranks_hold(struct prog *p)
{
	p->axis_size[AXIS_cp] = 2;
	int32_t kv = keys_and_values(p, N, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, shift, ARG(.comm = {.axes = AXIS_BIT(cp), .step = 1}), kv);
}

static void shift_along_two_axes(struct prog *p)
{
	p->axis_size[AXIS_cp] = 2;
	int32_t kv = keys_and_values(p, N, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, shift, ARG(.comm = {.axes = AXIS_BIT(cp) | AXIS_BIT(dp), .step = 1}), kv);
}

static union op_arg some_heads(struct prog *p)
{
	union op_arg arg = attention(p);
	arg.attention.heads /= 2;
	arg.attention.groups /= 2;
	arg.attention.queries = (struct context){2, 0, 2};
	return arg;
}

static void rows_for_heads_that_were_not_split(struct prog *p)
{
	union op_arg arg = some_heads(p);
	int32_t qkv = floats(p, N, (H + 2 * G) * D, AXIS_cp, PLACE_SHARD0);
	qkv = EMIT(p, all_to_all, ARG(.comm = {AXIS_BIT(cp)}), qkv);
	here = __LINE__ + 1;
	EMIT(p, attention, &arg, qkv);
}

/* [q | k | v] of this rank's rows to all rows of some heads. */
static int32_t exchanged(struct prog *p)
{
	int32_t qkv = floats(p, N, (H + 2 * G) * D, AXIS_cp, PLACE_SHARD0);
	qkv = EMIT(p, split_heads, ARG(.heads = {2, {H * D, G * D, G * D}}), qkv);
	return EMIT(p, all_to_all, ARG(.comm = {AXIS_BIT(cp)}), qkv);
}

static void heads_that_stay_away(struct prog *p)
{
	union op_arg arg = some_heads(p);
	int32_t o = EMIT(p, attention, &arg, exchanged(p)),
	        w = weight(p, C, H * D, AXIS_tp, PLACE_REPLICATED);
	o = EMIT(p, all_to_all, ARG(.comm = {AXIS_BIT(cp)}), o);
	here = __LINE__ + 1;
	EMIT(p, linear, NO_ARG, o, w);
}

static void begins_of_one_ranks_rows(struct prog *p)
{
	union op_arg arg = some_heads(p);
	int32_t qkv = exchanged(p), begins = ints(p, N, 0, AXIS_cp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, attention, &arg, qkv, NONE, begins);
}

static void exchange_of_what_all_ranks_hold(struct prog *p)
{
	p->axis_size[AXIS_cp] = 2;
	int32_t x = floats(p, N, C, AXIS_cp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, all_to_all, ARG(.comm = {AXIS_BIT(cp)}), x);
}

/* All heads share the key, so each rank has part of its gradient. */
static void latent_key_without_fan_out(struct prog *p)
{
	int32_t x = floats(p, N, C, AXIS_tp, PLACE_REPLICATED), R = 2, V = 2;
	int32_t key = EMIT(p, linear, NO_ARG, x, weight(p, R, C, AXIS_tp, PLACE_REPLICATED));
	int32_t q = floats(p, N, H / 2 * D, AXIS_tp, PLACE_SHARD1);
	int32_t kv = floats(p, N, H / 2 * (D - R + V), AXIS_tp, PLACE_SHARD1);
	int32_t table = floats(p, N, R, AXIS_tp, PLACE_REPLICATED),
	        at = ints(p, N, 0, AXIS_tp, PLACE_REPLICATED);
	int32_t y = EMIT(p, mla_pack, ARG(.mla = {.heads = H / 2, .head_dim = D, .value_dim = V}), q, kv, key,
	                 table, at);
	here = NONE;
	prog_backward(p, &(struct seed){y, floats(p, N, H / 2 * (2 * D + V), AXIS_tp, PLACE_SHARD1)}, 1);
}

static void columns_of_different_ranks(struct prog *p)
{
	int32_t a = floats(p, N, C, AXIS_tp, PLACE_SHARD1), b = floats(p, N, C, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, join_columns, NO_ARG, a, b);
}

/* The router */

static void gate_on_partial_sums(struct prog *p)
{
	int32_t y = floats(p, N, C, AXIS_tp, PLACE_PARTIAL),
	        gate = floats(p, N, 1, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, row_gate, NO_ARG, y, gate);
}

static void choice_among_some_experts(struct prog *p)
{
	int32_t logits = floats(p, N, E, AXIS_tp, PLACE_SHARD1);
	here = __LINE__ + 1;
	EMIT(p, route, ARG(.route = {.topk = K}), logits);
}

static union op_arg balance(uint32_t axes)
{
	return (union op_arg){.balance = {.experts = E, .aux_coeff = 0.01f, .sequences = 1, .axes = axes}};
}

static void counts_of_copies(struct prog *p)
{
	union op_arg arg = balance(AXIS_BIT(tp));
	int32_t index = ints(p, N, K, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, expert_counts, &arg, index);
}

static void balance_of_counts_that_were_not_added_up(struct prog *p)
{
	union op_arg arg = balance(AXIS_BIT(tp));
	int32_t logits = floats(p, N, E, AXIS_tp, PLACE_SHARD0);
	int32_t counts = EMIT(p, expert_counts, &arg, ints(p, N, K, AXIS_tp, PLACE_SHARD0));
	here = __LINE__ + 1;
	EMIT(p, balance, &arg, logits, counts);
}

static void balance_of_counts_of_part_of_a_sample(struct prog *p)
{
	p->axis_size[AXIS_cp] = 2;
	union op_arg arg = balance(AXIS_BIT(cp));
	int32_t logits = floats(p, N, E, AXIS_cp, PLACE_SHARD0);
	int32_t counts = EMIT(p, expert_counts, &arg, ints(p, N, K, AXIS_cp, PLACE_SHARD0));
	here = __LINE__ + 1;
	EMIT(p, balance, &arg, logits, counts);
}

static void balance_of_each_ranks_rows(struct prog *p)
{
	union op_arg arg = balance(0);
	int32_t logits = floats(p, N, E, AXIS_tp, PLACE_SHARD0);
	int32_t counts = EMIT(p, expert_counts, &arg, ints(p, N, K, AXIS_tp, PLACE_SHARD0));
	here = __LINE__ + 1;
	EMIT(p, balance, &arg, logits, counts);
}

static void each_ranks_rows_where_no_loss_looks(struct prog *p)
{
	union op_arg arg = balance(0);
	arg.balance.aux_coeff = 0;
	int32_t logits = floats(p, N, E, AXIS_tp, PLACE_SHARD0);
	EMIT(p, balance, &arg, logits, EMIT(p, expert_counts, &arg, ints(p, N, K, AXIS_tp, PLACE_SHARD0)));
}

static void bias_moved_by_one_ranks_counts(struct prog *p)
{
	union op_arg arg = balance(AXIS_BIT(tp));
	int32_t bias = weight(p, E, 0, AXIS_tp, PLACE_REPLICATED);
	int32_t counts = EMIT(p, expert_counts, &arg, ints(p, N, K, AXIS_tp, PLACE_SHARD0));
	here = __LINE__ + 1;
	EMIT(p, bias_update, ARG(.bias_update = {0.1f}), bias, counts);
}

static union op_arg capacity(int32_t ranks, uint32_t axes)
{
	return (union op_arg){
	        .capacity = {.experts = E, .limit = 2, .ranks = ranks, .seq_length = N, .axes = axes}};
}

static void capacity_without_gathering(struct prog *p)
{
	union op_arg arg = capacity(2, AXIS_BIT(tp));
	int32_t index = ints(p, N, K, AXIS_tp, PLACE_SHARD0), probs = floats(p, N, K, AXIS_tp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, capacity, &arg, index, probs);
}

static void capacity_over_data_without_gathering(struct prog *p)
{
	union op_arg arg = capacity(2, AXIS_BIT(dp));
	int32_t index = ints(p, N, K, AXIS_dp, PLACE_SHARD0), probs = floats(p, N, K, AXIS_dp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, capacity, &arg, index, probs);
}

static void capacity_of_each_ranks_rows(struct prog *p)
{
	union op_arg arg = capacity(1, 0);
	int32_t index = ints(p, N, K, AXIS_tp, PLACE_SHARD0), probs = floats(p, N, K, AXIS_tp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, capacity, &arg, index, probs);
}

static void capacity_of_gathered_choices_but_own_weights(struct prog *p)
{
	union op_arg arg = capacity(2, AXIS_BIT(tp));
	int32_t index = ints(p, N, K, AXIS_tp, PLACE_REPLICATED),
	        probs = floats(p, N, K, AXIS_tp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, capacity, &arg, index, probs);
}

static void capacity_that_keeps_other_ranks_rows(struct prog *p)
{
	union op_arg arg = capacity(1, AXIS_BIT(tp));
	int32_t index = ints(p, N, K, AXIS_tp, PLACE_REPLICATED),
	        probs = floats(p, N, K, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, capacity, &arg, index, probs);
}

/* The expert grid: ep · etp are the four ranks of tp · dp. */

static void fold(struct prog *p)
{
	p->axis_size[AXIS_ep] = p->axis_size[AXIS_etp] = 2;
}

/* Gathered over etp, cut over ep. */
static int32_t rows_on(struct prog *p, int32_t rows, int32_t columns, enum place ep, enum place etp)
{
	int32_t v = floats(p, rows, columns, AXIS_ep, ep);
	prog_place(p, v, AXIS_etp, etp);
	return v;
}

static int32_t index_on(struct prog *p, enum place ep)
{
	return ints(p, N, K, AXIS_ep, ep);
}

static int32_t sizes_on(struct prog *p, enum place ep)
{
	return ints(p, 2, E, AXIS_ep, ep);
}

static union op_arg own_experts(int32_t count)
{
	return (union op_arg){.expert = {.count = count, .kind = ACT_silu, .gated = 1, .rows = N}};
}

static int32_t experts_on(struct prog *p, int32_t count, int32_t columns, enum place etp)
{
	int32_t w = weight(p, count * F, columns, AXIS_ep, PLACE_SHARD0);
	prog_place(p, w, AXIS_etp, etp);
	return w;
}

static void experts_on_rows_of_the_dense_grid(struct prog *p)
{
	fold(p);
	union op_arg arg = own_experts(E / 2);
	int32_t h = floats(p, N, C, AXIS_tp, PLACE_SHARD0), w = experts_on(p, E / 2, C, PLACE_REPLICATED);
	int32_t sizes = ints(p, 2, E, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, grouped_linear, &arg, h, w, sizes);
}

static void residual_of_the_other_grid(struct prog *p)
{
	fold(p);
	int32_t x = floats(p, N, C, AXIS_tp, PLACE_SHARD0), y = rows_on(p, N, C, PLACE_SHARD0, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, add, NO_ARG, x, y);
}

static void regrid_of_what_tensor_parallel_ranks_hold(struct prog *p)
{
	fold(p);
	int32_t h = floats(p, N, C, AXIS_dp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, regrid, NO_ARG, h);
}

static void regrid_without_reduce_scatter(struct prog *p)
{
	fold(p);
	union op_arg arg = own_experts(E / 2);
	int32_t h = rows_on(p, N, F / 2, PLACE_SHARD0, PLACE_SHARD1),
	        w = experts_on(p, E / 2, F / 2, PLACE_SHARD1);
	int32_t y = EMIT(p, grouped_linear, &arg, h, w, sizes_on(p, PLACE_REPLICATED));
	here = __LINE__ + 1;
	EMIT(p, regrid, NO_ARG, y);
}

static void all_reduce_over_ranks_of_the_other_grid(struct prog *p)
{
	fold(p);
	int32_t x = floats(p, N, C, AXIS_tp, PLACE_PARTIAL);
	here = __LINE__ + 1;
	EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(etp)}), x);
}

/* Stages belong to both grids, and an axis of one rank to any. */
static void all_reduce_over_stages(struct prog *p)
{
	p->axis_size[AXIS_pp] = 2;
	int32_t x = floats(p, N, C, AXIS_tp, PLACE_PARTIAL);
	EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(tp) | AXIS_BIT(pp) | AXIS_BIT(etp)}), x);
}

/* Its gradient is partial over ranks that nobody adds up, since it lies on the dense grid. */
static void weight_of_the_other_grid(struct prog *p)
{
	fold(p);
	int32_t w = weight(p, F, C, AXIS_tp, PLACE_REPLICATED);
	int32_t y = EMIT(p, linear, NO_ARG, rows_on(p, N, C, PLACE_SHARD0, PLACE_SHARD0), w);
	here = NONE;
	prog_backward(p, &(struct seed){y, rows_on(p, N, F, PLACE_SHARD0, PLACE_SHARD0)}, 1);
}

static void same_gradient_everywhere(struct prog *p)
{
	fold(p);
	int32_t w = weight(p, F, C, AXIS_tp, PLACE_REPLICATED);
	int32_t y = EMIT(p, linear, NO_ARG, rows_on(p, N, C, PLACE_REPLICATED, PLACE_REPLICATED), w);
	prog_backward(p, &(struct seed){y, rows_on(p, N, F, PLACE_REPLICATED, PLACE_REPLICATED)}, 1);
}

/* Every rank adds what is its own, so the sum is of the ranks of either grid. */
static void norm_over_both_grids(struct prog *p)
{
	static const enum mesh_axis axes[] = {AXIS_tp, AXIS_dp, AXIS_ep, AXIS_etp};
	int32_t one = 1, norm2 = prog_value(p, "norm2", R_STAT, DT_f64, 1, &one);
	fold(p);
	p->axis_size[AXIS_pp] = 2;
	for (size_t i = 0; i < sizeof axes / sizeof *axes; i++)
		prog_place(p, norm2, axes[i], PLACE_PARTIAL);
	p->value[norm2].grid = GRID_DENSE;
	EMIT_INTO(p, square_sum, ARG(.square_sum = {1}), (int32_t[OP_MAX_OUT]){norm2},
	          rows_on(p, F, C, PLACE_SHARD0, PLACE_REPLICATED));
}

static void norm_over_one_grid(struct prog *p)
{
	int32_t one = 1, norm2 = prog_value(p, "norm2", R_STAT, DT_f64, 1, &one);
	fold(p);
	int32_t g = rows_on(p, F, C, PLACE_SHARD0, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT_INTO(p, square_sum, ARG(.square_sum = {1}), (int32_t[OP_MAX_OUT]){norm2}, g);
}

static union op_arg dispatch(int32_t ranks, int32_t own)
{
	return (union op_arg){
	        .dispatch = {.experts = E, .ranks = ranks, .count = own, .counts = 1, .axes = AXIS_BIT(ep)}};
}

static void plan_with_one_ranks_counts(struct prog *p)
{
	fold(p);
	union op_arg arg = dispatch(2, 0);
	int32_t index = index_on(p, PLACE_SHARD0), counts = sizes_on(p, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, dispatch_plan, &arg, index, counts);
}

static void plan_for_own_experts_without_gathering(struct prog *p)
{
	fold(p);
	union op_arg arg = dispatch(1, E / 2);
	int32_t index = index_on(p, PLACE_SHARD0), counts = ints(p, 1, E, AXIS_ep, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, dispatch_plan, &arg, index, counts);
}

static void plan_for_other_experts(struct prog *p)
{
	fold(p);
	p->axis_rank[AXIS_ep] = 1;
	union op_arg arg = dispatch(1, E / 2);
	int32_t index = index_on(p, PLACE_REPLICATED), counts = ints(p, 1, E, AXIS_ep, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, dispatch_plan, &arg, index, counts);
}

static void plan_for_all_experts_as_own(struct prog *p)
{
	fold(p);
	union op_arg arg = dispatch(1, E);
	int32_t index = index_on(p, PLACE_REPLICATED), counts = ints(p, 1, E, AXIS_ep, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, dispatch_plan, &arg, index, counts);
}

static void plan_as_if_alone(struct prog *p)
{
	fold(p);
	union op_arg arg = dispatch(1, 0);
	int32_t index = index_on(p, PLACE_SHARD0), counts = ints(p, 1, E, AXIS_ep, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, dispatch_plan, &arg, index, counts);
}

static void plan_of_another_rank(struct prog *p)
{
	fold(p);
	p->axis_rank[AXIS_ep] = 1;
	union op_arg arg = dispatch(2, 0);
	int32_t index = index_on(p, PLACE_SHARD0), counts = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, dispatch_plan, &arg, index, counts);
}

static void overflow_that_counts_twice(struct prog *p)
{
	fold(p);
	p->axis_rank[AXIS_etp] = 1;
	union op_arg arg = dispatch(2, 0);
	int32_t index = index_on(p, PLACE_SHARD0), counts = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, dispatch_plan, &arg, index, counts);
}

/* [2·N,K], for the choices of own experts among those of all ranks. */
static int32_t own_slots(struct prog *p)
{
	union op_arg arg = dispatch(1, E / 2);
	fold(p);
	int32_t index = EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(ep)}), index_on(p, PLACE_SHARD0));
	int32_t counts = EMIT(p, expert_counts, ARG(.balance = {.experts = E, .sequences = 1}), index);
	return EMIT(p, dispatch_plan, &arg, index, counts);
}

static void own_choices_of_cut_rows(struct prog *p)
{
	int32_t slot = own_slots(p), h = rows_on(p, 2 * N, C, PLACE_SHARD0, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, permute, ARG(.permute = {.rows = N}), h, slot);
}

static void own_weights_of_cut_rows(struct prog *p)
{
	int32_t slot = own_slots(p), probs = rows_on(p, 2 * N, K, PLACE_SHARD0, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, permute_probs, ARG(.permute = {.rows = N}), probs, slot);
}

static void own_choices_without_reduce_scatter(struct prog *p)
{
	int32_t slot = own_slots(p), y = rows_on(p, N, C, PLACE_SHARD0, PLACE_REPLICATED);
	y = EMIT(p, unpermute, NO_ARG, y, slot);
	here = __LINE__ + 1;
	EMIT(p, regrid, NO_ARG, y);
}

static void own_choices_among_rows_of_all(struct prog *p)
{
	int32_t slot = own_slots(p), y = rows_on(p, N, C, PLACE_REPLICATED, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, unpermute, NO_ARG, y, slot);
}

static void sums_of_other_rows_than_the_slots(struct prog *p)
{
	fold(p);
	int32_t slot = index_on(p, PLACE_SHARD0), h = rows_on(p, N, C, PLACE_PARTIAL, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, permute, ARG(.permute = {.rows = N}), h, slot);
}

static const union op_arg *over_ep(void)
{
	static const union op_arg arg = {.comm = {.axes = AXIS_BIT(ep), .rows = N}};
	return &arg;
}

static void rows_that_go_by_one_ranks_sizes(struct prog *p)
{
	fold(p);
	int32_t h = rows_on(p, N, C, PLACE_SHARD0, PLACE_REPLICATED), sizes = sizes_on(p, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, all_to_all, over_ep(), h, sizes);
}

static void rows_that_go_by_other_ranks_sizes(struct prog *p)
{
	p->axis_size[AXIS_ep] = p->axis_size[AXIS_edp] = 2;
	int32_t h = floats(p, N, C, AXIS_ep, PLACE_SHARD0), sizes = sizes_on(p, PLACE_REPLICATED);
	prog_place(p, h, AXIS_edp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, all_to_all, over_ep(), h, sizes);
}

static void rows_that_go_although_all_ranks_hold_them(struct prog *p)
{
	fold(p);
	int32_t h = rows_on(p, N, C, PLACE_REPLICATED, PLACE_REPLICATED),
	        sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, all_to_all, over_ep(), h, sizes);
}

static void experts_of_a_rank_on_rows_of_all(struct prog *p)
{
	fold(p);
	union op_arg arg = own_experts(E / 2);
	int32_t h = rows_on(p, N, C, PLACE_REPLICATED, PLACE_REPLICATED),
	        w = experts_on(p, E / 2, C, PLACE_REPLICATED);
	int32_t sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, grouped_linear, &arg, h, w, sizes);
}

static void experts_that_all_ranks_hold(struct prog *p)
{
	fold(p);
	union op_arg arg = own_experts(E / 2);
	int32_t h = rows_on(p, N, C, PLACE_SHARD0, PLACE_REPLICATED);
	int32_t w = weight(p, E / 2 * F, C, AXIS_ep, PLACE_REPLICATED), sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, grouped_linear, &arg, h, w, sizes);
}

static void experts_of_another_rank(struct prog *p)
{
	fold(p);
	p->axis_rank[AXIS_ep] = 1;
	union op_arg arg = own_experts(E / 2);
	int32_t h = rows_on(p, N, C, PLACE_SHARD0, PLACE_REPLICATED),
	        w = experts_on(p, E / 2, C, PLACE_REPLICATED);
	int32_t sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, grouped_linear, &arg, h, w, sizes);
}

static void some_of_the_experts(struct prog *p)
{
	union op_arg arg = own_experts(E - 1);
	int32_t h = rows_on(p, N, C, PLACE_REPLICATED, PLACE_REPLICATED);
	int32_t w = weight(p, (E - 1) * F, C, AXIS_ep, PLACE_REPLICATED),
	        sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, grouped_linear, &arg, h, w, sizes);
}

static void all_experts_but_the_first(struct prog *p)
{
	union op_arg arg = own_experts(E);
	arg.expert.first = 1;
	int32_t h = rows_on(p, N, C, PLACE_REPLICATED, PLACE_REPLICATED);
	int32_t w = weight(p, E * F, C, AXIS_ep, PLACE_REPLICATED), sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, grouped_linear, &arg, h, w, sizes);
}

/* By experts, the weights still by tokens of all ranks. */
static void weights_in_another_order(struct prog *p)
{
	fold(p);
	union op_arg arg = own_experts(E / 2);
	int32_t h = rows_on(p, N, 2 * F, PLACE_SHARD0, PLACE_REPLICATED);
	int32_t weights = rows_on(p, N, 0, PLACE_REPLICATED, PLACE_REPLICATED),
	        sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, expert_activation, &arg, h, weights, sizes);
}

static void activation_before_the_columns_are_added_up(struct prog *p)
{
	fold(p);
	union op_arg arg = own_experts(E / 2);
	int32_t h = rows_on(p, N, 2 * F, PLACE_SHARD0, PLACE_PARTIAL);
	int32_t weights = rows_on(p, N, 0, PLACE_SHARD0, PLACE_REPLICATED),
	        sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, expert_activation, &arg, h, weights, sizes);
}

static int32_t replicas(struct prog *p, int32_t columns)
{
	int32_t v = floats(p, N, columns, AXIS_edp, PLACE_SHARD0);
	return v;
}

static void order_by_the_sizes_of_other_rows(struct prog *p)
{
	p->axis_size[AXIS_edp] = 2;
	union op_arg arg = own_experts(E);
	int32_t h = replicas(p, C), sizes = sizes_on(p, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, regroup, &arg, h, sizes);
}

/* Replicas of the experts have seen rows of their own. */
static int32_t gradient_of_a_replica(struct prog *p)
{
	union op_arg arg = own_experts(E);
	p->axis_size[AXIS_edp] = 2;
	int32_t sizes = ints(p, 2, E, AXIS_edp, PLACE_SHARD0);
	return EMIT(p, grouped_dw, &arg, replicas(p, F), replicas(p, C), sizes);
}

static void gradient_of_other_rows(struct prog *p)
{
	union op_arg arg = own_experts(E);
	p->axis_size[AXIS_edp] = 2;
	int32_t x = floats(p, N, C, AXIS_edp, PLACE_REPLICATED),
	        sizes = ints(p, 2, E, AXIS_edp, PLACE_SHARD0);
	int32_t dy = replicas(p, F);
	here = __LINE__ + 1;
	EMIT(p, grouped_dw, &arg, dy, x, sizes);
}

static void gradient_from_other_rows(struct prog *p)
{
	union op_arg arg = own_experts(E);
	p->axis_size[AXIS_edp] = 2;
	int32_t dy = floats(p, N, F, AXIS_edp, PLACE_REPLICATED),
	        sizes = ints(p, 2, E, AXIS_edp, PLACE_REPLICATED);
	int32_t x = replicas(p, C);
	here = __LINE__ + 1;
	EMIT(p, grouped_dw, &arg, dy, x, sizes);
}

static void norm_of_one_replicas_gradient(struct prog *p)
{
	int32_t g = gradient_of_a_replica(p);
	here = __LINE__ + 1;
	EMIT(p, square_sum, ARG(.square_sum = {1}), g);
}

static void replicas_as_it_should_be(struct prog *p)
{
	int32_t g = gradient_of_a_replica(p);
	EMIT(p, square_sum, ARG(.square_sum = {1}), EMIT(p, all_reduce, ARG(.comm = {AXIS_BIT(edp)}), g));
}

/* Shapes */

static void split_behind_the_last_column(struct prog *p)
{
	int32_t x = floats(p, N, C, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, split_columns, ARG(.columns = {C}), x);
}

static void join_of_different_rows(struct prog *p)
{
	int32_t a = floats(p, N, C, AXIS_tp, PLACE_REPLICATED),
	        b = floats(p, N + 1, C, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, join_columns, NO_ARG, a, b);
}

static void more_ranks_than_heads(struct prog *p)
{
	int32_t x = floats(p, N, 9, AXIS_cp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, split_heads, ARG(.heads = {2, {3, 3, 3}}), x);
}

static void heads_without_values(struct prog *p)
{
	int32_t x = floats(p, N, 12, AXIS_cp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, split_heads, ARG(.heads = {2, {4, 4}}), x);
}

static void heads_of_odd_rows(struct prog *p)
{
	int32_t x = floats(p, N - 1, 2, AXIS_cp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, join_heads, ARG(.heads = {2, {4}}), x);
}

static void exchange_of_odd_rows(struct prog *p)
{
	p->axis_size[AXIS_cp] = 2;
	int32_t x = floats(p, N - 1, C, AXIS_cp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, all_to_all, ARG(.comm = {AXIS_BIT(cp)}), x);
}

static void exchange_by_sizes_of_one_rank(struct prog *p)
{
	fold(p);
	int32_t h = rows_on(p, N, C, PLACE_SHARD0, PLACE_REPLICATED),
	        sizes = ints(p, 1, E, AXIS_ep, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, all_to_all, over_ep(), h, sizes);
}

static void latent(struct prog *p, int32_t width, int32_t key_rows)
{
	int32_t q = floats(p, N, width, AXIS_tp, PLACE_REPLICATED);
	int32_t kv = floats(p, N, H * D, AXIS_tp, PLACE_REPLICATED),
	        key = floats(p, key_rows, 2, AXIS_tp, PLACE_REPLICATED);
	int32_t table = floats(p, N, 2, AXIS_tp, PLACE_REPLICATED),
	        at = ints(p, N, 0, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, mla_pack, ARG(.mla = {.heads = H, .head_dim = D, .value_dim = 2}), q, kv, key, table, at);
}

static void queries_of_another_head_size(struct prog *p)
{
	latent(p, H * D + H, N);
}

static void key_of_other_rows(struct prog *p)
{
	latent(p, H * D, N + 1);
}

static void keys_of_another_head_size(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = floats(p, N, 2 * G * D + G, AXIS_cp, PLACE_SHARD0);
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void part_of_a_whole_sample(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_SHARD0);
	arg.attention.queries.ranks = arg.attention.rows.ranks = 1;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void part_among_other_ranks(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_SHARD0);
	arg.attention.queries.ranks = arg.attention.rows.ranks = 4;
	arg.attention.seq_length *= 2;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void part_of_odd_chunks(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_SHARD0);
	arg.attention.seq_length += 2;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void mask_without_keys(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = queries(p), kv = keys_and_values(p, N, PLACE_SHARD0);
	arg.attention.dropout = 0.5f;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void heads_that_groups_cannot_share(struct prog *p)
{
	union op_arg arg = attention(p);
	int32_t q = floats(p, N, 3 * D, AXIS_cp, PLACE_SHARD0), kv = keys_and_values(p, N, PLACE_SHARD0);
	arg.attention.heads = 3;
	here = __LINE__ + 1;
	EMIT(p, attention_part, &arg, q, kv);
}

static void counts_of_weights(struct prog *p)
{
	union op_arg arg = balance(0);
	int32_t probs = floats(p, N, K, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, expert_counts, &arg, probs);
}

static void balance_among_other_experts(struct prog *p)
{
	union op_arg arg = balance(0);
	int32_t logits = floats(p, N, E, AXIS_tp, PLACE_REPLICATED),
	        counts = ints(p, 1, E / 2, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, balance, &arg, logits, counts);
}

static void capacity_of_weights_of_other_rows(struct prog *p)
{
	union op_arg arg = capacity(1, 0);
	int32_t index = ints(p, N, K, AXIS_tp, PLACE_REPLICATED),
	        probs = floats(p, N + 1, K, AXIS_tp, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, capacity, &arg, index, probs);
}

static void experts_by_no_sizes(struct prog *p)
{
	union op_arg arg = own_experts(E);
	int32_t h = floats(p, N, C, AXIS_ep, PLACE_REPLICATED),
	        w = weight(p, E * F, C, AXIS_ep, PLACE_REPLICATED);
	int32_t probs = floats(p, N, K, AXIS_ep, PLACE_REPLICATED);
	here = __LINE__ + 1;
	EMIT(p, grouped_linear, &arg, h, w, probs);
}

static const char unfinished[] = "keys of some ranks are still missing",
                  other_ranks[] = "says other ranks than its axes",
                  other_experts[] = "not those of the experts that the argument says",
                  other_rows[] = "sizes are those of other rows",
                  copies[] = "several ranks hold the same rows",
                  missing[] = "choices of other ranks are missing", grids[] = "a regrid is missing";

static const struct example examples[] = {
        EXAMPLE(attention_on_part_of_a_sample, "attention", "needs whole samples"),
        EXAMPLE(product_of_a_part, "linear", unfinished),
        EXAMPLE(sum_of_parts, "all_reduce", unfinished),
        EXAMPLE(statistics_of_a_part, "add", unfinished),
        EXAMPLE(part_that_claims_to_have_seen_all, "attention_part", "counts other ranks' keys"),
        EXAMPLE(part_that_forgets_the_one_before, "attention_part", "counts other ranks' keys"),
        EXAMPLE(the_same_keys_twice, "attention_part", "an earlier part has seen"),
        EXAMPLE(all_keys_after_those_of_one_rank, "attention_part", "an earlier part has seen"),
        EXAMPLE(two_parts_as_it_should_be, NULL, NULL),
        EXAMPLE(part_after_something_else, "attention_part", "no part of attention"),
        EXAMPLE(gathered_keys_as_those_of_one_rank, "attention_part", "not as many as their rows"),
        EXAMPLE(keys_that_all_ranks_hold_as_those_of_one, "attention_part",
                "not those that the argument says"),
        EXAMPLE(keys_that_were_not_gathered, "attention_part", "not those that the argument says"),
        EXAMPLE(queries_of_all_ranks, "attention_part", "queries are not cut over these ranks"),
        EXAMPLE(begins_of_other_rows, "attention_part", "placed differently"),
        EXAMPLE(part_whose_axis_is_not_said, "attention_part", "needs whole samples"),
        EXAMPLE(shift_of_what_all_ranks_hold, "shift", "all ranks hold the same"),
        EXAMPLE(shift_along_two_axes, "shift", "along one axis"),
        EXAMPLE(rows_for_heads_that_were_not_split, "attention", "not as wide as the heads"),
        EXAMPLE(heads_that_stay_away, "linear", "different inner dimensions"),
        EXAMPLE(begins_of_one_ranks_rows, "attention", "one i32 begin a row"),
        EXAMPLE(exchange_of_what_all_ranks_hold, "all_to_all", "not cut over these ranks"),
        EXAMPLE(latent_key_without_fan_out, "linear_dw", "partial sums"),
        EXAMPLE(columns_of_different_ranks, "join_columns", "placed differently"),
        EXAMPLE(gate_on_partial_sums, "row_gate", "whole rows"),
        EXAMPLE(choice_among_some_experts, "route", "whole rows"),
        EXAMPLE(counts_of_copies, "expert_counts", "counted by several ranks"),
        EXAMPLE(balance_of_counts_that_were_not_added_up, "balance", "not complete where they should be"),
        EXAMPLE(balance_of_counts_of_part_of_a_sample, "balance", "not complete where they should be"),
        EXAMPLE(balance_of_each_ranks_rows, "balance", "were not added up"),
        EXAMPLE(each_ranks_rows_where_no_loss_looks, NULL, NULL),
        EXAMPLE(bias_moved_by_one_ranks_counts, "bias_update", "move the bias apart"),
        EXAMPLE(capacity_without_gathering, "capacity", missing),
        EXAMPLE(capacity_over_data_without_gathering, "capacity", missing),
        EXAMPLE(capacity_of_each_ranks_rows, "capacity", missing),
        EXAMPLE(capacity_of_gathered_choices_but_own_weights, "capacity", "placed differently"),
        EXAMPLE(capacity_that_keeps_other_ranks_rows, "capacity", other_ranks),
        EXAMPLE(experts_on_rows_of_the_dense_grid, "grouped_linear", grids),
        EXAMPLE(residual_of_the_other_grid, "add", grids),
        EXAMPLE(regrid_of_what_tensor_parallel_ranks_hold, "regrid", copies),
        EXAMPLE(regrid_without_reduce_scatter, "regrid", copies),
        EXAMPLE(all_reduce_over_ranks_of_the_other_grid, "all_reduce", "ranks of the other grid"),
        EXAMPLE(all_reduce_over_stages, NULL, NULL),
        EXAMPLE(weight_of_the_other_grid, "linear_dw", "the sum is of the other grid"),
        EXAMPLE(same_gradient_everywhere, NULL, NULL),
        EXAMPLE(norm_over_both_grids, NULL, NULL),
        EXAMPLE(norm_over_one_grid, "square_sum", "the sum is of the other grid"),
        EXAMPLE(plan_with_one_ranks_counts, "dispatch_plan", "not those of all ranks"),
        EXAMPLE(plan_for_own_experts_without_gathering, "dispatch_plan", missing),
        EXAMPLE(plan_for_other_experts, "dispatch_plan", other_ranks),
        EXAMPLE(plan_for_all_experts_as_own, "dispatch_plan", other_ranks),
        EXAMPLE(plan_as_if_alone, "dispatch_plan", other_ranks),
        EXAMPLE(plan_of_another_rank, "dispatch_plan", other_ranks),
        EXAMPLE(overflow_that_counts_twice, "dispatch_plan", "counted on several ranks"),
        EXAMPLE(own_choices_of_cut_rows, "permute", "need all tokens"),
        EXAMPLE(own_weights_of_cut_rows, "permute_probs", "need all tokens"),
        EXAMPLE(own_choices_without_reduce_scatter, "regrid", copies),
        EXAMPLE(own_choices_among_rows_of_all, "unpermute", "not those of own choices"),
        EXAMPLE(sums_of_other_rows_than_the_slots, "permute", "other rows than the slots"),
        EXAMPLE(rows_that_go_by_one_ranks_sizes, "all_to_all", "sizes that all of them know"),
        EXAMPLE(rows_that_go_by_other_ranks_sizes, "all_to_all", other_rows),
        EXAMPLE(rows_that_go_although_all_ranks_hold_them, "all_to_all", "rows that are cut"),
        EXAMPLE(experts_of_a_rank_on_rows_of_all, "grouped_linear", other_experts),
        EXAMPLE(experts_that_all_ranks_hold, "grouped_linear", "in a way that does not match"),
        EXAMPLE(experts_of_another_rank, "grouped_linear", other_experts),
        EXAMPLE(some_of_the_experts, "grouped_linear", "neither all nor a rank's share"),
        EXAMPLE(all_experts_but_the_first, "grouped_linear", "neither all nor a rank's share"),
        EXAMPLE(weights_in_another_order, "expert_activation", "weights are those of other rows"),
        EXAMPLE(activation_before_the_columns_are_added_up, "expert_activation", "partial sums"),
        EXAMPLE(order_by_the_sizes_of_other_rows, "regroup", other_rows),
        EXAMPLE(gradient_of_other_rows, "grouped_dw", "in a way that does not match"),
        EXAMPLE(gradient_from_other_rows, "grouped_dw", "in a way that does not match"),
        EXAMPLE(norm_of_one_replicas_gradient, "square_sum", "an all-reduce is missing"),
        EXAMPLE(split_behind_the_last_column, "split_columns", "cuts inside a row"),
        EXAMPLE(join_of_different_rows, "join_columns", "different rows"),
        EXAMPLE(more_ranks_than_heads, "split_heads", "do not divide by the ranks"),
        EXAMPLE(heads_without_values, "split_heads", "not as wide as a row"),
        EXAMPLE(heads_of_odd_rows, "join_heads", "not a multiple of the ranks"),
        EXAMPLE(exchange_of_odd_rows, "all_to_all", "not a multiple of the ranks"),
        EXAMPLE(exchange_by_sizes_of_one_rank, "all_to_all", "i32 [ranks, experts]"),
        EXAMPLE(queries_of_another_head_size, "mla_pack", "not as wide as the heads"),
        EXAMPLE(key_of_other_rows, "mla_pack", "different rows"),
        EXAMPLE(keys_of_another_head_size, "attention_part", "not as wide as the heads"),
        EXAMPLE(part_of_a_whole_sample, "attention_part", "of at least two"),
        EXAMPLE(part_among_other_ranks, "attention_part", other_ranks),
        EXAMPLE(part_of_odd_chunks, "attention_part", "not a multiple of the sequence length"),
        EXAMPLE(mask_without_keys, "attention_part", "one key a sample"),
        EXAMPLE(heads_that_groups_cannot_share, "attention_part", "not a multiple of groups"),
        EXAMPLE(counts_of_weights, "expert_counts", "i32 choices"),
        EXAMPLE(balance_among_other_experts, "balance", "counts of every sequence"),
        EXAMPLE(capacity_of_weights_of_other_rows, "capacity", "their weights of all ranks"),
        EXAMPLE(experts_by_no_sizes, "grouped_linear", "sizes of every rank"),
        EXAMPLE(replicas_as_it_should_be, NULL, NULL),
};

TEST(mistakes_with_samples_and_experts_are_refused_with_layer_and_line)
{
	refusal_check(examples, sizeof examples / sizeof *examples);
}
