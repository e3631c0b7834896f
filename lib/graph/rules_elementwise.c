/* Additions, norms, activations, dropout: one row in, one row out. */
#include "graph/rule.h"

static const char *shape_same(struct prog *p, struct node *n)
{
	return rule_out_like(p, n, 0, n->in[0]);
}

/* add */

static const char *shape_add(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || !rule_same_shape(p, n->in[0], n->in[1]))
		return "operands have different shapes";
	return shape_same(p, n);
}

static void grad_of_add(struct prog *p, struct node n)
{
	int32_t dy = grad_of(p, n.out[0]);
	grad_add(p, n.in[0], dy);
	grad_add(p, n.in[1], dy);
}

static struct cost cost_add(const struct prog *p, const struct node *n)
{
	return cost_elementwise(p, n, 1);
}

const struct rule rule_add = {shape_add, place_linear_elementwise, grad_of_add, cost_add};

/* norms */

static const char *shape_layernorm(struct prog *p, struct node *n)
{
	int32_t rows = IN(0)->dim[0], width = IN(0)->dim[1];
	if (IN(0)->nd != 2 || !rule_is_vector(p, n->in[1], width) || !rule_is_vector(p, n->in[2], width))
		return "weight and bias must be as long as a row";
	const char *why = rule_out_like(p, n, 0, n->in[0]);
	for (int k = 1; !why && k < 3; k++)
		why = rule_out_vector(p, n, k, DT_f32, rows);
	return why;
}

static void grad_layernorm(struct prog *p, struct node n)
{
	int32_t outs[OP_MAX_OUT] = {NONE, grad_accumulator(p, n.in[1]), grad_accumulator(p, n.in[2])};
	grad_add(p, n.in[0],
	         EMIT_INTO(p, layernorm_bwd, &n.arg, outs, grad_of(p, n.out[0]), n.in[0], n.in[1], n.out[1],
	                   n.out[2]));
}

const struct rule rule_layernorm = {shape_layernorm, place_rows, grad_layernorm, cost_light};

static const char *shape_layernorm_bwd(struct prog *p, struct node *n)
{
	if (!rule_same_shape(p, n->in[0], n->in[1]) || (HAS(5) && !rule_same_shape(p, n->in[0], n->in[5])))
		return "dy, x and the addend have different shapes";
	if (!rule_is_vector(p, n->in[2], IN(0)->dim[1]) || !rule_is_vector(p, n->in[3], IN(0)->dim[0]) ||
	    !rule_is_vector(p, n->in[4], IN(0)->dim[0]))
		return "needs a weight as long as a row, and the statistics of every row";
	const char *why = rule_out_like(p, n, 0, n->in[0]);
	for (int k = 1; !why && k < 3; k++)
		why = rule_out_vector(p, n, k, DT_f32, IN(0)->dim[1]);
	return why;
}

const struct rule rule_layernorm_bwd = {shape_layernorm_bwd, place_rows_bwd, NULL, cost_light};

static const char *shape_rmsnorm(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || !rule_is_vector(p, n->in[1], IN(0)->dim[1]))
		return "the weight must be as long as a row";
	const char *why = rule_out_like(p, n, 0, n->in[0]);
	return why ? why : rule_out_vector(p, n, 1, DT_f32, IN(0)->dim[0]);
}

static void grad_rmsnorm(struct prog *p, struct node n)
{
	int32_t outs[OP_MAX_OUT] = {NONE, grad_accumulator(p, n.in[1])};
	grad_add(p, n.in[0],
	         EMIT_INTO(p, rmsnorm_bwd, &n.arg, outs, grad_of(p, n.out[0]), n.in[0], n.in[1], n.out[1]));
}

const struct rule rule_rmsnorm = {shape_rmsnorm, place_rows, grad_rmsnorm, cost_light};

static const char *shape_rmsnorm_bwd(struct prog *p, struct node *n)
{
	if (!rule_same_shape(p, n->in[0], n->in[1]) || (HAS(4) && !rule_same_shape(p, n->in[0], n->in[4])))
		return "dy, x and the addend have different shapes";
	if (!rule_is_vector(p, n->in[2], IN(0)->dim[1]) || !rule_is_vector(p, n->in[3], IN(0)->dim[0]))
		return "needs a weight as long as a row, and the statistics of every row";
	const char *why = rule_out_like(p, n, 0, n->in[0]);
	return why ? why : rule_out_vector(p, n, 1, DT_f32, IN(0)->dim[1]);
}

