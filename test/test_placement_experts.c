/* Placement rules by force, of experts: the router on the dense grid, what works on rows of choices on the
 * expert grid, and the whole block over both. */
#include "base/rng.h"
#include "test/placement.h"
#include "test/test.h"

enum { E = 4, K = 2, C = 4, F = 4, TOKENS = 8, CHOICES = TOKENS * K };

static uint32_t sized(const struct prog *p, uint32_t axes)
{
	for (int a = 0; a < AXIS_COUNT; a++)
		if (p->axis_size[a] == 1)
			axes &= ~(1u << a);
	return axes;
}

static int32_t gather(struct prog *p, uint32_t axes, int32_t v)
{
	return sized(p, axes) ? EMIT(p, all_gather, ARG(.comm = {sized(p, axes)}), v) : v;
}

/* The router */

/* loss, z, entropy, dlogits <- logits, scale: the rows of a sequence are on several ranks, who add up what
 * they count. */
static int balanced(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                    int32_t *out)
{
	union op_arg own = *arg, choose = {.route = {.topk = K}};
	(void)n_in;
	p->value[in[0]].want_grad = 1;
	placement_argument(p, OP_expert_counts, in, &own);
	EMIT(p, route, &choose, in[0]);
	int32_t counts = EMIT(p, expert_counts, &own, prog_out(p, 1));
	if (sized(p, arg->balance.axes))
		counts = prog_emit(p, op, ARG(.comm = {arg->balance.axes}), HERE, &counts, 1, NULL);
	EMIT(p, balance, &own, in[0], counts);
	for (int k = 0; k < 3; k++)
		out[k] = prog_out(p, k);
	differentiate(p, out[0], in[1]);
	out[3] = adjoint_of(p, in[0]);
	return 4;
}

/* kept, dropped <- index, probs: all rows of a micro-batch meet. */
static int compete(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                   int32_t *out)
{
	union op_arg own = *arg;
	(void)op, (void)n_in;
	placement_argument(p, OP_capacity, in, &own);
	own.capacity.context_ranks = p->axis_size[AXIS_cp];
	int32_t index = gather(p, arg->capacity.axes, in[0]), probs = gather(p, arg->capacity.axes, in[1]);
	out[0] = EMIT(p, capacity, &own, index, probs);
	out[1] = prog_out(p, 1);
	return 2;
}

/* Row by row, two experts that differ. */
static double two_experts(const struct trial *t, int k, int rank, int64_t i)
{
	uint64_t first = rng_bits(1, (uint64_t)i / K) % E, step = 1 + rng_bits(2, (uint64_t)i / K) % (E - 1);
	(void)t, (void)k, (void)rank;
	return (double)((first + (uint64_t)i % K * step) % E);
}

/* One half of the rows chooses among one half of the experts, so that ranks with a half each may deal with it
 * alone. */
static double half_of_experts(const struct trial *t, int k, int rank, int64_t i)
{
	const int32_t *dim = t->o->in[k].shape.dim;
	int64_t half = i * 2 / (dim[0] * dim[1]);
	uint64_t other = rng_bits(3, (uint64_t)i / K) % K;
	(void)rank;
	return (double)((uint64_t)half * (E / 2) + ((uint64_t)i + other) % K);
}

/* On the expert grid */

static double two(const struct trial *t, int k, int rank, int64_t i)
{
	(void)t, (void)k, (void)rank, (void)i;
	return 2;
}

/* Slots of a half of the tokens are a half of all, and so on, so that ranks can number their own: those whose
 * tokens are cut have all of theirs, those whose choices are cut have none but their own. */
static double slots(const struct trial *t, int k, int rank, int64_t i)
{
	static const int64_t within[] = {2, 0, 3, 1};
	int64_t slot = i / 4 * 4 + within[i % 4], rows = CHOICES;
	for (int a = 0; a < AXES; a++) {
		enum place at = (enum place)t->at[k][a];
		if (at != PLACE_SHARD0 && at != PLACE_SHARD1)
			continue;
		rows /= t->size[a];
		if (at == PLACE_SHARD1 && slot / rows != placement_coordinate(t, rank, a))
			return -1;
		slot %= rows;
	}
	return (double)slot;
}

static double one(const struct trial *t, int k, int rank, int64_t i)
{
	(void)t, (void)k, (void)rank, (void)i;
	return 1;
}

/* y <- x[R·E,C], sizes[R,E]: rows go to their experts (arg.comm.back: come home). */
static int travel(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                  int32_t *out)
{
	union op_arg own = *arg;
	own.comm.rows = p->value[in[0]].dim[0];
	out[0] = p->axis_size[AXIS_ep] > 1 ? prog_emit(p, op, &own, HERE, in, n_in, NULL) : in[0];
	return 1;
}

