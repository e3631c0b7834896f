/* Attention on packed rows [q heads | k groups | v groups], rotary positions, norms of queries and keys. */
#include "graph/rule.h"

static int32_t packed_width(int32_t heads, int32_t groups, int32_t head_dim)
{
	return (heads + 2 * groups) * head_dim;
}

/* rope */

static const char *shape_rope(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || n->in[2] == NONE)
		return "needs a table and positions";
	if (IN(0)->dim[1] != packed_width(n->arg.rope.heads, n->arg.rope.groups, n->arg.rope.head_dim))
		return "rows are not (heads + 2 groups) · head_dim wide";
	if (IN(1)->dtype != DT_f32 || IN(1)->dim[1] > n->arg.rope.head_dim || IN(1)->dim[1] % 2)
		return "the table must be f32 [P,R] with R even and at most head_dim";
	if (value_count(IN(2)) != IN(0)->dim[0])
		return "needs one position a row";
	return rule_out_like(p, n, 0, n->in[0]);
}

static void grad_rope(struct prog *p, struct node n)
{
	union op_arg back = n.arg;
	back.rope.inverse = !n.arg.rope.inverse;
	grad_add(p, n.in[0], EMIT(p, rope, &back, grad_of(p, n.out[0]), n.in[1], n.in[2]));
}

const struct rule rule_rope = {shape_rope, place_heads, grad_rope, cost_light};

/* qk_norm */

static const char *shape_qk_norm(struct prog *p, struct node *n)
{
	int32_t heads = n->arg.norm.heads, groups = n->arg.norm.groups, dim = n->arg.norm.head_dim;
	if (IN(0)->dim[1] != packed_width(heads, groups, dim))
		return "rows are not (heads + 2 groups) · head_dim wide";
	if (!rule_is_vector(p, n->in[1], dim) || !rule_is_vector(p, n->in[2], dim))
		return "weights must be head_dim long";
	const char *why = rule_out_like(p, n, 0, n->in[0]);
	return why ? why : rule_out(p, n, 1, DT_f32, 2, (int32_t[]){IN(0)->dim[0], heads + groups});
}

static void grad_qk_norm(struct prog *p, struct node n)
{
	int32_t outs[OP_MAX_OUT] = {NONE, grad_accumulator(p, n.in[1]), grad_accumulator(p, n.in[2])};
	grad_add(p, n.in[0],
	         EMIT_INTO(p, qk_norm_bwd, &n.arg, outs, grad_of(p, n.out[0]), n.in[0], n.in[1], n.in[2],
	                   n.out[1]));
}

const struct rule rule_qk_norm = {shape_qk_norm, place_heads, grad_qk_norm, cost_light};

static const char *shape_qk_norm_bwd(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || !rule_same_shape(p, n->in[0], n->in[1]))
		return "dy and x have different shapes";
	if (!rule_is_vector(p, n->in[4], IN(0)->dim[0] * (n->arg.norm.heads + n->arg.norm.groups)))
		return "needs the statistics of every head";
	const char *why = rule_out_like(p, n, 0, n->in[0]);
	for (int k = 1; !why && k < 3; k++)
		why = rule_out_vector(p, n, k, DT_f32, n->arg.norm.head_dim);
	return why;
}

/* Unlike a row norm's, these weights are shared by the heads: sharded heads give partial sums too. */
static const char *place_qk_norm_bwd(struct prog *p, struct node *n, int axis)
{
	enum place rows = rule_at(p, n->in[0], axis);
	const char *why = rule_check_rows(p, n, axis, true);
	if (!why)
		why = rule_place(p, n, 0, axis, rows);
	for (int k = 1; !why && k < 3; k++)
		why = rule_place(p, n, k, axis, rows == PLACE_REPLICATED ? PLACE_REPLICATED : PLACE_PARTIAL);
	return why;
}

const struct rule rule_qk_norm_bwd = {shape_qk_norm_bwd, place_qk_norm_bwd, NULL, cost_light};

/* attention */

