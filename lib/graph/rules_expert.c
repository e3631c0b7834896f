/* Mixture of experts: the router and its losses on rows of the dense grid, dispatch and the experts' products
 * on those of the expert grid. */
#include "graph/rule.h"

static bool is_choices(const struct prog *p, int32_t v, enum dtype dtype, int32_t rows)
{
	return v != NONE && p->value[v].dtype == dtype && p->value[v].nd == 2 &&
	       (rows < 0 || p->value[v].dim[0] == rows);
}

/* All inputs but the first lie as said. */
static const char *others_lie(const struct prog *p, const struct node *n, int axis, enum place at)
{
	for (int k = 1; k < op_rows[n->op].n_in; k++)
		if (HAS(k) && rule_at(p, n->in[k], axis) != at)
			return "operands are placed differently";
	return NULL;
}

static const char *outputs_lie(struct prog *p, struct node *n, int axis, enum place at)
{
	const char *why = NULL;
	for (int k = 0; !why && k < op_rows[n->op].n_out; k++)
		why = rule_place(p, n, k, axis, at);
	return why;
}

static const char *whole_rows(const struct prog *p, const struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	return rows == PLACE_REPLICATED || rows == PLACE_SHARD0 ? NULL : "it needs whole rows";
}

/* route */

static const char *shape_route(struct prog *p, struct node *n)
{
	int32_t rows = IN(0)->dim[0], experts = IN(0)->dim[1], topk = n->arg.route.topk;
	if (IN(0)->nd != 2 || IN(0)->dtype != DT_f32 || topk < 1 || topk > experts)
		return "needs f32 logits of at least topk experts";
	if (HAS(1) && (!rule_is_vector(p, n->in[1], experts) || IN(1)->dtype != DT_f32))
		return "needs an f32 bias for each expert";
	const char *why = rule_out(p, n, 0, DT_f32, 2, (int32_t[]){rows, topk});
	return why ? why : rule_out(p, n, 1, DT_i32, 2, (int32_t[]){rows, topk});
}

static const char *place_route(struct prog *p, struct node *n, int axis)
{
	const char *why = whole_rows(p, n, axis);
	if (!why)
		why = others_lie(p, n, axis, PLACE_REPLICATED);
	return why ? why : outputs_lie(p, n, axis, rule_at(p, n->in[0], axis));
}

static void grad_route(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, route_bwd, &n.arg, grad_of(p, n.out[0]), n.in[0], n.out[1]));
}

const struct rule rule_route = {shape_route, place_route, grad_route, cost_light};

static const char *shape_route_bwd(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || !is_choices(p, n->in[2], DT_i32, IN(1)->dim[0]) ||
	    !rule_same_shape(p, n->in[0], n->in[2]))
		return "dprobs, logits and index do not fit";
	return rule_out_like(p, n, 0, n->in[1]);
}

static const char *place_route_bwd(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	const char *why = whole_rows(p, n, axis);
	if (!why)
		why = others_lie(p, n, axis, rows);
	return why ? why : rule_place(p, n, 0, axis, rows);
}

const struct rule rule_route_bwd = {shape_route_bwd, place_route_bwd, NULL, cost_light};

/* expert_counts, balance */

static const char *shape_expert_counts(struct prog *p, struct node *n)
{
	if (!is_choices(p, n->in[0], DT_i32, -1))
		return "needs i32 choices";
	return rule_out(p, n, 0, DT_i32, 2, (int32_t[]){n->arg.balance.sequences, n->arg.balance.experts});
}

/* Counts of some rows are part of those of all, where they are to be added up; else they are this rank's. */
static const char *place_expert_counts(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	bool summed = n->arg.balance.axes >> axis & 1;
	const char *why = whole_rows(p, n, axis);
	if (!why && summed && rows != PLACE_SHARD0)
		why = "the same rows would be counted by several ranks";
	return why ? why : rule_place(p, n, 0, axis, summed ? PLACE_PARTIAL : rows);
}

