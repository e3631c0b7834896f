/* Placement rules by force where ranks share samples: attention over parts of them, and heads for rows. */
#include "test/placement.h"
#include "test/test.h"

static int32_t part(struct prog *p, union op_arg *arg, const int32_t *in, int32_t kv, struct context rows,
                    int32_t before)
{
	int32_t lse = before == NONE ? NONE : prog_out(p, 1);
	arg->attention.rows = rows;
	arg->attention.covered += rows.count;
	arg->attention.goes_on = arg->attention.covered < rows.ranks;
	return EMIT(p, attention_part, arg, in[0], kv, before, lse, in[3], in[4]);
}

/* Round by round, the keys of the rank before, of the one before that, … */
static int32_t attend_rounds(struct prog *p, union op_arg *arg, const int32_t *in)
{
	int32_t ranks = p->axis_size[AXIS_cp], rank = p->axis_rank[AXIS_cp], o = NONE;
	int32_t kv[RANKS] = {in[1]};
	for (int32_t s = 1; s < ranks; s++)
		kv[s] = EMIT(p, shift, ARG(.comm = {.axes = AXIS_BIT(cp), .step = s}), in[1]);
	for (int32_t s = 0; s < ranks; s++)
		o = part(p, arg, in, kv[s], (struct context){ranks, (rank - s + ranks) % ranks, 1}, o);
	return o;
}

static int32_t attend_gathered(struct prog *p, union op_arg *arg, const int32_t *in)
{
	int32_t ranks = p->axis_size[AXIS_cp];
	int32_t kv = EMIT(p, all_gather, ARG(.comm = {AXIS_BIT(cp)}), in[1]);
	return part(p, arg, in, kv, (struct context){ranks, 0, ranks}, NONE);
}

static struct context own_context(const struct prog *p)
{
	return (struct context){p->axis_size[AXIS_cp], p->axis_rank[AXIS_cp], 1};
}

/* o, dq, dkv <- q, kv, do, keys, begins: each rank's queries meet the keys of all. */
static int parts(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                 int32_t *out)
{
	union op_arg own = *arg;
	int32_t o;
	(void)n_in;
	p->value[in[0]].want_grad = p->value[in[1]].want_grad = 1;
	placement_argument(p, OP_attention, in, &own);
	own.attention.queries = own_context(p);
	if (p->axis_size[AXIS_cp] == 1)
		o = EMIT(p, attention, &own, EMIT(p, join_columns, NO_ARG, in[0], in[1]), in[3], in[4]);
	else
		o = op == OP_shift ? attend_rounds(p, &own, in) : attend_gathered(p, &own, in);
	out[0] = differentiate(p, o, in[2]);
	out[1] = adjoint_of(p, in[0]);
	out[2] = adjoint_of(p, in[1]);
	return 3;
}

/* o <- q, kv, keys, begins: what forward refuses, though backward would too. */
static int part_forward(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                        int32_t *out)
{
	const int32_t operands[] = {in[0], in[1], NONE, in[2], in[3]};
	union op_arg own = *arg;
	(void)op, (void)n_in;
	placement_argument(p, OP_attention, in, &own);
	own.attention.queries = own_context(p);
	out[0] = p->axis_size[AXIS_cp] > 1 ? attend_gathered(p, &own, operands)
	                                   : EMIT(p, attention, &own,
	                                          EMIT(p, join_columns, NO_ARG, in[0], in[1]), in[2], in[3]);
	return 1;
}

/* dq, dkv <- do, q, kv, o, lse, keys?, begins? */
static void attend_backward(struct prog *p, const union op_arg *arg, const int32_t *in, int32_t keys,
                            int32_t begins, int32_t *out)
{
	const union op_arg *over = ARG(.comm = {AXIS_BIT(cp)});
	union op_arg own = *arg;
	int32_t ranks = p->axis_size[AXIS_cp], width = arg->attention.heads * arg->attention.head_dim;
	placement_argument(p, OP_attention, in, &own);
	if (ranks > 1) {
		own.attention.queries = own_context(p);
		own.attention.rows = (struct context){ranks, 0, ranks};
		own.attention.covered = ranks;
		out[0] = EMIT(p, attention_part_bwd, &own, in[0], in[1], EMIT(p, all_gather, over, in[2]),
		              in[3], in[4], keys, begins);
		out[1] = EMIT(p, reduce_scatter, over, prog_out(p, 1));
		return;
	}
	int32_t qkv = EMIT(p, join_columns, NO_ARG, in[1], in[2]);
	union op_arg columns = {.columns = {width}};
	int32_t dqkv = EMIT(p, attention_bwd, &own, in[0], qkv, in[3], in[4], keys, begins);
	placement_argument(p, OP_split_columns, &dqkv, &columns);
	out[0] = EMIT(p, split_columns, &columns, dqkv);
	out[1] = prog_out(p, 1);
}

