/* Placement rules by force: what they accept is right on two ranks and on four. What works on parts of
 * samples and on experts stands in files of its own. */
#include "test/placement.h"
#include "test/test.h"

/* Blocks */

/* A collective and the wait for it. */
static int await(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                 int32_t *out)
{
	int32_t y = prog_emit(p, op, arg, HERE, in, n_in, NULL);
	out[0] = EMIT(p, wait, NO_ARG, y, in[0]);
	return 1;
}

/* y, dtable <- table, ids, dy: a vocabulary cut over tp, and the sum of what each rank found. */
static int look_up(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                   int32_t *out)
{
	union op_arg own = *arg;
	(void)n_in;
	placement_argument(p, OP_embedding, in, &own);
	int32_t y = EMIT(p, embedding, &own, in[0], in[1]);
	y = prog_emit(p, op, ARG(.comm = {AXIS_BIT(tp)}), HERE, &y, 1, NULL);
	out[0] = differentiate(p, y, in[2]);
	out[1] = gradient(p, in[0]);
	return 2;
}

/* loss, lse, row_loss, dlogits <- logits, targets, scale: columns cut over tp, whose statistics meet. */
static int lose(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                int32_t *out)
{
	int32_t stats = NONE;
	union op_arg own = *arg;
	(void)op, (void)n_in;
	placement_argument(p, OP_cross_entropy, in, &own);
	p->value[in[0]].want_grad = 1;
	if (p->axis_size[AXIS_tp] > 1)
		stats = EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(tp)}),
		             EMIT(p, logit_stats, &own, in[0], in[1]));
	EMIT(p, cross_entropy, &own, in[0], in[1], stats);
	for (int k = 0; k < 3; k++)
		out[k] = prog_out(p, k);
	differentiate(p, out[0], in[2]);
	out[3] = adjoint_of(p, in[0]);
	return 4;
}

/* y, dx, dw1, db1, dw2, db2 <- x, w1, b1, w2, b2, dy: the block between a collective and its conjugate. */
static int feed_forward(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                        int32_t *out)
{
	enum op back = op == OP_fan_out ? OP_all_reduce : OP_reduce_scatter;
	int32_t x = in[0];
	(void)n_in;
	p->value[x].want_grad = 1;
	int32_t h = prog_emit(p, op, arg, HERE, &x, 1, NULL);
	h = EMIT(p, activation, ARG(.activation = {ACT_silu}), EMIT(p, linear, NO_ARG, h, in[1], in[2]));
	h = EMIT(p, linear, NO_ARG, h, in[3]);
	out[0] = differentiate(
	        p, EMIT(p, bias_add, NO_ARG, prog_emit(p, back, arg, HERE, &h, 1, NULL), in[4]), in[5]);
	out[1] = adjoint_of(p, x);
	for (int k = 1; k < 5; k++)
		out[1 + k] = gradient(p, in[k]);
	return 6;
}

/* y, dx <- x[N,A+B], dy[N,A]: the other columns are nobody's, so their gradient is zero. */
static int first_columns(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                         int32_t *out)
{
	union op_arg own = *arg;
	(void)n_in;
	p->value[in[0]].want_grad = 1;
	placement_argument(p, op, in, &own);
	int32_t a = EMIT(p, split_columns, &own, in[0]);
	out[0] = differentiate(p, EMIT(p, activation, ARG(.activation = {ACT_silu}), a), in[1]);
	out[1] = adjoint_of(p, in[0]);
	return 2;
}

/* clang-format off */
#define EPS {.norm = {.eps = 1e-5f}}
#define SILU {.activation = {ACT_silu}}
#define ATTENTION(p) \
	{.attention = {.seq_length = 4, .heads = 4, .groups = 2, .head_dim = 4, .scale = 0.5f, .dropout = p}}
