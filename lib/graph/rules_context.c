/* What attention needs where ranks share a sequence, and multi-head latent attention. */
#include "graph/rule.h"

/* split_columns, join_columns: each the other's adjoint */

static const char *shape_split_columns(struct prog *p, struct node *n)
{
	int32_t first = n->arg.columns.first, width = IN(0)->dim[1], rows = IN(0)->dim[0];
	if (IN(0)->nd != 2 || first < 1 || first >= width)
		return "it cuts inside a row";
	const char *why = rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2, (int32_t[]){rows, first});
	return why ? why : rule_out(p, n, 1, (enum dtype)IN(0)->dtype, 2, (int32_t[]){rows, width - first});
}

/* Columns that ranks share are cut in each part, or the parts would be those of different ranks. */
static const char *place_columns(struct prog *p, struct node *n, int axis)
{
	enum place at = rule_at(p, n->in[0], axis);
	const char *why = NULL;
	for (int k = 1; k < op_rows[n->op].n_in; k++)
		if (rule_at(p, n->in[k], axis) != at)
			return "operands are placed differently";
	for (int k = 0; !why && k < op_rows[n->op].n_out; k++)
		why = rule_place(p, n, k, axis, at);
	return why;
}

static int32_t or_zeros(struct prog *p, int32_t gradient, int32_t like)
{
	if (gradient != NONE)
		return gradient;
	struct value v = p->value[like];
	int32_t zeros = prog_value(p, "zeros", R_TEMP, (enum dtype)v.dtype, v.nd, v.dim);
	p->value[zeros].grid = v.grid;
	for (int a = 0; a < AXIS_COUNT; a++)
		p->value[zeros].place[a] = v.place[a];
	prog_emit(p, OP_zero, NO_ARG, HERE, NULL, 0, (int32_t[OP_MAX_OUT]){zeros});
	return zeros;
}

static void grad_split_columns(struct prog *p, struct node n)
{
	int32_t a = or_zeros(p, grad_of(p, n.out[0]), n.out[0]),
	        b = or_zeros(p, grad_of(p, n.out[1]), n.out[1]);
	grad_add(p, n.in[0], EMIT(p, join_columns, NO_ARG, a, b));
}

const struct rule rule_split_columns = {shape_split_columns, place_columns, grad_split_columns, cost_light};

static const char *shape_join_columns(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || IN(0)->dim[0] != IN(1)->dim[0] || IN(0)->dtype != IN(1)->dtype)
		return "operands have different rows";
	return rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2,
	                (int32_t[]){IN(0)->dim[0], IN(0)->dim[1] + IN(1)->dim[1]});
}

static void grad_join_columns(struct prog *p, struct node n)
{
	int32_t a = EMIT(p, split_columns, ARG(.columns = {p->value[n.in[0]].dim[1]}), grad_of(p, n.out[0]));
	int32_t b = prog_out(p, 1);
	grad_add(p, n.in[0], a);
	grad_add(p, n.in[1], b);
}

const struct rule rule_join_columns = {shape_join_columns, place_columns, grad_join_columns, cost_light};

/* split_heads, join_heads */

static const char *check_heads(const struct node *n, int64_t width)
{
	int64_t sum = 0;
	for (int k = 0; k < 3; k++) {
		if (n->arg.heads.part[k] % n->arg.heads.ranks)
			return "heads do not divide by the ranks";
		sum += n->arg.heads.part[k];
	}
	return sum == width ? NULL : "the parts are not as wide as a row";
}

static const char *shape_split_heads(struct prog *p, struct node *n)
{
	int32_t ranks = n->arg.heads.ranks;
	const char *why = check_heads(n, IN(0)->dim[1]);
	return why ? why
	           : rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2,
	                      (int32_t[]){IN(0)->dim[0] * ranks, IN(0)->dim[1] / ranks});
}

static void grad_split_heads(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, join_heads, &n.arg, grad_of(p, n.out[0])));
}

const struct rule rule_split_heads = {shape_split_heads, place_columns, grad_split_heads, cost_light};

static const char *shape_join_heads(struct prog *p, struct node *n)
{
	int32_t ranks = n->arg.heads.ranks;
	const char *why = check_heads(n, (int64_t)IN(0)->dim[1] * ranks);
	if (!why && IN(0)->dim[0] % ranks)
		why = "rows are not a multiple of the ranks";
	return why ? why
	           : rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2,
	                      (int32_t[]){IN(0)->dim[0] / ranks, IN(0)->dim[1] * ranks});
}

static void grad_join_heads(struct prog *p, struct node n)
{
	grad_add(p, n.in[0], EMIT(p, split_heads, &n.arg, grad_of(p, n.out[0])));
}

