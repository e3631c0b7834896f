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

enum cut { WHOLE, BY_ROWS, BY_COLUMNS }; /* of a parameter, over the tensor-parallel ranks */

struct builder {
	struct model *m;
	struct prog *p;
	const struct model_config *c;
	const char *prefix;  /* "decoder.layers.7." */
	int32_t ranks, rank; /* tensor-parallel */
	int32_t rows,
	        first_row; /* of the residual stream on this rank: fewer than N under sequence parallelism */
};

/* Parameters */

static int64_t share_of(const struct builder *b, int64_t n)
{
	return (n + b->ranks - 1) / b->ranks;
}

/* The box of a logical parameter [rows,columns] on this rank; a last share may be smaller, or empty. */
static void add_part(struct builder *b, const char *name, int nd, int64_t rows, int64_t columns, enum cut cut,
                     int64_t local_row, enum init init, double std)
{
	struct model *m = b->m;
	struct part part = {.name = arena_printf(&b->p->arena, "%s%s", b->prefix, name),
	                    .nd = nd,
	                    .shape = {rows, columns},
	                    .extent = {rows, columns},
	                    .local_row = local_row,
	                    .init = init,
	                    .std = std};
	if (cut != WHOLE) {
		int k = cut == BY_COLUMNS;
		int64_t share = share_of(b, part.shape[k]), begin = share * b->rank;
		part.offset[k] = begin < part.shape[k] ? begin : part.shape[k];
		int64_t rest = part.shape[k] - part.offset[k];
		part.extent[k] = rest < share ? rest : share;
	}
	m->part = mem_grow(m->part, m->n_part, &m->cap_part, sizeof *m->part);
	m->part[m->n_part++] = part;
}

static int32_t add_param(struct builder *b, int nd, int64_t columns, enum cut cut, const struct rows *rows,
                         int n, enum init init, double std)
{
	struct model *m = b->m;
	int64_t total = 0;
	int32_t first = (int32_t)m->n_part;
	for (int i = 0; i < n; i++) {
		if (!rows[i].rows)
			continue;
		add_part(b, rows[i].name, nd, rows[i].rows, columns, cut, total, init, std);
		total += cut == BY_ROWS ? share_of(b, rows[i].rows) : rows[i].rows;
	}
	int32_t dim[] = {(int32_t)total, (int32_t)(cut == BY_COLUMNS ? share_of(b, columns) : columns)};
	int32_t v = prog_value(b->p, m->part[first].name, R_PARAM, m->spec.dtype, nd, dim);
	static const enum place places[] = {[BY_ROWS] = PLACE_SHARD0, [BY_COLUMNS] = PLACE_SHARD1};
	prog_place(b->p, v, AXIS_tp, places[cut]);
	m->param = mem_grow(m->param, m->n_param, &m->cap_param, sizeof *m->param);
	/* Under sequence parallelism a rank sees its rows alone, so what all ranks hold gets partial
	 * gradients. */
	m->param[m->n_param++] =
	        (struct param){.value = v,
	                       .first_part = first,
	                       .n_parts = (int32_t)m->n_part - first,
	                       .chunk = b->p->chunk,
	                       .layer = b->p->layer,
	                       .decay = nd > 1,
	                       .cut = cut != WHOLE && b->ranks > 1,
	                       .partial = cut == WHOLE && m->spec.sequence_parallel ? AXIS_BIT(tp) : 0};
	return v;
}

#define ROWS(...)                           \
	(const struct rows[]){__VA_ARGS__}, \
	        (int)(sizeof((const struct rows[]){__VA_ARGS__}) / sizeof(struct rows))

static int32_t vector(struct builder *b, enum cut cut, enum init init, const struct rows *rows, int n)
{
	return add_param(b, 1, 1, cut, rows, n, init, 0);
}

static double output_std(const struct builder *b)
{
	return b->c->init_method_std / sqrt(2.0 * (double)b->c->num_layers);
}

/* Pieces */

/* The residual stream comes to all tensor-parallel ranks, each works on its own columns (heads, ffn,
 * vocabulary), and their sums go back: Shoeybi et al. 2019; Korthikanti et al. 2022 where the stream is cut
 * by rows. */

