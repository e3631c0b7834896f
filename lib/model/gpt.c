/* The GPT decoder: every operation of the forward pass, with its communication. Letters: N rows, C width,
 * H heads, G groups, D head size, F ffn, V padded vocabulary. */
#include "base/hash.h"
#include "model/model.h"

#include <math.h>
#include <string.h>

struct rows { /* one logical parameter among those of a value */
	const char *name;
	int64_t rows;
};

struct builder {
	struct model *m;
	struct prog *p;
	const struct model_config *c;
	const char *prefix; /* "decoder.layers.7." */
};

/* Parameters */

static void add_part(struct builder *b, const char *name, int nd, int64_t rows, int64_t columns,
                     int64_t local_row, enum init init, double std)
{
	struct model *m = b->m;
	m->part = mem_grow(m->part, m->n_part, &m->cap_part, sizeof *m->part);
	m->part[m->n_part++] = (struct part){.name = arena_printf(&b->p->arena, "%s%s", b->prefix, name),
	                                     .nd = nd,
	                                     .shape = {rows, columns},
	                                     .extent = {rows, columns},
	                                     .local_row = local_row,
	                                     .init = init,
	                                     .std = std};
}

static int32_t add_param(struct builder *b, int nd, int64_t columns, const struct rows *rows, int n,
                         enum init init, double std)
{
	struct model *m = b->m;
	int64_t total = 0;
	int32_t first = (int32_t)m->n_part;
	for (int i = 0; i < n; i++) {
		if (!rows[i].rows)
			continue;
		add_part(b, rows[i].name, nd, rows[i].rows, columns, total, init, std);
		total += rows[i].rows;
	}
	int32_t dim[] = {(int32_t)total, (int32_t)columns};
	int32_t v = prog_value(b->p, m->part[first].name, R_PARAM, m->spec.dtype, nd, dim);
	m->param = mem_grow(m->param, m->n_param, &m->cap_param, sizeof *m->param);
	m->param[m->n_param++] = (struct param){v, first, (int32_t)m->n_part - first, nd > 1};
	return v;
}

#define ROWS(...)                           \
	(const struct rows[]){__VA_ARGS__}, \
	        (int)(sizeof((const struct rows[]){__VA_ARGS__}) / sizeof(struct rows))

static int32_t vector(struct builder *b, enum init init, const struct rows *rows, int n)
{
	return add_param(b, 1, 1, rows, n, init, 0);
}

static double output_std(const struct builder *b)
{
	return b->c->init_method_std / sqrt(2.0 * (double)b->c->num_layers);
}

/* Pieces */

static int32_t norm(struct builder *b, const char *weight, const char *bias, int32_t x)
{
	int64_t C = b->c->hidden_size;
	float eps = (float)b->c->norm_epsilon;
	int32_t w = vector(b, INIT_ONE, ROWS({weight, C}));
	if (b->c->normalization == MODEL_RMSNORM)
		return EMIT(b->p, rmsnorm, ARG(.norm = {.eps = eps}), x, w);
	int32_t beta = vector(b, INIT_ZERO, ROWS({bias, C}));
	return EMIT(b->p, layernorm, ARG(.norm = {.eps = eps}), x, w, beta);
}

/* A mask belongs to a site by name, so that it is the same however layers are spread over ranks. */
static uint32_t salt(const struct builder *b, const char *site)
{
	uint64_t h = hash_bytes(b->prefix, strlen(b->prefix), 0);
	return (uint32_t)hash_bytes(site, strlen(site), h);
}

static int32_t dropout(struct builder *b, const char *site, int32_t x)
{
	float p = (float)b->c->hidden_dropout;
	if (b->m->spec.use != MODEL_TRAIN || p == 0)
		return x;
	return EMIT(b->p, dropout, ARG(.dropout = {p, salt(b, site), b->m->spec.rows}), x, b->m->keys);
}

static int32_t attend(struct builder *b, int32_t qkv)
{
	const struct model_config *c = b->c;
	union op_arg arg = {.attention = {.seq_length = b->m->spec.rows,
	                                  .heads = (int32_t)c->num_attention_heads,
	                                  .groups = (int32_t)c->num_query_groups,
	                                  .head_dim = (int32_t)c->kv_channels,
	                                  .window = c->window_size > 0 ? (int32_t)c->window_size : 0,
	                                  .scale = 1 / sqrtf((float)c->kv_channels)}};
	if (b->m->spec.use == MODEL_GENERATE) {
		int32_t dim[] = {(int32_t)c->max_position_embeddings,
		                 arg.attention.groups * arg.attention.head_dim};
		int32_t k = prog_value(b->p, "key cache", R_STATE, b->m->spec.dtype, 2, dim);
		int32_t v = prog_value(b->p, "value cache", R_STATE, b->m->spec.dtype, 2, dim);
		return EMIT(b->p, attention_cache, &arg, qkv, k, v, b->m->positions);
	}
	if (b->m->spec.use == MODEL_TRAIN && c->attention_dropout > 0) {
		arg.attention.dropout = (float)c->attention_dropout;
		arg.attention.salt = salt(b, "attention.probabilities");
	}
	return EMIT(b->p, attention, &arg, qkv, arg.attention.dropout > 0 ? b->m->keys : NONE);
}

