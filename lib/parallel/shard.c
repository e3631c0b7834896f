#include "parallel/shard.h"
#include "base/mem.h"
#include "graph/rule.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGN_ELEMENTS = 32 }; /* members and parts begin at multiples of 64 bytes, of bf16 too */

struct sharder {
	struct sharding *s;
	struct prog *p;
	const struct shard_param *param;
	size_t n;
	const struct shard_options *options;
	int32_t *at_node; /* where the nodes appended since `first` go: prog_insert */
	size_t first, cap_at;
	int32_t *last_write; /* by value, among the nodes before `first` */
};

/* Buckets */

enum { AXES_SHARING = AXIS_BIT(cp) | AXIS_BIT(dp) | AXIS_BIT(edp) };

/* Ranks that hold the same parameters because they work on other rows. */
static uint32_t row_axes(const struct value *v)
{
	return v->grid == GRID_EXPERT ? AXIS_BIT(edp) : AXES_DATA | AXIS_BIT(cp);
}

/* Cut on the same axes; on which dimension is forgotten in a pack. */
static bool lie_alike(const struct value *a, const struct value *b)
{
	bool same = a->grid == b->grid && a->dtype == b->dtype;
	for (int i = 0; i < AXIS_COUNT; i++)
		same &= (a->place[i] >= PLACE_SHARD0) == (b->place[i] >= PLACE_SHARD0);
	return same;
}

static bool alike(const struct sharder *h, const struct shard_param *a, const struct shard_param *b)
{
	bool same = a->decay == b->decay && a->is_buffer == b->is_buffer && a->partial == b->partial &&
	            a->tied == b->tied && a->counts == b->counts && a->chunk == b->chunk &&
	            lie_alike(&h->p->value[a->value], &h->p->value[b->value]);
	/* Parameters that are gathered just in time come by layers. */
	return same && (h->options->stage < 3 || (a->layer == b->layer && a->layer >= 0));
}

/* Who shares a bucket like this one: nobody where there are no others. */
static void find_sharers(const struct sharder *h, struct bucket *b)
{
	const struct prog *p = h->p;
	uint32_t may = row_axes(&p->value[b->like.value]) & AXES_SHARING;
	b->axes = prog_axes(p, may);
	b->ranks = prog_ranks(p, b->axes);
	b->rank = prog_place_among(p, b->axes);
	b->stage = b->ranks > 1 && !b->like.is_buffer ? h->options->stage : 0;
}

static int64_t padded_count(const struct prog *p, const struct shard_param *q)
{
	return (value_count(&p->value[q->value]) + ALIGN_ELEMENTS - 1) / ALIGN_ELEMENTS * ALIGN_ELEMENTS;
}

static struct bucket *open_bucket(struct sharder *h, const struct shard_param *q)
{
	struct sharding *s = h->s;
	for (size_t i = s->n; i-- > 0;)
		if (alike(h, &s->bucket[i].like, q) && s->bucket[i].count < h->options->bucket_size)
			return &s->bucket[i];
	s->bucket = mem_grow(s->bucket, s->n, &s->cap, sizeof *s->bucket);
	struct bucket *b = &s->bucket[s->n++];
	*b = (struct bucket){.like = *q, .member = mem_array(h->n, sizeof *b->member)};
	find_sharers(h, b);
	for (int k = 0; k < SHARD_STATE_COUNT; k++)
		b->state[k].value = NONE;
	return b;
}

/* From the last parameter to the first, the order in which backward finishes their gradients. */
static void fill_buckets(struct sharder *h)
{
	for (size_t k = h->n; k-- > 0;) {
		struct bucket *b = open_bucket(h, &h->param[k]);
		h->s->bucket_of[k] = (int32_t)(b - h->s->bucket);
		h->s->at[k] = b->count;
		b->member[b->n++] = (int32_t)k;
		b->count += padded_count(h->p, &h->param[k]);
	}
}

