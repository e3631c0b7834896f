/* The passes and the planner on random programs of several chunks: memory that is shared and reused, and
 * micro-batches that take turns, change no bit of a result; what a pass breaks is refused. */
#include "base/err.h"
#include "base/rng.h"
#include "comm/comm.h"
#include "comm/queue.h"
#include "graph/exec.h"
#include "graph/rule.h"
#include "kernels/kernels.h"
#include "test/test.h"

#include <stdlib.h>

/* A random program: in each chunk a directed graph of the operations of a network, behind the last a loss;
 * its parameters in packs, its gradients summed where they are or in temporary packs. Collectives go over
 * groups of one rank. */

enum {
	ROWS = 8,
	LENGTH = 2, /* tokens of a sample */
	CLASSES = 16,
	PROGRAMS = 400,
	MAX_CHUNKS = 3,
	MAX_POOL = 64,
	MAX_PARAMS = 128,
	MICRO_BATCHES = 5,
	ALIGN_ELEMENTS = PROG_ALIGN_BYTES / 4
};

struct random_program {
	struct prog p;
	uint64_t seed, drawn;
	int chunks;
	bool split; /* weight gradients apart */
	int32_t ids, targets, keys, positions, table, scale, loss, norm2;
	int32_t in[MAX_CHUNKS], out[MAX_CHUNKS], out_adjoint[MAX_CHUNKS];
	int32_t pool[MAX_POOL];
	int n_pool;
	int32_t param[MAX_PARAMS];
	uint8_t param_chunk[MAX_PARAMS];
	int n_param;
	/* Nodes that a pass has appended since node `first`, and where they go. */
	size_t first;
	int32_t before[4 * MAX_PARAMS];
	size_t n_before;
};

static int32_t draw(struct random_program *r, int32_t limit)
{
	return (int32_t)(rng_bits(r->seed, r->drawn++) % (uint64_t)limit);
}

static int32_t outside(struct prog *p, enum region region, enum dtype dtype, int32_t rows, int32_t columns)
{
	int32_t dim[] = {rows, columns};
	return prog_value(p, "outside", region, dtype, columns ? 2 : 1, dim);
}

/* A parameter of the chunk: a new one, or a matrix that serves already. (A vector's gradients may come in
 * both parts of backward, whose order is the schedule's.) */
static int32_t weight(struct random_program *r, int32_t rows, int32_t columns)
{
	bool shares = columns && draw(r, 3) == 0;
	ASSERT(r->n_param < MAX_PARAMS);
	for (int i = 0; i < r->n_param && shares; i++) {
		const struct value *v = &r->p.value[r->param[i]];
		if (r->param_chunk[i] == r->p.chunk && v->nd == 2 && v->dim[0] == rows &&
		    v->dim[1] == columns)
			return r->param[i];
	}
	r->param_chunk[r->n_param] = r->p.chunk;
	return r->param[r->n_param++] = outside(&r->p, R_PARAM, DT_f32, rows, columns);
}

#define OVER(axis) ARG(.comm = {.axes = AXIS_BIT(axis)})

/* [q heads | k groups | v groups], turned, normalized, attended to. */
static int32_t random_attention(struct random_program *r, int32_t a)
{
	struct prog *p = &r->p;
	union op_arg arg = {.attention = {.seq_length = LENGTH,
	                                  .heads = 4,
	                                  .groups = 2,
	                                  .head_dim = 4,
	                                  .scale = 0.5f,
	                                  .dropout = draw(r, 2) ? 0.25f : 0,
	                                  .salt = (uint32_t)r->drawn}};
	int32_t qkv = EMIT(p, linear, NO_ARG, a, weight(r, 32, p->value[a].dim[1]));
	if (draw(r, 2))
		qkv = EMIT(p, qk_norm, ARG(.norm = {1e-5f, 4, 2, 4}), qkv, weight(r, 4, 0), weight(r, 4, 0));
	if (draw(r, 2))
		qkv = EMIT(p, rope, ARG(.rope = {4, 2, 4, 0}), qkv, r->table, r->positions);
	return EMIT(p, attention, &arg, qkv, arg.attention.dropout > 0 ? r->keys : NONE);
}

static int32_t random_collective(struct random_program *r, int32_t a)
{
	static const enum op ops[] = {OP_fan_out, OP_all_reduce, OP_all_gather, OP_reduce_scatter};
	return prog_emit(&r->p, ops[draw(r, 4)], OVER(tp), HERE, &a, 1, NULL);
}

/* One more operation on values of the pool, the newest most likely; NONE where it does not fit. */
static int32_t random_node(struct random_program *r)
{
	struct prog *p = &r->p;
	int32_t back = draw(r, 3), a = r->pool[r->n_pool > back ? r->n_pool - 1 - back : 0];
	int32_t width = p->value[a].dim[1], b = r->pool[draw(r, r->n_pool)], wide = 8 << draw(r, 3);
	union op_arg act = {.activation = {draw(r, ACT_COUNT)}}, eps = {.norm = {.eps = 1e-5f}};
	switch (draw(r, 12)) {
	case 0:
	case 1:
		return rule_same_shape(p, a, b) ? EMIT(p, add, NO_ARG, a, b) : NONE;
	case 2:
		return EMIT(p, activation, &act, a);
	case 3:
		return EMIT(p, linear, NO_ARG, a, weight(r, wide, width),
		            draw(r, 2) ? weight(r, wide, 0) : NONE);
	case 4:
		return EMIT(p, rmsnorm, &eps, a, weight(r, width, 0));
	case 5:
		return EMIT(p, layernorm, &eps, a, weight(r, width, 0), weight(r, width, 0));
	case 6:
		return width > 8 ? EMIT(p, glu, &act, a) : NONE;
	case 7:
		return EMIT(p, bias_add, NO_ARG, a, weight(r, width, 0));
	case 8:
	case 9:
		return random_collective(r, a);
	case 10:
		return random_attention(r, a);
	default:
		return EMIT(p, dropout,
		            ARG(.dropout = {.p = 0.25f, .salt = (uint32_t)r->drawn, .seq_length = LENGTH}), a,
		            r->keys);
	}
}

