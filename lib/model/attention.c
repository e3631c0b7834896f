/* The attention block: projections, positions, attention itself, over ranks that share heads and sequences.
 */
#include "model/builder.h"

#include <math.h>

/* Widths of this rank's heads. */
struct heads {
	int32_t heads, groups, head_dim, value_dim;
};

static struct heads heads_of(const struct builder *b)
{
	const struct model_config *c = b->c;
	int32_t size = (int32_t)c->kv_channels;
	if (c->multi_latent_attention)
		return (struct heads){(int32_t)c->num_attention_heads / b->ranks,
		                      (int32_t)c->num_attention_heads / b->ranks,
		                      (int32_t)(c->qk_head_dim + c->qk_pos_emb_head_dim),
		                      (int32_t)c->v_head_dim};
	return (struct heads){(int32_t)c->num_attention_heads / b->ranks,
	                      (int32_t)c->num_query_groups / b->ranks, size, size};
}

/* Attention over the rows of all context-parallel ranks. */

struct exchange {
	union op_arg arg;
	struct heads h;
	int32_t keys;
};

static int32_t attend_part(struct builder *b, struct exchange *x, int32_t q, int32_t kv, int32_t first,
                           int32_t count, int32_t before, int32_t lse)
{
	struct context *rows = &x->arg.attention.rows;
	*rows = (struct context){b->context.ranks, first, count};
	x->arg.attention.covered += count;
	x->arg.attention.goes_on = x->arg.attention.covered < b->context.ranks;
	return EMIT(b->p, attention_part, &x->arg, q, kv, before, lse, x->keys, b->m->begins);
}

/* Round s: the keys of the rank s places before, which come straight from it while those of the round before
 * are at work. Liu et al. 2023 pass them on around a ring; here every rank sends its own, so that backward
 * need not keep what passed. */
static int32_t attend_p2p(struct builder *b, struct exchange *x, int32_t qkv)
{
	int32_t ranks = b->context.ranks, rank = b->context.first, o = NONE, lse = NONE;
	int32_t q = EMIT(b->p, split_columns, ARG(.columns = {x->h.heads * x->h.head_dim}), qkv);
	int32_t own = prog_out(b->p, 1), kv = own;
	for (int32_t s = 0; s < ranks; s++) {
		union op_arg next = {.comm = {.axes = AXIS_BIT(cp), .begins = 1, .step = s + 1}};
		int32_t coming = s + 1 < ranks ? EMIT(b->p, shift, &next, own) : NONE;
		o = attend_part(b, x, q, kv, (rank - s + ranks) % ranks, 1, o, lse);
		lse = prog_out(b->p, 1);
		kv = coming;
	}
	return o;
}

static int32_t attend_all_gather(struct builder *b, struct exchange *x, int32_t qkv)
{
	int32_t q = EMIT(b->p, split_columns, ARG(.columns = {x->h.heads * x->h.head_dim}), qkv);
	int32_t kv = EMIT(b->p, all_gather, ARG(.comm = {AXIS_BIT(cp)}), prog_out(b->p, 1));
	return attend_part(b, x, q, kv, 0, b->context.ranks, NONE, NONE);
}

/* Heads for rows and back: Jacobs et al. 2023. */
static int32_t attend_a2a(struct builder *b, struct exchange *x, int32_t qkv)
{
	int32_t ranks = b->context.ranks, D = x->h.head_dim, V = x->h.value_dim, G = x->h.groups,
	        H = x->h.heads;
	const union op_arg *over = ARG(.comm = {AXIS_BIT(cp)});
	qkv = EMIT(b->p, split_heads, ARG(.heads = {ranks, {H * D, G * D, G * V}}), qkv);
	qkv = EMIT(b->p, all_to_all, over, qkv);
	x->arg.attention.heads /= ranks;
	x->arg.attention.groups /= ranks;
	x->arg.attention.first_head += b->context.first * x->arg.attention.heads;
	x->arg.attention.queries = (struct context){ranks, 0, ranks};
	int32_t o = EMIT(b->p, attention, &x->arg, qkv, x->keys, b->m->begins_of_all);
	o = EMIT(b->p, all_to_all, over, o);
	return EMIT(b->p, join_heads, ARG(.heads = {ranks, {H * V}}), o);
}