/* A pack of values of the bucket's members; `of` gives the value of one. Its placement is theirs. */
static int32_t pack(struct sharder *h, struct bucket *b, const int32_t *values)
{
	struct prog *p = h->p;
	int32_t id = prog_pack(p, p->value[values[0]].name, values, (size_t)b->n, ALIGN_ELEMENTS,
	                       (int64_t)b->ranks * ALIGN_ELEMENTS);
	for (int a = 0; a < AXIS_COUNT; a++) {
		enum place at = (enum place)p->value[values[0]].place[a];
		p->value[id].place[a] = (uint8_t)(at == PLACE_SHARD1 ? PLACE_SHARD0 : at);
	}
	for (int32_t i = 0; i < b->n; i++)
		for (int a = 0; a < AXIS_COUNT; a++) {
			bool cut = p->value[values[i]].place[a] >= PLACE_SHARD0;
			enum place at = cut ? PLACE_SHARD0 : (enum place)p->value[values[i]].place[a];
			if (at != p->value[id].place[a])
				err_set(&p->e, EXIT_INTERNAL,
				        "program: %s is placed otherwise than its bucket",
				        p->value[values[i]].name);
		}
	return id;
}

static int64_t part_count(const struct bucket *b)
{
	return b->stage ? b->count / b->ranks : b->count;
}

static int64_t part_first(const struct bucket *b)
{
	return b->stage ? part_count(b) * b->rank : 0;
}

static void cut_over_sharers(struct prog *p, const struct bucket *b, int32_t value)
{
	for (int a = 0; a < AXIS_COUNT; a++)
		if (b->axes >> a & 1)
			prog_place(p, value, (enum mesh_axis)a, PLACE_SHARD0);
}

/* A value of this rank's part of the bucket, placed as the pack but cut over those who share it. */
static int32_t part_value(struct sharder *h, const struct bucket *b, const char *name, enum region region,
                          enum dtype dtype, int32_t like)
{
	int32_t id = prog_flat(h->p, name, region, dtype, part_count(b));
	h->p->value[id].grid = h->p->value[like].grid;
	memcpy(h->p->value[id].place, h->p->value[like].place, sizeof h->p->value[id].place);
	if (b->stage)
		cut_over_sharers(h->p, b, id);
	return id;
}

static void set_state(struct bucket *b, enum shard_state k, int32_t value, int64_t first, int64_t count)
{
	b->state[k] = (struct shard_slice){value, first, count};
}

/* Nodes that go to a place of their own */

static void place_new(struct sharder *h, int32_t before)
{
	if (!h->at_node)
		return;
	size_t n = h->p->n_node - h->first;
	for (size_t i = h->cap_at; i < n; i++)
		h->at_node[i] = before;
	h->cap_at = n;
}

static void begin_inserting(struct sharder *h, size_t most)
{
	h->first = h->p->n_node;
	h->at_node = mem_array(most + 1, sizeof *h->at_node);
	h->cap_at = 0;
}

static void end_inserting(struct sharder *h)
{
	if (!h->p->e.code)
		prog_insert(h->p, h->first, h->at_node);
	free(h->at_node);
	h->at_node = NULL;
}

static void turn_to(struct prog *p, enum segment segment, int chunk)
{
	p->segment = (uint8_t)segment;
	p->chunk = (uint8_t)chunk;
}

/* Parameters: whole, or gathered when they are needed (stage 3) */

static bool reads(const struct node *n, const bool *wanted)
{
	for (int k = 0; k < op_rows[n->op].n_in; k++)
		if (n->in[k] != NONE && wanted[n->in[k]])
			return true;
	return false;
}

/* The first node of a segment set that reads a member, or NONE. */
static int32_t first_reader(const struct sharder *h, const bool *wanted, uint32_t segments)
{
	for (size_t i = 0; i < h->first; i++)
		if (segments >> h->p->node[i].segment & 1 && reads(&h->p->node[i], wanted))
			return (int32_t)i;
	return NONE;
}