/* A value that another stage sends. */
static int32_t given(struct random_program *r, int32_t like, enum region region)
{
	int32_t v = outside(&r->p, region, DT_f32, r->p.value[like].dim[0], r->p.value[like].dim[1]);
	r->p.value[v].given = 1;
	return v;
}

static int32_t begin_chunk(struct random_program *r, int c)
{
	struct prog *p = &r->p;
	r->in[c] = r->out[c] = r->out_adjoint[c] = NONE;
	if (c == 0) {
		int32_t x = EMIT(p, embedding, NO_ARG, weight(r, CLASSES, 16), r->ids);
		return draw(r, 2) ? x : EMIT(p, all_reduce, OVER(tp), x);
	}
	int32_t x = r->in[c] = given(r, r->out[c - 1], R_SAVED);
	p->value[x].want_grad = 1;
	if (draw(r, 2))
		x = EMIT(p, fan_out, OVER(tp), x);
	return EMIT(p, linear, NO_ARG, x, weight(r, 16, p->value[x].dim[1]));
}

static void end_chunk(struct random_program *r, int c)
{
	struct prog *p = &r->p;
	int32_t x = r->pool[r->n_pool - 1];
	if (c < r->chunks - 1) {
		int32_t y = EMIT(p, activation, ARG(.activation = {ACT_silu}), x);
		r->out[c] = draw(r, 2) ? EMIT(p, add, NO_ARG, y, x) : y;
		p->value[r->out[c]].region = R_EDGE;
		r->out_adjoint[c] = given(r, r->out[c], r->split ? R_SAVED : R_EDGE);
		return;
	}
	union op_arg arg = {.cross_entropy = {CLASSES - 3, 0, 0}};
	int32_t outs[OP_MAX_OUT] = {r->loss, NONE, NONE}, stats = NONE;
	int32_t logits = EMIT(p, linear, NO_ARG, x, weight(r, CLASSES, p->value[x].dim[1]));
	if (draw(r, 2))
		stats = EMIT(p, all_gather, OVER(tp), EMIT(p, logit_stats, &arg, logits, r->targets));
	EMIT_INTO(p, cross_entropy, &arg, outs, logits, r->targets, stats);
}

static void build_chunk(struct random_program *r, int c)
{
	struct prog *p = &r->p;
	int nodes = 3 + draw(r, 24 / r->chunks);
	p->chunk = (uint8_t)c;
	p->layer = -1;
	r->pool[0] = begin_chunk(r, c);
	r->n_pool = 1;
	for (int i = 0; i < nodes; i++) {
		p->layer = 10 * c + i / 5;
		p->block = i % 5 < 2 ? BLOCK_ATTENTION : BLOCK_MLP;
		int32_t v = random_node(r);
		if (v != NONE)
			r->pool[r->n_pool++] = v;
	}
	p->layer = -1;
	p->block = BLOCK_NONE;
	end_chunk(r, c);
	p->chunk = 0;
}

static void differentiate(struct random_program *r)
{
	struct seed seed[MAX_CHUNKS];
	for (int c = 0; c < r->chunks; c++)
		seed[c] = c == r->chunks - 1 ? (struct seed){r->loss, r->scale}
		                             : (struct seed){r->out[c], r->out_adjoint[c]};
	prog_backward(&r->p, seed, (size_t)r->chunks);
}

/* Packs, as data parallelism makes them */

static void begin_inserting(struct random_program *r)
{
	r->first = r->p.n_node;
	r->n_before = 0;
}

/* Nodes appended since the last call go in front of node `at`. */
static void place_new(struct random_program *r, int32_t at)
{
	while (r->n_before < r->p.n_node - r->first)
		r->before[r->n_before++] = at;
}

static bool is_one_of(int32_t v, const int32_t *list, int n)
{
	for (int i = 0; i < n; i++)
		if (list[i] == v)
			return true;
	return false;
}

/* The first and the last of the old nodes of some segments that read (or write) one of the values. */
static void find_users(const struct random_program *r, const int32_t *value, int n, uint32_t segments,
                       bool writers, int32_t *first, int32_t *last)
{
	*first = *last = NONE;
	for (size_t i = 0; i < r->first; i++) {
		const struct node *node = &r->p.node[i];
		bool uses = false;
		for (int k = 0; k < OP_MAX_IN; k++)
			uses |= !writers && node->in[k] != NONE && is_one_of(node->in[k], value, n);
		for (int k = 0; k < op_rows[node->op].n_out; k++)
			uses |= writers && is_one_of(node->out[k], value, n);
		if (uses && segments >> node->segment & 1) {
			*first = *first == NONE ? (int32_t)i : *first;
			*last = (int32_t)i;
		}
	}
}

struct bucket {
	int n, chunk;
	int32_t param[MAX_PARAMS], grad[MAX_PARAMS];
};

static int32_t pack(struct random_program *r, const int32_t *value, int n, int32_t multiple)
{
	return prog_pack(&r->p, "pack", value, (size_t)n, ALIGN_ELEMENTS, multiple);
}

static int32_t draw_multiple(struct random_program *r)
{
	return ALIGN_ELEMENTS * (1 + draw(r, 3));
}

static void turn_to(struct random_program *r, enum segment segment, int chunk)
{
	r->p.segment = (uint8_t)segment;
	r->p.chunk = (uint8_t)chunk;
}