#define QKV PACKED(8, 32, 16, 8, 8)
#define POSITIVE(r, t, n, c) {.region = r, .dtype = t, .shape = OF(n, c, c), .below = -1}
#define STATE(n, c) {.region = R_STATE, .dtype = DT_f32, .shape = OF(n, c, c)}
#define ROUNDED(n, c) {.region = R_TEMP, .dtype = DT_bf16, .shape = OF(n, c, c)}
#define BEGINS(n) {.region = R_INPUT, .dtype = DT_i32, .shape = OF(n, 0, 0), .content = placement_begins}
#define LATENT {.mla = {.heads = 4, .head_dim = 4, .value_dim = 2}}
#define OVER_TP {.comm = {AXIS_BIT(tp)}}
#define DROPOUT(length, ...) {.dropout = {.p = 0.5f, .salt = 3, .seq_length = length, __VA_ARGS__}}
#define VOCABULARY {.embedding = {0, AXIS_BIT(tp)}}
#define ITS_RESULTS {COLUMNS(4), COLUMNS(4), COLUMNS(4), COLUMNS(0), COLUMNS(10), COLUMNS(0)}
#define FEED_FORWARD ROWS(8, 4), WEIGHT(10, 4), WEIGHT(10, 0), WEIGHT(4, 10), WEIGHT(4, 0), ROWS(8, 4)

