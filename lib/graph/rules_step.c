/* The loss, and the operations of the optimizer on packs of gradients. */
#include "graph/rule.h"

/* cross_entropy */

/* Each rank's columns of a row: what the others need to know of them is two numbers. */

static const char *shape_logit_stats(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || n->in[1] == NONE || IN(1)->dtype != DT_i32 ||
	    value_count(IN(1)) != IN(0)->dim[0])
		return "needs one i32 target a row of logits";
	return rule_out(p, n, 0, DT_f32, 2, (int32_t[]){IN(0)->dim[0], 2});
}

static const char *place_logit_stats(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis), targets = rule_at(p, n->in[1], axis);
	bool cut = n->arg.cross_entropy.axes >> axis & 1;
	if (cut)
		return rows == PLACE_SHARD1 && targets == PLACE_REPLICATED
		               ? rule_place(p, n, 0, axis, PLACE_SHARD0)
		               : "the columns are not cut over this axis";
	if (rows != targets || (rows != PLACE_REPLICATED && rows != PLACE_SHARD0))
		return "logits and targets are placed differently";
	return rule_place(p, n, 0, axis, rows);
}

/* No gradient of its own: cross_entropy's covers it. */
const struct rule rule_logit_stats = {shape_logit_stats, place_logit_stats, NULL, cost_light};

static const char *shape_cross_entropy(struct prog *p, struct node *n)
{
	if (IN(0)->nd != 2 || n->in[1] == NONE || IN(1)->dtype != DT_i32 ||
	    value_count(IN(1)) != IN(0)->dim[0])
		return "needs one i32 target a row of logits";
	if (n->arg.cross_entropy.vocab_size < 1 ||
	    (!HAS(2) && n->arg.cross_entropy.vocab_size > IN(0)->dim[1]))
		return "vocab_size is not within the columns";
	if (HAS(2) &&
	    (IN(2)->dtype != DT_f32 || IN(2)->nd != 2 || IN(2)->dim[1] != 2 || IN(2)->dim[0] % IN(0)->dim[0]))
		return "stats must be f32 [shards · N, 2]";
	const char *why = rule_out_vector(p, n, 0, DT_f64, 1);
	for (int k = 1; !why && k < 3; k++)
		why = rule_out_vector(p, n, k, DT_f32, IN(0)->dim[0]);
	return why;
}

static const char *place_cross_entropy(struct prog *p, struct node *n, int axis)
{
	enum place columns = rule_at(p, n->in[0], axis);
	bool cut = n->arg.cross_entropy.axes >> axis & 1;
	enum place rows = cut ? PLACE_REPLICATED : columns;
	if (cut && (columns != PLACE_SHARD1 || !HAS(2)))
		return "columns that are cut need the statistics of all ranks";
	if (rows != PLACE_REPLICATED && rows != PLACE_SHARD0)
		return "it needs whole rows of logits";
	if (rows != rule_at(p, n->in[1], axis) || (HAS(2) && rows != rule_at(p, n->in[2], axis)))
		return "logits, targets and statistics are placed differently";
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
	enum place columns = rule_at(p, n->in[0], axis);
	bool cut = n->arg.cross_entropy.axes >> axis & 1;
	enum place rows = cut ? PLACE_REPLICATED : columns;
	if (cut && columns != PLACE_SHARD1)
		return "the columns are not cut over this axis";
	if (rows != PLACE_REPLICATED && rows != PLACE_SHARD0)
		return "it needs whole rows of logits";
	if (rule_at(p, n->in[1], axis) != rows || rule_at(p, n->in[2], axis) != rows)
		return "logits, targets and lse are placed differently";
	if (rule_at(p, n->in[3], axis) != PLACE_REPLICATED)
		return "the scale must be the same everywhere";
	return rule_place(p, n, 0, axis, columns);
}

const struct rule rule_cross_entropy_bwd = {shape_cross_entropy_bwd, place_cross_entropy_bwd, NULL,
                                            cost_light};

/* optimizer */

static const char *shape_square_sum(struct prog *p, struct node *n)
{
	return rule_out_vector(p, n, 0, DT_f64, 1);
}

/* Every element counts once: of equal copies only the one on the first rank of the axis does, so the sums are
 * partial along every axis. */