const struct rule rule_expert_counts = {shape_expert_counts, place_expert_counts, NULL, cost_light};

static const char *check_balance(const struct prog *p, const struct node *n, int32_t logits, int32_t counts)
{
	const struct value *x = &p->value[logits];
	if (counts == NONE || x->nd != 2 || x->dtype != DT_f32 || p->value[counts].dtype != DT_i32 ||
	    x->dim[1] != n->arg.balance.experts || p->value[counts].dim[1] != x->dim[1] ||
	    p->value[counts].dim[0] != n->arg.balance.sequences)
		return "needs f32 logits, and counts of every sequence";
	return NULL;
}

static const char *shape_balance(struct prog *p, struct node *n)
{
	const char *why = check_balance(p, n, n->in[0], n->in[1]);
	for (int k = 0; !why && k < 3; k++)
		why = rule_out_vector(p, n, k, DT_f64, 1);
	return why;
}

/* Without a loss that looks at them, counts may be those of fewer rows. */
static const char *counts_lie(const struct prog *p, const struct node *n, int axis, int32_t logits,
                              int32_t counts)
{
	enum place rows = rule_at(p, logits, axis);
	bool complete = n->arg.balance.axes >> axis & 1;
	if (rows != PLACE_REPLICATED && rows != PLACE_SHARD0)
		return "it needs whole rows";
	if (!complete && rows == PLACE_SHARD0 && !(AXES_DATA >> axis & 1) && n->arg.balance.aux_coeff != 0)
		return "rows of a sequence are on several ranks, whose counts were not added up";
	return rule_at(p, counts, axis) == (complete ? PLACE_REPLICATED : rows)
	               ? NULL
	               : "the counts are not complete where they should be";
}

static const char *place_balance(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	const char *why = counts_lie(p, n, axis, n->in[0], n->in[1]);
	return why ? why : outputs_lie(p, n, axis, rows == PLACE_SHARD0 ? PLACE_PARTIAL : PLACE_REPLICATED);
}

static void grad_balance(struct prog *p, struct node n)
{
	if (grad_of(p, n.out[0]) != NONE)
		grad_add(p, n.in[0], EMIT(p, balance_bwd, &n.arg, grad_of(p, n.out[0]), n.in[0], n.in[1]));
}

const struct rule rule_balance = {shape_balance, place_balance, grad_balance, cost_light};

static const char *shape_balance_bwd(struct prog *p, struct node *n)
{
	if (!rule_is_vector(p, n->in[0], 1) || n->in[1] == NONE)
		return "needs a scale and logits";
	const char *why = check_balance(p, n, n->in[1], n->in[2]);
	return why ? why : rule_out_like(p, n, 0, n->in[1]);
}

static const char *place_balance_bwd(struct prog *p, struct node *n, int axis)
{
	if (rule_at(p, n->in[0], axis) != PLACE_REPLICATED)
		return "the scale must be the same everywhere";
	const char *why = counts_lie(p, n, axis, n->in[1], n->in[2]);
	return why ? why : rule_place(p, n, 0, axis, rule_at(p, n->in[1], axis));
}

const struct rule rule_balance_bwd = {shape_balance_bwd, place_balance_bwd, NULL, cost_light};

static const char *shape_bias_update(struct prog *p, struct node *n)
{
	return n->in[1] == NONE || IN(1)->dtype != DT_i32 || value_count(IN(0)) != value_count(IN(1))
	               ? "needs a count for each bias"
	               : NULL;
}

static const char *place_bias_update(struct prog *p, struct node *n, int axis)
{
	return rule_at(p, n->in[0], axis) == PLACE_REPLICATED &&
	                       rule_at(p, n->in[1], axis) == PLACE_REPLICATED
	               ? NULL
	               : "ranks would move the bias apart";
}

const struct rule rule_bias_update = {shape_bias_update, place_bias_update, NULL, cost_light};

/* capacity */

