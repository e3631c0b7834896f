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

/* attention: on packed rows [q heads | k groups | v groups], or on rows of queries and rows of keys and
 * values apart, where ranks share the sequence. */

static int32_t value_dim(const struct node *n)
{
	return n->arg.attention.value_dim ? n->arg.attention.value_dim : n->arg.attention.head_dim;
}

static int32_t query_width(const struct node *n)
{
	return n->arg.attention.heads * n->arg.attention.head_dim;
}

static int32_t key_width(const struct node *n)
{
	return n->arg.attention.groups * (n->arg.attention.head_dim + value_dim(n));
}

/* Rows of one sample in the blocks of some context-parallel ranks. */
static int32_t rows_a_sample(const struct node *n, const struct context *c)
{
	int32_t length = n->arg.attention.seq_length;
	return c->ranks > 1 ? length / c->ranks * c->count : length;
}

static const char *check_samples(const struct prog *p, const struct node *n, int32_t rows, int32_t keys,
                                 int32_t begins)
{
	const struct context *c = &n->arg.attention.queries;
	int32_t length = n->arg.attention.seq_length;
	if (n->arg.attention.heads % n->arg.attention.groups)
		return "heads are not a multiple of groups";
	if (length < 1 || (c->ranks > 1 && length % (2 * c->ranks)) || rows % rows_a_sample(n, c))
		return "rows are not a multiple of the sequence length";
	if (n->arg.attention.dropout > 0 &&
	    (keys == NONE || p->value[keys].dim[0] * rows_a_sample(n, c) != rows))
		return "dropout needs one key a sample";
	if (begins != NONE && (!rule_is_vector(p, begins, rows) || p->value[begins].dtype != DT_i32))
		return "needs one i32 begin a row";
	return NULL;
}

static const char *shape_output(struct prog *p, struct node *n, int32_t rows, enum dtype dtype)
{
	int32_t heads = n->arg.attention.heads;
	const char *why = rule_out(p, n, 0, dtype, 2, (int32_t[]){rows, heads * value_dim(n)});
	return why ? why : rule_out(p, n, 1, DT_f32, 2, (int32_t[]){rows, heads});
}

static const char *shape_attention(struct prog *p, struct node *n)
{
	if (IN(0)->dim[1] != query_width(n) + key_width(n))
		return "rows are not as wide as the heads";
	const char *why = check_samples(p, n, IN(0)->dim[0], n->in[1], n->in[2]);
	return why ? why : shape_output(p, n, IN(0)->dim[0], (enum dtype)IN(0)->dtype);
}

/* What an axis may cut: the batch between samples, or the heads; never a sample. Of the inputs from `host`
 * on, which are per sample or row, those that are there go along with the rows. */
static const char *place_attention_like(struct prog *p, struct node *n, int axis, int host)
{
	enum place at = rule_at(p, n->in[0], axis), samples = at == PLACE_SHARD0 ? at : PLACE_REPLICATED;
	if (at == PLACE_PARTIAL)
		return "it needs whole values, these are partial sums";
	if (at == PLACE_SHARD0 && !(AXES_DATA >> axis & 1))
		return "it needs whole samples, these are cut";
	for (int k = 1; k < op_rows[n->op].n_in; k++)
		if (HAS(k) && rule_at(p, n->in[k], axis) != (k < host ? at : samples))
			return "operands are placed differently";
	const char *why = NULL;
	for (int k = 0; !why && k < op_rows[n->op].n_out; k++)
		why = rule_place(p, n, k, axis, at);
	return why;
}

static const char *place_attention(struct prog *p, struct node *n, int axis)
{
	return place_attention_like(p, n, axis, 1);
}

static void grad_attention(struct prog *p, struct node n)
{
	grad_add(p, n.in[0],
	         EMIT(p, attention_bwd, &n.arg, grad_of(p, n.out[0]), n.in[0], n.out[0], n.out[1], n.in[1],
	              n.in[2]));
}

/* Pairs of query and key that are computed: the causal half, or the window's band, of which a part over some
 * of the ranks has its share. */
static double attention_pairs(const struct prog *p, const struct node *n, int32_t rows_of)
{
	const struct context *c = &n->arg.attention.rows;
	double length = n->arg.attention.seq_length, window = n->arg.attention.window;
	double rows = p->value[rows_of].dim[0], share = c->ranks > 1 ? (double)c->count / c->ranks : 1;
	if (window <= 0 || window > length)
		window = length;
	return share * rows * (window - window * (window - 1) / (2 * length));
}

static struct cost cost_attention(const struct prog *p, const struct node *n)
{
	struct cost c = cost_elementwise(p, n, 0);
	c.flop = 2 * attention_pairs(p, n, n->in[0]) * n->arg.attention.heads *
	         (n->arg.attention.head_dim + value_dim(n));
	return c;
}

