#include "test/placement.h"
#include "base/err.h"
#include "base/rng.h"
#include "comm/comm.h"
#include "graph/exec.h"
#include "graph/rule.h"
#include "kernels/kernels.h"
#include "test/ranks.h"
#include "test/test.h"

#include <stdlib.h>

enum { COMBINATIONS = 16 }; /* accepted ones along one axis that are remembered */

struct built { /* the program of one rank */
	struct prog p;
	int32_t in[OP_MAX_IN], out[RESULTS];
	size_t n_in;
	int n_out;
};

/* Building */

int one_node(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
             int32_t *out)
{
	int32_t outs[OP_MAX_OUT] = {NONE, NONE, NONE}, rows = 8;
	int n = op_rows[op].n_out;
	union op_arg own = *arg;
	placement_argument(p, op, in, &own);
	for (int a = 0; a < AXIS_COUNT; a++)
		if (arg->embedding.axes >> a & 1)
			rows /= p->axis_size[a];
	if (op == OP_embedding_bwd)
		outs[0] = prog_value(p, "table", R_GRAD, DT_f32, 2, (int32_t[]){rows, 4});
	prog_emit(p, op, &own, HERE, in, n_in, outs);
	for (int k = 0; k < n; k++)
		out[k] = prog_out(p, k);
	for (size_t k = 0; k < n_in && op_rows[op].flags & UPDATES; k++)
		if (p->value[in[k]].region != R_INPUT && p->value[in[k]].region != R_STAT)
			out[n++] = in[k];
	return n;
}

int32_t differentiate(struct prog *p, int32_t y, int32_t adjoint)
{
	if (!p->e.code)
		prog_backward(p, &(struct seed){y, adjoint}, 1);
	return y;
}

int32_t gradient(const struct prog *p, int32_t v)
{
	return p->e.code ? 0 : p->value[v].grad;
}

int32_t adjoint_of(const struct prog *p, int32_t v)
{
	int32_t g = gradient(p, v);
	if (!p->e.code && memcmp(p->value[g].place, p->value[v].place, sizeof p->value[v].place))
		test_failed(__FILE__, __LINE__, "an adjoint is placed otherwise than its value");
	return g;
}

/* Arguments */

/* Which share this rank has of what these axes cut. */
static int32_t index_on(const struct prog *p, uint32_t axes)
{
	int32_t index = 0;
	for (int a = AXIS_COUNT; a-- > 0;)
		if (axes >> a & 1)
			index = index * p->axis_size[a] + p->axis_rank[a];
	return index;
}

static uint32_t axes_at(const struct prog *p, int32_t v, enum place place)
{
	uint32_t axes = 0;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (p->axis_size[a] > 1 && rule_at(p, v, a) == place)
			axes |= 1u << a;
	return axes;
}

static int32_t ranks_on(const struct prog *p, uint32_t axes)
{
	int32_t ranks = 1;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (axes >> a & 1)
			ranks *= p->axis_size[a];
	return ranks;
}

static void own_table(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	int32_t rows = 8 / ranks_on(p, arg->embedding.axes);
	(void)in;
	arg->embedding.first_row = rows * index_on(p, arg->embedding.axes);
}

static void own_columns(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	arg->cross_entropy.first_column = p->value[in[0]].dim[1] * index_on(p, arg->cross_entropy.axes);
}

static void own_norm_heads(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	int32_t ranks = ranks_on(p, axes_at(p, in[0], PLACE_SHARD1));
	arg->norm.heads /= ranks;
	arg->norm.groups /= ranks;
}

static void own_rope_heads(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	int32_t ranks = ranks_on(p, axes_at(p, in[0], PLACE_SHARD1));
	arg->rope.heads /= ranks;
	arg->rope.groups /= ranks;
}

static void own_heads(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	uint32_t axes = axes_at(p, in[0], PLACE_SHARD1);
	arg->attention.heads /= ranks_on(p, axes);
	arg->attention.groups /= ranks_on(p, axes);
	arg->attention.first_head = index_on(p, axes) * arg->attention.heads;
}

static void own_latent_heads(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	arg->mla.heads /= ranks_on(p, axes_at(p, in[0], PLACE_SHARD1));
}