static const char *shape_capacity(struct prog *p, struct node *n)
{
	int32_t ranks = n->arg.capacity.ranks;
	uint32_t axes = n->arg.capacity.axes;
	if (n->arg.capacity.rank != prog_place_among(p, axes) || ranks != prog_ranks(p, axes))
		return "the argument says other ranks than its axes";
	if (!is_choices(p, n->in[0], DT_i32, -1) || !is_choices(p, n->in[1], DT_f32, IN(0)->dim[0]) ||
	    IN(0)->dim[0] % ranks)
		return "needs the choices and their weights of all ranks";
	const char *why = rule_out(p, n, 0, DT_i32, 2, (int32_t[]){IN(0)->dim[0] / ranks, IN(0)->dim[1]});
	return why ? why : rule_out_vector(p, n, 1, DT_f64, 1);
}

static const char *place_capacity(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	bool gathered = n->arg.capacity.axes >> axis & 1;
	const char *why = others_lie(p, n, axis, rows);
	if (!why && rows == PLACE_SHARD0 && (gathered || !(AXES_DATA >> axis & 1)))
		why = "the choices of other ranks are missing";
	if (!why)
		why = whole_rows(p, n, axis);
	if (!why)
		why = rule_place(p, n, 0, axis, gathered ? PLACE_SHARD0 : rows);
	bool own = gathered || rows == PLACE_SHARD0;
	return why ? why : rule_place(p, n, 1, axis, own ? PLACE_PARTIAL : PLACE_REPLICATED);
}

const struct rule rule_capacity = {shape_capacity, place_capacity, NULL, cost_light};

/* Dispatch. Along the axes that share the experts either the rows are cut, and every choice finds its row
 * (alltoall); or all ranks hold all rows, and each finds rows for the choices of its own experts alone: then
 * `slot` is marked SHARD1, cut between the choices (allgather). */

static const char *shape_dispatch_plan(struct prog *p, struct node *n)
{
	if (!is_choices(p, n->in[0], DT_i32, -1) || !is_choices(p, n->in[1], DT_i32, n->arg.dispatch.ranks) ||
	    IN(1)->dim[1] != n->arg.dispatch.experts || n->arg.dispatch.experts % n->arg.dispatch.ranks)
		return "needs choices, and counts of every rank and expert";
	const char *why = rule_out_like(p, n, 0, n->in[0]);
	if (!why)
		why = rule_out_like(p, n, 1, n->in[1]);
	return why ? why : rule_out_vector(p, n, 2, DT_f64, 1);
}

/* Whose rows these are, and whose experts, where an axis shares the experts. */
static const char *check_shared(const struct prog *p, const struct node *n, int axis)
{
	int32_t ranks = p->axis_size[axis], rank = p->axis_rank[axis], count = n->arg.dispatch.count;
	if (count && rule_at(p, n->in[0], axis) != PLACE_REPLICATED)
		return "the choices of other ranks are missing";
	if (count ? count * ranks != n->arg.dispatch.experts || n->arg.dispatch.first != rank * count
	          : n->arg.dispatch.ranks != ranks || n->arg.dispatch.rank != rank)
		return "the argument says other ranks than its axes";
	return NULL;
}

static const char *place_dispatch_plan(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	bool shared = n->arg.dispatch.axes >> axis & 1, own = shared && n->arg.dispatch.count;
	const char *why = whole_rows(p, n, axis);
	if (!why && shared)
		why = check_shared(p, n, axis);
	if (!why && !own && rows == PLACE_REPLICATED && p->axis_rank[axis] && n->arg.dispatch.counts)
		why = "what the same choices lose is counted on several ranks";
	if (!why && rule_at(p, n->in[1], axis) != (shared ? PLACE_REPLICATED : rows))
		why = "the counts are not those of all ranks";
	if (!why)
		why = rule_place(p, n, 0, axis, own ? PLACE_SHARD1 : rows);
	if (!why)
		why = rule_place(p, n, 1, axis, shared ? PLACE_REPLICATED : rows);
	/* Of equal copies one counts, so the sum is partial everywhere. */
	return why ? why : rule_place(p, n, 2, axis, PLACE_PARTIAL);
}