static int32_t enter(struct builder *b, int32_t x)
{
	if (b->ranks == 1)
		return x;
	const union op_arg *over = ARG(.comm = {AXIS_BIT(tp)});
	return b->m->spec.sequence_parallel ? EMIT(b->p, all_gather, over, x) : EMIT(b->p, fan_out, over, x);
}

static int32_t add_up(struct builder *b, int32_t y)
{
	if (b->ranks == 1)
		return y;
	const union op_arg *over = ARG(.comm = {AXIS_BIT(tp)});
	return b->m->spec.sequence_parallel ? EMIT(b->p, reduce_scatter, over, y)
	                                    : EMIT(b->p, all_reduce, over, y);
}

/* A product over the columns that ranks share; its bias comes once, after the sum. */
static int32_t linear_back(struct builder *b, int32_t h, int32_t w, int32_t bias)
{
	if (b->ranks == 1)
		return EMIT(b->p, linear, NO_ARG, h, w, bias);
	int32_t y = add_up(b, EMIT(b->p, linear, NO_ARG, h, w));
	return bias == NONE ? y : EMIT(b->p, bias_add, NO_ARG, y, bias);
}

static int32_t norm(struct builder *b, const char *weight, const char *bias, int32_t x)
{
	int64_t C = b->c->hidden_size;
	float eps = (float)b->c->norm_epsilon;
	int32_t w = vector(b, WHOLE, INIT_ONE, ROWS({weight, C}));
	if (b->c->normalization == MODEL_RMSNORM)
		return EMIT(b->p, rmsnorm, ARG(.norm = {.eps = eps}), x, w);
	int32_t beta = vector(b, WHOLE, INIT_ZERO, ROWS({bias, C}));
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
	return EMIT(b->p, dropout,
	            ARG(.dropout = {p, salt(b, site), b->m->spec.rows, b->first_row,
	                            b->m->spec.sequence_parallel ? AXIS_BIT(tp) : 0}),
	            x, b->m->keys);
}

static int32_t attend(struct builder *b, int32_t qkv)
{
	const struct model_config *c = b->c;
	int32_t heads = (int32_t)c->num_attention_heads / b->ranks;
	union op_arg arg = {.attention = {.seq_length = b->m->spec.rows,
	                                  .heads = heads,
	                                  .groups = (int32_t)c->num_query_groups / b->ranks,
	                                  .head_dim = (int32_t)c->kv_channels,
	                                  .window = c->window_size > 0 ? (int32_t)c->window_size : 0,
	                                  .scale = 1 / sqrtf((float)c->kv_channels),
	                                  .first_head = heads * b->rank}};
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

/* Weights of the head size serve all heads, so every rank holds them and adds to their gradients. */
static int32_t head_norm(struct builder *b, const char *name)
{
	int32_t w = vector(b, WHOLE, INIT_ONE, ROWS({name, b->c->kv_channels}));
	b->m->param[b->m->n_param - 1].partial = b->ranks > 1 ? AXIS_BIT(tp) : 0;
	return w;
}

/* [N,C] -> packed [N,(H+2G)D] of this rank's heads. Query, key and value rows lie side by side for one
 * product. */
static int32_t project_qkv(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	int64_t q = c->num_attention_heads * c->kv_channels, kv = c->num_query_groups * c->kv_channels;
	int32_t w = add_param(b, 2, c->hidden_size, BY_ROWS,
	                      ROWS({"attention.query.weight", q}, {"attention.key.weight", kv},
	                           {"attention.value.weight", kv}),
	                      INIT_NORMAL, c->init_method_std);
	int32_t bias = c->add_bias_linear || c->add_qkv_bias
	                       ? vector(b, BY_ROWS, INIT_ZERO,
	                                ROWS({"attention.query.bias", q}, {"attention.key.bias", kv},
	                                     {"attention.value.bias", kv}))
	                       : NONE;
	return EMIT(b->p, linear, NO_ARG, x, w, bias);
}

/* x -> its like */
static int32_t attention_block(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	int32_t H = (int32_t)c->num_attention_heads / b->ranks, G = (int32_t)c->num_query_groups / b->ranks,
	        D = (int32_t)c->kv_channels;
	int32_t h = project_qkv(b, enter(b, x));
	if (c->qk_layernorm) {
		int32_t wq = head_norm(b, "attention.query_norm.weight");
		int32_t wk = head_norm(b, "attention.key_norm.weight");
		h = EMIT(b->p, qk_norm, ARG(.norm = {(float)c->norm_epsilon, H, G, D}), h, wq, wk);
	}
	if (c->position_embedding_type == MODEL_POSITION_ROPE)
		h = EMIT(b->p, rope, ARG(.rope = {H, G, D, 0}), h, b->m->rope_table, b->m->positions);
	h = attend(b, h);
	int32_t wo = add_param(b, 2, c->num_attention_heads * c->kv_channels, BY_COLUMNS,
	                       ROWS({"attention.output.weight", c->hidden_size}), INIT_NORMAL, output_std(b));
	int32_t bo = c->add_bias_linear
	                     ? vector(b, WHOLE, INIT_ZERO, ROWS({"attention.output.bias", c->hidden_size}))
	                     : NONE;
	return dropout(b, "attention.output", linear_back(b, h, wo, bo));
}

static const struct {
	int32_t kind;
	bool gated;
} activations[] = {
        [MODEL_GELU] = {ACT_gelu, false},  [MODEL_GELU_EXACT] = {ACT_gelu_exact, false},
        [MODEL_RELU] = {ACT_relu, false},  [MODEL_SQUARED_RELU] = {ACT_squared_relu, false},
        [MODEL_SWIGLU] = {ACT_silu, true}, [MODEL_GEGLU] = {ACT_gelu, true},
};

/* x -> its like. Gate and up rows lie side by side for one product. */
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
	int32_t w = add_param(b, 2, c->hidden_size, BY_ROWS, weights, 2, INIT_NORMAL, c->init_method_std);
	int32_t bias = c->add_bias_linear ? vector(b, BY_ROWS, INIT_ZERO, biases, 2) : NONE;
	int32_t h = EMIT(b->p, linear, NO_ARG, enter(b, x), w, bias);
	h = gated ? EMIT(b->p, glu, &act, h) : EMIT(b->p, activation, &act, h);
	int32_t w2 = add_param(b, 2, F, BY_COLUMNS, ROWS({"mlp.fc2.weight", c->hidden_size}), INIT_NORMAL,
	                       output_std(b));
	int32_t b2 = c->add_bias_linear ? vector(b, WHOLE, INIT_ZERO, ROWS({"mlp.fc2.bias", c->hidden_size}))
	                                : NONE;
	return dropout(b, "mlp.output", linear_back(b, h, w2, b2));
}