const struct rule rule_rmsnorm_bwd = {shape_rmsnorm_bwd, place_rows_bwd, NULL, cost_light};

/* activations */

static void grad_activation(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, activation_bwd, &n.arg, grad_of(p, n.out[0]), n.in[0]));
}

static struct cost cost_activation(const struct prog *p, const struct node *n)
{
	return cost_elementwise(p, n, 20);
}

const struct rule rule_activation = {shape_same, place_elementwise, grad_activation, cost_activation};
const struct rule rule_activation_bwd = {shape_add, place_elementwise, NULL, cost_activation};

static const char *shape_glu(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || IN(0)->dim[1] % 2)
		return "needs rows of gate and up halves";
	return rule_out(p, n, 0, IN(0)->dtype, 2, (int32_t[]){IN(0)->dim[0], IN(0)->dim[1] / 2});
}

static void grad_glu(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, glu_bwd, &n.arg, grad_of(p, n.out[0]), n.in[0]));
}

const struct rule rule_glu = {shape_glu, place_elementwise, grad_glu, cost_activation};

static const char *shape_glu_bwd(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || IN(1)->dim[1] != 2 * IN(0)->dim[1] || IN(1)->dim[0] != IN(0)->dim[0])
		return "dy and x do not fit";
	return rule_out_like(p, n, 0, n->in[1]);
}

const struct rule rule_glu_bwd = {shape_glu_bwd, place_elementwise, NULL, cost_activation};

/* dropout: its own adjoint, since the mask depends on the element alone */

static const char *shape_dropout(struct prog *p, struct node *n)
{
	int64_t ranks = n->arg.dropout.rows.ranks > 1 ? n->arg.dropout.rows.ranks : 1;
	int64_t length = n->arg.dropout.seq_length / ranks;
	int64_t end = n->arg.dropout.first_row + (int64_t)IN(0)->dim[0];
	if (n->in[1] == NONE || IN(1)->dtype != DT_i64 || length < 1 || end > IN(1)->dim[0] * length)
		return "needs one i64 key a sample";
	return shape_same(p, n);
}

/* Rows are cut with their samples, or (sequence parallelism) within the samples, whose keys all ranks hold
 * then.
 */
static const char *place_dropout(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis), keys = rule_at(p, n->in[1], axis);
	bool within = n->arg.dropout.axes >> axis & 1;
	if (rows != PLACE_REPLICATED && rows != PLACE_SHARD0)
		return "it needs whole rows";
	if (keys != (within ? PLACE_REPLICATED : rows) || (within && rows != PLACE_SHARD0))
		return "rows and keys are placed differently";
	return rule_place(p, n, 0, axis, rows);
}

static void grad_dropout(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, dropout, &n.arg, grad_of(p, n.out[0]), n.in[1]));
}

const struct rule rule_dropout = {shape_dropout, place_dropout, grad_dropout, cost_activation};

/* row_gate */

static const char *shape_row_gate(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || !rule_is_vector(p, n->in[1], IN(0)->dim[0]) || IN(1)->dtype != IN(0)->dtype)
		return "needs one gate a row";
	return shape_same(p, n);
}

static const char *place_row_gate(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	if (rows != PLACE_REPLICATED && rows != PLACE_SHARD0)
		return "it needs whole rows";
	for (int k = 1; k < op_rows[n->op].n_in; k++)
		if (rule_at(p, n->in[k], axis) != rows)
			return "operands are placed differently";
	const char *why = NULL;
	for (int k = 0; !why && k < op_rows[n->op].n_out; k++)
		why = rule_place(p, n, k, axis, rows);
	return why;
}

static void grad_row_gate(struct prog *p, struct node n)
{
	int32_t dx = EMIT(p, row_gate_bwd, NO_ARG, grad_of(p, n.out[0]), n.in[0], n.in[1]);
	int32_t dg = prog_out(p, 1);
	grad_add(p, n.in[0], dx);
	grad_add(p, n.in[1], dg);
}

const struct rule rule_row_gate = {shape_row_gate, place_row_gate, grad_row_gate, cost_light};

static const char *shape_row_gate_bwd(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || !rule_same_shape(p, n->in[0], n->in[1]) ||
	    !rule_is_vector(p, n->in[2], IN(0)->dim[0]))
		return "dy, x and the gates do not fit";
	const char *why = shape_same(p, n);
	return why ? why : rule_out_like(p, n, 1, n->in[2]);
}

const struct rule rule_row_gate_bwd = {shape_row_gate_bwd, place_row_gate, NULL, cost_light};
