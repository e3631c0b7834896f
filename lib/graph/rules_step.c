/* The loss, collectives, and the optimizer's operations. */
#include "graph/rule.h"

/* cross_entropy */

static const char *shape_cross_entropy(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || n->in[1] == NONE || IN(1)->dtype != DT_i32 ||
	    value_count(IN(1)) != IN(0)->dim[0])
		return "needs one i32 target a row of logits";
	if (n->arg.cross_entropy.vocab_size < 1 || n->arg.cross_entropy.vocab_size > IN(0)->dim[1])
		return "vocab_size is not within the columns";
	const char *why = rule_out_vector(p, n, 0, DT_f64, 1);
	for (int k = 1; !why && k < 3; k++)
		why = rule_out_vector(p, n, k, DT_f32, IN(0)->dim[0]);
	return why;
}

static const char *place_cross_entropy(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	if (rows != rule_at(p, n->in[1], axis))
		return "logits and targets are placed differently";
	if (rows != PLACE_REPLICATED && rows != PLACE_SHARD0)
		return "it needs whole rows of logits";
	const char *why = rule_place(p, n, 0, axis, rows == PLACE_SHARD0 ? PLACE_PARTIAL : PLACE_REPLICATED);
	for (int k = 1; !why && k < 3; k++)
		why = rule_place(p, n, k, axis, rows);
	return why;
}

/* The adjoint of the summed loss is one scalar, the seed. */
static void grad_cross_entropy(struct prog *p, struct node n)
{
	grad_add(p, n.in[0],
	         EMIT(p, cross_entropy_bwd, &n.arg, n.in[0], n.in[1], n.out[1], grad_of(p, n.out[0])));
}

const struct rule rule_cross_entropy = {shape_cross_entropy, place_cross_entropy, grad_cross_entropy,
                                        cost_light};

static const char *shape_cross_entropy_bwd(struct prog *p, struct node *n)
{
	if (!rule_is_vector(p, n->in[1], IN(0)->dim[0]) || !rule_is_vector(p, n->in[2], IN(0)->dim[0]) ||
	    !rule_is_vector(p, n->in[3], 1))
		return "needs a target and lse of every row, and a scale";
	return rule_out_like(p, n, 0, n->in[0]);
}

static const char *place_cross_entropy_bwd(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	if (rows != PLACE_REPLICATED && rows != PLACE_SHARD0)
		return "it needs whole rows of logits";
	if (rule_at(p, n->in[1], axis) != rows || rule_at(p, n->in[2], axis) != rows)
		return "logits, targets and lse are placed differently";
	if (rule_at(p, n->in[3], axis) != PLACE_REPLICATED)
		return "the scale must be the same everywhere";
	return rule_place(p, n, 0, axis, rows);
}

const struct rule rule_cross_entropy_bwd = {shape_cross_entropy_bwd, place_cross_entropy_bwd, NULL,
                                            cost_light};

/* all_reduce */

static const char *shape_all_reduce(struct prog *p, struct node *n)
{
	return rule_out_like(p, n, 0, n->in[0]);
}

static const char *place_all_reduce(struct prog *p, struct node *n, int axis)
{
	enum place at = rule_at(p, n->in[0], axis);
	if (!(n->arg.comm.axes >> axis & 1))
		return rule_place(p, n, 0, axis, at);
	if (at != PLACE_PARTIAL)
		return "nothing to add up: the operand holds no partial sums";
	return rule_place(p, n, 0, axis, PLACE_REPLICATED);
}

/* A ring or a direct exchange sends 2 (n-1)/n of the bytes. */
static struct cost cost_all_reduce(const struct prog *p, const struct node *n)
{
	struct cost c = {0};
	for (int a = 0; a < AXIS_COUNT; a++)
		if (n->arg.comm.axes >> a & 1)
			c.wire_bytes[a] =
			        2.0 * (p->axis_size[a] - 1) / p->axis_size[a] * (double)value_bytes(IN(0));
	return c;
}

const struct rule rule_all_reduce = {shape_all_reduce, place_all_reduce, NULL, cost_all_reduce};

/* optimizer */

static const char *shape_square_sum(struct prog *p, struct node *n)
{
	return rule_out_vector(p, n, 0, DT_f64, 1);
}

static const char *place_square_sum(struct prog *p, struct node *n, int axis)
{
	enum place at = rule_at(p, n->in[0], axis);
	if (at == PLACE_PARTIAL)
		return "the norm of partial sums: an all-reduce is missing";
	return rule_place(p, n, 0, axis, at == PLACE_REPLICATED ? PLACE_REPLICATED : PLACE_PARTIAL);
}

static struct cost cost_square_sum(const struct prog *p, const struct node *n)
{
	double count = (double)value_count(IN(0));
	return (struct cost){.flop = 2 * count, .bytes = 4 * count};
}

const struct rule rule_square_sum = {shape_square_sum, place_square_sum, NULL, cost_square_sum};

static const char *shape_adamw(struct prog *p, struct node *n)
{
	static const uint8_t same[] = {1, 3, 4};
	for (size_t i = 0; i < sizeof same; i++)
		if (n->in[same[i]] == NONE || !rule_same_shape(p, n->in[0], n->in[same[i]]))
			return "parameter, gradient and moments have different shapes";
	if (IN(0)->dtype != DT_f32 && !HAS(2))
		return "a parameter below f32 needs a master";
	if (!rule_is_vector(p, n->in[5], HYPER_COUNT) || !rule_is_vector(p, n->in[6], 1))
		return "needs hyper[8] and norm2[1]";
	return NULL;
}

static const char *place_adamw(struct prog *p, struct node *n, int axis)
{
	for (int k = 1; k < 5; k++)
		if (HAS(k) && rule_at(p, n->in[k], axis) != rule_at(p, n->in[0], axis))
			return k == 1 ? "the gradient is not placed as its parameter"
			              : "state is not placed as its parameter";
	return rule_at(p, n->in[6], axis) == PLACE_REPLICATED ? NULL : "the gradient norm is not complete";
}

const struct rule rule_adamw = {shape_adamw, place_adamw, NULL, cost_light};