static const struct operation operations[] = {
	{NODE(linear), {4, 4}, {{0}}, {ROWS(6, 4), WEIGHT(10, 4)}, {COLUMNS(10)}},
	{NODE(linear), {3, 3}, {{0}}, {ROWS(6, 4), WEIGHT(10, 4), WEIGHT(10, 0)}, {COLUMNS(10)}},
	{NODE(linear_act), {3, 3}, {.linear = {0, ACT_silu}}, {ROWS(6, 4), WEIGHT(10, 4)}, {COLUMNS(10), COLUMNS(10)}},
	{NODE(linear_act), {3, 3}, {.linear = {0, ACT_silu}}, {ROWS(6, 4), WEIGHT(10, 4), WEIGHT(10, 0)},
	 {COLUMNS(10), COLUMNS(10)}},
	{NODE(linear_dx_act), {3, 3}, {.linear = {0, ACT_silu}}, {ROWS(6, 10), WEIGHT(10, 4), ROWS(6, 4)}, {COLUMNS(4)}},
	{NODE(linear_dx), {4, 4}, {{0}}, {ROWS(6, 10), WEIGHT(10, 4)}, {COLUMNS(4)}},
	{NODE(linear_dw), {4, 4}, {{0}}, {ROWS(6, 10), ROWS(6, 4)}, {COLUMNS(4)}},
	{NODE(linear_dw_bias), {4, 4}, {{0}}, {ROWS(6, 10), ROWS(6, 4)}, {COLUMNS(4), COLUMNS(0)}},
	{NODE(bias_grad), {3, 3}, {{0}}, {ROWS(6, 10)}, {COLUMNS(0)}},
	{NODE(bias_add), {3, 3}, {{0}}, {ROWS(6, 4), WEIGHT(4, 0)}, {COLUMNS(4)}},
	{NODE(embedding), {2, 2}, {{0}}, {WEIGHT(8, 4), IDS(6, 8)}, {COLUMNS(4)}},
	{NODE(embedding), {2, 1}, VOCABULARY, {WEIGHT(8, 4), IDS(6, 8)}, {COLUMNS(4)}},
	{NODE(embedding_bwd), {2, 2}, {{0}}, {ROWS(6, 4), IDS(6, 8)}, {COLUMNS(4)}},
	{NODE(embedding_bwd), {2, 1}, VOCABULARY, {ROWS(6, 4), IDS(6, 8)}, {COLUMNS(4)}},
	{NODE(add), {4, 4}, {{0}}, {ROWS(6, 4), ROWS(6, 4)}, {COLUMNS(4)}},
	{NODE(layernorm), {2, 2}, EPS, {ROWS(6, 4), WEIGHT(4, 0), WEIGHT(4, 0)}, {COLUMNS(4)}},
	{NODE(layernorm_bwd), {2, 2}, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), PER_ROW(6)},
	 {COLUMNS(4)}},
	{NODE(layernorm_bwd), {2, 2}, EPS,
	 {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), PER_ROW(6), ROWS(6, 4)}, {COLUMNS(4)}},
	{NODE(rmsnorm), {2, 2}, EPS, {ROWS(6, 4), WEIGHT(4, 0)}, {COLUMNS(4)}},
	{NODE(rmsnorm_bwd), {2, 2}, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6)}, {COLUMNS(4)}},
	{NODE(rmsnorm_bwd), {2, 2}, EPS, {ROWS(6, 4), ROWS(6, 4), WEIGHT(4, 0), PER_ROW(6), ROWS(6, 4)},
	 {COLUMNS(4)}},
	{NODE(activation), {3, 3}, SILU, {ROWS(6, 4)}, {COLUMNS(4)}},
	{NODE(activation_bwd), {3, 3}, SILU, {ROWS(6, 4), ROWS(6, 4)}, {COLUMNS(4)}},
	{NODE(glu), {3, 3}, SILU, {PACKED(6, 8, 4, 4)}, {COLUMNS(4)}},
	{NODE(glu_bwd), {3, 3}, SILU, {ROWS(6, 4), PACKED(6, 8, 4, 4)}, {COLUMNS(4, 4)}},
	{NODE(dropout), {2, 2}, DROPOUT(2, .axes = 0), {ROWS(8, 4), KEYS(4)}, {COLUMNS(4)}},
	{NODE(dropout), {2, 1}, DROPOUT(4, .axes = AXIS_BIT(tp)), {ROWS(8, 4), KEYS(2)}, {COLUMNS(4)}},
	{NODE(dropout), {1, 1}, DROPOUT(8, .axes = AXIS_BIT(tp)), {ROWS(8, 4), KEYS(1)}, {COLUMNS(4)}},
	{NODE(rope), {3, 3}, {.rope = {4, 2, 4, 0}}, {QKV, TABLE(10, 4), IDS(8, 10)}, {COLUMNS(16, 8, 8)}},
	{NODE(qk_norm), {3, 3}, {.norm = {1e-5f, 4, 2, 4}}, {QKV, WEIGHT(4, 0), WEIGHT(4, 0)},
	 {COLUMNS(16, 8, 8), COLUMNS(4, 2)}},
	{NODE(qk_norm_bwd), {3, 3}, {.norm = {1e-5f, 4, 2, 4}},
	 {QKV, QKV, WEIGHT(4, 0), WEIGHT(4, 0), PACKED(8, 6, 4, 2)}, {COLUMNS(16, 8, 8)}},
	{NODE(attention), {3, 2}, ATTENTION(0), {QKV}, {COLUMNS(16), COLUMNS(4)}},
	{NODE(attention), {3, 2}, ATTENTION(0.3f), {QKV, KEYS(2)}, {COLUMNS(16), COLUMNS(4)}},
	{NODE(attention_bwd), {3, 2}, ATTENTION(0), {ROWS(8, 16), QKV, ROWS(8, 16), ROWS(8, 4)}, {COLUMNS(16, 8, 8)}},
	{NODE(attention_bwd), {3, 2}, ATTENTION(0.3f),
	 {ROWS(8, 16), QKV, ROWS(8, 16), ROWS(8, 4), KEYS(2)}, {COLUMNS(16, 8, 8)}},
	{NODE(attention), {3, 2}, ATTENTION(0.3f), {QKV, KEYS(2), BEGINS(8)}, {COLUMNS(16), COLUMNS(4)}},
	{NODE(attention_bwd), {3, 2}, ATTENTION(0.3f),
	 {ROWS(8, 16), QKV, ROWS(8, 16), ROWS(8, 4), KEYS(2), BEGINS(8)}, {COLUMNS(16, 8, 8)}},
	{NODE(mla_pack), {3, 3}, LATENT, {ROWS(8, 16), ROWS(8, 16), ROWS(8, 2), TABLE(10, 2), IDS(8, 10)},
	 {COLUMNS(16, 16, 8)}},
	{NODE(mla_unpack), {3, 3}, LATENT, {PACKED(8, 40, 16, 16, 8), TABLE(10, 2), IDS(8, 10)},
	 {COLUMNS(16), COLUMNS(16), COLUMNS(2)}},
	{NODE(split_columns), {4, 4}, {.columns = {4}}, {PACKED(6, 10, 4, 6)}, {COLUMNS(4), COLUMNS(6)}},
	{NODE(join_columns), {4, 4}, {{0}}, {ROWS(6, 4), ROWS(6, 6)}, {COLUMNS(4, 6)}},
	{NODE(row_gate), {2, 2}, {{0}}, {ROWS(6, 4), ROWS(6, 1)}, {COLUMNS(4)}},
	{NODE(row_gate_bwd), {2, 2}, {{0}}, {ROWS(6, 4), ROWS(6, 4), ROWS(6, 1)}, {COLUMNS(4)}},
	{NODE(logit_stats), {2, 2}, {.cross_entropy = {9, 0, 0}}, {ROWS(6, 10), IDS(6, 9)}, {COLUMNS(2)}},
	{NODE(cross_entropy), {2, 2}, {.cross_entropy = {9, 0, 0}}, {ROWS(6, 10), IDS(6, 9)}, {COLUMNS(0)}},
	{NODE(cross_entropy), {2, 2}, {.cross_entropy = {9, 0, 0}}, {ROWS(6, 10), IDS(6, 9), ROWS(6, 2)},
	 {COLUMNS(0)}},
	{NODE(cross_entropy_bwd), {2, 2}, {.cross_entropy = {9, 0, 0}},
	 {ROWS(6, 10), IDS(6, 9), PER_ROW(6), HOST(1)}, {COLUMNS(10)}},
	{NODE(cross_entropy_bwd), {2, 1}, {.cross_entropy = {9, 0, AXIS_BIT(tp)}},
	 {ROWS(6, 10), IDS(6, 9), PER_ROW(6), HOST(1)}, {COLUMNS(10)}},
	{NODE(cast), {4, 4}, {.cast = {DT_bf16}}, {ROWS(6, 4)}, {COLUMNS(4)}},
	{NODE(cast), {4, 4}, {.cast = {DT_f32}}, {ROUNDED(6, 4)}, {COLUMNS(4)}},
	{NODE(accumulate), {4, 4}, {{0}}, {ROWS(6, 4)}, {COLUMNS(4)}},
	{NODE(square_sum), {3, 3}, {{0}}, {ROWS(6, 4)}, {COLUMNS(0)}},
	{NODE(fan_out), {4, 1}, OVER_TP, {ROWS(8, 4)}, {COLUMNS(4)}},
	{NODE(all_reduce), {4, 1}, OVER_TP, {ROWS(8, 4)}, {COLUMNS(4)}},
	{NODE(all_gather), {4, 1}, OVER_TP, {ROWS(8, 4)}, {COLUMNS(4)}},
	{NODE(reduce_scatter), {4, 1}, OVER_TP, {ROWS(8, 4)}, {COLUMNS(4)}},
	{NODE(share), {4, 1}, OVER_TP, {ROWS(8, 4)}, {COLUMNS(4)}},
	{NODE(adamw), {3, 3}, {.adamw = {1}},
	 {WEIGHT(6, 4), ROWS(6, 4), TABLE(6, 4), TABLE(6, 4), POSITIVE(R_OPT, DT_f32, 6, 4),
	  POSITIVE(R_INPUT, DT_f32, 9, 0), POSITIVE(R_STAT, DT_f64, 1, 0)},
	 {COLUMNS(4), COLUMNS(4), COLUMNS(4), COLUMNS(4), COLUMNS(4)}},
	{NODE(attention_cache), {2, 2}, ATTENTION(0),
	 {PACKED(4, 32, 16, 8, 8), STATE(8, 8), STATE(8, 8), IDS(4, 8)},
	 {COLUMNS(16), COLUMNS(16, 8, 8), COLUMNS(8), COLUMNS(8)}},
	{BLOCK(await, all_reduce), {4, 1}, OVER_TP, {ROWS(8, 4)}, {COLUMNS(4)}},
	{BLOCK(first_columns, split_columns), {3, 3}, {.columns = {4}}, {PACKED(6, 10, 4, 6), ROWS(6, 4)},
	 {COLUMNS(4), COLUMNS(4, 6)}},
	{BLOCK(look_up, all_reduce), {2, 1}, VOCABULARY, {WEIGHT(8, 4), IDS(8, 8), ROWS(8, 4)},
	 {COLUMNS(4), COLUMNS(4)}},
	{BLOCK(look_up, reduce_scatter), {2, 1}, VOCABULARY, {WEIGHT(8, 4), IDS(8, 8), ROWS(8, 4)},
	 {COLUMNS(4), COLUMNS(4)}},
	{BLOCK(lose, all_gather), {2, 1}, {.cross_entropy = {9, 0, AXIS_BIT(tp)}},
	 {ROWS(6, 10), IDS(6, 9), HOST(1)}, {COLUMNS(0), COLUMNS(0), COLUMNS(0), COLUMNS(10)}},
	{BLOCK(feed_forward, fan_out), {2, 1}, OVER_TP, {FEED_FORWARD}, ITS_RESULTS},
	{BLOCK(feed_forward, all_gather), {2, 1}, OVER_TP, {FEED_FORWARD}, ITS_RESULTS},
};
/* clang-format on */

