/* The mixture-of-experts block: router, losses that balance it, dispatch to the experts' ranks and back, and
 * the shared expert, which computes meanwhile. */
#include "model/builder.h"

#include <math.h>

/* A layer under construction. */
struct experts {
	struct builder *b;
	const struct model_config *c;
	int32_t E, K;
	int32_t at;           /* among the mixture-of-experts layers of the model */
	int32_t probs, index; /* [n,K] */
	int32_t slot, sizes;
	int64_t limit;               /* rows that an expert takes of one micro-batch; 0: all */
	int32_t ep, etp, own, first; /* ranks of the expert grid; experts on this rank */
	int32_t tokens;              /* rows whose choices are dispatched */
	int32_t rows;                /* of choices on this rank, at most */
	uint32_t shared_axes;        /* that the rows are gathered over: etp, and ep where all gather */
	union op_arg arg;            /* of what works on counted rows */
};

static bool trains(const struct builder *b)
{
	return b->m->spec.use == MODEL_TRAIN;
}

static int32_t gather(struct builder *b, uint32_t axes, int32_t v)
{
	axes = prog_axes(b->p, axes);
	return axes ? EMIT(b->p, all_gather, ARG(.comm = {axes}), v) : v;
}

static int32_t add_over(struct builder *b, uint32_t axes, int32_t v)
{
	axes = prog_axes(b->p, axes);
	return axes ? EMIT(b->p, all_reduce, ARG(.comm = {axes}), v) : v;
}

/* Router */

/* f32 whatever the model's type. */
static int32_t router_logits(struct experts *x, int32_t h)
{
	struct builder *b = x->b;
	int32_t w = build_f32_param(b, x->c->hidden_size, &(struct rows){"mlp.router.weight", x->E},
	                            INIT_NORMAL, x->c->init_method_std, false);
	h = build_jitter(b, "mlp.router.input", h, x->c->moe_input_jitter_eps);
	if (b->m->spec.dtype != DT_f32)
		h = EMIT(b->p, cast, ARG(.cast = {DT_f32}), h);
	return EMIT(b->p, linear, NO_ARG, h, w, NONE);
}

static void route(struct experts *x, int32_t logits)
{
	const struct model_config *c = x->c;
	bool groups = c->moe_router_num_groups != OPTION_NULL_INT;
	union op_arg arg = {.route = {.score = (int32_t)c->moe_router_score_function,
	                              .topk = x->K,
	                              .num_groups = groups ? (int32_t)c->moe_router_num_groups : 0,
	                              .group_topk = groups ? (int32_t)c->moe_router_group_topk : 0,
	                              .pre_softmax = c->moe_router_pre_softmax,
	                              .scaling_factor = (float)c->moe_router_topk_scaling_factor}};
	int32_t bias = NONE;
	if (c->moe_router_enable_expert_bias) {
		bias = build_f32_param(x->b, 1, &(struct rows){"mlp.router.expert_bias", x->E}, INIT_ZERO, 0,
		                       true);
		x->b->m->expert_bias[x->at] = bias;
	}
	x->probs = EMIT(x->b->p, route, &arg, logits, bias);
	x->index = prog_out(x->b->p, 1);
}

static union op_arg balance_arg(const struct experts *x, int32_t sequences, uint32_t axes)
{
	const struct builder *b = x->b;
	return (union op_arg){.balance = {.experts = x->E,
	                                  .score = (int32_t)x->c->moe_router_score_function,
	                                  .z_coeff = (float)x->c->moe_z_loss_coeff,
	                                  .sequences = sequences,
	                                  .sequence_rows = b->block_rows / b->m->spec.batch,
	                                  .first_row = b->first_row,
	                                  .axes = axes}};
}

static int32_t count(struct experts *x, const union op_arg *arg)
{
	return add_over(x->b, arg->balance.axes, EMIT(x->b->p, expert_counts, arg, x->index));
}

/* Counts of the step up to this micro-batch: the sum goes on, so backward has a copy. */
static int32_t count_on(struct experts *x, const union op_arg *arg)
{
	struct prog *p = x->b->p;
	int32_t sum = prog_value(p, "expert counts so far", R_STAT, DT_i32, 2, (int32_t[]){1, x->E});
	EMIT_INTO(p, accumulate, NO_ARG, (int32_t[OP_MAX_OUT]){sum}, count(x, arg));
	return EMIT(p, accumulate, NO_ARG, sum);
}