static void own_first(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	arg->columns.first /= ranks_on(p, axes_at(p, in[0], PLACE_SHARD1));
}

static void own_rows(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	uint32_t within = arg->dropout.axes & axes_at(p, in[0], PLACE_SHARD0);
	if (within & AXIS_BIT(cp))
		arg->dropout.rows = (struct context){p->axis_size[AXIS_cp], p->axis_rank[AXIS_cp], 1};
	arg->dropout.first_row = p->value[in[0]].dim[0] * index_on(p, within & ~AXIS_BIT(cp));
}

static void counted_once(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	arg->square_sum.counts = !index_on(p, axes_at(p, in[0], PLACE_REPLICATED));
}

/* Along axes where sequences are not counted together, ranks have whole ones; along cp part of every one. */
static void own_sequences(const struct prog *p, int32_t rows, union op_arg *arg)
{
	uint32_t cut = axes_at(p, rows, PLACE_SHARD0), within = cut & arg->balance.axes & ~AXIS_BIT(cp);
	arg->balance.sequences /= ranks_on(p, cut & ~arg->balance.axes);
	arg->balance.sequence_rows /= ranks_on(p, cut & arg->balance.axes & AXIS_BIT(cp));
	arg->balance.first_row = p->value[rows].dim[0] * index_on(p, within);
}

static void own_sequences_first(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	own_sequences(p, in[0], arg);
}

static void own_sequences_second(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	own_sequences(p, in[1], arg);
}

static void own_block(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	(void)in;
	arg->capacity.ranks = ranks_on(p, arg->capacity.axes);
	arg->capacity.rank = index_on(p, arg->capacity.axes);
}

static void own_slots(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	uint32_t axes = axes_at(p, in[1], PLACE_SHARD0) | axes_at(p, in[1], PLACE_SHARD1);
	arg->permute.rows /= ranks_on(p, axes);
}

static void experts_of(const struct prog *p, int32_t v, union op_arg *arg)
{
	uint32_t axes = axes_at(p, v, PLACE_SHARD0) & AXIS_BIT(ep);
	arg->expert.count /= ranks_on(p, axes);
	arg->expert.first = index_on(p, axes) * arg->expert.count;
	arg->expert.rows = p->value[v].dim[0];
}

static void own_experts_first(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	experts_of(p, in[0], arg);
}

static void own_experts_second(const struct prog *p, const int32_t *in, union op_arg *arg)
{
	experts_of(p, in[1], arg);
}

void placement_argument(const struct prog *p, enum op op, const int32_t *in, union op_arg *arg)
{
	static void (*const own[OP_COUNT])(const struct prog *, const int32_t *, union op_arg *) = {
	        [OP_embedding] = own_table,
	        [OP_embedding_bwd] = own_table,
	        [OP_cross_entropy_bwd] = own_columns,
	        [OP_cross_entropy] = own_columns,
	        [OP_logit_stats] = own_columns,
	        [OP_rope] = own_rope_heads,
	        [OP_qk_norm] = own_norm_heads,
	        [OP_qk_norm_bwd] = own_norm_heads,
	        [OP_attention] = own_heads,
	        [OP_attention_bwd] = own_heads,
	        [OP_attention_cache] = own_heads,
	        [OP_attention_part] = own_heads,
	        [OP_mla_pack] = own_latent_heads,
	        [OP_mla_unpack] = own_latent_heads,
	        [OP_split_columns] = own_first,
	        [OP_dropout] = own_rows,
	        [OP_square_sum] = counted_once,
	        [OP_expert_counts] = own_sequences_first,
	        [OP_balance] = own_sequences_first,
	        [OP_balance_bwd] = own_sequences_second,
	        [OP_capacity] = own_block,
	        [OP_permute] = own_slots,
	        [OP_permute_probs] = own_slots,
	        [OP_regroup] = own_experts_first,
	        [OP_grouped_linear] = own_experts_second,
	        [OP_grouped_dx] = own_experts_second,
	        [OP_grouped_dw] = own_experts_first,
	        [OP_expert_activation] = own_experts_first,
	        [OP_expert_activation_bwd] = own_experts_first,
	};
	if (own[op])
		own[op](p, in, arg);
}

