/* Collectives: how each changes the placement along its axes, its conjugate in backward, and what it sends.
 */
#include "graph/rule.h"

static int32_t ranks_of(const struct prog *p, const struct node *n)
{
	return prog_ranks(p, n->arg.comm.axes);
}

/* Along its axes a collective turns `from` into `to`; along the others it changes nothing. */
static const char *place_from_to(struct prog *p, struct node *n, int axis, enum place from, enum place to,
                                 const char *otherwise)
{
	enum place at = rule_at(p, n->in[0], axis);
	if (!(n->arg.comm.axes >> axis & 1))
		return rule_place(p, n, 0, axis, at);
	return at == from ? rule_place(p, n, 0, axis, to) : otherwise;
}

/* A ring or a direct exchange sends (ranks - 1)/ranks of the whole, `passes` times; a group over several axes
 * is booked on its first. */
static struct cost cost_ring(const struct prog *p, const struct node *n, double whole_bytes, double passes)
{
	struct cost c = {0};
	double ranks = ranks_of(p, n);
	for (int a = 0; a < AXIS_COUNT; a++)
		if (n->arg.comm.axes >> a & 1 && p->axis_size[a] > 1) {
			c.wire_bytes[a] = passes * (ranks - 1) / ranks * whole_bytes;
			break;
		}
	return c;
}

static struct cost cost_nothing(const struct prog *p, const struct node *n)
{
	(void)p, (void)n;
	return (struct cost){0};
}

static const char *shape_like_input(struct prog *p, struct node *n)
{
	return rule_out_like(p, n, 0, n->in[0]);
}

/* fan_out and all_reduce: f and g of Shoeybi et al. 2019, each the other's adjoint */

static const char *place_fan_out(struct prog *p, struct node *n, int axis)
{
	return place_from_to(p, n, axis, PLACE_REPLICATED, PLACE_REPLICATED,
	                     "ranks that share the work must hold the same operand");
}

static void grad_fan_out(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, all_reduce, &n.arg, grad_of(p, n.out[0])));
}

const struct rule rule_fan_out = {shape_like_input, place_fan_out, grad_fan_out, cost_nothing};

static const char *place_all_reduce(struct prog *p, struct node *n, int axis)
{
	return place_from_to(p, n, axis, PLACE_PARTIAL, PLACE_REPLICATED,
	                     "nothing to add up: the operand holds no partial sums");
}

static void grad_all_reduce(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], grad_of(p, n.out[0]));
}

static struct cost cost_all_reduce(const struct prog *p, const struct node *n)
{
	return cost_ring(p, n, (double)value_bytes(IN(0)), 2);
}

const struct rule rule_all_reduce = {shape_like_input, place_all_reduce, grad_all_reduce, cost_all_reduce};

/* all_gather and reduce_scatter of rows, each the other's adjoint: Korthikanti et al. 2022 */

static const char *shape_all_gather(struct prog *p, struct node *n)
{
	struct value like = *IN(0);
	like.dim[0] *= ranks_of(p, n);
	return rule_out(p, n, 0, (enum dtype)like.dtype, like.nd, like.dim);
}

static const char *place_all_gather(struct prog *p, struct node *n, int axis)
{
	return place_from_to(p, n, axis, PLACE_SHARD0, PLACE_REPLICATED,
	                     "the operand is not cut over these ranks");
}

static void grad_all_gather(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, reduce_scatter, &n.arg, grad_of(p, n.out[0])));
}

static struct cost cost_all_gather(const struct prog *p, const struct node *n)
{
	return cost_ring(p, n, (double)value_bytes(OUT(0)), 1);
}

const struct rule rule_all_gather = {shape_all_gather, place_all_gather, grad_all_gather, cost_all_gather};

static const char *shape_reduce_scatter(struct prog *p, struct node *n)
{
	struct value like = *IN(0);
	int32_t ranks = ranks_of(p, n);
	if (like.dim[0] % ranks)
		return "rows are not a multiple of the ranks";
	like.dim[0] /= ranks;
	return rule_out(p, n, 0, (enum dtype)like.dtype, like.nd, like.dim);
}

static const char *place_reduce_scatter(struct prog *p, struct node *n, int axis)
{
	return place_from_to(p, n, axis, PLACE_PARTIAL, PLACE_SHARD0,
	                     "nothing to add up: the operand holds no partial sums");
}

static void grad_reduce_scatter(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, all_gather, &n.arg, grad_of(p, n.out[0])));
}

static struct cost cost_reduce_scatter(const struct prog *p, const struct node *n)
{
	return cost_ring(p, n, (double)value_bytes(IN(0)), 1);
}

const struct rule rule_reduce_scatter = {shape_reduce_scatter, place_reduce_scatter, grad_reduce_scatter,
                                         cost_reduce_scatter};

/* share: every rank has written its part of x */

static const char *shape_share(struct prog *p, struct node *n)
{
	return IN(0)->dim[0] % ranks_of(p, n) ? "x is not a multiple of the ranks" : NULL;
}

static const char *place_share(struct prog *p, struct node *n, int axis)
{
	return rule_at(p, n->in[0], axis) == PLACE_REPLICATED || !(n->arg.comm.axes >> axis & 1)
	               ? NULL
	               : "it makes copies equal, and these are none";
}