/* x[N,C] -> [N,C]. Query, key and value rows lie side by side for one product. */
static int32_t attention_block(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	int32_t H = (int32_t)c->num_attention_heads, G = (int32_t)c->num_query_groups,
	        D = (int32_t)c->kv_channels;
	int64_t q = (int64_t)H * D, kv = (int64_t)G * D;
	int32_t w = add_param(b, 2, c->hidden_size,
	                      ROWS({"attention.query.weight", q}, {"attention.key.weight", kv},
	                           {"attention.value.weight", kv}),
	                      INIT_NORMAL, c->init_method_std);
	int32_t bias = c->add_bias_linear || c->add_qkv_bias
	                       ? vector(b, INIT_ZERO,
	                                ROWS({"attention.query.bias", q}, {"attention.key.bias", kv},
	                                     {"attention.value.bias", kv}))
	                       : NONE;
	int32_t h = EMIT(b->p, linear, NO_ARG, x, w, bias);
	if (c->qk_layernorm) {
		int32_t wq = vector(b, INIT_ONE, ROWS({"attention.query_norm.weight", D}));
		int32_t wk = vector(b, INIT_ONE, ROWS({"attention.key_norm.weight", D}));
		h = EMIT(b->p, qk_norm, ARG(.norm = {(float)c->norm_epsilon, H, G, D}), h, wq, wk);
	}
	if (c->position_embedding_type == MODEL_POSITION_ROPE)
		h = EMIT(b->p, rope, ARG(.rope = {H, G, D, 0}), h, b->m->rope_table, b->m->positions);
	h = attend(b, h);
	int32_t wo = add_param(b, 2, q, ROWS({"attention.output.weight", c->hidden_size}), INIT_NORMAL,
	                       output_std(b));
	int32_t bo = c->add_bias_linear
	                     ? vector(b, INIT_ZERO, ROWS({"attention.output.bias", c->hidden_size}))
	                     : NONE;
	return dropout(b, "attention.output", EMIT(b->p, linear, NO_ARG, h, wo, bo));
}

static const struct {
	int32_t kind;
	bool gated;
} activations[] = {
        [MODEL_GELU] = {ACT_gelu, false},  [MODEL_GELU_EXACT] = {ACT_gelu_exact, false},
        [MODEL_RELU] = {ACT_relu, false},  [MODEL_SQUARED_RELU] = {ACT_squared_relu, false},
        [MODEL_SWIGLU] = {ACT_silu, true}, [MODEL_GEGLU] = {ACT_gelu, true},
};

/* x[N,C] -> [N,C]. Gate and up rows lie side by side for one product. */
static int32_t mlp_block(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	int64_t F = c->ffn_hidden_size;
	bool gated = activations[c->activation].gated;
	union op_arg act = {.activation = {activations[c->activation].kind}};
	const struct rows weights[] = {{gated ? "mlp.gate.weight" : "mlp.fc1.weight", F},
	                               {"mlp.up.weight", gated ? F : 0}};
	const struct rows biases[] = {{gated ? "mlp.gate.bias" : "mlp.fc1.bias", F},
	                              {"mlp.up.bias", gated ? F : 0}};
	int32_t w = add_param(b, 2, c->hidden_size, weights, 2, INIT_NORMAL, c->init_method_std);
	int32_t bias = c->add_bias_linear ? vector(b, INIT_ZERO, biases, 2) : NONE;
	int32_t h = EMIT(b->p, linear, NO_ARG, x, w, bias);
	h = gated ? EMIT(b->p, glu, &act, h) : EMIT(b->p, activation, &act, h);
	int32_t w2 = add_param(b, 2, F, ROWS({"mlp.fc2.weight", c->hidden_size}), INIT_NORMAL, output_std(b));
	int32_t b2 = c->add_bias_linear ? vector(b, INIT_ZERO, ROWS({"mlp.fc2.bias", c->hidden_size})) : NONE;
	return dropout(b, "mlp.output", EMIT(b->p, linear, NO_ARG, h, w2, b2));
}