/* Cutting */

static int ranks_of(const struct trial *t)
{
	return t->size[0] * t->size[1];
}

int placement_coordinate(const struct trial *t, int rank, int axis)
{
	return axis ? rank % t->size[1] : rank / t->size[1];
}

static int32_t blocks_of(const struct shape *s)
{
	return s->lies.blocks ? s->lies.blocks : 1;
}

static bool cuts_between(const struct trial *t, const struct shape *s, int axis)
{
	return (s->lies.between >> t->along->axis[axis] & 1) || (s->lies.between >> t->along->twin[axis] & 1);
}

/* The share of each rank along one axis, false where it does not come out even. */
static bool cut_rows(const struct trial *t, struct shape *s, int axis)
{
	int parts = t->size[axis], chunks = t->along->axis[axis] == AXIS_cp && parts > 1 ? 2 * parts : parts;
	bool between = cuts_between(t, s, axis);
	int32_t rows = s->dim[0] / blocks_of(s);
	bool even = between ? blocks_of(s) % parts == 0 : rows % chunks == 0;
	if (between)
		s->lies.blocks /= parts;
	s->dim[0] /= parts;
	return even && s->dim[0];
}

static bool cut_columns(const struct trial *t, struct shape *s, int axis)
{
	int parts = t->size[axis];
	bool even = s->dim[1] && s->dim[1] % parts == 0;
	if (s->lies.choices)
		return true;
	s->dim[1] /= parts;
	for (int i = 0; i < PIECES; i++) {
		even &= s->lies.piece[i] % parts == 0;
		s->lies.piece[i] /= parts;
	}
	return even;
}

static bool cut_once(const struct trial *t, struct shape *s, enum place at, int axis)
{
	return at == PLACE_SHARD0 ? cut_rows(t, s, axis) : at != PLACE_SHARD1 || cut_columns(t, s, axis);
}

static bool cut(const struct trial *t, const struct shape *whole, const uint8_t *at, struct shape *share)
{
	*share = *whole;
	/* Choices among tokens that are cut: no order of the whole is that of such ranks. */
	if (whole->lies.choices && at[0] == PLACE_SHARD1 && at[1] == PLACE_SHARD0)
		return false;
	return cut_once(t, share, at[0], 0) && cut_once(t, share, at[1], 1);
}

static int32_t columns_of(const struct shape *s)
{
	return s->dim[1] ? s->dim[1] : 1;
}

static int32_t row_before(const struct trial *t, const struct shape *s, int axis, int which, int32_t r)
{
	int parts = t->size[axis];
	if (cuts_between(t, s, axis))
		return which * s->dim[0] / parts + r;
	int32_t rows = s->dim[0] / blocks_of(s), own = rows / parts, j = r % own;
	return r / own * rows +
	       (t->along->axis[axis] == AXIS_cp ? context_position(rows, parts, which, j) : which * own + j);
}

static int32_t column_before(const struct trial *t, const struct shape *s, int axis, int which, int32_t c)
{
	int parts = t->size[axis], k = 0, left = 0;
	if (s->lies.choices)
		return c;
	for (; c >= s->lies.piece[k] / parts; k++) {
		c -= s->lies.piece[k] / parts;
		left += s->lies.piece[k];
	}
	return c + left + which * s->lies.piece[k] / parts;
}

/* Where element (r, c) of a rank's share stands in the whole: what the last axis has cut is joined first. */
static int64_t in_whole(const struct trial *t, const struct shape *whole, const uint8_t *at, int rank,
                        int32_t r, int32_t c)
{
	struct shape before[AXES] = {*whole, *whole};
	cut_once(t, &before[1], at[0], 0);
	for (int a = AXES; a-- > 0;) {
		int which = placement_coordinate(t, rank, a);
		if (at[a] == PLACE_SHARD0)
			r = row_before(t, &before[a], a, which, r);
		if (at[a] == PLACE_SHARD1)
			c = column_before(t, &before[a], a, which, c);
	}
	return (int64_t)r * columns_of(whole) + c;
}

/* Contents */