const struct rule rule_attention = {shape_attention, place_attention, grad_attention, cost_attention};

static const char *shape_attention_bwd(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || n->in[2] == NONE || n->in[3] == NONE ||
	    !rule_same_shape(p, n->in[0], n->in[2]))
		return "do and o have different shapes";
	if (IN(1)->dim[0] != IN(0)->dim[0] || IN(1)->dim[1] != query_width(n) + key_width(n) ||
	    !rule_is_vector(p, n->in[3], IN(0)->dim[0] * n->arg.attention.heads))
		return "needs qkv and lse of every row";
	const char *why = check_samples(p, n, IN(1)->dim[0], n->in[4], n->in[5]);
	return why ? why : rule_out_like(p, n, 0, n->in[1]);
}

static const char *place_attention_bwd(struct prog *p, struct node *n, int axis)
{
	return place_attention_like(p, n, axis, 4);
}

static struct cost cost_attention_bwd(const struct prog *p, const struct node *n)
{
	struct cost c = cost_attention(p, n);
	c.flop *= 2.5; /* five products instead of two: Dao 2023 */
	return c;
}

const struct rule rule_attention_bwd = {shape_attention_bwd, place_attention_bwd, NULL, cost_attention_bwd};

/* attention_part: the ranks' keys come one after the other, or all at once */

/* The node that made the output so far, which this one goes on with. */
static const struct node *part_before(const struct prog *p, const struct node *n)
{
	int32_t def = HAS(2) ? p->value[n->in[2]].def : NONE;
	return def == NONE || p->node[def].op != OP_attention_part ? NULL : &p->node[def];
}

static bool share_ranks(const struct context *a, const struct context *b)
{
	int32_t on = ((b->first - a->first) % a->ranks + a->ranks) % a->ranks;
	return on < a->count || a->ranks - on < b->count;
}

/* Keys that an earlier part has seen would count twice. */
static bool seen_before(const struct prog *p, const struct node *n)
{
	bool seen = false;
	for (const struct node *m = part_before(p, n); m && !seen; m = part_before(p, m))
		seen = share_ranks(&m->arg.attention.rows, &n->arg.attention.rows);
	return seen;
}

static const char *check_parts(const struct prog *p, const struct node *n, int32_t q, int32_t kv)
{
	const struct context *keys = &n->arg.attention.rows, *queries = &n->arg.attention.queries;
	if (kv == NONE || keys->ranks < 2 || keys->ranks != queries->ranks || queries->count != 1)
		return "queries are those of one rank, keys those of some, of at least two";
	if (p->value[q].dim[1] != query_width(n) || p->value[kv].dim[1] != key_width(n))
		return "rows are not as wide as the heads";
	if (p->value[kv].dim[0] != p->value[q].dim[0] * keys->count)
		return "the ranks' keys are not as many as their rows";
	return NULL;
}

static const char *shape_attention_part(struct prog *p, struct node *n)
{
	const char *why = check_parts(p, n, n->in[0], n->in[1]);
	if (!why)
		why = check_samples(p, n, IN(0)->dim[0], n->in[4], n->in[5]);
	const struct node *before = part_before(p, n);
	if (!why && HAS(2) && (!before || n->in[3] != before->out[1] || IN(2)->dtype != DT_f32))
		why = "what came before is no part of attention";
	int32_t covered = n->arg.attention.rows.count + (before ? before->arg.attention.covered : 0);
	if (!why && covered != n->arg.attention.covered)
		why = "it counts other ranks' keys than it has seen";
	if (!why && seen_before(p, n))
		why = "it sees keys that an earlier part has seen";
	enum dtype dtype = n->arg.attention.goes_on ? DT_f32 : (enum dtype)IN(0)->dtype;
	return why ? why : shape_output(p, n, IN(0)->dim[0], dtype);
}

/* Along the axis that cuts the samples: whose keys are here, all at once or those of some ranks. */
static const char *check_keys(const struct prog *p, const struct node *n, int axis, int32_t kv)
{
	bool all = n->arg.attention.rows.count == p->axis_size[axis];
	if (n->arg.attention.rows.ranks != p->axis_size[axis])
		return "the argument says other ranks than its axes";
	return rule_at(p, kv, axis) == (all ? PLACE_REPLICATED : PLACE_SHARD0)
	               ? NULL
	               : "keys are not those that the argument says";
}