static int32_t attend_cached(struct builder *b, struct exchange *x, int32_t qkv)
{
	int32_t rows = (int32_t)b->c->max_position_embeddings;
	int32_t k = prog_value(b->p, "key cache", R_STATE, b->m->spec.dtype, 2,
	                       (int32_t[]){rows, x->h.groups * x->h.head_dim});
	int32_t v = prog_value(b->p, "value cache", R_STATE, b->m->spec.dtype, 2,
	                       (int32_t[]){rows, x->h.groups * x->h.value_dim});
	return EMIT(b->p, attention_cache, &x->arg, qkv, k, v, b->m->positions);
}

/* Packed rows [H·D | G·D | G·V] -> [N,H·V] */
static int32_t attend(struct builder *b, int32_t qkv)
{
	static int32_t (*const exchanges[])(struct builder *, struct exchange *,
	                                    int32_t) = {[EXCHANGE_P2P] = attend_p2p,
	                                                [EXCHANGE_ALL_GATHER] = attend_all_gather,
	                                                [EXCHANGE_A2A] = attend_a2a};
	const struct model_config *c = b->c;
	struct exchange x = {.h = heads_of(b), .keys = NONE};
	x.arg = (union op_arg){.attention = {.seq_length = b->m->spec.rows,
	                                     .heads = x.h.heads,
	                                     .groups = x.h.groups,
	                                     .head_dim = x.h.head_dim,
	                                     .value_dim = x.h.value_dim,
	                                     .window = c->window_size > 0 ? (int32_t)c->window_size : 0,
	                                     .scale = (float)model_attention_scale(c),
	                                     .first_head = x.h.heads * b->rank,
	                                     .queries = b->context,
	                                     .axes = b->context.ranks ? AXIS_BIT(cp) : 0}};
	if (b->m->spec.use == MODEL_GENERATE)
		return attend_cached(b, &x, qkv);
	if (b->m->spec.use == MODEL_TRAIN && c->attention_dropout > 0) {
		x.arg.attention.dropout = (float)c->attention_dropout;
		x.arg.attention.salt = build_salt(b, "attention.probabilities");
		x.keys = b->m->keys;
	}
	if (b->context.ranks)
		return exchanges[b->m->spec.exchange](b, &x, qkv);
	return EMIT(b->p, attention, &x.arg, qkv, x.keys, b->m->begins);
}

/* Projections */

/* Weights of the head size serve all heads, so every rank holds them and adds to their gradients. */
static int32_t head_norm(struct builder *b, const char *name)
{
	int32_t w = build_vector(b, WHOLE, INIT_ONE, ROWS({name, b->c->kv_channels}));
	b->m->param[b->m->n_param - 1].partial = b->ranks > 1 ? AXIS_BIT(tp) : 0;
	return w;
}

/* [N,C] -> packed rows of this rank's heads. Query, key and value rows lie side by side for one product. */
static int32_t project_packed(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	int64_t q = c->num_attention_heads * c->kv_channels, kv = c->num_query_groups * c->kv_channels;
	int32_t w = build_param(b, 2, c->hidden_size, BY_ROWS,
	                        ROWS({"attention.query.weight", q}, {"attention.key.weight", kv},
	                             {"attention.value.weight", kv}),
	                        INIT_NORMAL, c->init_method_std);
	int32_t bias = c->add_bias_linear || c->add_qkv_bias
	                       ? build_vector(b, BY_ROWS, INIT_ZERO,
	                                      ROWS({"attention.query.bias", q}, {"attention.key.bias", kv},
	                                           {"attention.value.bias", kv}))
	                       : NONE;
	return EMIT(b->p, linear, LAYER_PRODUCT(b), x, w, bias);
}