/* What the balancing loss looks at: which rows it counts together, and over which ranks. */
static int32_t counts_to_balance(struct experts *x, union op_arg *arg)
{
	const struct builder *b = x->b;
	uint32_t data = prog_axes(b->p, AXES_DATA);
	bool sequences = x->c->moe_router_load_balancing_type == MODEL_BALANCING_SEQ;
	bool all = x->c->moe_router_load_balancing_type == MODEL_BALANCING_GLOBAL;
	bool any =
	        x->c->moe_router_load_balancing_type != MODEL_BALANCING_NONE && x->c->moe_aux_loss_coeff > 0;
	*arg = balance_arg(x, any && sequences ? b->m->spec.batch : 1,
	                   !any ? 0 : b->row_axes | (all ? data : 0));
	arg->balance.aux_coeff = any ? (float)x->c->moe_aux_loss_coeff : 0;
	return any && all ? count_on(x, arg) : count(x, arg);
}

static void balance(struct experts *x, int32_t logits)
{
	struct builder *b = x->b;
	union op_arg arg, load = balance_arg(x, 1, b->row_axes | prog_axes(b->p, AXES_DATA));
	const int32_t *sum = b->m->expert_sum;
	int32_t sums[OP_MAX_OUT] = {sum[EXPERT_LOSS], sum[EXPERT_Z], sum[EXPERT_ENTROPY]};
	int32_t loads[OP_MAX_OUT] = {b->m->expert_load_of[x->at], NONE, NONE};
	int32_t counts = counts_to_balance(x, &arg);
	EMIT_INTO(b->p, balance, &arg, sums, logits, counts);
	EMIT_INTO(b->p, accumulate, NO_ARG, loads, EMIT(b->p, expert_counts, &load, x->index));
}

/* A micro-batch's choices compete, whichever ranks hold its rows: so all of these see all. */
static void drop_beyond_capacity(struct experts *x)
{
	struct builder *b = x->b;
	union op_arg arg = {.capacity = {.experts = x->E,
	                                 .limit = (int32_t)x->limit,
	                                 .by_position = x->c->moe_token_drop_policy == MODEL_DROP_POSITION,
	                                 .ranks = prog_ranks(b->p, b->row_axes),
	                                 .rank = prog_place_among(b->p, b->row_axes),
	                                 .context_ranks = b->context.ranks,
	                                 .seq_length = b->m->spec.rows,
	                                 .axes = b->row_axes}};
	int32_t index = gather(b, b->row_axes, x->index), probs = gather(b, b->row_axes, x->probs);
	int32_t outs[OP_MAX_OUT] = {NONE, b->m->expert_sum[EXPERT_DROPPED], NONE};
	x->index = EMIT_INTO(b->p, capacity, &arg, outs, index, probs);
}

/* Dispatch: rows of tokens become rows of choices in order of expert, on the ranks of the experts. */

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

/* Micro-batches that the ranks which share the experts may work on at a time. */
static int64_t micro_batches(const struct experts *x)
{
	int64_t ranks = (int64_t)x->ep * x->etp, share = prog_ranks(x->b->p, x->b->row_axes);
	return ranks % share == 0 ? ranks / share : share % ranks == 0 ? 1 : ranks / share + 2;
}

/* The most rows that can come to a rank's experts. */
static int64_t worst_rows(const struct experts *x, int64_t tokens)
{
	int64_t worst = tokens * (x->K < x->own ? x->K : x->own);
	return x->limit ? least(worst, x->own * x->limit * micro_batches(x)) : worst;
}

static void plan_dispatch(struct experts *x, bool gathers)
{
	struct builder *b = x->b;
	const int32_t ranks = gathers ? 1 : x->ep;
	int64_t tokens = (int64_t)x->tokens * ranks, worst = worst_rows(x, tokens), average = tokens * x->K;
	double factor = x->c->moe_expert_rank_capacity_factor;
	average /= x->ep;
	int64_t cap = isnan(factor) ? worst : least(worst, (int64_t)ceil(factor * (double)average));
	x->rows = (int32_t)(cap > 1 ? cap : 1);
	x->arg.expert.expected = (int32_t)least(average, cap);
	union op_arg own = {.balance = {.experts = x->E, .sequences = 1}};
	union op_arg arg = {.dispatch = {.experts = x->E,
	                                 .ranks = ranks,
	                                 .rank = gathers ? 0 : b->p->axis_rank[AXIS_ep],
	                                 .capacity = cap < worst ? x->rows : 0,
	                                 .first = gathers ? x->first : 0,
	                                 .count = gathers ? x->own : 0,
	                                 .counts = b->p->axis_rank[AXIS_etp] == 0,
	                                 .axes = AXIS_BIT(ep)}};
	int32_t counts = EMIT(b->p, expert_counts, &own, x->index);
	counts = gathers ? counts : gather(b, AXIS_BIT(ep), counts);
	int32_t outs[OP_MAX_OUT] = {NONE, NONE, b->m->expert_sum[EXPERT_OVERFLOW]};
	x->slot = EMIT_INTO(b->p, dispatch_plan, &arg, outs, x->index, counts);
	x->sizes = prog_out(b->p, 1);
}