/* Until all keys have been seen the output is not what it will be: nobody but the next part may read it. */
static const char *place_attention_part(struct prog *p, struct node *n, int axis)
{
	bool within = n->arg.attention.axes >> axis & 1;
	if (!within)
		return place_attention_like(p, n, axis, 4);
	const char *why = rule_at(p, n->in[0], axis) == PLACE_SHARD0
	                          ? check_keys(p, n, axis, n->in[1])
	                          : "the queries are not cut over these ranks";
	if (!why && HAS(4) && rule_at(p, n->in[4], axis) != PLACE_REPLICATED)
		why = "keys of samples are the same for all their rows";
	if (!why && HAS(5) && rule_at(p, n->in[5], axis) != PLACE_SHARD0)
		why = "operands are placed differently";
	bool done = n->arg.attention.covered == p->axis_size[axis];
	for (int k = 0; !why && k < 2; k++)
		why = rule_place(p, n, k, axis, done ? PLACE_SHARD0 : PLACE_PARTIAL);
	return why;
}

/* The last part of the chain that node n belongs to. */
static const struct node *last_part(const struct prog *p, const struct node *n)
{
	const struct node *last = n;
	for (const struct node *m = n; m < p->node + p->n_node; m++)
		if (m->op == OP_attention_part && m->in[2] == last->out[0])
			last = m;
	return last;
}

/* With the output and lse of all parts, each part's gradients are those of the whole softmax restricted to
 * its keys (Liu et al. 2023). So the adjoint of the whole output serves every part. */
static void grad_attention_part(struct prog *p, struct node n)
{
	int32_t def = p->value[n.out[0]].def;
	struct node last = *last_part(p, &p->node[def]);
	int32_t dout = grad_of(p, n.out[0]);
	int32_t dq = EMIT(p, attention_part_bwd, &n.arg, dout, n.in[0], n.in[1], last.out[0], last.out[1],
	                  n.in[4], n.in[5]);
	int32_t dkv = prog_out(p, 1);
	grad_add(p, n.in[0], dq);
	grad_add(p, n.in[1], dkv);
	if (n.in[2] != NONE && !p->e.code)
		p->value[n.in[2]].grad = dout;
}

const struct rule rule_attention_part = {shape_attention_part, place_attention_part, grad_attention_part,
                                         cost_attention};

static const char *shape_attention_part_bwd(struct prog *p, struct node *n)
{
	if (n->in[1] == NONE || n->in[3] == NONE || n->in[4] == NONE ||
	    !rule_same_shape(p, n->in[0], n->in[3]))
		return "do and o have different shapes";
	if (IN(1)->dim[0] != IN(0)->dim[0] ||
	    !rule_is_vector(p, n->in[4], IN(0)->dim[0] * n->arg.attention.heads))
		return "needs queries and lse of every row";
	const char *why = check_parts(p, n, n->in[1], n->in[2]);
	if (!why)
		why = check_samples(p, n, IN(1)->dim[0], n->in[5], n->in[6]);
	if (!why)
		why = rule_out_like(p, n, 0, n->in[1]);
	return why ? why : rule_out_like(p, n, 1, n->in[2]);
}

static const char *place_attention_part_bwd(struct prog *p, struct node *n, int axis)
{
	static const enum place wanted[] = {[0] = PLACE_SHARD0, [1] = PLACE_SHARD0,     [3] = PLACE_SHARD0,
	                                    [4] = PLACE_SHARD0, [5] = PLACE_REPLICATED, [6] = PLACE_SHARD0};
	if (!(n->arg.attention.axes >> axis & 1))
		return place_attention_like(p, n, axis, 5);
	const char *why = check_keys(p, n, axis, n->in[2]);
	for (int k = 0; !why && k < 7; k++)
		if (k != 2 && HAS(k) && rule_at(p, n->in[k], axis) != wanted[k])
			why = "operands are placed differently";
	if (!why)
		why = rule_place(p, n, 0, axis, PLACE_SHARD0);
	bool all = rule_at(p, n->in[2], axis) == PLACE_REPLICATED;
	return why ? why : rule_place(p, n, 1, axis, all ? PLACE_PARTIAL : PLACE_SHARD0);
}

static struct cost cost_attention_part_bwd(const struct prog *p, const struct node *n)
{
	struct cost c = cost_attention(p, n);
	c.flop *= 2.5;
	return c;
}

const struct rule rule_attention_part_bwd = {shape_attention_part_bwd, place_attention_part_bwd, NULL,
                                             cost_attention_part_bwd};

static const char *shape_attention_cache(struct prog *p, struct node *n)
{
	int32_t groups = n->arg.attention.groups;
	if (n->in[3] == NONE || IN(1)->dim[1] != groups * n->arg.attention.head_dim ||
	    IN(2)->dim[1] != groups * value_dim(n) || IN(1)->dim[0] != IN(2)->dim[0])
		return "caches must be [P, groups · head_dim] and [P, groups · value_dim]";
	if (value_count(IN(3)) != IN(0)->dim[0])
		return "needs one position a row";
	int32_t out[] = {IN(0)->dim[0], n->arg.attention.heads * value_dim(n)};
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