/* The block, as lib/model/experts.c builds it. */
struct dispatch {
	struct prog *p;
	union op_arg arg; /* of what works on counted rows */
	int32_t capacity;
	bool gathers; /* else all_to_all */
	uint32_t shared;
	int32_t slot, sizes, overflow;
	int32_t tokens, rows, choices;
};

static int32_t enter(struct dispatch *x, int32_t v)
{
	return gather(x->p, x->shared, EMIT(x->p, regrid, NO_ARG, v));
}

static int32_t leave(struct dispatch *x, int32_t v)
{
	uint32_t axes = sized(x->p, x->shared);
	if (axes)
		v = EMIT(x->p, reduce_scatter, ARG(.comm = {axes}), v);
	return EMIT(x->p, regrid, NO_ARG, v);
}

static void plan(struct dispatch *x, int32_t index)
{
	struct prog *p = x->p;
	int32_t ranks = x->gathers ? 1 : p->axis_size[AXIS_ep], ep = p->axis_rank[AXIS_ep];
	int32_t counts = EMIT(p, expert_counts, ARG(.balance = {.experts = E, .sequences = 1}), index);
	if (!x->gathers)
		counts = gather(p, AXIS_BIT(ep), counts);
	union op_arg arg = {.dispatch = {.experts = E,
	                                 .ranks = ranks,
	                                 .rank = x->gathers ? 0 : ep,
	                                 .capacity = x->capacity,
	                                 .first = x->gathers ? x->arg.expert.first : 0,
	                                 .count = x->gathers ? x->arg.expert.count : 0,
	                                 .counts = p->axis_rank[AXIS_etp] == 0,
	                                 .axes = AXIS_BIT(ep)}};
	x->slot = EMIT(p, dispatch_plan, &arg, index, counts);
	x->sizes = prog_out(p, 1);
	x->overflow = prog_out(p, 2);
	x->rows = x->tokens * ranks * K;
	x->choices = x->gathers ? x->rows : x->tokens * K;
}

static int32_t move(struct dispatch *x, int32_t v, bool back)
{
	union op_arg arg = {
	        .comm = {.axes = AXIS_BIT(ep), .back = back, .rows = back ? x->choices : x->rows}};
	bool alone = x->gathers || x->p->axis_size[AXIS_ep] == 1;
	return alone ? v : EMIT(x->p, all_to_all, &arg, v, x->sizes);
}

static int32_t order(struct dispatch *x, int32_t v, bool back)
{
	union op_arg arg = x->arg;
	arg.expert.back = back;
	arg.expert.rows = arg.expert.pad && !back ? arg.expert.pad * arg.expert.count : x->rows;
	bool ordered = x->gathers || x->p->axis_size[AXIS_ep] == 1;
	return ordered && !arg.expert.pad ? v : EMIT(x->p, regroup, &arg, v, x->sizes);
}

static int32_t compute(struct dispatch *x, int32_t rows, int32_t weights, int32_t w1, int32_t w2)
{
	struct prog *p = x->p;
	int32_t h = EMIT(p, grouped_linear, &x->arg, rows, w1, x->sizes);
	h = EMIT(p, expert_activation, &x->arg, h, weights, x->sizes);
	return EMIT(p, grouped_linear, &x->arg, h, w2, x->sizes);
}

static struct dispatch begin(struct prog *p, enum op op, const union op_arg *arg)
{
	struct dispatch x = {
	        .p = p, .arg = *arg, .gathers = op == OP_all_gather && p->axis_size[AXIS_ep] > 1};
	int32_t own = E / p->axis_size[AXIS_ep];
	x.shared = AXIS_BIT(etp) | (x.gathers ? AXIS_BIT(ep) : 0);
	x.arg.expert.count = own;
	x.arg.expert.first = own * p->axis_rank[AXIS_ep];
	/* Room that does not suffice: of expected rows, which say nothing of the result. */
	x.capacity = arg->expert.expected;
	return x;
}