static struct cost cost_share(const struct prog *p, const struct node *n)
{
	return cost_ring(p, n, (double)value_bytes(IN(0)), 1);
}

const struct rule rule_share = {shape_share, place_share, NULL, cost_share};

/* shift: everyone's rows go some places on, and their gradients come back */

static const char *shape_shift(struct prog *p, struct node *n)
{
	uint32_t axes = n->arg.comm.axes;
	return !axes || axes & (axes - 1) ? "it goes along one axis" : rule_out_like(p, n, 0, n->in[0]);
}

static const char *place_shift(struct prog *p, struct node *n, int axis)
{
	return place_from_to(p, n, axis, PLACE_SHARD0, PLACE_SHARD0, "all ranks hold the same");
}

static void grad_shift(struct prog *p, struct node n)
{
	n.arg.comm.step = -n.arg.comm.step;
	grad_add(p, n.in[0], EMIT(p, shift, &n.arg, grad_of(p, n.out[0])));
}

static struct cost cost_shift(const struct prog *p, const struct node *n)
{
	return cost_ring(p, n, (double)value_bytes(IN(0)) * ranks_of(p, n) / (ranks_of(p, n) - 1.0), 1);
}

const struct rule rule_shift = {shape_shift, place_shift, grad_shift, cost_shift};

/* all_to_all: equal parts turn rows into columns and back; counted rows go to their experts and home */

static const char *shape_all_to_all(struct prog *p, struct node *n)
{
	struct value like = *IN(0);
	if (!HAS(1))
		return like.dim[0] % ranks_of(p, n) ? "rows are not a multiple of the ranks"
		                                    : rule_out_like(p, n, 0, n->in[0]);
	if (IN(1)->dtype != DT_i32 || IN(1)->nd != 2 || IN(1)->dim[0] != ranks_of(p, n) ||
	    IN(1)->dim[1] % ranks_of(p, n))
		return "sizes must be i32 [ranks, experts]";
	like.dim[0] = n->arg.comm.rows;
	return rule_out(p, n, 0, (enum dtype)like.dtype, like.nd, like.dim);
}

static const char *place_all_to_all(struct prog *p, struct node *n, int axis)
{
	enum place at = rule_at(p, n->in[0], axis);
	if (!(n->arg.comm.axes >> axis & 1)) {
		enum place rows = at == PLACE_SHARD0 ? at : PLACE_REPLICATED;
		return HAS(1) && rule_at(p, n->in[1], axis) != rows ? "the sizes are those of other rows"
		                                                    : rule_place(p, n, 0, axis, at);
	}
	if (HAS(1))
		return at != PLACE_SHARD0 || rule_at(p, n->in[1], axis) != PLACE_REPLICATED
		               ? "rows that are cut over these ranks, and sizes that all of them know"
		               : rule_place(p, n, 0, axis, at);
	if (at != PLACE_SHARD0 && at != PLACE_SHARD1)
		return "the operand is not cut over these ranks";
	return rule_place(p, n, 0, axis, at == PLACE_SHARD0 ? PLACE_SHARD1 : PLACE_SHARD0);
}

static void grad_all_to_all(struct prog *p, struct node n)
{
	n.arg.comm.back = !n.arg.comm.back;
	n.arg.comm.rows = p->value[n.in[0]].dim[0];
	grad_add(p, n.in[0], EMIT(p, all_to_all, &n.arg, grad_of(p, n.out[0]), n.in[1]));
}

/* Of counted rows, as many as there are without dropping: the smaller side, which has no room to spare. */
static struct cost cost_all_to_all(const struct prog *p, const struct node *n)
{
	int64_t in = value_bytes(IN(0)), out = value_bytes(OUT(0));
	return cost_ring(p, n, (double)(in < out ? in : out), 1);
}

const struct rule rule_all_to_all = {shape_all_to_all, place_all_to_all, grad_all_to_all, cost_all_to_all};

/* regrid: every rank has rows of its own, so both grids may say how they are cut */

static const char *shape_regrid(struct prog *p, struct node *n)
{
	const char *why = shape_like_input(p, n);
	struct value *y = OUT(0);
	if (why || y->def != NONE)
		return why;
	y->grid = IN(0)->grid == GRID_DENSE ? GRID_EXPERT : GRID_DENSE;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (p->axis_size[a] > 1 && prog_lies_along(y, a))
			y->place[a] = PLACE_SHARD0;
	return NULL;
}

static const char *place_regrid(struct prog *p, struct node *n, int axis)
{
	return rule_at(p, n->in[0], axis) == PLACE_SHARD0 ? NULL : "several ranks hold the same rows";
}

static void grad_regrid(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, regrid, NO_ARG, grad_of(p, n.out[0])));
}

const struct rule rule_regrid = {shape_regrid, place_regrid, grad_regrid, cost_nothing};

/* wait */

static const char *place_wait(struct prog *p, struct node *n, int axis)
{
	return rule_place(p, n, 0, axis, rule_at(p, n->in[0], axis));
}

const struct rule rule_wait = {shape_like_input, place_wait, NULL, cost_nothing};