static int part_backward(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                         int32_t *out)
{
	(void)op, (void)n_in;
	attend_backward(p, arg, in, NONE, NONE, out);
	return 2;
}

/* x for do, q and o, which are of one shape. */
static int part_backward_of_samples(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in,
                                    size_t n_in, int32_t *out)
{
	const int32_t operands[] = {in[0], in[0], in[1], in[0], in[2]};
	(void)op, (void)n_in;
	attend_backward(p, arg, operands, in[3], in[4], out);
	return 2;
}

/* Every rank has all rows of some heads: one more cut of the heads. */
static int32_t attend_heads(struct prog *p, union op_arg *arg, const int32_t *in)
{
	int32_t ranks = p->axis_size[AXIS_cp], heads = arg->attention.heads * arg->attention.head_dim;
	const union op_arg *over = ARG(.comm = {AXIS_BIT(cp)});
	int32_t qkv = EMIT(p, split_heads, ARG(.heads = {ranks, {heads, heads, heads}}), in[0]);
	arg->attention.heads /= ranks;
	arg->attention.groups /= ranks;
	arg->attention.first_head += p->axis_rank[AXIS_cp] * arg->attention.heads;
	arg->attention.queries = (struct context){ranks, 0, ranks};
	int32_t o = EMIT(p, attention, arg, EMIT(p, all_to_all, over, qkv), in[2],
	                 EMIT(p, all_gather, over, in[3]));
	return EMIT(p, join_heads, ARG(.heads = {ranks, {heads}}), EMIT(p, all_to_all, over, o));
}

/* o, dqkv <- qkv, do, keys, begins */
static int heads_for_rows(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                          int32_t *out)
{
	union op_arg own = *arg;
	int32_t o;
	(void)op, (void)n_in;
	p->value[in[0]].want_grad = 1;
	placement_argument(p, OP_attention, in, &own);
	o = p->axis_size[AXIS_cp] == 1 ? EMIT(p, attention, &own, in[0], in[2], in[3])
	                               : attend_heads(p, &own, in);
	out[0] = differentiate(p, o, in[1]);
	out[1] = adjoint_of(p, in[0]);
	return 2;
}

/* x <- x: to columns and home, without ranks that exchange them. */
static int split_and_join(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                          int32_t *out)
{
	union op_arg own = {.heads = {2, {p->value[in[0]].dim[1]}}};
	(void)op, (void)arg, (void)n_in;
	out[0] = EMIT(p, join_heads, &own, EMIT(p, split_heads, &own, in[0]));
	return 1;
}

/* x <- x: one rank on, and the rest of the way around. */
static int around(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                  int32_t *out)
{
	int32_t rest = p->axis_size[AXIS_cp] - 1;
	(void)op, (void)n_in, (void)arg;
	int32_t y = EMIT(p, shift, ARG(.comm = {.axes = AXIS_BIT(cp), .step = 1}), in[0]);
	out[0] = EMIT(p, shift, ARG(.comm = {.axes = AXIS_BIT(cp), .step = rest}), y);
	return 1;
}

/* clang-format off */
/* Two samples of eight rows: cp cuts each, other axes cut between them. */
#define SAMPLES .blocks = 2, .between = AXIS_BIT(dp) | AXIS_BIT(tp)
#define SAMPLE_ROWS(c, ...) {.region = R_TEMP, .dtype = DT_f32, .shape = {{16, c}, {.piece = {__VA_ARGS__}, SAMPLES}}}
#define IN_SAMPLES(...) {.piece = {__VA_ARGS__}, SAMPLES}
#define BEGINS {.region = R_INPUT, .dtype = DT_i32, .shape = {{16, 0}, {SAMPLES}}, .content = placement_begins}
#define ATTENTION(h, g, d) {.attention = {.seq_length = 8, .heads = h, .groups = g, .head_dim = d, .scale = 0.5f, .dropout = 0.3f, \
	.salt = 5, .axes = AXIS_BIT(cp)}}