const struct rule rule_join_heads = {shape_join_heads, place_columns, grad_join_heads, cost_light};

/* mla_pack, mla_unpack */

static int32_t mla_width(const struct node *n)
{
	return n->arg.mla.heads * (2 * n->arg.mla.head_dim + n->arg.mla.value_dim);
}

static const char *check_rotation(const struct prog *p, int32_t rows, int32_t table, int32_t position,
                                  int32_t rotated)
{
	if (table == NONE || position == NONE || p->value[table].dtype != DT_f32 ||
	    p->value[table].dim[1] != rotated || rotated % 2)
		return "needs a table f32 [P,R] with R even";
	return value_count(&p->value[position]) == rows ? NULL : "needs one position a row";
}

static const char *shape_mla_pack(struct prog *p, struct node *n)
{
	int32_t heads = n->arg.mla.heads, size = n->arg.mla.head_dim, rows = IN(0)->dim[0];
	if (n->in[1] == NONE || n->in[2] == NONE || IN(1)->dim[0] != rows || IN(2)->dim[0] != rows)
		return "operands have different rows";
	int32_t rotated = IN(2)->dim[1];
	if (IN(0)->dim[1] != heads * size || rotated >= size ||
	    IN(1)->dim[1] != heads * (size - rotated + n->arg.mla.value_dim))
		return "rows are not as wide as the heads";
	const char *why = check_rotation(p, rows, n->in[3], n->in[4], rotated);
	return why ? why : rule_out(p, n, 0, (enum dtype)IN(0)->dtype, 2, (int32_t[]){rows, mla_width(n)});
}

/* The key that all heads share is on all ranks where these share the heads. */
static const char *place_mla_pack(struct prog *p, struct node *n, int axis)
{
	enum place at = rule_at(p, n->in[0], axis), rows = at == PLACE_SHARD1 ? PLACE_REPLICATED : at;
	if (at == PLACE_PARTIAL)
		return "it needs whole values, these are partial sums";
	if (rule_at(p, n->in[1], axis) != at || rule_at(p, n->in[2], axis) != rows ||
	    rule_at(p, n->in[4], axis) != rows || rule_at(p, n->in[3], axis) != PLACE_REPLICATED)
		return "operands are placed differently";
	return rule_place(p, n, 0, axis, at);
}

static void grad_mla_pack(struct prog *p, struct node n)
{
	int32_t dq = EMIT(p, mla_unpack, &n.arg, grad_of(p, n.out[0]), n.in[3], n.in[4]);
	int32_t dkv = prog_out(p, 1), dkey = prog_out(p, 2);
	grad_add(p, n.in[0], dq);
	grad_add(p, n.in[1], dkv);
	grad_add(p, n.in[2], dkey);
}

const struct rule rule_mla_pack = {shape_mla_pack, place_mla_pack, grad_mla_pack, cost_light};

static const char *shape_mla_unpack(struct prog *p, struct node *n)
{
	int32_t heads = n->arg.mla.heads, size = n->arg.mla.head_dim, rows = IN(0)->dim[0];
	int32_t rotated = n->in[1] == NONE ? 0 : IN(1)->dim[1];
	enum dtype dtype = (enum dtype)IN(0)->dtype;
	if (IN(0)->dim[1] != mla_width(n) || rotated >= size)
		return "rows are not as wide as the heads";
	const char *why = check_rotation(p, rows, n->in[1], n->in[2], rotated);
	if (!why)
		why = rule_out(p, n, 0, dtype, 2, (int32_t[]){rows, heads * size});
	if (!why)
		why = rule_out(p, n, 1, dtype, 2,
		               (int32_t[]){rows, heads * (size - rotated + n->arg.mla.value_dim)});
	return why ? why : rule_out(p, n, 2, dtype, 2, (int32_t[]){rows, rotated});
}

static const char *place_mla_unpack(struct prog *p, struct node *n, int axis)
{
	enum place at = rule_at(p, n->in[0], axis), rows = at == PLACE_SHARD1 ? PLACE_REPLICATED : at;
	if (at == PLACE_PARTIAL)
		return "it needs whole values, these are partial sums";
	if (rule_at(p, n->in[2], axis) != rows || rule_at(p, n->in[1], axis) != PLACE_REPLICATED)
		return "operands are placed differently";
	const char *why = rule_place(p, n, 0, axis, at);
	if (!why)
		why = rule_place(p, n, 1, axis, at);
	return why ? why : rule_place(p, n, 2, axis, at == PLACE_SHARD1 ? PLACE_PARTIAL : at);
}

const struct rule rule_mla_unpack = {shape_mla_unpack, place_mla_unpack, NULL, cost_light};