const struct rule rule_dispatch_plan = {shape_dispatch_plan, place_dispatch_plan, NULL, cost_light};

static const char *shape_permute(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || !is_choices(p, n->in[1], DT_i32, IN(0)->dim[0]))
		return "needs the slots of every row";
	return rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2,
	                (int32_t[]){n->arg.permute.rows, IN(0)->dim[1]});
}

/* From rows of tokens to rows of choices; slots may be cut between choices, where all tokens are there. */
static const char *place_permute(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis), slot = rule_at(p, n->in[1], axis);
	if (slot == PLACE_SHARD1)
		return rows == PLACE_REPLICATED ? rule_place(p, n, 0, axis, PLACE_SHARD0)
		                                : "slots of own choices need all tokens";
	if (rows == PLACE_PARTIAL)
		return slot == PLACE_REPLICATED ? rule_place(p, n, 0, axis, rows)
		                                : "partial sums of other rows than the slots";
	return rows == slot ? rule_place(p, n, 0, axis, rows) : "rows and slots are placed differently";
}

static void grad_permute(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, unpermute, &n.arg, grad_of(p, n.out[0]), n.in[1]));
}

const struct rule rule_permute = {shape_permute, place_permute, grad_permute, cost_light};

static const char *shape_unpermute(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || !is_choices(p, n->in[1], DT_i32, -1))
		return "needs the slots of every row";
	return rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2, (int32_t[]){IN(1)->dim[0], IN(0)->dim[1]});
}

static const char *place_unpermute(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis), slot = rule_at(p, n->in[1], axis);
	if (slot == PLACE_SHARD1)
		return rows == PLACE_SHARD0 ? rule_place(p, n, 0, axis, PLACE_PARTIAL)
		                            : "rows are not those of own choices";
	if (rows == PLACE_PARTIAL)
		return slot == PLACE_REPLICATED ? rule_place(p, n, 0, axis, rows)
		                                : "partial sums of other rows than the slots";
	return rows == slot ? rule_place(p, n, 0, axis, rows) : "rows and slots are placed differently";
}

static void grad_unpermute(struct prog *p, struct node n)
{
	union op_arg arg = {.permute = {.rows = p->value[n.in[0]].dim[0]}};
	grad_add(p, n.in[0], EMIT(p, permute, &arg, grad_of(p, n.out[0]), n.in[1]));
}

const struct rule rule_unpermute = {shape_unpermute, place_unpermute, grad_unpermute, cost_light};

static const char *shape_permute_probs(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || IN(0)->dtype != DT_f32 || !is_choices(p, n->in[1], DT_i32, -1))
		return "needs f32 weights and slots";
	if (n->arg.permute.back)
		return rule_out(p, n, 0, DT_f32, 2, IN(1)->dim);
	return rule_same_shape(p, n->in[0], n->in[1]) ? rule_out_vector(p, n, 0, DT_f32, n->arg.permute.rows)
	                                              : "needs a slot for each weight";
}

static const char *place_permute_probs(struct prog *p, struct node *n, int axis)
{
	return n->arg.permute.back ? place_unpermute(p, n, axis) : place_permute(p, n, axis);
}

static void grad_permute_probs(struct prog *p, struct node n)
{
	n.arg.permute.back = !n.arg.permute.back;
	grad_add(p, n.in[0], EMIT(p, permute_probs, &n.arg, grad_of(p, n.out[0]), n.in[1]));
}

const struct rule rule_permute_probs = {shape_permute_probs, place_permute_probs, grad_permute_probs,
                                        cost_light};

/* Products on counted rows. Sizes are those of all ranks that share the experts, and go with the rows along
 * the others. */