#define Q SAMPLE_ROWS(16, 16)
#define KV SAMPLE_ROWS(16, 8, 8)
#define Q_KV Q, KV, Q, KEYS(2), BEGINS
#define LSE SAMPLE_ROWS(4, 4)
#define WITHOUT_MASK {.attention = {.seq_length = 8, .heads = 4, .groups = 2, .head_dim = 4, .scale = 0.5f, .axes = AXIS_BIT(cp)}}
#define D_Q_KV {IN_SAMPLES(16), IN_SAMPLES(8, 8)}
#define QKV SAMPLE_ROWS(24, 8, 8, 8), SAMPLE_ROWS(8, 8), KEYS(2), BEGINS

static const struct operation samples[] = {
	{NODE(attention), {3, 2},
	 {.attention = {.seq_length = 8, .heads = 4, .groups = 4, .head_dim = 2, .scale = 0.5f}},
	 {SAMPLE_ROWS(24, 8, 8, 8)}, {IN_SAMPLES(8), IN_SAMPLES(4)}},
	{NODE(dropout), {2, 1}, {.dropout = {.p = 0.5f, .salt = 3, .seq_length = 8, .axes = AXIS_BIT(cp)}},
	 {SAMPLE_ROWS(4, 4), KEYS(2)}, {IN_SAMPLES(4)}},
	{BLOCK(around, shift), {4, 1}, {{0}}, {SAMPLE_ROWS(4, 4)}, {IN_SAMPLES(4)}},
	{BLOCK(split_and_join, split_heads), {4, 4}, {{0}}, {SAMPLE_ROWS(4, 4)}, {IN_SAMPLES(4)}},
	{BLOCK(parts, shift), {3, 1}, ATTENTION(4, 2, 4), {Q_KV}, {IN_SAMPLES(16), IN_SAMPLES(16), IN_SAMPLES(8, 8)}},
	{BLOCK(parts, all_gather), {3, 1}, ATTENTION(4, 2, 4), {Q_KV},
	 {IN_SAMPLES(16), IN_SAMPLES(16), IN_SAMPLES(8, 8)}},
	{BLOCK(part_forward, all_gather), {3, 1}, ATTENTION(4, 2, 4), {Q, KV, KEYS(2), BEGINS}, {IN_SAMPLES(16)}},
	{BLOCK(part_backward, all_gather), {3, 1}, WITHOUT_MASK, {Q, Q, KV, Q, LSE}, D_Q_KV},
	{BLOCK(part_backward_of_samples, all_gather), {3, 1}, ATTENTION(4, 2, 4), {Q, KV, LSE, KEYS(2), BEGINS},
	 D_Q_KV},
	{BLOCK(heads_for_rows, all_to_all), {3, 1}, ATTENTION(4, 4, 2), {QKV}, {IN_SAMPLES(8), IN_SAMPLES(8, 8, 8)}},
};

static const struct operation heads[] = {
	{BLOCK(parts, shift), {1, 2}, ATTENTION(4, 2, 4), {Q_KV}, {IN_SAMPLES(16), IN_SAMPLES(16), IN_SAMPLES(8, 8)}},
	{BLOCK(parts, all_gather), {1, 2}, ATTENTION(4, 2, 4), {Q_KV},
	 {IN_SAMPLES(16), IN_SAMPLES(16), IN_SAMPLES(8, 8)}},
	{BLOCK(part_forward, all_gather), {1, 2}, ATTENTION(4, 2, 4), {Q, KV, KEYS(2), BEGINS}, {IN_SAMPLES(16)}},
	{BLOCK(part_backward, all_gather), {1, 2}, WITHOUT_MASK, {Q, Q, KV, Q, LSE}, D_Q_KV},
	{BLOCK(part_backward_of_samples, all_gather), {1, 2}, ATTENTION(4, 2, 4), {Q, KV, LSE, KEYS(2), BEGINS},
	 D_Q_KV},
	{BLOCK(heads_for_rows, all_to_all), {1, 2}, ATTENTION(4, 4, 2), {QKV}, {IN_SAMPLES(8), IN_SAMPLES(8, 8, 8)}},
};
/* clang-format on */

const struct list context_lists[CONTEXT_LISTS] = {
        LIST(samples, {{AXIS_dp, AXIS_cp}, {AXIS_dp, AXIS_cp}}),
        LIST(heads, {{AXIS_cp, AXIS_tp}, {AXIS_cp, AXIS_tp}}),
};
