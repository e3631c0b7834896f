/* Matrix products, embeddings, biases: where a sharded inner dimension gives partial sums. */
#include "graph/rule.h"

/* The dimensions of a product [rows, columns] = [rows, inner] · [inner, columns]. */
static struct cost cost_product(const struct prog *p, const struct node *n, double rows, double columns,
                                double inner)
{
	struct cost c = cost_elementwise(p, n, 0);
	c.flop = 2 * rows * columns * inner;
	return c;
}

/* linear */

static const char *shape_linear(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || IN(0)->nd != 2 || IN(1)->nd != 2)
		return "x and w must be matrices";
	if (IN(0)->dim[1] != IN(1)->dim[1])
		return "x and w have different inner dimensions";
	if (HAS(2) && !rule_is_vector(p, n->in[2], IN(1)->dim[0]))
		return "the bias is not as long as w has rows";
	return rule_out(p, n, 0, IN(0)->dtype, 2, (int32_t[]){IN(0)->dim[0], IN(1)->dim[0]});
}

struct product_place {
	enum place a, b, out;
};

static const char *place_product(struct prog *p, struct node *n, int axis, const struct product_place *rows)
{
	enum place a = rule_at(p, n->in[0], axis), b = rule_at(p, n->in[1], axis);
	if (a == PLACE_PARTIAL || b == PLACE_PARTIAL)
		return "an operand holds partial sums: an all-reduce is missing";
	for (int i = 0; i < 4; i++)
		if (rows[i].a == a && rows[i].b == b)
			return rule_place(p, n, 0, axis, rows[i].out);
	return "operands are sharded on dimensions that do not match";
}

static const char *place_linear(struct prog *p, struct node *n, int axis)
{
	static const struct product_place rows[] = {{PLACE_REPLICATED, PLACE_REPLICATED, PLACE_REPLICATED},
	                                            {PLACE_SHARD0, PLACE_REPLICATED, PLACE_SHARD0},
	                                            {PLACE_REPLICATED, PLACE_SHARD0, PLACE_SHARD1},
	                                            {PLACE_SHARD1, PLACE_SHARD1, PLACE_PARTIAL}};
	const char *why = place_product(p, n, axis, rows);
	if (why || !HAS(2))
		return why;
	enum place out = rule_at(p, n->out[0], axis), bias = rule_at(p, n->in[2], axis);
	if (out == PLACE_PARTIAL)
		return "a bias on partial sums would be added once per rank";
	return bias == (out == PLACE_SHARD1 ? PLACE_SHARD0 : PLACE_REPLICATED)
	               ? NULL
	               : "the bias is not sharded as w";
}

static void grad_linear(struct prog *p, struct node n)
{
	int32_t dy = grad_of(p, n.out[0]);
	if (p->value[n.in[1]].want_grad)
		EMIT_INTO(p, linear_dw, &n.arg, (int32_t[OP_MAX_OUT]){grad_accumulator(p, n.in[1])}, dy,
		          n.in[0]);
	if (n.in[2] != NONE)
		EMIT_INTO(p, bias_grad, NO_ARG, (int32_t[OP_MAX_OUT]){grad_accumulator(p, n.in[2])}, dy);
	if (p->value[n.in[0]].want_grad)
		grad_add(p, n.in[0], EMIT(p, linear_dx, &n.arg, dy, n.in[1]));
}

static struct cost cost_linear(const struct prog *p, const struct node *n)
{
	return cost_product(p, n, IN(0)->dim[0], IN(1)->dim[0], IN(1)->dim[1]);
}

const struct rule rule_linear = {shape_linear, place_linear, grad_linear, cost_linear};

/* linear_act: made of linear and activation when their adjoints are there already */

static const char *shape_linear_act(struct prog *p, struct node *n)
{
	const char *why = shape_linear(p, n);
	return why ? why : rule_out_like(p, n, 1, n->out[0]);
}

static const char *place_linear_act(struct prog *p, struct node *n, int axis)
{
	const char *why = place_linear(p, n, axis);
	enum place y = why ? PLACE_PARTIAL : rule_at(p, n->out[0], axis);
	if (!why && y == PLACE_PARTIAL)
		return "an activation of partial sums: an all-reduce is missing";
	return why ? why : rule_place(p, n, 1, axis, y);
}