static int32_t travel(struct experts *x, int32_t v, bool back, int64_t rows)
{
	if (x->ep == 1)
		return v;
	union op_arg arg = {.comm = {.axes = AXIS_BIT(ep),
	                             .begins = x->c->moe_shared_expert_overlap,
	                             .back = back,
	                             .rows = (int32_t)rows}};
	return EMIT(x->b->p, all_to_all, &arg, v, x->sizes);
}

/* From order of origin to order of expert and back; where all rows are of one origin they are in order,
 * unless the experts' rows are to be filled up. */
static int32_t regroup(struct experts *x, int32_t v, bool back)
{
	if (x->ep == 1 && !x->arg.expert.pad)
		return v;
	union op_arg arg = x->arg;
	arg.expert.back = back;
	arg.expert.rows = arg.expert.pad && !back ? arg.expert.pad * x->own : x->rows;
	return EMIT(x->b->p, regroup, &arg, v, x->sizes);
}

static int32_t regroup_gathered(struct experts *x, int32_t v, bool back)
{
	return x->arg.expert.pad ? regroup(x, v, back) : v;
}

/* Gate and up rows of an expert lie side by side for one product. */
static int32_t compute(struct experts *x, int32_t rows, int32_t weights)
{
	struct builder *b = x->b;
	const struct model_config *c = x->c;
	int64_t F = c->moe_ffn_hidden_size;
	bool gated = x->arg.expert.gated;
	const struct rows first[] = {{gated ? "gate.weight" : "fc1.weight", F}, {"up.weight", gated ? F : 0}};
	const struct rows second[] = {{"fc2.weight", c->hidden_size}};
	int32_t w1 = build_expert_param(b, c->hidden_size, BY_ROWS, first, 2, c->init_method_std);
	int32_t w2 = build_expert_param(b, F, BY_COLUMNS, second, 1, build_output_std(b));
	int32_t h = EMIT(b->p, grouped_linear, &x->arg, rows, w1, x->sizes);
	h = EMIT(b->p, expert_activation, &x->arg, h, weights, x->sizes);
	return EMIT(b->p, grouped_linear, &x->arg, h, w2, x->sizes);
}

/* The shared expert has all tokens; its output may be gated. */
static int32_t share(struct experts *x, int32_t h)
{
	struct builder *b = x->b;
	const struct model_config *c = x->c;
	if (c->moe_shared_expert_intermediate_size == OPTION_NULL_INT)
		return NONE;
	int32_t y = build_feed_forward(b, "mlp.shared_experts.", c->moe_shared_expert_intermediate_size,
	                               false, h);
	if (!c->moe_shared_expert_gate)
		return y;
	int32_t w = build_param(b, 2, c->hidden_size, WHOLE, ROWS({"mlp.shared_expert_gate.weight", 1}),
	                        INIT_NORMAL, c->init_method_std);
	return EMIT(b->p, row_gate, NO_ARG, y, EMIT(b->p, linear, NO_ARG, h, w, NONE));
}

/* What every rank of the expert grid works on: rows of its own, and those of the ranks that share its
 * experts' columns, or, where all gather, that share the experts at all. */
static int32_t enter_grid(struct experts *x, int32_t h, bool gathers)
{
	struct builder *b = x->b;
	x->shared_axes = AXIS_BIT(etp) | (gathers ? AXIS_BIT(ep) : 0);
	h = gather(b, x->shared_axes, EMIT(b->p, regrid, NO_ARG, h));
	x->index = gather(b, x->shared_axes, EMIT(b->p, regrid, NO_ARG, x->index));
	x->probs = gather(b, x->shared_axes, EMIT(b->p, regrid, NO_ARG, x->probs));
	x->tokens = b->rows * prog_ranks(b->p, x->shared_axes);
	return h;
}

static int32_t leave_grid(struct experts *x, int32_t y)
{
	uint32_t axes = prog_axes(x->b->p, x->shared_axes);
	if (axes)
		y = EMIT(x->b->p, reduce_scatter, ARG(.comm = {axes}), y);
	return EMIT(x->b->p, regrid, NO_ARG, y);
}