/* y, dh, dlogits, dw1, dw2, overflow <- h, logits, w1, w2, dy */
static int experts(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                   int32_t *out)
{
	struct dispatch x = begin(p, op, arg);
	(void)n_in;
	p->value[in[0]].want_grad = p->value[in[1]].want_grad = 1;
	int32_t probs = EMIT(p, route, ARG(.route = {.topk = K}), in[1]), index = prog_out(p, 1);
	int32_t h = enter(&x, in[0]);
	index = enter(&x, index);
	probs = enter(&x, probs);
	x.tokens = p->value[index].dim[0];
	plan(&x, index);
	union op_arg choices = {.permute = {.rows = x.choices}};
	int32_t rows = order(&x, move(&x, EMIT(p, permute, &choices, h, x.slot), false), false);
	int32_t weights = order(&x, move(&x, EMIT(p, permute_probs, &choices, probs, x.slot), false), false);
	int32_t y = move(&x, order(&x, compute(&x, rows, weights, in[2], in[3]), true), true);
	out[0] = differentiate(p, leave(&x, EMIT(p, unpermute, NO_ARG, y, x.slot)), in[4]);
	for (int k = 0; k < 4; k++)
		out[1 + k] = k < 2 ? adjoint_of(p, in[k]) : gradient(p, in[k]);
	out[5] = x.overflow;
	return 6;
}

/* y, dx, dw <- x, w, dy: a product on the rows of the other grid. */
static int there_and_back(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                          int32_t *out)
{
	(void)op, (void)arg, (void)n_in;
	p->value[in[0]].want_grad = 1;
	int32_t h = EMIT(p, linear, NO_ARG, EMIT(p, regrid, NO_ARG, in[0]), in[1]);
	h = EMIT(p, activation, ARG(.activation = {ACT_silu}), h);
	out[0] = differentiate(p, EMIT(p, regrid, NO_ARG, h), in[2]);
	out[1] = adjoint_of(p, in[0]);
	out[2] = gradient(p, in[1]);
	return 3;
}

/* clang-format off */
#define BALANCE(s, rows, over) \
	{.balance = {.experts = E, .sequences = s, .sequence_rows = rows, .aux_coeff = 0.5f, .z_coeff = 0.25f, .axes = over}}
#define SEQUENCES(over) BALANCE(4, 2, over)
#define OF_SAMPLES BALANCE(2, 8, AXIS_BIT(cp))
#define CAPACITY {.capacity = {.experts = E, .limit = 2, .ranks = 1, .seq_length = 4, .axes = AXIS_BIT(tp)}}
#define ROUTE {.route = {.topk = K, .scaling_factor = 2}}
#define INTEGERS(r, n, c, ...) {.region = r, .dtype = DT_i32, .shape = {{n, c}, {.piece = {c}}}, __VA_ARGS__}
#define LOGITS(n) ROWS(n, E)
#define INDEX(n) CHOICE(n, two_experts, .blocks = 0)
#define COUNTS(s) INTEGERS(R_TEMP, s, E, .below = 7)
#define CHOICE(n, how, ...) {.region = R_TEMP, .dtype = DT_i32, .shape = {{n, K}, {.piece = {K}, __VA_ARGS__}}, .content = how}
#define HALVES(n) CHOICE(n, half_of_experts, .blocks = 0)
#define IN_SAMPLES .blocks = 2, .between = AXIS_BIT(dp)
#define SAMPLE_ROWS(c) {.region = R_TEMP, .dtype = DT_f32, .shape = {{16, c}, {.piece = {c}, IN_SAMPLES}}}

static const struct operation router[] = {
	{NODE(route), {2, 2}, ROUTE, {LOGITS(8)}, {COLUMNS(K), COLUMNS(K)}},
	{NODE(route), {2, 2}, ROUTE, {LOGITS(8), WEIGHT(E, 0)}, {COLUMNS(K), COLUMNS(K)}},
	{NODE(route_bwd), {2, 2}, ROUTE, {ROWS(8, K), LOGITS(8), INDEX(8)}, {COLUMNS(E)}},
	{NODE(expert_counts), {2, 2}, SEQUENCES(0), {INDEX(8)}, {COLUMNS(E)}},
	{NODE(expert_counts), {2, 1}, SEQUENCES(AXIS_BIT(tp)), {INDEX(8)}, {COLUMNS(E)}},
	{NODE(balance), {2, 1}, SEQUENCES(0), {LOGITS(8), COUNTS(4)}, {COLUMNS(0)}},
	{NODE(balance), {2, 2}, SEQUENCES(AXIS_BIT(tp)), {LOGITS(8), COUNTS(4)}, {COLUMNS(0)}},
	{NODE(balance_bwd), {2, 1}, SEQUENCES(0), {HOST(1), LOGITS(8), COUNTS(4)}, {COLUMNS(E)}},
	{NODE(balance_bwd), {2, 2}, SEQUENCES(AXIS_BIT(tp)), {HOST(1), LOGITS(8), COUNTS(4)}, {COLUMNS(E)}},
	{NODE(bias_update), {1, 1}, {.bias_update = {0.25f}}, {WEIGHT(E, 0), INTEGERS(R_STAT, 1, E, .below = 9)},
	 {COLUMNS(0)}},
	{BLOCK(balanced, all_reduce), {2, 1}, SEQUENCES(AXIS_BIT(tp)), {LOGITS(8), HOST(1)},
	 {COLUMNS(0), COLUMNS(0), COLUMNS(0), COLUMNS(E)}},
	{NODE(capacity), {2, 1}, CAPACITY, {HALVES(8), ROWS(8, K)}, {COLUMNS(K)}},
	{BLOCK(compete, all_gather), {2, 1}, CAPACITY, {HALVES(8), ROWS(8, K)}, {COLUMNS(K)}},
};