/* A copy of what is held comes into being before the first reader of a member. */
static void gather(struct random_program *r, const struct bucket *b, const int32_t *value, int32_t whole,
                   int32_t held, uint32_t segments)
{
	int32_t first, last;
	find_users(r, value, b->n, segments, false, &first, &last);
	if (first == NONE)
		return;
	turn_to(r, (enum segment)r->p.node[first].segment, b->chunk);
	EMIT_INTO(&r->p, all_gather, OVER(dp), (int32_t[OP_MAX_OUT]){whole}, held);
	place_new(r, first);
}

static void redirect(struct random_program *r, const int32_t *from, const int32_t *to, int n)
{
	for (size_t i = 0; i < r->first; i++)
		for (int k = 0; k < OP_MAX_IN && r->p.node[i].segment != SEG_FWD; k++)
			for (int j = 0; j < n; j++)
				if (r->p.node[i].in[k] == from[j])
					r->p.node[i].in[k] = to[j];
}

/* Parameters that are put together twice, for forward and for backward. */
static void gather_parameters(struct random_program *r, const struct bucket *b)
{
	struct prog *p = &r->p;
	int32_t again[MAX_PARAMS], multiple = draw_multiple(r);
	for (int i = 0; i < b->n; i++) {
		struct value v = p->value[b->param[i]];
		p->value[b->param[i]].region = R_TEMP;
		again[i] = prog_value(p, v.name, R_TEMP, DT_f32, v.nd, v.dim);
		p->value[again[i]].weight = 1;
	}
	redirect(r, b->param, again, b->n);
	int32_t first = pack(r, b->param, b->n, multiple), second = pack(r, again, b->n, multiple);
	int32_t held = prog_flat(p, "held", R_PARAM, DT_f32, value_count(&p->value[first]));
	gather(r, b, b->param, first, held, SEG_BIT(FWD));
	gather(r, b, again, second, held, SEG_BIT(BWD) | SEG_BIT(WGRAD));
}

/* Gradients of one micro-batch in a temporary pack, from its first writer to the sum behind its last. */
static void sum_gradients_at_once(struct random_program *r, const struct bucket *b)
{
	struct prog *p = &r->p;
	int32_t first, last;
	int64_t members = 0;
	for (int i = 0; i < b->n; i++) {
		p->value[b->grad[i]].region = R_TEMP;
		members += value_count(&p->value[b->grad[i]]);
	}
	find_users(r, b->grad, b->n, SEG_BIT(BWD) | SEG_BIT(WGRAD), true, &first, &last);
	int32_t whole = pack(r, b->grad, b->n, draw_multiple(r));
	if (members < value_count(&p->value[whole])) {
		turn_to(r, (enum segment)p->node[first].segment, b->chunk);
		prog_emit(p, OP_zero, NULL, HERE, NULL, 0, (int32_t[OP_MAX_OUT]){whole});
		place_new(r, first);
	}
	turn_to(r, (enum segment)p->node[last].segment, b->chunk);
	int32_t part = EMIT(p, reduce_scatter, OVER(dp), whole);
	int32_t held = prog_flat(p, "held", R_GRAD, DT_f32, value_count(&p->value[part]));
	p->value[held].sums = 1;
	EMIT_INTO(p, accumulate, NO_ARG, (int32_t[OP_MAX_OUT]){held}, part);
	place_new(r, last + 1);
}

/* Gradients that stay where they are summed; of the pack, parts are reduced on their own. */
static void sum_gradients_in_place(struct random_program *r, const struct bucket *b)
{
	struct prog *p = &r->p;
	int32_t whole = pack(r, b->grad, b->n, draw_multiple(r));
	int64_t count = value_count(&p->value[whole]), half = count / 2 / ALIGN_ELEMENTS * ALIGN_ELEMENTS;
	for (int side = 0; side < 2; side++) {
		int32_t part = prog_view(p, "part", whole, side * half, side ? count - half : half);
		int32_t sum = prog_view(p, "sum", whole, side * half, side ? count - half : half);
		if (!value_count(&p->value[part]))
			continue;
		turn_to(r, SEG_REDUCE, b->chunk);
		EMIT_INTO(p, all_reduce, OVER(dp), (int32_t[OP_MAX_OUT]){sum}, part);
		turn_to(r, SEG_NORM, 0);
		EMIT_INTO(p, square_sum, ARG(.square_sum = {1}), (int32_t[OP_MAX_OUT]){r->norm2}, sum);
	}
	place_new(r, (int32_t)r->first);
}

static void make_bucket(struct random_program *r, const struct bucket *b)
{
	int kind = draw(r, 4);
	if (!b->n)
		return;
	if (kind == 0)
		gather_parameters(r, b);
	else if (kind == 1)
		pack(r, b->param, b->n, draw_multiple(r));
	(kind == 3 ? sum_gradients_in_place : sum_gradients_at_once)(r, b);
}

/* Every parameter that has a gradient goes into one of two buckets of its chunk, or into none. */
static void make_buckets(struct random_program *r)
{
	begin_inserting(r);
	for (int c = 0; c < r->chunks; c++) {
		struct bucket b[3] = {{.chunk = c}, {.chunk = c}, {.chunk = c}};
		for (int i = 0; i < r->n_param; i++) {
			int32_t grad = r->p.value[r->param[i]].grad;
			struct bucket *to = &b[draw(r, 3)];
			if (r->param_chunk[i] != c || grad == NONE)
				continue;
			to->param[to->n] = r->param[i];
			to->grad[to->n++] = grad;
		}
		make_bucket(r, &b[0]);
		make_bucket(r, &b[1]);
	}
	if (!r->p.e.code)
		prog_insert(&r->p, r->first, r->before);
	turn_to(r, SEG_FWD, 0);
}