static const struct list dense = LIST(operations, {{AXIS_dp, AXIS_tp}, {AXIS_dp, AXIS_tp}});

/* Operations that mean nothing by themselves, and the blocks that would be wrong if their rules were. */
static const struct {
	enum op op;
	const char *block;
} counterparts[] = {
        {OP_wait, "await by all_reduce"},
        {OP_zero, "first_columns by split_columns"},
        {OP_shift, "around by shift"},
        {OP_attention_part, "parts by shift"},
        {OP_attention_part_bwd, "parts by shift"},
        {OP_split_heads, "heads_for_rows by all_to_all"},
        {OP_join_heads, "heads_for_rows by all_to_all"},
        {OP_all_to_all, "travel by all_to_all"},
        {OP_regrid, "there_and_back by regrid"},
        {OP_dispatch_plan, "experts by all_gather"},
};

static const struct list *list_at(int i)
{
	return i == 0               ? &dense
	       : i <= CONTEXT_LISTS ? &context_lists[i - 1]
	                            : &experts_lists[i - 1 - CONTEXT_LISTS];
}
enum { LISTS = 1 + CONTEXT_LISTS + EXPERTS_LISTS };

static const char *counterpart(enum op op)
{
	for (size_t i = 0; i < sizeof counterparts / sizeof *counterparts; i++)
		if (counterparts[i].op == op)
			return counterparts[i].block;
	return "";
}