static const struct operation router_of_samples[] = {
	{NODE(expert_counts), {2, 1}, OF_SAMPLES, {CHOICE(16, two_experts, IN_SAMPLES)}, {COLUMNS(E)}},
	{NODE(balance), {2, 2}, OF_SAMPLES, {SAMPLE_ROWS(E), COUNTS(2)}, {COLUMNS(0)}},
	{BLOCK(balanced, all_reduce), {2, 1}, OF_SAMPLES, {SAMPLE_ROWS(E), HOST(1)},
	 {COLUMNS(0), COLUMNS(0), COLUMNS(0), {.piece = {E}, IN_SAMPLES}}},
	{BLOCK(compete, all_gather), {2, 1},
	 {.capacity = {.experts = E, .limit = 3, .by_position = 1, .ranks = 1, .seq_length = 8, .axes = AXIS_BIT(cp)}},
	 {CHOICE(16, half_of_experts, IN_SAMPLES), SAMPLE_ROWS(K)}, {{.piece = {K}, IN_SAMPLES}}},
};

/* Of two ranks of origin, each of which sends every expert two rows. In order of expert, then origin: ep cuts
 * between experts, others cut the rows of each. */
#define BY_EXPERT(...) {.piece = {__VA_ARGS__}, .blocks = E, .between = AXIS_BIT(ep)}
#define BY_ORIGIN(...) {.piece = {__VA_ARGS__}, .blocks = 2, .between = AXIS_BIT(edp) | AXIS_BIT(etp)}
#define SENT(...) {.piece = {__VA_ARGS__}, .blocks = 4, .between = AXIS_BIT(edp) | AXIS_BIT(ep)}
#define ARRIVED(...) {.piece = {__VA_ARGS__}, .blocks = 4, .between = AXIS_BIT(edp)}
#define LAID(how, c, ...) {.region = R_TEMP, .dtype = DT_f32, .shape = {{16, c}, how(__VA_ARGS__)}}
#define ROW_WEIGHTS {.region = R_TEMP, .dtype = DT_f32, .shape = {{16, 0}, BY_EXPERT(0)}}
#define EXPERT_WEIGHT {.region = R_PARAM, .dtype = DT_f32, .shape = {{E * F, C}, BY_EXPERT(C)}}
#define SIZES INTEGERS(R_TEMP, 2, E, .content = two)
#define SLOTS {.region = R_TEMP, .dtype = DT_i32, .shape = {{TOKENS, K}, {.choices = true}}, .content = slots}
#define EXPERT(...) {.expert = {.count = E, .kind = ACT_silu, .gated = 1, __VA_ARGS__}}
#define PERMUTE(...) {.permute = {.rows = CHOICES, __VA_ARGS__}}

/* ep is special to these rules, all other axes of the grid are alike. */
#define ON_CHOICES(a, b) \
	{NODE(grouped_linear), {a(4, 1), b(4, 1)}, EXPERT(), {LAID(BY_EXPERT, C, C), EXPERT_WEIGHT, SIZES}, {BY_EXPERT(F)}}, \
	{NODE(grouped_dx), {a(4, 1), b(4, 1)}, EXPERT(), {LAID(BY_EXPERT, F, F), EXPERT_WEIGHT, SIZES}, {BY_EXPERT(C)}}, \
	{NODE(grouped_dw), {a(4, 1), b(4, 1)}, EXPERT(), {LAID(BY_EXPERT, F, F), LAID(BY_EXPERT, C, C), SIZES}, {BY_EXPERT(C)}}, \
	{NODE(expert_activation), {3, 3}, EXPERT(), {LAID(BY_EXPERT, 2 * F, F, F), ROW_WEIGHTS, SIZES}, {BY_EXPERT(F)}}, \
	{NODE(expert_activation_bwd), {3, 3}, EXPERT(), \
	 {LAID(BY_EXPERT, F, F), LAID(BY_EXPERT, 2 * F, F, F), ROW_WEIGHTS, SIZES}, {BY_EXPERT(F, F), BY_EXPERT(0)}}, \
	{NODE(regroup), {4, 4}, EXPERT(), {LAID(BY_ORIGIN, C, C), SIZES}, {BY_EXPERT(C)}}, \
	{NODE(regroup), {4, 4}, EXPERT(.back = 1), {LAID(BY_EXPERT, C, C), SIZES}, {BY_ORIGIN(C)}}, \
	{NODE(permute), {4, 4}, PERMUTE(), {ROWS(TOKENS, C), SLOTS}, {COLUMNS(C)}}, \
	{NODE(unpermute), {4, 4}, PERMUTE(), {ROWS(CHOICES, C), SLOTS}, {COLUMNS(C)}}, \
	{NODE(permute_probs), {4, 4}, PERMUTE(), {ROWS(TOKENS, K), SLOTS}, {COLUMNS(0)}}, \
	{NODE(permute_probs), {4, 4}, PERMUTE(.back = 1), {PER_ROW(CHOICES), SLOTS}, {COLUMNS(K)}}