static const char *check_packed(const struct prog *p, const struct node *n, int32_t qkv, int32_t keys)
{
	int32_t length = n->arg.attention.seq_length;
	const struct value *v = &p->value[qkv];
	if (v->dim[1] !=
	    packed_width(n->arg.attention.heads, n->arg.attention.groups, n->arg.attention.head_dim))
		return "rows are not (heads + 2 groups) · head_dim wide";
	if (n->arg.attention.heads % n->arg.attention.groups)
		return "heads are not a multiple of groups";
	if (length < 1 || v->dim[0] % length)
		return "rows are not a multiple of the sequence length";
	if (n->arg.attention.dropout > 0 && (keys == NONE || p->value[keys].dim[0] * length != v->dim[0]))
		return "dropout needs one key a sample";
	return NULL;
}

static const char *shape_attention(struct prog *p, struct node *n)
{
	const char *why = check_packed(p, n, n->in[0], n->in[1]);
	int32_t rows = IN(0)->dim[0], heads = n->arg.attention.heads;
	if (!why)
		why = rule_out(p, n, 0, IN(0)->dtype, 2,
		               (int32_t[]){rows, heads * n->arg.attention.head_dim});
	return why ? why : rule_out(p, n, 1, DT_f32, 2, (int32_t[]){rows, heads});
}

static void grad_attention(struct prog *p, struct node n)
{
	grad_add(p, n.in[0],
	         EMIT(p, attention_bwd, &n.arg, grad_of(p, n.out[0]), n.in[0], n.out[0], n.out[1], n.in[1]));
}

/* Pairs of query and key that are computed: the causal half, or the window's band. */
static double attention_pairs(const struct prog *p, const struct node *n, int32_t rows_of)
{
	double length = n->arg.attention.seq_length, window = n->arg.attention.window;
	double rows = p->value[rows_of].dim[0];
	if (window <= 0 || window > length)
		window = length;
	return rows * (window - window * (window - 1) / (2 * length));
}

static struct cost cost_attention(const struct prog *p, const struct node *n)
{
	struct cost c = cost_elementwise(p, n, 0);
	c.flop = 4 * attention_pairs(p, n, n->in[0]) * n->arg.attention.heads * n->arg.attention.head_dim;
	return c;
}

const struct rule rule_attention = {shape_attention, place_heads, grad_attention, cost_attention};

static const char *shape_attention_bwd(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || n->in[2] == NONE || n->in[3] == NONE ||
	    !rule_same_shape(p, n->in[0], n->in[2]))
		return "do and o have different shapes";
	if (IN(1)->dim[0] != IN(0)->dim[0] ||
	    !rule_is_vector(p, n->in[3], IN(0)->dim[0] * n->arg.attention.heads))
		return "needs qkv and lse of every row";
	const char *why = check_packed(p, n, n->in[1], n->in[4]);
	return why ? why : rule_out_like(p, n, 0, n->in[1]);
}

static struct cost cost_attention_bwd(const struct prog *p, const struct node *n)
{
	struct cost c = cost_attention(p, n);
	c.flop *= 2.5; /* five products instead of two: Dao 2023 */
	return c;
}

const struct rule rule_attention_bwd = {shape_attention_bwd, place_heads, NULL, cost_attention_bwd};

static const char *shape_attention_cache(struct prog *p, struct node *n)
{
	int32_t width = n->arg.attention.groups * n->arg.attention.head_dim;
	if (n->in[3] == NONE || IN(1)->dim[1] != width || !rule_same_shape(p, n->in[1], n->in[2]))
		return "caches must be [P, groups · head_dim]";
	if (value_count(IN(3)) != IN(0)->dim[0])
		return "needs one position a row";
	int32_t out[] = {IN(0)->dim[0], n->arg.attention.heads * n->arg.attention.head_dim};
	return rule_out(p, n, 0, IN(0)->dtype, 2, out);
}

/* One sequence: all its rows are on every rank, whose caches hold the heads that it works on. */
static const char *place_attention_cache(struct prog *p, struct node *n, int axis)
{
	enum place heads = rule_at(p, n->in[0], axis);
	if (heads != PLACE_REPLICATED && heads != PLACE_SHARD1)
		return "it needs all rows of the sequence";
	if (rule_at(p, n->in[1], axis) != heads || rule_at(p, n->in[2], axis) != heads)
		return "caches are not cut as the heads are";
	if (rule_at(p, n->in[3], axis) != PLACE_REPLICATED)
		return "positions must be the same everywhere";
	return rule_place(p, n, 0, axis, heads);
}

const struct rule rule_attention_cache = {shape_attention_cache, place_attention_cache, NULL, cost_light};