static void place_edges(struct random_program *r)
{
	for (int c = 1; c < r->chunks && !r->p.e.code; c++)
		r->p.value[r->p.value[r->in[c]].grad].region = R_EDGE;
}

struct how { /* to build it, where that is not left to chance */
	int chunks, slots;
	bool split;
};

static void choose_slots(struct random_program *r, const struct how *how)
{
	r->p.batch_slots = how ? how->slots : 1 + draw(r, 4);
	r->p.edge_slots = how ? how->slots : 1 + draw(r, 3);
	for (int c = 0; c < r->chunks; c++)
		r->p.saved_slots[c] = how ? how->slots : 1 + draw(r, 3);
}

static void make_inputs(struct random_program *r)
{
	struct prog *p = &r->p;
	r->ids = outside(p, R_BATCH, DT_i32, ROWS, 0);
	r->targets = outside(p, R_BATCH, DT_i32, ROWS, 0);
	r->keys = outside(p, R_BATCH, DT_i64, ROWS / LENGTH, 0);
	r->positions = outside(p, R_INPUT, DT_i32, ROWS, 0);
	r->table = outside(p, R_CONST, DT_f32, LENGTH, 4);
	r->scale = outside(p, R_INPUT, DT_f32, 1, 0);
	r->loss = outside(p, R_STAT, DT_f64, 1, 0);
	r->norm2 = outside(p, R_STAT, DT_f64, 1, 0);
}

/* All passes after each other, each of which leaves a program that prog_check accepts. */
static void build_random(struct random_program *r, uint64_t seed, const struct how *how)
{
	*r = (struct random_program){.seed = seed};
	struct prog *p = &r->p;
	prog_init(p);
	r->chunks = how ? how->chunks : 1 + draw(r, MAX_CHUNKS);
	r->split = how ? how->split : draw(r, 2);
	make_inputs(r);
	for (int c = 0; c < r->chunks; c++)
		build_chunk(r, c);
	differentiate(r);
	prog_check(p);
	if (draw(r, 2))
		prog_fuse(p, false);
	prog_check(p);
	prog_recompute(p, (uint32_t)draw(r, 1 << REPEAT_COUNT), draw(r, 2) ? -1 : 1 + draw(r, 2));
	prog_check(p);
	place_edges(r);
	if (r->split)
		prog_split_backward(p);
	prog_check(p);
	make_buckets(r);
	prog_check(p);
	prog_overlap(p, draw(r, 2) ? (uint32_t)draw(r, 1 << SEG_COUNT) : 0);
	prog_check(p);
	choose_slots(r, how);
	prog_plan(p);
	prog_check(p);
}

/* The planner's invariants, in other words than prog_check's: what is not one value by another name, or a
 * part of the other, shares no byte with it while the lives of both last, unless one is computed in place of
 * the other at the very node where that one is read last. */

struct lives { /* by value: the value that it is a part or another name of; where in it; from when to when */
	int32_t *root, *from, *to;
	int64_t *inside;
	uint32_t *segments;
	uint8_t *chunk; /* of the nodes that use it; MAX_CHUNKS: of several */
};

static void rename_parts(const struct prog *p, struct lives *l)
{
	for (int32_t v = 0; v < (int32_t)p->n_value; v++) {
		l->root[v] = v;
		for (int32_t w = v; p->value[w].of != NONE; w = p->value[w].of) {
			l->root[v] = p->value[w].of;
			l->inside[v] += p->value[w].at_bytes;
		}
	}
	for (size_t i = 0; i < p->n_node; i++) {
		int32_t in = p->node[i].in[0], out = p->node[i].out[0];
		if (!(op_rows[p->node[i].op].flags & ALIAS))
			continue;
		l->root[out] = l->root[in];
		l->inside[out] = l->inside[in];
	}
}

static void use(struct lives *l, const struct node *n, int32_t v, int32_t at)
{
	if (v == NONE)
		return;
	int32_t root = l->root[v];
	l->chunk[root] = l->to[root] == NONE || l->chunk[root] == n->chunk ? n->chunk : MAX_CHUNKS;
	l->from[root] = l->from[root] == NONE ? at : l->from[root];
	l->to[root] = at;
	l->segments[root] |= 1u << n->segment;
}

static struct lives find_lives(const struct prog *p)
{
	size_t n = p->n_value;
	struct lives l = {.root = mem_array(n, sizeof *l.root),
	                  .from = mem_array(n, sizeof *l.from),
	                  .to = mem_array(n, sizeof *l.to),
	                  .inside = mem_array(n, sizeof *l.inside),
	                  .segments = mem_array(n, sizeof *l.segments),
	                  .chunk = mem_array(n, sizeof *l.chunk)};
	rename_parts(p, &l);
	for (size_t v = 0; v < n; v++)
		l.from[v] = l.to[v] = NONE;
	for (int32_t i = 0; i < (int32_t)p->n_node; i++) {
		for (int k = 0; k < op_rows[p->node[i].op].n_in; k++)
			use(&l, &p->node[i], p->node[i].in[k], i);
		for (int k = 0; k < op_rows[p->node[i].op].n_out; k++)
			use(&l, &p->node[i], p->node[i].out[k], i);
	}
	for (size_t v = 0; v < n; v++)
		if (p->value[v].given)
			l.from[l.root[v]] = 0;
	return l;
}

static void free_lives(struct lives *l)
{
	free(l->root);
	free(l->from);
	free(l->to);
	free(l->inside);
	free(l->segments);
	free(l->chunk);
}