#define OTHER(other, ep) other
#define EP(other, ep) ep

#define SIZES_OF_FOUR INTEGERS(R_TEMP, 4, E, .content = one)

static const struct operation over_edp_ep[] = {
	ON_CHOICES(OTHER, EP),
	{BLOCK(travel, all_to_all), {TOGETHER, 1}, {.comm = {.axes = AXIS_BIT(ep)}},
	 {LAID(SENT, C, C), SIZES_OF_FOUR}, {ARRIVED(C)}},
	{BLOCK(travel, all_to_all), {TOGETHER, 1}, {.comm = {.axes = AXIS_BIT(ep), .back = 1}},
	 {LAID(ARRIVED, C, C), SIZES_OF_FOUR}, {SENT(C)}},
};
static const struct operation over_ep_etp[] = {ON_CHOICES(EP, OTHER)};

/* The gate and up rows of an expert are cut apart. */
#define GATE_UP {.piece = {C}, .blocks = 2 * E, .between = AXIS_BIT(ep)}
#define DOWN {.piece = {F}, .blocks = E, .between = AXIS_BIT(ep)}
#define OF_EXPERTS(m, k, how) {.region = R_PARAM, .dtype = DT_f32, .shape = {{m, k}, how}, .twin = true}
#define THE_BLOCK ROWS(TOKENS, C), LOGITS(TOKENS), OF_EXPERTS(E * 2 * F, C, GATE_UP), OF_EXPERTS(E * C, F, DOWN), ROWS(TOKENS, C)
#define ITS_RESULTS {COLUMNS(C), COLUMNS(C), COLUMNS(E), GATE_UP, DOWN, COLUMNS(0)}

static const struct operation blocks[] = {
	{BLOCK(there_and_back, regrid), {1, 1}, {{0}},
	 {ROWS(8, C), OF_EXPERTS(C, C, COLUMNS(C)), ROWS(8, C)},
	 {COLUMNS(C), COLUMNS(C), COLUMNS(C)}},
	{BLOCK(experts, all_to_all), {1, 1}, EXPERT(), {THE_BLOCK}, ITS_RESULTS},
	{BLOCK(experts, all_to_all), {1, 1}, EXPERT(.pad = 9), {THE_BLOCK}, ITS_RESULTS},
	{BLOCK(experts, all_gather), {1, 1}, EXPERT(), {THE_BLOCK}, ITS_RESULTS},
	{BLOCK(experts, all_gather), {1, 1}, EXPERT(.pad = 9), {THE_BLOCK}, ITS_RESULTS},
};

/* Ranks with experts of their own have limits of their own; those that share the columns of experts share the
 * limit too. */
static const struct operation limited[] = {
	{BLOCK(experts, all_to_all), {UNTRIED, 1}, EXPERT(.expected = 11), {THE_BLOCK}, ITS_RESULTS},
};
#define ON(a, b) {{AXIS_##a, AXIS_##b}, {AXIS_##a, AXIS_##b}}
#define FOLDED(a, b) {{AXIS_dp, AXIS_tp}, {AXIS_##a, AXIS_##b}}
/* clang-format on */

const struct list experts_lists[EXPERTS_LISTS] = {
        LIST(router, ON(dp, tp)),       LIST(router_of_samples, ON(dp, cp)), LIST(over_edp_ep, ON(edp, ep)),
        LIST(over_ep_etp, ON(ep, etp)), LIST(blocks, FOLDED(edp, ep)),       LIST(blocks, FOLDED(ep, etp)),
        LIST(blocks, FOLDED(edp, etp)), LIST(limited, FOLDED(edp, etp)),
};