static const char *sizes_fit(const struct prog *p, const struct node *n)
{
	int32_t sizes = n->in[op_rows[n->op].n_in - 1], first = n->arg.expert.first,
	        count = n->arg.expert.count;
	if (!is_choices(p, sizes, DT_i32, -1))
		return "needs the sizes of every rank and expert";
	int32_t experts = p->value[sizes].dim[1];
	bool share = count == experts || count * p->axis_size[AXIS_ep] == experts;
	return share && first >= 0 && first <= experts - count
	               ? NULL
	               : "own experts are neither all nor a rank's share";
}

/* Along ep rows of own experts go by the sizes of all, and the argument says which these are. */
static const char *own_experts_lie(const struct prog *p, const struct node *n, int32_t experts)
{
	bool cut = rule_at(p, n->in[0], AXIS_ep) == PLACE_SHARD0;
	int32_t own = cut ? experts / p->axis_size[AXIS_ep] : experts, rank = cut ? p->axis_rank[AXIS_ep] : 0;
	return n->arg.expert.count == own && n->arg.expert.first == own * rank
	               ? NULL
	               : "the rows are not those of the experts that the argument says";
}

static const char *sizes_lie(const struct prog *p, const struct node *n, int axis)
{
	int32_t sizes = n->in[op_rows[n->op].n_in - 1];
	bool cut = axis != AXIS_ep && rule_at(p, n->in[0], axis) == PLACE_SHARD0;
	if (rule_at(p, sizes, axis) != (cut ? PLACE_SHARD0 : PLACE_REPLICATED))
		return "the sizes are those of other rows";
	return axis == AXIS_ep ? own_experts_lie(p, n, p->value[sizes].dim[1]) : NULL;
}

static const char *shape_regroup(struct prog *p, struct node *n)
{
	struct value like = *IN(0);
	like.dim[0] = n->arg.expert.rows;
	const char *why = sizes_fit(p, n);
	return why ? why : rule_out(p, n, 0, (enum dtype)like.dtype, like.nd, like.dim);
}

static const char *place_regroup(struct prog *p, struct node *n, int axis)
{
	const char *why = sizes_lie(p, n, axis);
	return why ? why : rule_place(p, n, 0, axis, rule_at(p, n->in[0], axis));
}

static void grad_regroup(struct prog *p, struct node n)
{
	n.arg.expert.back = !n.arg.expert.back;
	n.arg.expert.rows = p->value[n.in[0]].dim[0];
	grad_add(p, n.in[0], EMIT(p, regroup, &n.arg, grad_of(p, n.out[0]), n.in[1]));
}

const struct rule rule_regroup = {shape_regroup, place_regroup, grad_regroup, cost_light};

/* How many rows are expected: without a bound on the experts' ranks there may be more of them than choices.
 */
static struct cost cost_grouped(const struct prog *p, const struct node *n)
{
	struct cost c = cost_elementwise(p, n, 0);
	double rows = n->arg.expert.expected > 0 && n->arg.expert.expected < IN(0)->dim[0]
	                      ? n->arg.expert.expected
	                      : IN(0)->dim[0];
	c.bytes *= rows / IN(0)->dim[0];
	c.flop = 2 * rows * IN(0)->dim[1] * (n->op == OP_grouped_dx ? IN(1)->dim[1] : OUT(0)->dim[1]);
	if (n->op == OP_grouped_dw)
		c.flop = 2 * rows * IN(0)->dim[1] * IN(1)->dim[1];
	return c;
}

static const char *shape_grouped_linear(struct prog *p, struct node *n)
{
	const char *why = sizes_fit(p, n);
	if (!why && (IN(0)->nd != 2 || IN(1)->nd != 2 || IN(0)->dim[1] != IN(1)->dim[1] ||
	             IN(1)->dim[0] % n->arg.expert.count))
		why = "x and w do not fit";
	return why ? why
	           : rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2,
	                      (int32_t[]){IN(0)->dim[0], IN(1)->dim[0] / n->arg.expert.count});
}

struct product_place {
	enum place a, b, out;
};