/* Which of the summands of partial sums a rank holds, of how many. */
static int summand(const struct trial *t, const uint8_t *at, int rank, int *of)
{
	int index = 0;
	*of = 1;
	for (int a = 0; a < AXES; a++)
		if (at[a] == PLACE_PARTIAL) {
			index = index * t->size[a] + placement_coordinate(t, rank, a);
			*of *= t->size[a];
		}
	return index;
}

/* Element i of operand k on a rank: of partial sums, all but the first rank have random summands; of partial
 * integers, nothing. */
static double content(const struct trial *t, int k, int rank, int64_t i)
{
	const struct operand *o = &t->o->in[k];
	uint64_t key = (uint64_t)k, at = (uint64_t)i;
	double x = o->content     ? o->content(t, k, rank, i)
	           : o->below > 0 ? (double)(rng_bits(key, at) % (uint64_t)o->below)
	           : o->below < 0 ? 0.1 + rng_uniform(key, at)
	                          : 2 * rng_uniform(key, at) - 1;
	int of, index = summand(t, t->at[k], rank, &of);
	double rest = 0;
	for (int j = 1; j < of && o->below <= 0 && !o->content; j++) {
		double one = rng_uniform(key + 100 * (uint64_t)j, at);
		if (j == index)
			return one;
		rest += one;
	}
	return index ? 0 : x - rest;
}

double placement_begins(const struct trial *t, int k, int rank, int64_t i)
{
	(void)k, (void)rank;
	int64_t position = i % t->o->arg.attention.seq_length;
	return (double)(i * 5 % (position + 1));
}

static void store(void *data, enum dtype dtype, int64_t i, double x)
{
	if (dtype == DT_f32)
		((float *)data)[i] = (float)x;
	else if (dtype_is_half(dtype))
		((uint16_t *)data)[i] = half_from_f32(dtype, (float)x);
	else if (dtype == DT_f64)
		((double *)data)[i] = x;
	else if (dtype == DT_i32)
		((int32_t *)data)[i] = (int32_t)x;
	else
		((int64_t *)data)[i] = (int64_t)x;
}

static double load(const void *data, enum dtype dtype, int64_t i)
{
	return dtype == DT_f32        ? (double)((const float *)data)[i]
	       : dtype_is_half(dtype) ? (double)half_to_f32(dtype, ((const uint16_t *)data)[i])
	       : dtype == DT_i32      ? (double)((const int32_t *)data)[i]
	                              : ((const double *)data)[i];
}

static void fill(const struct trial *t, int rank, struct exec *x, const struct built *b)
{
	for (size_t k = 0; k < b->n_in; k++) {
		uint64_t data[MOST];
		const struct value *v = &b->p.value[b->in[k]];
		ASSERT(value_count(v) <= MOST);
		for (int32_t r = 0; r < v->dim[0]; r++) {
			/* Of what ranks share, each has written its rows. */
			int which = placement_coordinate(t, rank, 1), rows = v->dim[0] / t->size[1];
			bool unwritten = t->o->op == OP_share && r / rows != which;
			for (int32_t c = 0; c < v->dim[1]; c++) {
				int64_t i = in_whole(t, &t->o->in[k].shape, t->at[k], rank, r, c);
				double value = unwritten ? NAN : content(t, (int)k, rank, i);
				store(data, (enum dtype)v->dtype, (int64_t)r * v->dim[1] + c, value);
			}
		}
		exec_upload(x, b->in[k], data);
	}
}

/* Running */

/* Every value has memory of its own (what the planner does with it is another test), but for other names. */
static void give_memory(struct prog *p)
{
	for (size_t v = 0; v < p->n_value; v++) {
		p->value[v].region = R_SAVED;
		p->value[v].offset_bytes = p->bytes[R_SAVED];
		p->bytes[R_SAVED] += prog_aligned(value_bytes(&p->value[v]));
	}
	for (size_t i = 0; i < p->n_node; i++)
		if (op_rows[p->node[i].op].flags & ALIAS)
			p->value[p->node[i].out[0]].offset_bytes = p->value[p->node[i].in[0]].offset_bytes;
}

static void place_operand(const struct trial *t, struct built *b, int32_t v)
{
	const struct mesh_pair *m = t->along;
	bool twin = t->o->in[b->n_in].twin;
	for (int a = 0; a < AXES; a++)
		prog_place(&b->p, v, twin ? m->twin[a] : m->axis[a], (enum place)t->at[b->n_in][a]);
}