static bool in_place(const struct prog *p, const struct lives *l, int32_t before, int32_t after)
{
	const struct value *a = &p->value[before], *b = &p->value[after];
	if (l->from[after] == NONE || l->to[before] != l->from[after] || b->given)
		return false;
	const struct node *n = &p->node[l->from[after]];
	int flags = op_rows[n->op].flags;
	bool allowed = (flags & IN_PLACE_0 && n->in[0] != NONE && l->root[n->in[0]] == before) ||
	               (flags & IN_PLACE_1 && n->in[1] != NONE && l->root[n->in[1]] == before);
	return allowed && n->out[0] == after && n->in[0] != n->in[1] && a->offset_bytes == b->offset_bytes &&
	       value_bytes(a) == value_bytes(b);
}

static bool share_bytes(const struct value *a, const struct value *b)
{
	return a->region == b->region && a->offset_bytes < b->offset_bytes + value_bytes(b) &&
	       b->offset_bytes < a->offset_bytes + value_bytes(a);
}

static bool lives_meet(const struct prog *p, const struct lives *l, int32_t a, int32_t b)
{
	bool both_pass = p->value[a].region >= R_SAVED && p->value[b].region >= R_SAVED;
	return !both_pass || (l->from[a] <= l->to[b] && l->from[b] <= l->to[a]);
}

/* The bytes of one slot that a value's region has. */
static void bounds(const struct prog *p, const struct lives *l, int32_t v, int64_t *begin, int64_t *end)
{
	int region = p->value[v].region, chunk = l->chunk[v] % MAX_CHUNKS;
	*begin = region == R_SAVED ? p->saved_base[chunk] : 0;
	*end = region == R_SAVED   ? *begin + p->saved_stride[chunk]
	       : region == R_BATCH ? p->batch_stride
	       : region == R_EDGE  ? p->edge_stride
	                           : p->bytes[region];
}

static void check_root(const struct prog *p, const struct lives *l, int32_t v, const char *what)
{
	const struct value *x = &p->value[v];
	const uint32_t passing = SEG_BIT(FWD) | SEG_BIT(BWD) | SEG_BIT(WGRAD);
	int64_t begin, end;
	bounds(p, l, v, &begin, &end);
	if (x->offset_bytes < begin || x->offset_bytes % PROG_ALIGN_BYTES ||
	    x->offset_bytes + value_bytes(x) > end)
		test_failed(__FILE__, __LINE__, "%s: v%d lies outside its region", what, v);
	if (x->region == R_TEMP && l->segments[v] & (l->segments[v] - 1))
		test_failed(__FILE__, __LINE__, "%s: v%d outlives its segment in temporary memory", what, v);
	if (x->region == R_SAVED && l->segments[v] & ~passing)
		test_failed(__FILE__, __LINE__, "%s: v%d outlives its micro-batch", what, v);
	if (x->region >= R_SAVED && l->chunk[v] == MAX_CHUNKS)
		test_failed(__FILE__, __LINE__, "%s: v%d is of several chunks", what, v);
}

static void check_memory(const struct prog *p, const char *what)
{
	struct lives l = find_lives(p);
	for (int32_t i = 0; i < (int32_t)p->n_value; i++) {
		const struct value *x = &p->value[i], *root = &p->value[l.root[i]];
		if (l.from[l.root[i]] == NONE)
			continue; /* used by nobody: of a node that a pass removed */
		if (x->region != root->region || x->offset_bytes != root->offset_bytes + l.inside[i])
			test_failed(__FILE__, __LINE__, "%s: v%d is not where v%d is", what, i, l.root[i]);
		if (l.root[i] != i)
			continue;
		check_root(p, &l, i, what);
		for (int32_t j = 0; j < i; j++)
			if (l.root[j] == j && l.from[j] != NONE && share_bytes(x, &p->value[j]) &&
			    lives_meet(p, &l, i, j) && !in_place(p, &l, i, j) && !in_place(p, &l, j, i))
				test_failed(__FILE__, __LINE__, "%s: v%d lies on v%d", what, i, j);
	}
	free_lives(&l);
}

/* What waits for a collective: its wait, or a later one's, or a collective that is not only begun. */
static bool ends_flight(const struct prog *p, int32_t begun, int32_t at)
{
	const struct node *n = &p->node[at];
	if (n->op == OP_wait)
		return p->value[n->in[0]].def >= begun;
	return op_rows[n->op].flags & COMM && !(op_rows[n->op].flags & ALIAS) && !n->arg.comm.begins;
}

static bool touches(const struct prog *p, const int32_t *v, int n_v, int32_t of)
{
	for (int k = 0; k < n_v; k++)
		if (v[k] != NONE && share_bytes(&p->value[v[k]], &p->value[of]))
			return true;
	return false;
}

/* A collective in flight reads its operand and writes its result at any time until it is waited for. */
static void check_flight(const struct prog *p, int32_t begun, const char *what)
{
	const struct node *c = &p->node[begun];
	for (int32_t i = begun + 1; i < (int32_t)p->n_node; i++) {
		const struct node *n = &p->node[i];
		if (n->segment != c->segment || n->chunk != c->chunk)
			continue;
		if (ends_flight(p, begun, i))
			return;
		if (op_rows[n->op].flags & COMM)
			continue; /* behind it in the queue */
		if (touches(p, n->out, op_rows[n->op].n_out, c->in[0]) ||
		    touches(p, n->out, op_rows[n->op].n_out, c->out[0]) ||
		    touches(p, n->in, op_rows[n->op].n_in, c->out[0]))
			test_failed(__FILE__, __LINE__,
			            "%s: node %d takes memory of node %d, which is in flight", what, i,
			            begun);
	}
	if (p->value[c->in[0]].region == R_TEMP || p->value[c->out[0]].region == R_TEMP)
		test_failed(__FILE__, __LINE__, "%s: node %d is in flight behind its segment", what, begun);
}

static int check_flights(const struct prog *p, const char *what)
{
	int begun = 0;
	for (int32_t i = 0; i < (int32_t)p->n_node; i++) {
		const struct node *n = &p->node[i];
		if (op_rows[n->op].flags & COMM && !(op_rows[n->op].flags & ALIAS) && n->arg.comm.begins) {
			check_flight(p, i, what);
			begun++;
		}
	}
	return begun;
}