static bool is_tried(enum op op)
{
	bool tried = false;
	for (int l = 0; l < LISTS; l++)
		for (size_t i = 0; i < list_at(l)->n; i++) {
			const struct operation *o = &list_at(l)->operation[i];
			tried |= o->build == one_node ? o->op == op : !strcmp(o->name, counterpart(op));
		}
	return tried;
}

TEST(every_operation_is_tried)
{
	for (enum op op = 0; op < OP_COUNT; op++)
		if (!is_tried(op))
			test_failed(__FILE__, __LINE__, "%s", op_rows[op].name);
}

/* A block stands for the operations that it was on ranks with. */
static void check_block(const struct operation *o, const bool *met)
{
	for (size_t i = 0; i < sizeof counterparts / sizeof *counterparts; i++)
		if (!strcmp(counterparts[i].block, o->name) && !met[counterparts[i].op])
			test_failed(__FILE__, __LINE__, "%s has no %s", o->name,
			            op_rows[counterparts[i].op].name);
}

TEST(what_the_rules_accept_is_right_on_two_ranks_and_on_four)
{
	for (int l = 0; l < LISTS; l++)
		for (size_t i = 0; i < list_at(l)->n; i++) {
			bool met[OP_COUNT] = {false};
			placement_try(&list_at(l)->operation[i], &list_at(l)->along, met);
			check_block(&list_at(l)->operation[i], met);
		}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