/* False where a rule refuses. */
static bool build(const struct trial *t, int rank, struct built *b)
{
	const struct operation *o = t->o;
	*b = (struct built){0};
	prog_init(&b->p);
	for (int a = 0; a < AXES; a++) {
		b->p.axis_size[t->along->axis[a]] = b->p.axis_size[t->along->twin[a]] = t->size[a];
		b->p.axis_rank[t->along->axis[a]] = b->p.axis_rank[t->along->twin[a]] =
		        placement_coordinate(t, rank, a);
	}
	for (; b->n_in < OP_MAX_IN && o->in[b->n_in].shape.dim[0]; b->n_in++) {
		const struct operand *from = &o->in[b->n_in];
		struct shape share;
		if (!cut(t, &from->shape, t->at[b->n_in], &share))
			return false;
		b->in[b->n_in] = prog_value(&b->p, "operand", (enum region)from->region,
		                            (enum dtype)from->dtype, share.dim[1] ? 2 : 1, share.dim);
		place_operand(t, b, b->in[b->n_in]);
	}
	b->n_out = o->build(&b->p, o->op, &o->arg, b->in, b->n_in, b->out);
	return !b->p.e.code;
}

static void fetch(const struct trial *t, struct exec *x, const struct built *b, struct result *out)
{
	for (int k = 0; k < b->n_out; k++) {
		const struct value *v = &b->p.value[b->out[k]];
		double raw[MOST];
		ASSERT(value_count(v) <= MOST);
		exec_download(x, b->out[k], raw);
		for (int64_t i = 0; i < value_count(v); i++)
			out[k].data[i] = load(raw, (enum dtype)v->dtype, i);
		out[k].shape = (struct shape){{v->dim[0], v->nd > 1 ? v->dim[1] : 0}, t->o->out[k]};
		for (int a = 0; a < AXES; a++) {
			enum mesh_axis axis = t->along->axis[a];
			out[k].place[a] = v->place[prog_lies_along(v, axis) ? axis : t->along->twin[a]];
		}
	}
}

static void execute(struct trial *t, int rank, struct built *b, const struct exec_options *options)
{
	struct stream *stream;
	struct exec *x;
	struct err e = {0};
	CHECK(!cpu_reference_backend.open(&stream, THREADS(1), &e));
	give_memory(&b->p);
	if (CHECK(!exec_create(&x, &b->p, &cpu_reference_backend, stream, options, &e))) {
		struct exec_part part = {.segments = SEG_BIT(FWD) | SEG_BIT(BWD), .first = true};
		fill(t, rank, x, b);
		if (exec_run(x, &part, &e))
			test_failed(__FILE__, __LINE__, "%s: %s", t->o->name, e.text);
		fetch(t, x, b, t->result[rank]);
		exec_free(x);
	}
	cpu_reference_backend.close(stream);
}

/* One rank's thread, with a group for either axis, and one for both. */
static void execute_among_others(int rank, struct comm *world, void *shared)
{
	struct trial *t = shared;
	const struct mesh_pair *m = t->along;
	struct built b;
	struct err e = {0};
	struct comm *self = NULL, *group[AXES] = {NULL};
	if (!world)
		CHECK(!comm_self(&self, &e));
	for (int a = 0; a < AXES && world; a++)
		CHECK(!comm_split(world, &group[a], placement_coordinate(t, rank, !a), "axis", &e));
	const struct exec_comm comm[] = {
	        {.axes = 1u << m->axis[0], .comm = self ? self : group[0]},
	        {.axes = 1u << m->axis[1], .comm = self ? self : group[1]},
	        {.axes = 1u << m->axis[0] | 1u << m->axis[1], .comm = self ? self : world},
	        {.axes = 1u << m->twin[0], .comm = self ? self : group[0]},
	        {.axes = 1u << m->twin[1], .comm = self ? self : group[1]},
	        {.axes = 1u << m->twin[0] | 1u << m->twin[1], .comm = self ? self : world},
	};
	build(t, rank, &b);
	execute(t, rank, &b, &(struct exec_options){.comm = comm, .n_comm = sizeof comm / sizeof *comm});
	prog_free(&b.p);
	for (int a = 0; a < AXES; a++)
		comm_close(group[a]);
	comm_close(self);
}