static int32_t project_qkv(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	struct heads h = heads_of(b);
	int32_t y = project_packed(b, build_enter(b, x));
	if (c->qk_layernorm) {
		int32_t wq = head_norm(b, "attention.query_norm.weight");
		int32_t wk = head_norm(b, "attention.key_norm.weight");
		y = EMIT(b->p, qk_norm, ARG(.norm = {(float)c->norm_epsilon, h.heads, h.groups, h.head_dim}),
		         y, wq, wk);
	}
	if (c->position_embedding_type == MODEL_POSITION_ROPE)
		y = EMIT(b->p, rope,
		         ARG(.rope = {.heads = h.heads,
		                      .groups = h.groups,
		                      .head_dim = h.head_dim,
		                      .interleaved = c->rotary_interleaved}),
		         y, b->m->rope_table, b->m->positions);
	return y;
}

/* Multi-head latent attention: what all heads share (latents, the rotary key) is computed once on a rank's
 * own rows, and it is the narrow latents that come to the ranks that share the heads. */

static int32_t latent(struct builder *b, const char *down, int64_t width, int32_t x)
{
	int32_t w = build_param(b, 2, b->c->hidden_size, WHOLE, ROWS({down, width}), INIT_NORMAL,
	                        b->c->init_method_std);
	return EMIT(b->p, linear, LAYER_PRODUCT(b), x, w, NONE);
}

static int32_t heads_from(struct builder *b, const char *up, int64_t width, int64_t rank, int32_t x)
{
	int32_t w = build_param(b, 2, rank, BY_ROWS, ROWS({up, b->c->num_attention_heads * width}),
	                        INIT_NORMAL, b->c->init_method_std);
	return EMIT(b->p, linear, LAYER_PRODUCT(b), build_enter(b, x), w, NONE);
}

static int32_t latent_queries(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	int64_t size = c->qk_head_dim + c->qk_pos_emb_head_dim;
	if (c->q_lora_rank == OPTION_NULL_INT)
		return heads_from(b, "attention.query.weight", size, c->hidden_size, x);
	int32_t y = latent(b, "attention.query_down.weight", c->q_lora_rank, x);
	y = build_norm(b, "attention.query_latent_norm.weight", "attention.query_latent_norm.bias",
	               c->q_lora_rank, y);
	return heads_from(b, "attention.query_up.weight", size, c->q_lora_rank, y);
}

static int32_t project_latent(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	struct heads h = heads_of(b);
	int32_t q = latent_queries(b, x);
	int32_t down =
	        latent(b, "attention.key_value_down.weight", c->kv_lora_rank + c->qk_pos_emb_head_dim, x);
	int32_t kv = EMIT(b->p, split_columns, ARG(.columns = {(int32_t)c->kv_lora_rank}), down);
	int32_t key = build_enter(b, prog_out(b->p, 1));
	kv = build_norm(b, "attention.key_value_latent_norm.weight", "attention.key_value_latent_norm.bias",
	                c->kv_lora_rank, kv);
	kv = heads_from(b, "attention.key_value_up.weight", c->qk_head_dim + c->v_head_dim, c->kv_lora_rank,
	                kv);
	return EMIT(b->p, mla_pack,
	            ARG(.mla = {.heads = h.heads,
	                        .head_dim = h.head_dim,
	                        .value_dim = h.value_dim,
	                        .interleaved = c->rotary_interleaved}),
	            q, kv, key, b->m->rope_table, b->m->positions);
}

int32_t build_attention(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	int64_t width = c->num_attention_heads * heads_of(b).value_dim;
	int32_t h = attend(b, c->multi_latent_attention ? project_latent(b, x) : project_qkv(b, x));
	int32_t wo = build_param(b, 2, width, BY_COLUMNS, ROWS({"attention.output.weight", c->hidden_size}),
	                         INIT_NORMAL, build_output_std(b));
	int32_t bo = c->add_bias_linear ? build_vector(b, WHOLE, INIT_ZERO,
	                                               ROWS({"attention.output.bias", c->hidden_size}))
	                                : NONE;
	return build_dropout(b, "attention.output", build_linear_back(b, h, wo, bo));
}