static int32_t layer(struct builder *b, int32_t x)
{
	b->p->block = BLOCK_ATTENTION;
	int32_t h = norm(b, "input_layernorm.weight", "input_layernorm.bias", x);
	x = EMIT(b->p, add, NO_ARG, x, attention_block(b, h));
	b->p->block = BLOCK_NONE;
	h = norm(b, "pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias", x);
	b->p->block = BLOCK_MLP;
	h = mlp_block(b, h);
	b->p->block = BLOCK_NONE;
	return EMIT(b->p, add, NO_ARG, x, h);
}

/* Inputs */

static void place_by_batch(struct builder *b, int32_t v)
{
	prog_place(b->p, v, AXIS_dp, PLACE_SHARD0);
	prog_place(b->p, v, AXIS_rp, PLACE_SHARD0);
}

/* Inputs carry the batch, which data-parallel ranks share out. */
static int32_t input(struct builder *b, const char *name, enum region region, enum dtype dtype,
                     int32_t length)
{
	int32_t v = prog_value(b->p, name, region, dtype, 1, &length);
	place_by_batch(b, v);
	return v;
}

static bool holds_embedding(const struct model *m)
{
	bool any = false;
	for (int32_t i = 0; i < m->spec.n_chunk; i++)
		any |= m->spec.chunk[i].has_embedding;
	return any;
}

static bool holds_head(const struct model *m)
{
	bool any = false;
	for (int32_t i = 0; i < m->spec.n_chunk; i++)
		any |= m->spec.chunk[i].has_head;
	return any;
}

static void make_loss_inputs(struct builder *b, int32_t N)
{
	struct model *m = b->m;
	int32_t one = 1;
	m->loss = prog_value(b->p, "lm_loss", R_STAT, DT_f64, 1, &one);
	if (!holds_head(m))
		return;
	m->targets = input(b, "targets", R_BATCH, DT_i32, N);
	if (m->spec.use == MODEL_TRAIN)
		m->loss_scale = prog_value(b->p, "loss scale", R_INPUT, DT_f32, 1, &one);
}