static bool communicates(const struct prog *p)
{
	for (size_t i = 0; i < p->n_node; i++)
		if (op_rows[p->node[i].op].flags & COMM)
			return true;
	return false;
}

static void describe(const struct trial *t, char *text, size_t cap)
{
	size_t n = (size_t)snprintf(text, cap, "%s along %s %d, %s %d:", t->o->name,
	                            mesh_axis_name(t->along->axis[0]), t->size[0],
	                            mesh_axis_name(t->along->axis[1]), t->size[1]);
	for (int k = 0; k < OP_MAX_IN && t->o->in[k].shape.dim[0]; k++) {
		n += (size_t)snprintf(text + n, cap - n, " %s", place_names[t->at[k][0]]);
		n += (size_t)snprintf(text + n, cap - n, "/%s", place_names[t->at[k][1]]);
	}
}

/* Builds on all ranks, and runs what they accept; all must say the same. */
static bool run(struct trial *t, bool *met)
{
	int n = ranks_of(t), accepted = 0;
	bool meet = false;
	for (int rank = 0; rank < n; rank++) {
		struct built b;
		if (build(t, rank, &b)) {
			accepted++;
			meet = communicates(&b.p);
			t->n_result = b.n_out;
			for (size_t i = 0; i < b.p.n_node && met; i++)
				met[b.p.node[i].op] = true;
			if (!meet)
				execute(t, rank, &b, NULL);
		}
		prog_free(&b.p);
		if (!accepted)
			return false;
	}
	char text[300];
	describe(t, text, sizeof text);
	if (accepted != n)
		test_failed(__FILE__, __LINE__, "%s: %d of %d ranks accept", text, accepted, n);
	return accepted == n && (!meet || ranks_run(n, execute_among_others, t));
}

/* Comparing */

/* The ranks that hold the same copy: those with equal coordinates on the axes where it is replicated. */
static int copy_of(const struct trial *t, const uint8_t *at, int rank)
{
	int copy = 0;
	for (int a = 0; a < AXES; a++)
		if (at[a] == PLACE_REPLICATED)
			copy = copy * t->size[a] + placement_coordinate(t, rank, a);
	return copy;
}

/* The difference between result k, put together from the shares, and the whole; -1 where shapes differ. */
static double difference(const struct trial *t, int k, const struct result *whole)
{
	static double sum[RANKS][MOST];
	const uint8_t *at = t->result[0][k].place;
	struct shape share, whole_shape = whole[k].shape;
	double worst = 0;
	memset(sum, 0, sizeof sum);
	if (!cut(t, &whole_shape, at, &share))
		return -1;
	for (int rank = 0; rank < ranks_of(t); rank++) {
		const struct result *mine = &t->result[rank][k];
		if (memcmp(mine->shape.dim, share.dim, sizeof share.dim) ||
		    memcmp(mine->place, at, sizeof mine->place))
			return -1;
		for (int32_t r = 0; r < share.dim[0]; r++)
			for (int32_t c = 0; c < columns_of(&share); c++)
				sum[copy_of(t, at, rank)][in_whole(t, &whole_shape, at, rank, r, c)] +=
				        mine->data[r * columns_of(&share) + c];
	}
	for (int rank = 0; rank < ranks_of(t); rank++)
		for (int32_t i = 0; i < whole_shape.dim[0] * columns_of(&whole_shape); i++) {
			double gap = fabs(sum[copy_of(t, at, rank)][i] - whole[k].data[i]);
			if (!(gap <= worst))
				worst = isnan(gap) ? INFINITY : gap;
		}
	return worst;
}

/* The trials of one operation. */
struct search {
	struct trial t, whole;
	uint8_t good[AXES][COMBINATIONS][OP_MAX_IN]; /* accepted along each axis alone */
	int n_good[AXES], combinations, wrong;
	bool *met;
};