/* h [n,C]: to the experts and back; *shared: what the shared expert makes of it meanwhile. */
static int32_t dispatch(struct experts *x, int32_t h, int32_t *shared)
{
	struct builder *b = x->b;
	bool gathers = x->c->moe_token_dispatcher_type == MODEL_DISPATCHER_ALLGATHER && x->ep > 1;
	int32_t (*order)(struct experts *, int32_t, bool) = gathers ? regroup_gathered : regroup;
	int32_t entered = enter_grid(x, h, gathers);
	plan_dispatch(x, gathers);
	int32_t choices = gathers || x->ep == 1 ? x->rows : x->tokens * x->K;
	union op_arg arg = {.permute = {.rows = choices}};
	int32_t rows = EMIT(b->p, permute, &arg, entered, x->slot);
	int32_t weights = EMIT(b->p, permute_probs, &arg, x->probs, x->slot);
	if (!gathers) {
		rows = travel(x, rows, false, x->rows);
		weights = travel(x, weights, false, x->rows);
	}
	*shared = share(x, h);
	int32_t y = compute(x, order(x, rows, false), order(x, weights, false));
	y = order(x, y, true);
	if (!gathers)
		y = travel(x, y, true, choices);
	return leave_grid(x, EMIT(b->p, unpermute, NO_ARG, y, x->slot));
}

static struct experts begin(struct builder *b)
{
	const struct model_config *c = b->c;
	struct activation_kind kind = build_activation_kind(c);
	struct experts x = {.b = b,
	                    .c = c,
	                    .E = (int32_t)c->num_experts,
	                    .K = (int32_t)c->moe_router_topk,
	                    .at = b->m->expert_at[b->p->layer],
	                    .ep = b->p->axis_size[AXIS_ep],
	                    .etp = b->p->axis_size[AXIS_etp]};
	x.own = x.E / x.ep;
	x.first = x.own * b->p->axis_rank[AXIS_ep];
	double all = (double)b->m->spec.batch * b->m->spec.rows, average = all * x.K / x.E;
	if (!isnan(c->moe_expert_capacity_factor) && b->m->spec.use != MODEL_GENERATE)
		x.limit = (int64_t)fmin(all, ceil(average * c->moe_expert_capacity_factor));
	x.arg = (union op_arg){
	        .expert = {.first = x.first, .count = x.own, .kind = kind.kind, .gated = kind.gated}};
	if (c->moe_pad_expert_input_to_capacity)
		x.arg.expert.pad = (int32_t)(x.limit * micro_batches(&x));
	return x;
}

int32_t build_experts(struct builder *b, int32_t h)
{
	struct experts x = begin(b);
	int32_t logits = router_logits(&x, h), shared;
	route(&x, logits);
	if (trains(b))
		balance(&x, logits);
	if (x.limit)
		drop_beyond_capacity(&x);
	int32_t y = dispatch(&x, h, &shared);
	if (shared != NONE)
		y = EMIT(b->p, add, NO_ARG, y, shared);
	return build_dropout(b, "mlp.output", y);
}

static void number_layers(struct builder *b)
{
	struct model *m = b->m;
	size_t layers = (size_t)b->c->num_layers;
	bool *is_moe = arena_alloc(&b->p->arena, layers, sizeof *is_moe);
	m->expert_layer = arena_alloc(&b->p->arena, layers, sizeof *m->expert_layer);
	m->expert_at = arena_alloc(&b->p->arena, layers, sizeof *m->expert_at);
	m->n_expert_layers = 0;
	if (model_moe_layers(b->c, is_moe, &b->p->e))
		return;
	for (int32_t l = 0; l < b->c->num_layers; l++) {
		m->expert_at[l] = is_moe[l] ? m->n_expert_layers : NONE;
		if (is_moe[l])
			m->expert_layer[m->n_expert_layers++] = l;
	}
}

void build_expert_sums(struct builder *b)
{
	struct model *m = b->m;
	struct arena *a = &b->p->arena;
	int32_t E = (int32_t)b->c->num_experts, sums = EXPERT_SUM_COUNT;
	number_layers(b);
	m->expert_sums = m->expert_load = NONE;
	if (!m->n_expert_layers)
		return;
	size_t n = (size_t)m->n_expert_layers;
	m->expert_bias = arena_alloc(a, n, sizeof *m->expert_bias);
	m->expert_load_of = arena_alloc(a, n, sizeof *m->expert_load_of);
	m->expert_sums = prog_value(b->p, "expert sums", R_STAT, DT_f64, 1, &sums);
	prog_place_sum(b->p, m->expert_sums);
	for (int k = 0; k < EXPERT_SUM_COUNT; k++)
		m->expert_sum[k] = prog_view(b->p, "expert sum", m->expert_sums, k, 1);
	m->expert_load =
	        prog_value(b->p, "expert load", R_STAT, DT_i32, 2, (int32_t[]){m->n_expert_layers, E});
	prog_place_sum(b->p, m->expert_load);
	for (int32_t l = 0; l < m->n_expert_layers; l++) {
		m->expert_bias[l] = NONE;
		m->expert_load_of[l] = prog_view(b->p, "expert load", m->expert_load, (int64_t)l * E, E);
	}
}