static void redirect(struct sharder *h, const int32_t *from, const int32_t *to, int32_t n)
{
	for (size_t i = 0; i < h->first; i++) {
		struct node *node = &h->p->node[i];
		for (int k = 0; k < op_rows[node->op].n_in && node->segment != SEG_FWD; k++)
			for (int32_t j = 0; j < n; j++)
				if (node->in[k] == from[j])
					node->in[k] = to[j];
	}
}

static void gather_before(struct sharder *h, struct bucket *b, const int32_t *values, int32_t at,
                          enum segment segment)
{
	int32_t whole = pack(h, b, values);
	turn_to(h->p, segment, b->like.chunk);
	h->p->layer = b->like.layer;
	EMIT_INTO(h->p, all_gather, ARG(.comm = {b->axes}), (int32_t[OP_MAX_OUT]){whole},
	          b->state[SHARD_PARAM].value);
	h->p->layer = -1;
	place_new(h, at);
}

static void gather_in_time(struct sharder *h, struct bucket *b)
{
	struct prog *p = h->p;
	int32_t *values = mem_array((size_t)b->n, sizeof *values),
	        *again = mem_array((size_t)b->n, sizeof *again);
	bool *wanted = mem_array(p->n_value, sizeof *wanted);
	for (int32_t i = 0; i < b->n; i++) {
		values[i] = h->param[b->member[i]].value;
		wanted[values[i]] = true;
		p->value[values[i]].region = R_TEMP;
	}
	int32_t forward = first_reader(h, wanted, SEG_BIT(FWD));
	int32_t backward = first_reader(h, wanted, SEG_BIT(BWD) | SEG_BIT(WGRAD));
	struct value like = p->value[values[0]];
	int32_t held = part_value(h, b, like.name, R_PARAM, (enum dtype)like.dtype, values[0]);
	for (int a = 0; a < AXIS_COUNT; a++)
		if (p->value[held].place[a] == PLACE_SHARD1)
			p->value[held].place[a] = PLACE_SHARD0;
	set_state(b, SHARD_PARAM, held, part_first(b), part_count(b));
	if (backward != NONE) {
		for (int32_t i = 0; i < b->n; i++) {
			struct value v = p->value[values[i]];
			again[i] = prog_value(p, v.name, R_TEMP, (enum dtype)v.dtype, v.nd, v.dim);
			p->value[again[i]].weight = 1;
			p->value[again[i]].grid = v.grid;
			memcpy(p->value[again[i]].place, v.place, sizeof v.place);
		}
		redirect(h, values, again, b->n);
		gather_before(h, b, again, backward, (enum segment)p->node[backward].segment);
	}
	if (forward != NONE)
		gather_before(h, b, values, forward, SEG_FWD);
	free(values);
	free(again);
	free(wanted);
}

static void hold_whole(struct sharder *h, struct bucket *b)
{
	int32_t *values = mem_array((size_t)b->n, sizeof *values);
	for (int32_t i = 0; i < b->n; i++)
		values[i] = h->param[b->member[i]].value;
	set_state(b, SHARD_PARAM, pack(h, b, values), 0, b->count);
	free(values);
}

static void place_parameters(struct sharder *h)
{
	begin_inserting(h, 2 * h->s->n);
	for (size_t i = 0; i < h->s->n; i++) {
		struct bucket *b = &h->s->bucket[i];
		int64_t multiple = (int64_t)b->ranks * ALIGN_ELEMENTS;
		b->count = (b->count + multiple - 1) / multiple * multiple;
		(b->stage == 3 ? gather_in_time : hold_whole)(h, b);
	}
	end_inserting(h);
}

/* Gradients */