/* Along ep rows and weights are both those of own experts: SHARD0 and SHARD0. */
static const char *place_grouped(struct prog *p, struct node *n, int axis, const struct product_place *rows,
                                 int count)
{
	enum place a = rule_at(p, n->in[0], axis), b = rule_at(p, n->in[1], axis);
	const char *why = sizes_lie(p, n, axis);
	if (why)
		return why;
	for (int i = 0; i < count; i++)
		if (rows[i].a == a && rows[i].b == b &&
		    (axis == AXIS_ep) == (rows[i].a == PLACE_SHARD0 && rows[i].b == PLACE_SHARD0))
			return rule_place(p, n, 0, axis, rows[i].out);
	return "rows and experts are cut in a way that does not match";
}
#define PLACE_GROUPED(p, n, axis, rows) place_grouped(p, n, axis, rows, sizeof(rows) / sizeof *(rows))

static const char *place_grouped_linear(struct prog *p, struct node *n, int axis)
{
	static const struct product_place rows[] = {{PLACE_REPLICATED, PLACE_REPLICATED, PLACE_REPLICATED},
	                                            {PLACE_SHARD0, PLACE_SHARD0, PLACE_SHARD0},
	                                            {PLACE_SHARD0, PLACE_REPLICATED, PLACE_SHARD0},
	                                            {PLACE_REPLICATED, PLACE_SHARD0, PLACE_SHARD1},
	                                            {PLACE_SHARD1, PLACE_SHARD1, PLACE_PARTIAL}};
	return PLACE_GROUPED(p, n, axis, rows);
}

static void grad_grouped_linear(struct prog *p, struct node n)
{
	int32_t dy = grad_of(p, n.out[0]);
	if (p->value[n.in[1]].want_grad)
		EMIT_INTO(p, grouped_dw, &n.arg, (int32_t[OP_MAX_OUT]){grad_accumulator(p, n.in[1])}, dy,
		          n.in[0], n.in[2]);
	if (p->value[n.in[0]].want_grad)
		grad_add(p, n.in[0], EMIT(p, grouped_dx, &n.arg, dy, n.in[1], n.in[2]));
}

const struct rule rule_grouped_linear = {shape_grouped_linear, place_grouped_linear, grad_grouped_linear,
                                         cost_grouped};

static const char *shape_grouped_dx(struct prog *p, struct node *n)
{
	const char *why = sizes_fit(p, n);
	if (!why && IN(0)->dim[1] * n->arg.expert.count != IN(1)->dim[0])
		why = "dy and w do not fit";
	return why ? why
	           : rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2,
	                      (int32_t[]){IN(0)->dim[0], IN(1)->dim[1]});
}

static const char *place_grouped_dx(struct prog *p, struct node *n, int axis)
{
	static const struct product_place rows[] = {{PLACE_REPLICATED, PLACE_REPLICATED, PLACE_REPLICATED},
	                                            {PLACE_SHARD0, PLACE_SHARD0, PLACE_SHARD0},
	                                            {PLACE_SHARD0, PLACE_REPLICATED, PLACE_SHARD0},
	                                            {PLACE_SHARD1, PLACE_SHARD0, PLACE_PARTIAL},
	                                            {PLACE_REPLICATED, PLACE_SHARD1, PLACE_SHARD1}};
	return PLACE_GROUPED(p, n, axis, rows);
}

const struct rule rule_grouped_dx = {shape_grouped_dx, place_grouped_dx, NULL, cost_grouped};

static const char *shape_grouped_dw(struct prog *p, struct node *n)
{
	const char *why = sizes_fit(p, n);
	if (!why && IN(0)->dim[0] != IN(1)->dim[0])
		why = "dy and x have different numbers of rows";
	return why ? why
	           : rule_out(p, n, 0, DT_f32, 2,
	                      (int32_t[]){IN(0)->dim[1] * n->arg.expert.count, IN(1)->dim[1]});
}