const struct rule rule_linear_act = {shape_linear_act, place_linear_act, NULL, cost_linear};

static const char *shape_linear_dx(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || IN(0)->dim[1] != IN(1)->dim[0])
		return "dy and w do not fit";
	return rule_out(p, n, 0, IN(0)->dtype, 2, (int32_t[]){IN(0)->dim[0], IN(1)->dim[1]});
}

static const char *place_linear_dx(struct prog *p, struct node *n, int axis)
{
	static const struct product_place rows[] = {{PLACE_REPLICATED, PLACE_REPLICATED, PLACE_REPLICATED},
	                                            {PLACE_SHARD0, PLACE_REPLICATED, PLACE_SHARD0},
	                                            {PLACE_SHARD1, PLACE_SHARD0, PLACE_PARTIAL},
	                                            {PLACE_REPLICATED, PLACE_SHARD1, PLACE_SHARD1}};
	return place_product(p, n, axis, rows);
}

const struct rule rule_linear_dx = {shape_linear_dx, place_linear_dx, NULL, cost_linear};

static const char *shape_linear_dx_act(struct prog *p, struct node *n)
{
	const char *why = shape_linear_dx(p, n);
	return why || (HAS(2) && rule_same_shape(p, n->out[0], n->in[2])) ? why : "h is not as dx is";
}

static const char *place_linear_dx_act(struct prog *p, struct node *n, int axis)
{
	const char *why = place_linear_dx(p, n, axis);
	enum place dx = why ? PLACE_PARTIAL : rule_at(p, n->out[0], axis);
	if (why || (dx != PLACE_PARTIAL && dx == rule_at(p, n->in[2], axis)))
		return why;
	return dx == PLACE_PARTIAL ? "a slope times partial sums: an all-reduce is missing"
	                           : "h is not placed as dx is";
}

const struct rule rule_linear_dx_act = {shape_linear_dx_act, place_linear_dx_act, NULL, cost_linear};

static const char *shape_linear_dw(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || IN(0)->dim[0] != IN(1)->dim[0])
		return "dy and x have different numbers of rows";
	return rule_out(p, n, 0, DT_f32, 2, (int32_t[]){IN(0)->dim[1], IN(1)->dim[1]});
}

static const char *place_linear_dw(struct prog *p, struct node *n, int axis)
{
	static const struct product_place rows[] = {{PLACE_REPLICATED, PLACE_REPLICATED, PLACE_REPLICATED},
	                                            {PLACE_SHARD0, PLACE_SHARD0, PLACE_PARTIAL},
	                                            {PLACE_SHARD1, PLACE_REPLICATED, PLACE_SHARD0},
	                                            {PLACE_REPLICATED, PLACE_SHARD1, PLACE_SHARD1}};
	return place_product(p, n, axis, rows);
}

static struct cost cost_linear_dw(const struct prog *p, const struct node *n)
{
	return cost_product(p, n, IN(0)->dim[1], IN(1)->dim[1], IN(0)->dim[0]);
}

const struct rule rule_linear_dw = {shape_linear_dw, place_linear_dw, NULL, cost_linear_dw};

static const char *shape_bias_grad(struct prog *p, struct node *n)
{
	return rule_out_vector(p, n, 0, DT_f32, IN(0)->dim[1]);
}

static const char *place_bias_grad(struct prog *p, struct node *n, int axis)
{
	static const enum place out[PLACE_COUNT] = {[PLACE_REPLICATED] = PLACE_REPLICATED,
	                                            [PLACE_SHARD0] = PLACE_PARTIAL,
	                                            [PLACE_SHARD1] = PLACE_SHARD0};
	enum place rows = rule_at(p, n->in[0], axis);
	return rows == PLACE_PARTIAL ? "dy holds partial sums" : rule_place(p, n, 0, axis, out[rows]);
}

const struct rule rule_bias_grad = {shape_bias_grad, place_bias_grad, NULL, cost_light};

static const char *shape_linear_dw_bias(struct prog *p, struct node *n)
{
	const char *why = shape_linear_dw(p, n);
	return why ? why : rule_out_vector(p, n, 1, DT_f32, IN(0)->dim[1]);
}