static void make_inputs(struct builder *b)
{
	struct model *m = b->m;
	const struct model_config *c = b->c;
	int32_t N = m->spec.batch * m->spec.rows;
	bool learned = c->position_embedding_type == MODEL_POSITION_LEARNED_ABSOLUTE;
	bool rope = c->position_embedding_type == MODEL_POSITION_ROPE;
	m->tokens = m->positions = m->row_positions = m->targets = m->keys = m->loss_scale = m->loss =
	        m->row_loss = m->rope_table = m->logits = NONE;
	if (holds_embedding(m))
		m->tokens = input(b, "tokens", R_BATCH, DT_i32, N);
	if (rope || m->spec.use == MODEL_GENERATE || (learned && holds_embedding(m) && b->rows == N))
		m->positions = input(b, "positions", R_INPUT, DT_i32, N);
	if (learned && holds_embedding(m) && b->rows < N) {
		m->row_positions = input(b, "positions of rows", R_INPUT, DT_i32, b->rows);
		prog_place(b->p, m->row_positions, AXIS_tp, PLACE_SHARD0);
	}
	if (m->spec.use != MODEL_GENERATE)
		make_loss_inputs(b, N);
	if (m->spec.use == MODEL_TRAIN && (c->hidden_dropout > 0 || c->attention_dropout > 0))
		m->keys = input(b, "sample keys", R_BATCH, DT_i64, m->spec.batch);
	if (rope) {
		int32_t dim[] = {(int32_t)c->max_position_embeddings, rope_rotated(c)};
		m->rope_table = prog_value(b->p, "rope table", R_CONST, DT_f32, 2, dim);
	}
}

/* The two ends of the model */

static int32_t embedding_table(struct builder *b, const char *prefix, const char *name)
{
	const char *outer = b->prefix;
	b->prefix = prefix;
	int32_t table =
	        add_param(b, 2, b->c->hidden_size, BY_ROWS, ROWS({name, b->m->spec.padded_vocab_size}),
	                  INIT_NORMAL, b->c->init_method_std);
	b->prefix = outer;
	return table;
}

/* Rows of the vocabulary that a rank holds, and the first of them. */
static union op_arg vocabulary(const struct builder *b)
{
	int64_t share = share_of(b, b->m->spec.padded_vocab_size);
	return (union op_arg){.embedding = {(int32_t)(share * b->rank), b->ranks > 1 ? AXIS_BIT(tp) : 0}};
}

static int32_t embed(struct builder *b, int32_t table)
{
	const struct model_config *c = b->c;
	union op_arg arg = vocabulary(b);
	b->prefix = "embedding.";
	int32_t x = add_up(b, EMIT(b->p, embedding, &arg, table, b->m->tokens));
	if (c->position_embedding_type == MODEL_POSITION_LEARNED_ABSOLUTE) {
		int32_t w = add_param(b, 2, c->hidden_size, WHOLE,
		                      ROWS({"position_embeddings.weight", c->max_position_embeddings}),
		                      INIT_NORMAL, c->init_method_std);
		int32_t at = b->m->row_positions == NONE ? b->m->positions : b->m->row_positions;
		x = EMIT(b->p, add, NO_ARG, x, EMIT(b->p, embedding, NO_ARG, w, at));
	}
	return dropout(b, "output", x);
}

static void head(struct builder *b, int32_t x, int32_t table)
{
	struct model *m = b->m;
	b->prefix = "decoder.";
	x = norm(b, "final_layernorm.weight", "final_layernorm.bias", x);
	b->prefix = "";
	if (table == NONE)
		table = embedding_table(b, "", "output_layer.weight");
	m->logits = EMIT(b->p, linear, NO_ARG, enter(b, x), table, NONE);
	if (m->spec.use == MODEL_GENERATE)
		return;
	union op_arg arg = vocabulary(b), over = {.comm = {AXIS_BIT(tp)}};
	arg = (union op_arg){
	        .cross_entropy = {(int32_t)b->c->vocab_size, arg.embedding.first_row, arg.embedding.axes}};
	int32_t outs[OP_MAX_OUT] = {m->loss, NONE, NONE}, stats = NONE;
	if (b->ranks > 1)
		stats = EMIT(b->p, all_gather, &over, EMIT(b->p, logit_stats, &arg, m->logits, m->targets));
	EMIT_INTO(b->p, cross_entropy, &arg, outs, m->logits, m->targets, stats);
	m->row_loss = prog_out(b->p, 2);
}