static const char *place_grouped_dw(struct prog *p, struct node *n, int axis)
{
	static const struct product_place rows[] = {{PLACE_REPLICATED, PLACE_REPLICATED, PLACE_REPLICATED},
	                                            {PLACE_SHARD1, PLACE_REPLICATED, PLACE_SHARD0},
	                                            {PLACE_REPLICATED, PLACE_SHARD1, PLACE_SHARD1}};
	enum place dy = rule_at(p, n->in[0], axis), x = rule_at(p, n->in[1], axis);
	const char *why = sizes_lie(p, n, axis);
	if (why || dy != PLACE_SHARD0 || x != PLACE_SHARD0)
		return why ? why : PLACE_GROUPED(p, n, axis, rows);
	return rule_place(p, n, 0, axis, axis == AXIS_ep ? PLACE_SHARD0 : PLACE_PARTIAL);
}

const struct rule rule_grouped_dw = {shape_grouped_dw, place_grouped_dw, NULL, cost_grouped};

/* expert_activation */

static const char *shape_expert_activation(struct prog *p, struct node *n)
{
	int32_t width = IN(0)->dim[1];
	const char *why = sizes_fit(p, n);
	if (!why && (!rule_is_vector(p, n->in[1], IN(0)->dim[0]) || IN(1)->dtype != DT_f32))
		why = "needs an f32 weight a row";
	if (!why && n->arg.expert.gated && width % 2)
		why = "needs rows of gate and up halves";
	return why ? why
	           : rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2,
	                      (int32_t[]){IN(0)->dim[0], n->arg.expert.gated ? width / 2 : width});
}

/* Weights are per row, sizes per rank: where the columns are cut all ranks have them. */
static const char *weights_lie(const struct prog *p, const struct node *n, int axis, int32_t weights)
{
	enum place rows = rule_at(p, n->in[0], axis);
	if (rows == PLACE_PARTIAL)
		return "a nonlinear operation on partial sums";
	if (rule_at(p, weights, axis) != (rows == PLACE_SHARD1 ? PLACE_REPLICATED : rows))
		return "the weights are those of other rows";
	return sizes_lie(p, n, axis);
}

static const char *place_expert_activation(struct prog *p, struct node *n, int axis)
{
	const char *why = weights_lie(p, n, axis, n->in[1]);
	return why ? why : rule_place(p, n, 0, axis, rule_at(p, n->in[0], axis));
}

static void grad_expert_activation(struct prog *p, struct node n)
{
	int32_t dx = EMIT(p, expert_activation_bwd, &n.arg, grad_of(p, n.out[0]), n.in[0], n.in[1], n.in[2]);
	int32_t dw = prog_out(p, 1);
	grad_add(p, n.in[0], dx);
	grad_add(p, n.in[1], dw);
}

const struct rule rule_expert_activation = {shape_expert_activation, place_expert_activation,
                                            grad_expert_activation, cost_light};

static const char *shape_expert_activation_bwd(struct prog *p, struct node *n)
{
	const char *why = sizes_fit(p, n);
	if (!why && (n->in[1] == NONE || IN(1)->dim[0] != IN(0)->dim[0] ||
	             IN(1)->dim[1] != IN(0)->dim[1] * (n->arg.expert.gated ? 2 : 1) ||
	             !rule_is_vector(p, n->in[2], IN(0)->dim[0])))
		why = "dy, x and the weights do not fit";
	if (!why)
		why = rule_out_like(p, n, 0, n->in[1]);
	return why ? why : rule_out_like(p, n, 1, n->in[2]);
}

static const char *place_expert_activation_bwd(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	const char *why = weights_lie(p, n, axis, n->in[2]);
	if (!why && rule_at(p, n->in[1], axis) != rows)
		why = "operands are placed differently";
	if (!why)
		why = rule_place(p, n, 0, axis, rows);
	return why ? why : rule_place(p, n, 1, axis, rows == PLACE_SHARD1 ? PLACE_PARTIAL : rows);
}

const struct rule rule_expert_activation_bwd = {shape_expert_activation_bwd, place_expert_activation_bwd,
                                                NULL, cost_light};