static int32_t layer(struct builder *b, int32_t x)
{
	int32_t h = norm(b, "input_layernorm.weight", "input_layernorm.bias", x);
	x = EMIT(b->p, add, NO_ARG, x, attention_block(b, h));
	h = norm(b, "pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias", x);
	return EMIT(b->p, add, NO_ARG, x, mlp_block(b, h));
}

/* Inputs carry the batch, which data-parallel ranks share out. */
static int32_t input(struct builder *b, const char *name, enum dtype dtype, int32_t length)
{
	int32_t v = prog_value(b->p, name, R_INPUT, dtype, 1, &length);
	prog_place(b->p, v, AXIS_dp, PLACE_SHARD0);
	return v;
}

static void make_inputs(struct builder *b)
{
	struct model *m = b->m;
	int32_t N = m->spec.batch * m->spec.rows, one = 1;
	m->tokens = input(b, "tokens", DT_i32, N);
	m->positions = input(b, "positions", DT_i32, N);
	m->targets = m->keys = m->loss_scale = m->loss = m->row_loss = m->rope_table = NONE;
	if (m->spec.use != MODEL_GENERATE) {
		m->targets = input(b, "targets", DT_i32, N);
		m->loss = prog_value(b->p, "lm_loss", R_STAT, DT_f64, 1, &one);
	}
	if (m->spec.use == MODEL_TRAIN) {
		m->keys = input(b, "sample keys", DT_i64, m->spec.batch);
		m->loss_scale = prog_value(b->p, "loss scale", R_INPUT, DT_f32, 1, &one);
	}
	if (b->c->position_embedding_type == MODEL_POSITION_ROPE) {
		int32_t dim[] = {(int32_t)b->c->max_position_embeddings, rope_rotated(b->c)};
		m->rope_table = prog_value(b->p, "rope table", R_CONST, DT_f32, 2, dim);
	}
}

static int32_t embed(struct builder *b, int32_t *table)
{
	const struct model_config *c = b->c;
	b->prefix = "embedding.";
	*table = add_param(b, 2, c->hidden_size,
	                   ROWS({"word_embeddings.weight", b->m->spec.padded_vocab_size}), INIT_NORMAL,
	                   c->init_method_std);
	int32_t x = EMIT(b->p, embedding, NO_ARG, *table, b->m->tokens);
	if (c->position_embedding_type == MODEL_POSITION_LEARNED_ABSOLUTE) {
		int32_t w = add_param(b, 2, c->hidden_size,
		                      ROWS({"position_embeddings.weight", c->max_position_embeddings}),
		                      INIT_NORMAL, c->init_method_std);
		x = EMIT(b->p, add, NO_ARG, x, EMIT(b->p, embedding, NO_ARG, w, b->m->positions));
	}
	return dropout(b, "output", x);
}

static void head(struct builder *b, int32_t x, int32_t table)
{
	struct model *m = b->m;
	b->prefix = "decoder.";
	x = norm(b, "final_layernorm.weight", "final_layernorm.bias", x);
	b->prefix = "";
	if (b->c->untie_embeddings_and_output_weights)
		table = add_param(b, 2, b->c->hidden_size,
		                  ROWS({"output_layer.weight", m->spec.padded_vocab_size}), INIT_NORMAL,
		                  b->c->init_method_std);
	m->logits = EMIT(b->p, linear, NO_ARG, x, table, NONE);
	if (m->spec.use == MODEL_GENERATE)
		return;
	int32_t outs[OP_MAX_OUT] = {m->loss, NONE, NONE};
	EMIT_INTO(b->p, cross_entropy, ARG(.cross_entropy = {(int32_t)b->c->vocab_size}), outs, m->logits,
	          m->targets);
	m->row_loss = prog_out(b->p, 2);
}

int model_build(struct model *m, struct prog *prog, const struct model_spec *spec, struct err *e)
{
	*m = (struct model){.spec = *spec, .prog = prog};
	struct builder b = {.m = m, .p = prog, .c = m->spec.config, .prefix = ""};
	int32_t table;
	prog->segment = SEG_FWD;
	make_inputs(&b);
	int32_t x = embed(&b, &table);
	for (int32_t l = 0; l < b.c->num_layers; l++) {
		prog->layer = l;
		b.prefix = arena_printf(&prog->arena, "decoder.layers.%d.", l);
		x = layer(&b, x);
	}
	prog->layer = -1;
	head(&b, x, table);
	*e = prog->e;
	return prog->e.code;
}
