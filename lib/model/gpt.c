/* The GPT decoder: embedding, layers, output layer and loss, cut into the chunks of a pipeline. */
#include "model/builder.h"

#include <string.h>

static int32_t layer(struct builder *b, int32_t x)
{
	int64_t C = b->c->hidden_size;
	b->p->block = BLOCK_ATTENTION;
	int32_t h = build_norm(b, "input_layernorm.weight", "input_layernorm.bias", C, x);
	x = EMIT(b->p, add, NO_ARG, x, build_attention(b, h));
	b->p->block = BLOCK_NONE;
	h = build_norm(b, "pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias", C, x);
	bool experts = b->m->expert_at[b->p->layer] != NONE;
	b->p->block = experts ? BLOCK_EXPERTS : BLOCK_MLP;
	h = experts ? build_experts(b, h) : build_mlp(b, h);
	b->p->block = BLOCK_NONE;
	return EMIT(b->p, add, NO_ARG, x, h);
}

/* Inputs */

/* One a row of this rank's share of the sequences. */
static int32_t row_input(struct builder *b, const char *name, enum region region)
{
	int32_t v = prog_value(b->p, name, region, DT_i32, 1, &b->block_rows);
	build_place_rows(b, v);
	return v;
}

/* `length` a sample, for all its rows: context-parallel ranks hold the same. */
static int32_t sample_input(struct builder *b, const char *name, enum dtype dtype, int32_t length)
{
	int32_t n = b->m->spec.batch * length, v = prog_value(b->p, name, R_BATCH, dtype, 1, &n);
	prog_place(b->p, v, AXIS_dp, PLACE_SHARD0);
	prog_place(b->p, v, AXIS_rp, PLACE_SHARD0);
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

static bool holds_experts(const struct model *m)
{
	bool any = false;
	for (int32_t i = 0; i < m->spec.n_chunk; i++)
		for (int32_t l = 0; l < m->spec.chunk[i].n_layers; l++)
			any |= m->expert_at[m->spec.chunk[i].first_layer + l] != NONE;
	return any;
}

static void make_loss_inputs(struct builder *b)
{
	struct model *m = b->m;
	int32_t one = 1;
	m->loss = prog_value(b->p, "lm_loss", R_STAT, DT_f64, 1, &one);
	if (holds_head(m))
		m->targets = row_input(b, "targets", R_BATCH);
	if (m->spec.use == MODEL_TRAIN && (holds_head(m) || holds_experts(m)))
		m->loss_scale = prog_value(b->p, "loss scale", R_INPUT, DT_f32, 1, &one);
}

/* Which positions the rows have, and where their documents begin. */
static void make_position_inputs(struct builder *b)
{
	struct model *m = b->m;
	const struct model_config *c = b->c;
	enum region region = m->spec.resets_positions ? R_BATCH : R_INPUT;
	bool learned = c->position_embedding_type == MODEL_POSITION_LEARNED_ABSOLUTE && holds_embedding(m);
	bool shares_rows = b->rows < b->block_rows;
	if (c->position_embedding_type == MODEL_POSITION_ROPE || m->spec.use == MODEL_GENERATE ||
	    (learned && !shares_rows))
		m->positions = row_input(b, "positions", region);
	if (learned && shares_rows) {
		m->row_positions = prog_value(b->p, "positions of rows", region, DT_i32, 1, &b->rows);
		build_place_rows(b, m->row_positions);
		prog_place(b->p, m->row_positions, AXIS_tp, PLACE_SHARD0);
	}
	if (!m->spec.resets_attention || m->spec.use == MODEL_GENERATE)
		return;
	if (b->context.ranks && m->spec.exchange == EXCHANGE_A2A)
		m->begins_of_all = sample_input(b, "begins of all documents", DT_i32, m->spec.rows);
	else
		m->begins = row_input(b, "begins of documents", R_BATCH);
}

static void make_inputs(struct builder *b)
{
	struct model *m = b->m;
	const struct model_config *c = b->c;
	build_expert_sums(b);
	bool random = c->hidden_dropout > 0 || c->attention_dropout > 0 ||
	              (holds_experts(m) && c->moe_input_jitter_eps > 0);
	m->tokens = m->positions = m->row_positions = m->targets = m->keys = m->loss_scale = m->loss =
	        m->row_loss = m->rope_table = m->logits = m->begins = m->begins_of_all = NONE;
	if (holds_embedding(m))
		m->tokens = row_input(b, "tokens", R_BATCH);
	make_position_inputs(b);
	if (m->spec.use != MODEL_GENERATE)
		make_loss_inputs(b);
	if (m->spec.use == MODEL_TRAIN && random)
		m->keys = sample_input(b, "sample keys", DT_i64, 1);
	if (c->position_embedding_type == MODEL_POSITION_ROPE) {
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
	        build_param(b, 2, b->c->hidden_size, BY_ROWS, ROWS({name, b->m->spec.padded_vocab_size}),
	                    INIT_NORMAL, b->c->init_method_std);
	b->prefix = outer;
	return table;
}

/* Rows of the vocabulary that a rank holds, and the first of them. */
static union op_arg vocabulary(const struct builder *b)
{
	int64_t share = (b->m->spec.padded_vocab_size + b->ranks - 1) / b->ranks;
	return (union op_arg){.embedding = {(int32_t)(share * b->rank), b->ranks > 1 ? AXIS_BIT(tp) : 0}};
}

static int32_t embed(struct builder *b, int32_t table)
{
	const struct model_config *c = b->c;
	union op_arg arg = vocabulary(b);
	b->prefix = "embedding.";
	int32_t x = build_add_up(b, EMIT(b->p, embedding, &arg, table, b->m->tokens));
	if (c->position_embedding_type == MODEL_POSITION_LEARNED_ABSOLUTE) {
		int32_t w = build_param(b, 2, c->hidden_size, WHOLE,
		                        ROWS({"position_embeddings.weight", c->max_position_embeddings}),
		                        INIT_NORMAL, c->init_method_std);
		int32_t at = b->m->row_positions == NONE ? b->m->positions : b->m->row_positions;
		x = EMIT(b->p, add, NO_ARG, x, EMIT(b->p, embedding, NO_ARG, w, at));
	}
	return build_dropout(b, "output", x);
}

static void head(struct builder *b, int32_t x, int32_t table)
{
	struct model *m = b->m;
	b->prefix = "decoder.";
	x = build_norm(b, "final_layernorm.weight", "final_layernorm.bias", b->c->hidden_size, x);
	b->prefix = "";
	if (table == NONE)
		table = embedding_table(b, "", "output_layer.weight");
	m->logits = EMIT(b->p, linear, NO_ARG, build_enter(b, x), table, NONE);
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
	build_place_rows(b, v);
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

static struct builder begin_building(struct model *m, struct prog *prog)
{
	int32_t context_ranks = prog->axis_size[AXIS_cp];
	struct builder b = {.m = m,
	                    .p = prog,
	                    .c = m->spec.config,
	                    .prefix = "",
	                    .ranks = prog->axis_size[AXIS_tp],
	                    .rank = prog->axis_rank[AXIS_tp],
	                    .rows = m->spec.batch * m->spec.rows / context_ranks};
	b.block_rows = b.rows;
	if (context_ranks > 1) {
		b.context = (struct context){context_ranks, prog->axis_rank[AXIS_cp], 1};
		b.row_axes |= AXIS_BIT(cp);
	}
	if (m->spec.sequence_parallel) {
		b.rows /= b.ranks;
		b.first_row = b.rows * b.rank;
		b.row_axes |= AXIS_BIT(tp);
	}
	return b;
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
	struct builder b = begin_building(m, prog);
	int32_t table = NONE;
	prog->segment = SEG_FWD;
	make_inputs(&b);
	for (int32_t i = 0; i < m->spec.n_chunk && !prog->e.code; i++)
		build_chunk(&b, i, &table);
	m->spec.chunk = NULL; /* the caller's, or this frame's */
	*e = prog->e;
	return prog->e.code;
}