/* The bias' gradient lies as the rows of dw do; the columns of x are not its business. */
static const char *place_linear_dw_bias(struct prog *p, struct node *n, int axis)
{
	static const enum place sums[PLACE_COUNT] = {[PLACE_REPLICATED] = PLACE_REPLICATED,
	                                             [PLACE_SHARD0] = PLACE_PARTIAL,
	                                             [PLACE_SHARD1] = PLACE_SHARD0};
	const char *why = place_linear_dw(p, n, axis);
	return why ? why : rule_place(p, n, 1, axis, sums[rule_at(p, n->in[0], axis)]);
}

const struct rule rule_linear_dw_bias = {shape_linear_dw_bias, place_linear_dw_bias, NULL, cost_linear_dw};

/* bias_add: the bias of a product whose partial sums had to be added up first */

static const char *shape_bias_add(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || !rule_is_vector(p, n->in[1], IN(0)->dim[1]))
		return "the bias is not as long as a row";
	return rule_out_like(p, n, 0, n->in[0]);
}

static const char *place_bias_add(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	if (rows == PLACE_PARTIAL)
		return "a bias on partial sums would be added once per rank";
	if (rule_at(p, n->in[1], axis) != (rows == PLACE_SHARD1 ? PLACE_SHARD0 : PLACE_REPLICATED))
		return "the bias is not sharded as the rows are";
	return rule_place(p, n, 0, axis, rows);
}

static void grad_bias_add(struct prog *p, struct node n)
{
	int32_t dy = grad_of(p, n.out[0]);
	EMIT_INTO(p, bias_grad, NO_ARG, (int32_t[OP_MAX_OUT]){grad_accumulator(p, n.in[1])}, dy);
	grad_add(p, n.in[0], dy);
}

const struct rule rule_bias_add = {shape_bias_add, place_bias_add, grad_bias_add, cost_light};

/* embedding */

static const char *shape_embedding(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || IN(0)->nd != 2 || IN(1)->dtype != DT_i32)
		return "needs a table [V,C] and i32 ids";
	return rule_out(p, n, 0, IN(0)->dtype, 2, (int32_t[]){(int32_t)value_count(IN(1)), IN(0)->dim[1]});
}

static const char *place_embedding(struct prog *p, struct node *n, int axis)
{
	enum place table = rule_at(p, n->in[0], axis), ids = rule_at(p, n->in[1], axis);
	bool cut = n->arg.embedding.axes >> axis & 1;
	if (!cut && table == PLACE_REPLICATED && (ids == PLACE_REPLICATED || ids == PLACE_SHARD0))
		return rule_place(p, n, 0, axis, ids);
	if (cut && table == PLACE_SHARD0 && ids == PLACE_REPLICATED)
		return rule_place(p, n, 0, axis, PLACE_PARTIAL);
	return "table and ids are sharded in a way that looks nothing up";
}

static void grad_embedding(struct prog *p, struct node n)
{
	EMIT_INTO(p, embedding_bwd, &n.arg, (int32_t[OP_MAX_OUT]){grad_accumulator(p, n.in[0])},
	          grad_of(p, n.out[0]), n.in[1]);
}

const struct rule rule_embedding = {shape_embedding, place_embedding, grad_embedding, cost_light};

static const char *shape_embedding_bwd(struct prog *p, struct node *n)
{
	if (n->out[0] == NONE)
		return "needs the accumulator of its table";
	if (n->in[1] == NONE || value_count(IN(1)) != IN(0)->dim[0] || OUT(0)->dim[1] != IN(0)->dim[1])
		return "dy, ids and the table do not fit";
	return NULL;
}

static const char *place_embedding_bwd(struct prog *p, struct node *n, int axis)
{
	enum place dy = rule_at(p, n->in[0], axis), ids = rule_at(p, n->in[1], axis);
	if (dy != ids || dy == PLACE_PARTIAL || dy == PLACE_SHARD1)
		return "dy and ids are placed differently";
	if (n->arg.embedding.axes >> axis & 1)
		return dy == PLACE_REPLICATED ? rule_place(p, n, 0, axis, PLACE_SHARD0)
		                              : "rows and table are cut by the same ranks";
	return rule_place(p, n, 0, axis, dy == PLACE_SHARD0 ? PLACE_PARTIAL : PLACE_REPLICATED);
}

const struct rule rule_embedding_bwd = {shape_embedding_bwd, place_embedding_bwd, NULL, cost_light};