/* Every passing value gets memory that nothing else uses: what reuse is compared with. Fit for one
 * micro-batch after the other. */
static void defeat_sharing(struct prog *p)
{
	struct lives l = find_lives(p);
	p->bytes[R_SAVED] = p->bytes[R_TEMP] = 0;
	for (int pass = 0; pass < 2; pass++)
		for (int32_t v = 0; v < (int32_t)p->n_value; v++) {
			struct value *x = &p->value[v], *root = &p->value[l.root[v]];
			if (x->region < R_SAVED || (root == x) != (pass == 0))
				continue;
			x->region = R_TEMP;
			x->home = l.root[v];
			x->offset_bytes = pass ? root->offset_bytes + l.inside[v] : p->bytes[R_TEMP];
			p->bytes[R_TEMP] += pass ? 0 : prog_aligned(value_bytes(x));
		}
	free_lives(&l);
}

/* Running: micro-batches go through the chunks in turns, as stages of a pipeline would, as far as the slots
 * allow. */

enum turn { FORWARD, BACKWARD, WEIGHTS, TURNS };
enum order { ONE_BY_ONE, FORWARD_FIRST, ANY };

struct running {
	struct random_program *r;
	struct exec *x;
	bool spoils; /* what nobody may read any more */
	int done[TURNS][MAX_CHUNKS];
	uint64_t drawn;
	struct buf trace;
	int most_in_flight;
};

static int finished(const struct running *s, int c)
{
	return s->done[s->r->split ? WEIGHTS : BACKWARD][c];
}

static bool can_forward(const struct running *s, int c, int m)
{
	const struct random_program *r = s->r;
	bool good = (c == 0 || s->done[FORWARD][c - 1] > m) && m - finished(s, c) < r->p.saved_slots[c];
	for (int d = 0; d < r->chunks && c == 0; d++)
		good &= m - finished(s, d) < r->p.batch_slots;
	return good && (c == r->chunks - 1 || m - s->done[FORWARD][c + 1] < r->p.edge_slots);
}

static bool can_backward(const struct running *s, int c, int m)
{
	return s->done[FORWARD][c] > m && (c == s->r->chunks - 1 || s->done[BACKWARD][c + 1] > m) &&
	       (c == 0 || m - s->done[BACKWARD][c - 1] < s->r->p.edge_slots);
}

static bool is_ready(const struct running *s, enum turn turn, int c)
{
	int m = s->done[turn][c];
	if (m == MICRO_BATCHES)
		return false;
	return turn == FORWARD    ? can_forward(s, c, m)
	       : turn == BACKWARD ? can_backward(s, c, m)
	                          : s->r->split && s->done[BACKWARD][c] > m;
}

static void fill_batch(struct running *s, int m)
{
	int32_t ids[ROWS], targets[ROWS];
	for (int i = 0; i < ROWS; i++) {
		uint64_t at = (uint64_t)(m * ROWS + i);
		ids[i] = (int32_t)(rng_bits(1, at) % CLASSES);
		targets[i] = i == 3 ? -1 : (int32_t)(rng_bits(2, at) % (CLASSES - 3));
	}
	exec_upload_of(s->x, s->r->ids, m, ids);
	exec_upload_of(s->x, s->r->targets, m, targets);
	exec_upload_of(s->x, s->r->keys, m, (int64_t[ROWS / LENGTH]){m, 7, -9, 1LL << 40});
}

static void fill_once(struct running *s)
{
	const struct prog *p = &s->r->p;
	float scale = 0.25f, table[LENGTH * 4] = {1, 1, 0, 0, 0.5f, 0.9f, 0.8f, 0.4f};
	int32_t positions[ROWS];
	for (int i = 0; i < ROWS; i++)
		positions[i] = i % LENGTH;
	exec_upload(s->x, s->r->scale, &scale);
	exec_upload(s->x, s->r->table, table);
	exec_upload(s->x, s->r->positions, positions);
	for (int32_t v = 0; v < (int32_t)p->n_value; v++)
		if (p->value[v].region == R_PARAM && p->value[v].of == NONE)
			rng_normal((uint64_t)v, 0, (size_t)value_count(&p->value[v]), 0.3f, 0.4f,
			           exec_data(s->x, v));
}

/* Where the memory of temporaries begins, or that of a chunk's saved values for a micro-batch; NULL: none. */
static char *memory_of(const struct running *s, enum region region, int c, int m)
{
	const struct prog *p = &s->r->p;
	for (int32_t v = 0; v < (int32_t)p->n_value; v++) {
		int64_t at = p->value[v].offset_bytes - (region == R_SAVED ? p->saved_base[c] : 0);
		if (p->value[v].region == region && at >= 0 && (region == R_TEMP || at < p->saved_stride[c]))
			return (char *)exec_data_of(s->x, v, m) - at;
	}
	return NULL;
}

static void spoil(const struct running *s, enum region region, int c, int m)
{
	const struct prog *p = &s->r->p;
	char *at = s->spoils ? memory_of(s, region, c, m) : NULL;
	if (at)
		memset(at, 0xff, (size_t)(region == R_TEMP ? p->bytes[R_TEMP] : p->saved_stride[c]));
}

/* What the transport does between stages. */
static void carry(struct running *s, int32_t from, int32_t to, int m)
{
	memcpy(exec_data_of(s->x, to, m), exec_data_of(s->x, from, m),
	       (size_t)value_bytes(&s->r->p.value[to]));
}

