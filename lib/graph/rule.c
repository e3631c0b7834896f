/* What the rule blocks share. */
#include "graph/rule.h"

const char *rule_out(struct prog *p, struct node *n, int k, enum dtype dtype, int nd, const int32_t *dim)
{
	if (n->out[k] == NONE) {
		n->out[k] = prog_value(p, op_rows[n->op].name, R_TEMP, dtype, nd, dim);
		return NULL;
	}
	const struct value *v = OUT(k);
	if (v->dtype != dtype || v->nd != nd)
		return "an output has another type than the operation gives";
	for (int i = 0; i < nd; i++)
		if (v->dim[i] != dim[i])
			return "an output has another shape than the operation gives";
	return NULL;
}

const char *rule_out_like(struct prog *p, struct node *n, int k, int32_t value)
{
	struct value like = p->value[value]; /* a copy: rule_out may move the array */
	return rule_out(p, n, k, like.dtype, like.nd, like.dim);
}

const char *rule_out_vector(struct prog *p, struct node *n, int k, enum dtype dtype, int32_t length)
{
	return rule_out(p, n, k, dtype, 1, &length);
}

const char *rule_place(struct prog *p, struct node *n, int k, int axis, enum place place)
{
	struct value *v = OUT(k);
	if (v->def == NONE) /* being emitted; of an accumulator, the first writer decides */
		v->place[axis] = (uint8_t)place;
	else if (v->place[axis] != place)
		return "an output is placed otherwise than the operation gives";
	return NULL;
}

bool rule_is_vector(const struct prog *p, int32_t value, int32_t length)
{
	return value != NONE && value_count(&p->value[value]) == length;
}

bool rule_same_shape(const struct prog *p, int32_t a, int32_t b)
{
	const struct value *x = &p->value[a], *y = &p->value[b];
	bool same = x->nd == y->nd;
	for (int k = 0; k < TENSOR_MAX_DIM; k++)
		same &= x->dim[k] == y->dim[k];
	return same;
}

void grad_add(struct prog *p, int32_t v, int32_t g)
{
	if (p->e.code || !p->value[v].want_grad)
		return;
	int32_t old = p->value[v].grad;
	int32_t sum = old == NONE ? g : EMIT(p, add, NO_ARG, old, g);
	p->value[v].grad = sum;
}

int32_t grad_of(const struct prog *p, int32_t v)
{
	return p->value[v].grad;
}

int32_t grad_accumulator(struct prog *p, int32_t parameter)
{
	if (p->value[parameter].grad == NONE) {
		struct value like = p->value[parameter];
		int32_t g = prog_value(p, like.name, R_GRAD, DT_f32, like.nd, like.dim);
		p->value[g].grid = like.grid;
		p->value[g].sums = 1;
		p->value[parameter].grad = g;
	}
	return p->value[parameter].grad;
}

static const char *same_places(const struct prog *p, const struct node *n, int axis)
{
	for (int k = 1; k < op_rows[n->op].n_in; k++)
		if (HAS(k) && rule_at(p, n->in[k], axis) != rule_at(p, n->in[0], axis))
			return "operands are placed differently";
	return NULL;
}

const char *place_linear_elementwise(struct prog *p, struct node *n, int axis)
{
	const char *why = same_places(p, n, axis);
	return why ? why : rule_place(p, n, 0, axis, rule_at(p, n->in[0], axis));
}

const char *place_elementwise(struct prog *p, struct node *n, int axis)
{
	if (rule_at(p, n->in[0], axis) == PLACE_PARTIAL)
		return "a nonlinear operation on partial sums";
	return place_linear_elementwise(p, n, axis);
}

const char *rule_check_rows(const struct prog *p, const struct node *n, int axis, bool heads)
{
	enum place rows = rule_at(p, n->in[0], axis);
	enum place samples = rows == PLACE_SHARD1 ? PLACE_REPLICATED : rows;
	if (rows == PLACE_PARTIAL)
		return "it needs whole values, these are partial sums";
	if (rows == PLACE_SHARD1 && !heads)
		return "it needs whole rows, these are sharded";
	for (int k = 1; k < op_rows[n->op].n_in; k++) {
		if (!HAS(k))
			continue;
		enum place at = rule_at(p, n->in[k], axis);
		bool host = IN(k)->region == R_INPUT || IN(k)->region == R_BATCH;
		bool along = !IN(k)->weight && IN(k)->dim[0] == IN(0)->dim[0] && IN(k)->region >= R_EDGE;
		if (host ? at != samples : along && at != rows)
			return "operands are placed differently";
		if (!along && !host && at != PLACE_REPLICATED)
			return "a weight that is not replicated";
	}
	return NULL;
}

const char *place_rows(struct prog *p, struct node *n, int axis)
{
	const char *why = rule_check_rows(p, n, axis, false);
	for (int k = 0; !why && k < op_rows[n->op].n_out; k++)
		why = rule_place(p, n, k, axis, rule_at(p, n->in[0], axis));
	return why;
}

const char *place_heads(struct prog *p, struct node *n, int axis)
{
	const char *why = rule_check_rows(p, n, axis, true);
	for (int k = 0; !why && k < op_rows[n->op].n_out; k++)
		why = rule_place(p, n, k, axis, rule_at(p, n->in[0], axis));
	return why;
}

const char *place_rows_bwd(struct prog *p, struct node *n, int axis)
{
	const char *why = rule_check_rows(p, n, axis, false);
	enum place rows = rule_at(p, n->in[0], axis);
	if (!why)
		why = rule_place(p, n, 0, axis, rows);
	for (int k = 1; !why && k < op_rows[n->op].n_out; k++)
		why = rule_place(p, n, k, axis, rows == PLACE_SHARD0 ? PLACE_PARTIAL : PLACE_REPLICATED);
	return why;
}

struct cost cost_elementwise(const struct prog *p, const struct node *n, double flop_per_element)
{
	struct cost c = {0};
	for (int k = 0; k < op_rows[n->op].n_in; k++)
		if (HAS(k))
			c.bytes += (double)value_bytes(IN(k));
	for (int k = 0; k < op_rows[n->op].n_out; k++)
		c.bytes += (double)value_bytes(OUT(k));
	int32_t first = op_rows[n->op].n_out ? n->out[0] : n->in[0];
	c.flop = flop_per_element * (double)value_count(&p->value[first]);
	return c;
}

struct cost cost_light(const struct prog *p, const struct node *n)
{
	return cost_elementwise(p, n, 8);
}