/* Chunks */

static int32_t edge_value(struct builder *b, const char *name, enum region region)
{
	int32_t v = prog_value(b->p, name, region, b->m->spec.dtype, 2,
	                       (int32_t[]){b->rows, (int32_t)b->c->hidden_size});
	b->p->value[v].given = 1;
	place_by_batch(b, v);
	if (b->m->spec.sequence_parallel)
		prog_place(b->p, v, AXIS_tp, PLACE_SHARD0);
	return v;
}

static int32_t begin_chunk(struct builder *b, struct model_edge *edge, const struct model_chunk *chunk,
                           int32_t *table)
{
	bool tied = !b->c->untie_embeddings_and_output_weights;
	if (chunk->has_embedding || (chunk->has_head && tied && *table == NONE)) {
		*table = embedding_table(b, "embedding.", "word_embeddings.weight");
		/* Both ends of one rank use one table; those of a pipeline hold a copy each. */
		if (tied && !(holds_embedding(b->m) && holds_head(b->m)))
			b->m->param[b->m->n_param - 1].tie = chunk->has_embedding ? TIE_OWNER : TIE_COPY;
	}
	if (chunk->has_embedding)
		return embed(b, *table);
	edge->in = edge_value(b, "from the stage before", R_SAVED);
	b->p->value[edge->in].want_grad = b->m->spec.use == MODEL_TRAIN;
	return edge->in;
}

static void end_chunk(struct builder *b, struct model_edge *edge, const struct model_chunk *chunk, int32_t x,
                      int32_t table)
{
	bool tied = !b->c->untie_embeddings_and_output_weights;
	if (chunk->has_head) {
		head(b, x, tied ? table : NONE);
		return;
	}
	edge->out = x;
	b->p->value[x].region = R_EDGE;
	if (b->m->spec.use == MODEL_TRAIN)
		edge->out_adjoint = edge_value(b, "gradient from the next stage", R_EDGE);
}

static void build_chunk(struct builder *b, int32_t i, int32_t *table)
{
	const struct model_chunk *chunk = &b->m->spec.chunk[i];
	struct model_edge *edge = &b->m->edge[i];
	*edge = (struct model_edge){NONE, NONE, NONE};
	b->p->chunk = (uint8_t)i;
	int32_t x = begin_chunk(b, edge, chunk, table);
	for (int32_t l = chunk->first_layer; l < chunk->first_layer + chunk->n_layers; l++) {
		b->p->layer = l;
		b->prefix = arena_printf(&b->p->arena, "decoder.layers.%d.", l);
		x = layer(b, x);
	}
	b->p->layer = -1;
	end_chunk(b, edge, chunk, x, *table);
	b->p->chunk = 0;
}

int model_build(struct model *m, struct prog *prog, const struct model_spec *spec, struct err *e)
{
	struct model_chunk whole = {0, (int32_t)spec->config->num_layers, true, true};
	*m = (struct model){.spec = *spec, .prog = prog};
	if (!m->spec.chunk) {
		m->spec.chunk = &whole;
		m->spec.n_chunk = 1;
	}
	m->spec.sequence_parallel &= prog->axis_size[AXIS_tp] > 1;
	struct builder b = {.m = m,
	                    .p = prog,
	                    .c = m->spec.config,
	                    .prefix = "",
	                    .ranks = prog->axis_size[AXIS_tp],
	                    .rank = prog->axis_rank[AXIS_tp],
	                    .rows = m->spec.batch * m->spec.rows};
	if (m->spec.sequence_parallel) {
		b.rows /= b.ranks;
		b.first_row = b.rows * b.rank;
	}
	int32_t table = NONE;
	prog->segment = SEG_FWD;
	make_inputs(&b);
	for (int32_t i = 0; i < m->spec.n_chunk && !prog->e.code; i++)
		build_chunk(&b, i, &table);
	m->spec.chunk = NULL; /* the caller's, or this frame's */
	*e = prog->e;
	return prog->e.code;
}