static void run_part(struct running *s, enum segment segment, int c, int m)
{
	struct err e = {0};
	struct exec_part part = {.segments = 1u << segment, .chunk = c, .micro_batch = m, .first = m == 0};
	if (exec_run(s->x, &part, &e))
		test_failed(__FILE__, __LINE__, "%s", e.text);
	spoil(s, R_TEMP, c, m);
}

static void take_turn(struct running *s, enum turn turn, int c)
{
	static const enum segment segments[] = {SEG_FWD, SEG_BWD, SEG_WGRAD};
	struct random_program *r = s->r;
	int m = s->done[turn][c]++;
	if (turn == FORWARD) {
		spoil(s, R_SAVED, c, m);
		if (c == 0)
			fill_batch(s, m);
		else
			carry(s, r->out[c - 1], r->in[c], m);
	}
	if (turn == BACKWARD && c < r->chunks - 1)
		carry(s, r->p.value[r->in[c + 1]].grad, r->out_adjoint[c], m);
	run_part(s, segments[turn], c, m);
	if (finished(s, c) == MICRO_BATCHES && turn != FORWARD && (turn == WEIGHTS || !r->split))
		run_part(s, SEG_REDUCE, c, 0);
	buf_printf(&s->trace, "%c%d ", "FBW"[turn], m);
	int in_flight = s->done[FORWARD][c] - finished(s, c);
	s->most_in_flight = in_flight > s->most_in_flight ? in_flight : s->most_in_flight;
}

/* One of the turns that can be taken: what was begun is ended first, or as much as there is room for is begun
 * first, or any; false at the end. */
static bool go_on(struct running *s, enum order order)
{
	static const enum turn sooner[][TURNS] = {
	        {WEIGHTS, BACKWARD, FORWARD}, {FORWARD, BACKWARD, WEIGHTS}, {FORWARD, BACKWARD, WEIGHTS}};
	struct {
		enum turn turn;
		int chunk;
	} ready[TURNS * MAX_CHUNKS];
	uint64_t n = 0;
	for (int k = 0; k < TURNS; k++)
		for (int c = s->r->chunks; c-- > 0;)
			if (is_ready(s, sooner[order][k], c)) {
				ready[n].turn = sooner[order][k];
				ready[n++].chunk = c;
			}
	if (!n)
		return false;
	uint64_t i = order == ANY ? rng_bits(s->r->seed + 77, s->drawn++) % n : 0;
	take_turn(s, ready[i].turn, ready[i].chunk);
	return true;
}

/* Sums over all micro-batches: losses, gradients, the norm of some. */
static void collect(struct running *s, struct buf *out)
{
	const struct prog *p = &s->r->p;
	for (int32_t v = 0; v < (int32_t)p->n_value; v++) {
		const struct value *x = &p->value[v];
		if ((x->region == R_GRAD || x->region == R_STAT) && x->of == NONE && x->home == v)
			buf_add(out, exec_data(s->x, v), (size_t)value_bytes(x));
	}
}

/* All micro-batches; the loss and all gradients, one behind the other: the caller's. */
static struct buf run_random(struct random_program *r, const struct backend *backend, enum order order,
                             bool spoils, struct running *s)
{
	struct buf out = {0};
	struct stream *stream;
	struct comm *self;
	struct err e = {0};
	*s = (struct running){.r = r, .spoils = spoils};
	CHECK(!backend->open(&stream, THREADS(1), &e) && !comm_self(&self, &e));
	struct exec_comm comm[] = {{.axes = AXIS_BIT(tp), .comm = self},
	                           {.axes = AXIS_BIT(dp), .comm = self}};
	struct exec_options options = {.comm = comm, .n_comm = 2};
	if (order == ANY)
		CHECK(!comm_queue_open(&options.queue, &e));
	if (CHECK(!exec_create(&s->x, &r->p, backend, stream, &options, &e))) {
		fill_once(s);
		while (go_on(s, order))
			continue;
		CHECK_INT(finished(s, 0), MICRO_BATCHES);
		run_part(s, SEG_NORM, 0, 0);
		CHECK(!comm_queue_wait(options.queue, UINT64_MAX, &e));
		collect(s, &out);
		exec_free(s->x);
	}
	comm_queue_close(options.queue);
	comm_close(self);
	backend->close(stream);
	return out;
}

static bool same_bits(const struct buf *a, const struct buf *b)
{
	return a->length == b->length && a->length > 16 && !memcmp(a->data, b->data, a->length);
}

/* The results of the program in each order, bit for bit those of `want`; the most that were in flight. */
static int compare_orders(struct random_program *r, const struct backend *backend, const struct buf *want,
                          const char *what)
{
	static const char *const names[] = {"one by one", "forward first", "in any order"};
	int most = 0;
	for (enum order order = ONE_BY_ONE; order <= ANY; order++) {
		struct running s;
		struct buf have = run_random(r, backend, order, true, &s);
		if (!same_bits(&have, want))
			test_failed(__FILE__, __LINE__, "%s, %s: results differ", what, names[order]);
		most = s.most_in_flight > most ? s.most_in_flight : most;
		buf_free(&have);
		buf_free(&s.trace);
	}
	return most;
}

struct seen { /* by how many programs */
	int interleaved, split, in_flight;
};

static void check_program(uint64_t seed, struct seen *seen)
{
	struct random_program planned, apart;
	struct running s;
	const struct backend *backend = seed % 2 ? &cpu_backend : &cpu_reference_backend;
	char what[40];
	snprintf(what, sizeof what, "program %d", (int)seed);
	build_random(&planned, seed, NULL);
	build_random(&apart, seed, NULL);
	if (planned.p.e.code) {
		test_failed(__FILE__, __LINE__, "%s: %s", what, planned.p.e.text);
	} else {
		check_memory(&planned.p, what);
		seen->in_flight += check_flights(&planned.p, what) > 0;
		int64_t reused = planned.p.bytes[R_TEMP];
		for (int c = 0; c < planned.chunks; c++)
			reused += planned.p.saved_stride[c];
		defeat_sharing(&apart.p);
		CHECK(reused < apart.p.bytes[R_TEMP]);
		struct buf want = run_random(&apart, backend, ONE_BY_ONE, false, &s);
		CHECK(want.length > 16 && isfinite(((double *)want.data)[0]));
		CHECK_INT(s.most_in_flight, 1);
		seen->interleaved += compare_orders(&planned, backend, &want, what) > 1;
		seen->split += planned.split;
		buf_free(&want);
		buf_free(&s.trace);
	}
	prog_free(&planned.p);
	prog_free(&apart.p);
}