/* Runs the combination and compares it; false where it is refused. */
static bool attempt(struct search *s)
{
	struct trial *t = &s->t;
	if (!run(t, s->met))
		return false;
	char text[300];
	double allowed = t->o->op == OP_cast ? 2e-2 : 2e-5; /* a sum of rounded summands */
	describe(t, text, sizeof text);
	for (int k = 0; k < t->n_result; k++) {
		double gap = difference(t, k, s->whole.result[0]);
		if (!(gap >= 0 && gap <= allowed) && !s->wrong++)
			test_failed(__FILE__, __LINE__,
			            "%s: is accepted, but result %d as %s/%s differs by %g", text, k,
			            place_names[t->result[0][k].place[0]],
			            place_names[t->result[0][k].place[1]], gap);
	}
	return true;
}

static int count_operands(const struct operation *o)
{
	int n = 0;
	while (n < OP_MAX_IN && o->in[n].shape.dim[0])
		n++;
	return n;
}

static void place_combination(struct search *s, int axis, int i)
{
	for (int k = 0; k < count_operands(s->t.o); k++, i /= PLACE_COUNT)
		s->t.at[k][axis] = (uint8_t)(i % PLACE_COUNT);
}

/* Every combination along one axis of two ranks; remembers those that are accepted. */
static void try_axis(struct search *s, int axis)
{
	struct trial *t = &s->t;
	int accepted = 0;
	memset(t->at, 0, sizeof t->at);
	t->size[axis] = 2;
	t->size[!axis] = 1;
	for (int i = 0; i < s->combinations; i++) {
		place_combination(s, axis, i);
		if (!attempt(s))
			continue;
		for (int k = 0; k < OP_MAX_IN && accepted < COMBINATIONS; k++)
			s->good[axis][accepted][k] = t->at[k][axis];
		accepted++;
	}
	if (accepted != t->o->accepted[axis])
		test_failed(__FILE__, __LINE__, "%s accepts %d combinations along %s, not %d", t->o->name,
		            accepted, mesh_axis_name(t->along->axis[axis]), t->o->accepted[axis]);
	s->n_good[axis] = accepted < COMBINATIONS ? accepted : COMBINATIONS;
}

/* Every combination along one axis of two ranks, with each that is right along the other: what needs both to
 * be refused alone is run too. */
static int try_both(struct search *s, int axis)
{
	int accepted = 0;
	s->t.size[0] = s->t.size[1] = 2;
	for (int i = 0; i < s->n_good[!axis]; i++) {
		for (int k = 0; k < OP_MAX_IN; k++)
			s->t.at[k][!axis] = s->good[!axis][i][k];
		for (int j = 0; j < s->combinations; j++) {
			place_combination(s, axis, j);
			accepted += attempt(s);
		}
	}
	return accepted;
}

/* What makes sense along both axes alone. */
static void try_together(struct search *s)
{
	int accepted = 0;
	s->t.size[0] = s->t.size[1] = 2;
	for (int i = 0; i < s->combinations; i++)
		for (int j = 0; j < s->combinations; j++) {
			place_combination(s, 0, i);
			place_combination(s, 1, j);
			accepted += attempt(s);
		}
	if (accepted != s->t.o->accepted[1])
		test_failed(__FILE__, __LINE__, "%s accepts %d combinations, not %d", s->t.o->name, accepted,
		            s->t.o->accepted[1]);
}

void placement_try(const struct operation *o, const struct mesh_pair *along, bool *met)
{
	static struct search s;
	s = (struct search){.whole = {.o = o, .along = along, .size = {1, 1}}, .combinations = 1};
	s.t = s.whole;
	s.met = met;
	for (int k = 0; k < count_operands(o); k++)
		s.combinations *= PLACE_COUNT;
	if (!run(&s.whole, NULL)) {
		test_failed(__FILE__, __LINE__, "%s is refused on one rank", o->name);
		return;
	}
	if (o->accepted[0] == TOGETHER) {
		try_together(&s);
		return;
	}
	for (int axis = 0; axis < AXES; axis++)
		if (o->accepted[axis] != UNTRIED)
			try_axis(&s, axis);
	for (int axis = 0; axis < AXES && o->accepted[0] != UNTRIED && o->accepted[1] != UNTRIED; axis++)
		CHECK(try_both(&s, axis) > 0);
}