static const char *place_square_sum(struct prog *p, struct node *n, int axis)
{
	enum place at = rule_at(p, n->in[0], axis);
	if (at == PLACE_PARTIAL)
		return "the norm of partial sums: an all-reduce is missing";
	if (at == PLACE_REPLICATED && p->axis_rank[axis] && n->arg.square_sum.counts)
		return "the same elements are counted on several ranks";
	return rule_place(p, n, 0, axis, PLACE_PARTIAL);
}

static struct cost cost_square_sum(const struct prog *p, const struct node *n)
{
	double count = (double)value_count(IN(0));
	return (struct cost){.flop = 2 * count, .bytes = 4 * count};
}

const struct rule rule_square_sum = {shape_square_sum, place_square_sum, NULL, cost_square_sum};

/* cast, accumulate, zero */

static const char *shape_cast(struct prog *p, struct node *n)
{
	struct value like = *IN(0);
	bool known = n->arg.cast.dtype == DT_f32 || dtype_is_half(n->arg.cast.dtype);
	return known ? rule_out(p, n, 0, (enum dtype)n->arg.cast.dtype, like.nd, like.dim)
	             : "casts are to f32, bf16 or f16";
}

static struct cost cost_cast(const struct prog *p, const struct node *n)
{
	return cost_elementwise(p, n, 0);
}

static void grad_cast(struct prog *p, struct node n)
{
	enum dtype back = (enum dtype)p->value[n.in[0]].dtype;
	grad_add(p, n.in[0], EMIT(p, cast, ARG(.cast = {back}), grad_of(p, n.out[0])));
}

const struct rule rule_cast = {shape_cast, place_linear_elementwise, grad_cast, cost_cast};

/* A sum that is there already may be a view, which is flat. */
static const char *shape_accumulate(struct prog *p, struct node *n)
{
	if (n->out[0] == NONE)
		return rule_out_like(p, n, 0, n->in[0]);
	return value_count(OUT(0)) == value_count(IN(0)) && OUT(0)->dtype == IN(0)->dtype
	               ? NULL
	               : "x and the sum are of different sizes or types";
}

const struct rule rule_accumulate = {shape_accumulate, place_linear_elementwise, NULL, cost_cast};

static const char *shape_zero(struct prog *p, struct node *n)
{
	(void)p;
	return n->out[0] == NONE ? "needs the value to clear" : NULL;
}

static const char *place_zero(struct prog *p, struct node *n, int axis)
{
	return rule_place(p, n, 0, axis, rule_at(p, n->out[0], axis));
}

const struct rule rule_zero = {shape_zero, place_zero, NULL, cost_cast};

/* adamw */

static const char *shape_adamw(struct prog *p, struct node *n)
{
	static const uint8_t same[] = {1, 3, 4};
	for (size_t i = 0; i < sizeof same; i++)
		if (n->in[same[i]] == NONE || !rule_same_shape(p, n->in[0], n->in[same[i]]))
			return "parameter, gradient and moments have different shapes";
	if (IN(0)->dtype != DT_f32 && !HAS(2))
		return "a parameter below f32 needs a master";
	for (int k = 3; k < 5; k++)
		if (IN(k)->dtype != DT_f32 && IN(k)->dtype != DT_bf16 && IN(k)->dtype != DT_f64)
			return "moments are f32 or bf16";
	if (!rule_is_vector(p, n->in[5], HYPER_COUNT) || !rule_is_vector(p, n->in[6], 1))
		return "needs hyper[9] and norm2[1]";
	return NULL;
}

static const char *place_adamw(struct prog *p, struct node *n, int axis)
{
	if (rule_at(p, n->in[0], axis) == PLACE_PARTIAL)
		return "a parameter is no partial sum";
	if (rule_at(p, n->in[5], axis) != PLACE_REPLICATED)
		return "hyper must be the same everywhere";
	for (int k = 1; k < 5; k++)
		if (HAS(k) && rule_at(p, n->in[k], axis) != rule_at(p, n->in[0], axis))
			return k == 1 ? "the gradient is not placed as its parameter"
			              : "state is not placed as its parameter";
	return rule_at(p, n->in[6], axis) == PLACE_REPLICATED ? NULL : "the gradient norm is not complete";
}

const struct rule rule_adamw = {shape_adamw, place_adamw, NULL, cost_light};