TEST(shared_and_reused_memory_changes_no_bit_in_any_order)
{
	struct seen seen = {0};
	for (uint64_t seed = 0; seed < PROGRAMS; seed++)
		check_program(seed, &seen);
	CHECK(seen.interleaved > PROGRAMS / 3);
	CHECK(seen.split > PROGRAMS / 3);
	CHECK(seen.in_flight > PROGRAMS / 5);
}

/* The orders of a pipeline's first stage, with as many slots as it has stages, against one after the other.
 */
TEST(the_orders_of_pipelines_give_the_same_gradients)
{
	static const struct {
		struct how how;
		const char *order;
	} cases[] = {
	        {{1, 1, false}, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 "},
	        {{1, 2, false}, "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4 "},
	        {{1, 3, false}, "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4 "},
	        {{1, 5, false}, "F0 F1 F2 F3 F4 B0 B1 B2 B3 B4 "},
	        {{1, 2, true}, "F0 F1 B0 B1 W0 F2 B2 W1 F3 B3 W2 F4 B4 W3 W4 "},
	        {{1, 5, true}, "F0 F1 F2 F3 F4 B0 B1 B2 B3 B4 W0 W1 W2 W3 W4 "},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
		for (uint64_t seed = 1000; seed < 1010; seed++) {
			struct random_program r;
			struct running before, s;
			build_random(&r, seed, &cases[i].how);
			MUST(!r.p.e.code);
			struct buf want = run_random(&r, &cpu_backend, ONE_BY_ONE, true, &before);
			struct buf have = run_random(&r, &cpu_backend, FORWARD_FIRST, true, &s);
			CHECK_STR(s.trace.data, cases[i].order);
			if (!same_bits(&have, &want))
				test_failed(__FILE__, __LINE__, "%s: results differ", cases[i].order);
			buf_free(&before.trace);
			buf_free(&s.trace);
			buf_free(&want);
			buf_free(&have);
			prog_free(&r.p);
		}
}

/* What prog_check is for: programs that passes broke. */

static bool refuses(struct prog *p, const char *part)
{
	bool good = prog_check(p) == EXIT_INTERNAL && strstr(p->e.text, part);
	p->e.code = 0;
	return good;
}

static bool is_alone(const struct prog *p, int32_t v)
{
	return v != NONE && p->value[v].home == v && p->value[v].region == R_TEMP;
}

/* Every result in turn is put where an operand of its node lies. */
static void overlap_each(struct prog *p, int *tried, int *refused)
{
	for (size_t i = 0; i < p->n_node; i++)
		for (int k = 0; k < op_rows[p->node[i].op].n_in; k++) {
			int32_t in = p->node[i].in[k], out = p->node[i].out[0];
			if (!op_rows[p->node[i].op].n_out || !is_alone(p, in) || !is_alone(p, out) ||
			    p->value[out].def != (int32_t)i)
				continue;
			int64_t old = p->value[out].offset_bytes, at = p->value[in].offset_bytes;
			if (at + value_bytes(&p->value[out]) > p->bytes[R_TEMP])
				continue;
			p->value[out].offset_bytes = at;
			*refused += refuses(p, "still read");
			p->value[out].offset_bytes = old;
			(*tried)++;
		}
}

/* Every activation in turn lies behind the temporary values instead, or is read by another chunk. */
static void misplace_each(struct prog *p, int *tried, int *refused)
{
	for (size_t i = 0; i < p->n_node; i++) {
		struct node *n = &p->node[i];
		struct value *x = op_rows[n->op].n_out ? &p->value[n->out[0]] : NULL;
		if (!x || x->region != R_SAVED || x->home != n->out[0] || x->last == NONE ||
		    p->node[x->last].segment == n->segment)
			continue;
		struct value old = *x;
		x->region = R_TEMP;
		x->offset_bytes = p->bytes[R_TEMP];
		p->bytes[R_TEMP] += value_bytes(x);
		*refused += refuses(p, "outlives its segment");
		p->bytes[R_TEMP] -= value_bytes(x);
		*x = old;
		p->node[x->last].chunk++;
		*refused += refuses(p, "a value of another chunk");
		p->node[x->last].chunk--;
		*tried += 2;
	}
}

TEST(a_broken_plan_is_refused)
{
	int tried[2] = {0}, refused[2] = {0};
	for (uint64_t seed = 0; seed < 10; seed++) {
		struct random_program r;
		build_random(&r, seed, NULL);
		MUST(!r.p.e.code);
		overlap_each(&r.p, &tried[0], &refused[0]);
		misplace_each(&r.p, &tried[1], &refused[1]);
		CHECK(!prog_check(&r.p));
		struct node first = r.p.node[0];
		memmove(r.p.node, r.p.node + 1, (r.p.n_node - 1) * sizeof first);
		r.p.node[r.p.n_node - 1] = first;
		prog_refresh(&r.p);
		CHECK(refuses(&r.p, "reads a value before it is written"));
		prog_free(&r.p);
	}
	CHECK(tried[0] > 50 && tried[1] > 50);
	CHECK_INT(refused[0], tried[0]);
	CHECK_INT(refused[1], tried[1]);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