static uint32_t partial_axes(const struct prog *p, int32_t value)
{
	uint32_t axes = 0;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (p->axis_size[a] > 1 && prog_lies_along(&p->value[value], a) &&
		    p->value[value].place[a] == PLACE_PARTIAL)
			axes |= 1u << a;
	return axes;
}

/* One collective on a gradient, which travels as bf16 where asked. into: where the result goes, NONE: a new
 * value. Its nodes go in front of node `at`; what turns bf16 back, which has to wait for it, in front of node
 * `back`. */
static int32_t reduce(struct sharder *h, enum op op, uint32_t axes, int32_t g, int32_t into, int32_t at,
                      int32_t back)
{
	struct prog *p = h->p;
	int32_t outs[OP_MAX_OUT] = {into, NONE, NONE}, sum;
	union op_arg over = {.comm = {.axes = axes}};
	if (h->options->reduce_in_bf16)
		g = EMIT(p, cast, ARG(.cast = {DT_bf16}), g);
	sum = prog_emit(p, op, &over, HERE, &g, 1, h->options->reduce_in_bf16 ? NULL : outs);
	place_new(h, at);
	if (h->options->reduce_in_bf16)
		sum = EMIT_INTO(p, cast, ARG(.cast = {DT_f32}), outs, sum);
	place_new(h, back);
	return sum;
}

/* The sum lies where the summand was. */
static int32_t reduce_in_place(struct sharder *h, uint32_t axes, int32_t g, int32_t at, int32_t back)
{
	int32_t sum = prog_view(h->p, "gradient", g, 0, value_count(&h->p->value[g]));
	return reduce(h, OP_all_reduce, axes, g, sum, at, back);
}

/* First and last node that writes one of these values. */
static void writers(const struct sharder *h, const int32_t *values, int32_t n, int32_t *first, int32_t *last)
{
	*first = INT32_MAX;
	*last = NONE;
	for (int32_t j = 0; j < n; j++) {
		const struct value *v = &h->p->value[values[j]];
		*first = v->def < *first ? v->def : *first;
		*last = h->last_write[values[j]] > *last ? h->last_write[values[j]] : *last;
	}
}

/* Stage 2: the whole gradient of a bucket lives in temporary memory from its first writer to the reduction
 * right behind its last; what stays is this rank's part, summed over micro-batches. */
static int32_t reduce_at_once(struct sharder *h, struct bucket *b, const int32_t *grads)
{
	struct prog *p = h->p;
	int32_t first, last;
	int64_t members = 0;
	for (int32_t i = 0; i < b->n; i++) {
		p->value[grads[i]].region = R_TEMP;
		members += value_count(&p->value[grads[i]]);
	}
	int32_t whole = pack(h, b, grads);
	writers(h, grads, b->n, &first, &last);
	if (members < b->count) { /* what lies between the members goes into the norm too */
		turn_to(p, (enum segment)p->node[first].segment, b->like.chunk);
		prog_emit(p, OP_zero, NULL, HERE, NULL, 0, (int32_t[OP_MAX_OUT]){whole});
		place_new(h, first);
	}
	turn_to(p, (enum segment)p->node[last].segment, b->like.chunk);
	int32_t part = reduce(h, OP_reduce_scatter, b->axes, whole, NONE, last + 1, last + 1);
	int32_t held = part_value(h, b, "gradient", R_GRAD, DT_f32, part);
	p->value[held].sums = 1;
	EMIT_INTO(p, accumulate, NO_ARG, (int32_t[OP_MAX_OUT]){held}, part);
	place_new(h, last + 1);
	return held;
}

/* Where a reduction goes: behind the last writer of what it reads, or at the end of everything. */
static int32_t early(const struct sharder *h, const int32_t *grads, int32_t n)
{
	int32_t first, last;
	writers(h, grads, n, &first, &last);
	return h->options->reduce_early ? last + 1 : (int32_t)h->first;
}

/* Stages 0 and 1: with the last micro-batch. */
static int32_t reduce_with_last(struct sharder *h, struct bucket *b, const int32_t *grads)
{
	struct prog *p = h->p;
	int32_t whole = pack(h, b, grads), at = early(h, grads, b->n);
	turn_to(p, SEG_REDUCE, b->like.chunk);
	if (!b->stage)
		return whole;
	int32_t view = prog_view(p, "gradient", whole, part_first(b), part_count(b));
	cut_over_sharers(p, b, view);
	return reduce(h, OP_reduce_scatter, b->axes, whole, view, at, (int32_t)h->first);
}

static int32_t *gradients_of(struct sharder *h, const struct bucket *b)
{
	int32_t *grads = mem_array((size_t)b->n, sizeof *grads);
	for (int32_t i = 0; i < b->n; i++) {
		grads[i] = h->p->value[h->param[b->member[i]].value].grad;
		if (grads[i] == NONE)
			err_set(&h->p->e, EXIT_INTERNAL, "program: %s has no gradient",
			        h->p->value[h->param[b->member[i]].value].name);
	}
	return grads;
}

static void check_partial(struct sharder *h, const struct bucket *b, int32_t grad)
{
	uint32_t axes = partial_axes(h->p, grad);
	if ((axes & ~row_axes(&h->p->value[grad])) != b->like.partial)
		err_set(&h->p->e, EXIT_INTERNAL,
		        "program: the gradient of %s is partial over other axes than said",
		        h->p->value[h->param[b->member[0]].value].name);
}

/* What is left to add up once the micro-batches are through: replicas, partial sums over other axes. */
static void reduce_rest(struct sharder *h, struct bucket *b, const int32_t *grads)
{
	struct prog *p = h->p;
	int32_t *g = &b->state[SHARD_GRAD].value, end = (int32_t)h->first;
	uint32_t axes = partial_axes(p, *g);
	bool behind =
	        b->stage >= 2 || (b->stage && h->options->reduce_in_bf16); /* of what stands at the end */
	turn_to(p, SEG_REDUCE, b->like.chunk);
	if (axes)
		*g = reduce_in_place(h, axes, *g, behind ? end : early(h, grads, b->n), end);
}

static void reduce_bucket(struct sharder *h, struct bucket *b)
{
	if (b->like.is_buffer)
		return;
	int32_t *grads = gradients_of(h, b);
	if (!h->p->e.code)
		check_partial(h, b, grads[0]);
	if (!h->p->e.code) {
		int32_t g = b->stage >= 2 ? reduce_at_once(h, b, grads) : reduce_with_last(h, b, grads);
		set_state(b, SHARD_GRAD, g, part_first(b), part_count(b));
		reduce_rest(h, b, grads);
	}
	free(grads);
}

/* Norm and update */

static bool counts_here(const struct prog *p, const struct bucket *b)
{
	const struct value *g = &p->value[b->state[SHARD_GRAD].value];
	bool counts = b->like.counts;
	for (int a = 0; a < AXIS_COUNT; a++)
		counts &= !prog_lies_along(g, a) || g->place[a] != PLACE_REPLICATED || !p->axis_rank[a];
	return counts;
}

static void emit_norm(struct sharder *h)
{
	struct prog *p = h->p;
	int32_t one = 1, norm2 = prog_value(p, "squared gradient norm", R_STAT, DT_f64, 1, &one);
	uint32_t axes = prog_axes(p, AXES_DENSE);
	turn_to(p, SEG_NORM, 0);
	prog_place_sum(p, norm2); /* gradients of both grids are added */
	for (size_t i = 0; i < h->s->n; i++) {
		struct bucket *b = &h->s->bucket[i];
		if (b->like.is_buffer)
			continue;
		if (b->like.tied)
			b->state[SHARD_GRAD].value =
			        reduce_in_place(h, AXES_ENDS, b->state[SHARD_GRAD].value, 0, 0);
		EMIT_INTO(p, square_sum, ARG(.square_sum = {counts_here(p, b)}), (int32_t[OP_MAX_OUT]){norm2},
		          b->state[SHARD_GRAD].value);
	}
	h->s->norm2 = axes ? EMIT(p, all_reduce, ARG(.comm = {axes}), norm2) : norm2;
}

/* A master is exact; moments are what the options say. */
static enum dtype type_of_state(const struct sharder *h, int state)
{
	return state == SHARD_MASTER ? DT_f32 : h->options->moments[state - SHARD_EXP_AVG];
}

static void update_bucket(struct sharder *h, struct bucket *b)
{
	struct prog *p = h->p;
	if (b->like.is_buffer)
		return;
	int32_t whole = b->state[SHARD_PARAM].value, mine = whole;
	int64_t first = part_first(b), count = part_count(b);
	if (b->stage == 1 || b->stage == 2) {
		mine = prog_view(p, p->value[whole].name, whole, first, count);
		cut_over_sharers(p, b, mine);
	}
	static const char *const names[] = {"master", "exp_avg", "exp_avg_sq"};
	for (int k = SHARD_MASTER; k <= SHARD_EXP_AVG_SQ; k++)
		if (k != SHARD_MASTER || p->value[whole].dtype != DT_f32)
			set_state(b, (enum shard_state)k,
			          part_value(h, b, names[k - SHARD_MASTER], R_OPT, type_of_state(h, k), mine),
			          first, count);
	turn_to(p, SEG_STEP, 0);
	EMIT(p, adamw, ARG(.adamw = {b->like.decay}), mine, b->state[SHARD_GRAD].value,
	     b->state[SHARD_MASTER].value, b->state[SHARD_EXP_AVG].value, b->state[SHARD_EXP_AVG_SQ].value,
	     h->s->hyper, h->s->norm2);
	if (mine != whole)
		EMIT(p, share, ARG(.comm = {b->axes}), whole);
}

static int32_t *find_last_writes(const struct prog *p)
{
	int32_t *last = mem_array(p->n_value + 1, sizeof *last);
	for (size_t i = 0; i < p->n_node; i++)
		for (int k = 0; k < op_rows[p->node[i].op].n_out; k++)
			last[p->node[i].out[k]] = (int32_t)i;
	return last;
}

static void emit_training(struct sharder *h)
{
	int32_t length = HYPER_COUNT;
	begin_inserting(h, 12 * h->s->n);
	h->last_write = find_last_writes(h->p);
	for (size_t i = 0; i < h->s->n && !h->p->e.code; i++)
		reduce_bucket(h, &h->s->bucket[i]);
	free(h->last_write);
	end_inserting(h);
	if (h->p->e.code)
		return;
	emit_norm(h);
	h->s->hyper = prog_value(h->p, "hyper", R_INPUT, DT_f32, 1, &length);
	for (size_t i = 0; i < h->s->n && !h->p->e.code; i++)
		update_bucket(h, &h->s->bucket[i]);
	turn_to(h->p, SEG_STEP, 0);
}

int shard_program(struct sharding *s, struct prog *p, const struct shard_param *param, size_t n,
                  const struct shard_options *options)
{
	*s = (struct sharding){.norm2 = NONE,
	                       .hyper = NONE,
	                       .bucket_of = mem_array(n + 1, sizeof *s->bucket_of),
	                       .at = mem_array(n + 1, sizeof *s->at)};
	if (p->e.code)
		return p->e.code;
	struct sharder h = {.s = s, .p = p, .param = param, .n = n, .options = options};
	prog_refresh(p);
	fill_buckets(&h);
	place_parameters(&h);
	if (options->trains)
		emit_training(&h);
	return p->e.code;
}

void shard_free(struct sharding *s)
{
	for (size_t i = 0; i < s->n; i++)
		free(s->bucket[i].member);
	free(s->bucket);
	free(s->bucket_of);
	free(s->at);
	*s = (struct sharding){0};
}
