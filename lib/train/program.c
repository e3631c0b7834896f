#include "train/program.h"
#include "parallel/stages.h"

#include <stdlib.h>
#include <string.h>

enum { EDGE_SLOTS = 2 }; /* a result is computed while the one before is on its way */

static const enum model_exchange exchanges[] = {[PARALLEL_CP_P2P] = EXCHANGE_P2P,
                                                [PARALLEL_CP_ALL_GATHER] = EXCHANGE_ALL_GATHER,
                                                [PARALLEL_CP_A2A] = EXCHANGE_A2A};

enum dtype program_dtype(const struct config *c)
{
	static const enum dtype types[] = {[PRECISION_FP32] = DT_f32,
	                                   [PRECISION_BF16] = DT_bf16,
	                                   [PRECISION_FP16] = DT_f16,
	                                   [PRECISION_FP8] = DT_bf16};
	return types[c->mixed_precision.precision];
}

static const enum dtype moment_types[] = {[MOMENT_FP32] = DT_f32, [MOMENT_BF16] = DT_bf16};

int program_mesh(const struct config *c, enum model_use use, struct mesh *mesh, struct err *e)
{
	if (use != MODEL_GENERATE && config_layout_is_open(c))
		return err_set(e, EXIT_INTERNAL, "parallel.layout auto: nobody has chosen the layout yet");
	const struct parallel_config *p = &c->parallel;
	bool experts = c->model.num_experts != OPTION_NULL_INT;
	struct mesh_sizes sizes = {.tp = (int)p->tensor_model_parallel_size,
	                           .cp = (int)p->context_parallel_size,
	                           .pp = (int)p->pipeline_model_parallel_size,
	                           .ep = experts ? (int)p->expert_model_parallel_size : 1,
	                           .etp = experts ? (int)p->expert_tensor_parallel_size : 1,
	                           .rp = (int)c->ddp.num_distributed_optimizer_instances};
	if (use == MODEL_GENERATE)
		return mesh_init(mesh, 1, &(struct mesh_sizes){0}, e);
	return mesh_init(mesh, (int)c->derived.world_size, &sizes, e);
}

/* Stages */

static int32_t told(int64_t number)
{
	return number == OPTION_NULL_INT ? 0 : (int32_t)number;
}

/* Virtual stage v is chunk v / pp of pipeline rank v % pp (Narayanan et al. 2021). */
static int split_stages(struct program *t, const struct config *c, struct err *e)
{
	const struct parallel_config *p = &c->parallel;
	int stages = t->mesh.size[AXIS_pp],
	    chunks = stages > 1 ? (int)p->virtual_pipeline_model_parallel_size : 1;
	struct stages_spec spec = {.num_layers = c->model.num_layers,
	                           .pipeline = stages,
	                           .chunks = chunks,
	                           .account_for_embedding = p->account_for_embedding_in_pipeline_split,
	                           .account_for_loss = p->account_for_loss_in_pipeline_split,
	                           .first_stage_layers = told(p->num_layers_in_first_pipeline_stage),
	                           .last_stage_layers = told(p->num_layers_in_last_pipeline_stage),
	                           .layout = p->pipeline_model_parallel_layout};
	if (stages == 1) {
		t->chunk[0] = (struct model_chunk){0, (int32_t)c->model.num_layers, true, true};
		return 1;
	}
	struct stage *stage = mem_array((size_t)stages * (size_t)chunks, sizeof *stage);
	int rc = stages_split(&spec, stage, e);
	for (int i = 0; i < chunks && !rc; i++) {
		const struct stage *s = &stage[i * stages + t->coord[AXIS_pp]];
		t->chunk[i] =
		        (struct model_chunk){s->first_layer, s->n_layers, s->has_embedding, s->has_loss};
	}
	free(stage);
	return rc ? -1 : chunks;
}

static int order_work(struct program *t, const struct config *c, enum model_use use, int chunks,
                      struct err *e)
{
	struct schedule_spec spec = {.kind = (enum parallel_schedule)c->parallel.pipeline_schedule,
	                             .stages = t->mesh.size[AXIS_pp],
	                             .chunks = chunks,
	                             .micro_batches = c->derived.accumulation,
	                             .forward_only = use == MODEL_EVALUATE};
	if (spec.stages == 1)
		spec.kind = PARALLEL_1F1B;
	int rc = schedule_build(&t->schedule, &spec, t->coord[AXIS_pp], e);
	if (rc)
		return rc;
	t->prog.batch_slots = t->schedule.window;
	t->prog.edge_slots = spec.stages > 1 ? EDGE_SLOTS : 1;
	for (int i = 0; i < chunks; i++)
		t->prog.saved_slots[i] = t->schedule.in_flight[i];
	return 0;
}

/* Passes */

static uint32_t repeats_of(const struct config *c)
{
	bool gathers = c->parallel.sequence_parallel || c->parallel.context_parallel_size > 1;
	uint32_t set = gathers ? 1u << REPEAT_GATHERS : 0;
	if (c->recompute.granularity == RECOMPUTE_SELECTIVE)
		set |= config_recompute_modules(c);
	return c->recompute.granularity == RECOMPUTE_FULL ? set | 1u << REPEAT_LAYERS : set;
}

static bool balances(const struct model_config *c)
{
	return c->moe_z_loss_coeff > 0 ||
	       (c->moe_router_load_balancing_type != MODEL_BALANCING_NONE && c->moe_aux_loss_coeff > 0);
}

static void differentiate(struct program *t)
{
	struct seed seed[PROG_MAX_CHUNKS + 1];
	size_t n = 0;
	int32_t balancing = t->model.n_expert_layers ? t->model.expert_sum[EXPERT_LOSS] : NONE;
	for (int i = 0; i < t->model.spec.n_chunk; i++) {
		const struct model_edge *edge = &t->model.edge[i];
		seed[n++] = t->chunk[i].has_head ? (struct seed){t->model.loss, t->model.loss_scale}
		                                 : (struct seed){edge->out, edge->out_adjoint};
	}
	/* It is a sum over tokens like the loss, and weighs as much as its coefficients say. */
	if (balancing != NONE && t->prog.value[balancing].def != NONE && balances(t->model.spec.config))
		seed[n++] = (struct seed){balancing, t->model.loss_scale};
	prog_backward(&t->prog, seed, n);
}

/* The gradient of what a stage was sent goes back as it came: whole, or by the same rows. */
static void send_back(struct prog *p, int32_t in)
{
	struct value *g = &p->value[p->value[in].grad];
	g->region = R_EDGE;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (g->place[a] != p->value[in].place[a])
			err_set(&p->e, EXIT_INTERNAL,
			        "program: the gradient for the stage before is %s along %s, what came from "
			        "it %s",
			        place_names[g->place[a]], mesh_axis_name((enum mesh_axis)a),
			        place_names[p->value[in].place[a]]);
}

/* What goes to the stage before lives on the edge; where backward is in two parts, what comes from the next
 * stage is read late and is kept like an activation. */
static void place_edges(struct program *t, bool split)
{
	struct prog *p = &t->prog;
	for (int i = 0; i < t->model.spec.n_chunk && !p->e.code; i++) {
		const struct model_edge *edge = &t->model.edge[i];
		if (edge->in != NONE)
			send_back(p, edge->in);
		if (split && edge->out_adjoint != NONE)
			p->value[edge->out_adjoint].region = R_SAVED;
	}
}

static void run_passes(struct program *t, const struct config *c)
{
	struct prog *p = &t->prog;
	bool split = c->parallel.pipeline_schedule == PARALLEL_ZERO_BUBBLE && t->mesh.size[AXIS_pp] > 1;
	differentiate(t);
	prog_check(p);
	prog_fuse(p, repeats_of(c) >> REPEAT_ACTIVATION & 1);
	prog_check(p);
	prog_recompute(p, repeats_of(c),
	               c->recompute.granularity == RECOMPUTE_FULL ? (int32_t)c->recompute.num_layers : -1);
	prog_check(p);
	place_edges(t, split);
	if (split)
		prog_split_backward(p);
	prog_check(p);
}

static void shard(struct program *t, const struct config *c)
{
	const struct model *m = &t->model;
	struct shard_options options = {.stage = (int)c->ddp.zero_stage,
	                                .bucket_size = c->ddp.bucket_size,
	                                .reduce_in_bf16 = !c->ddp.grad_reduce_in_fp32,
	                                .reduce_early = c->ddp.overlap_grad_reduce,
	                                .trains = m->spec.use == MODEL_TRAIN,
	                                .moments = {moment_types[c->optimizer.exp_avg_dtype],
	                                            moment_types[c->optimizer.exp_avg_sq_dtype]}};
	struct shard_param *list = mem_array(m->n_param + 1, sizeof *list);
	for (size_t k = 0; k < m->n_param; k++) {
		const struct param *q = &m->param[k];
		list[k] = (struct shard_param){.value = q->value,
		                               .chunk = q->chunk,
		                               .layer = q->layer,
		                               .decay = q->decay,
		                               .is_buffer = q->is_buffer,
		                               .tied = q->tie != TIE_NONE,
		                               .counts = q->tie != TIE_COPY,
		                               .partial = q->partial};
	}
	shard_program(&t->sharding, &t->prog, list, m->n_param, &options);
	free(list);
}

static void zero(struct prog *p, int32_t v)
{
	prog_emit(p, OP_zero, NULL, HERE, NULL, 0, (int32_t[OP_MAX_OUT]){v});
}

static int32_t add_over(struct prog *p, uint32_t axes, int32_t v)
{
	axes = prog_axes(p, axes);
	return axes ? EMIT(p, all_reduce, ARG(.comm = {axes}), v) : v;
}

/* The sum of the targets' losses over the ranks that have some: the last stage of every rank that has
 * samples, or parts of some. */
static void sum_loss(struct program *t)
{
	static const enum mesh_axis rows[] = {AXIS_cp, AXIS_dp, AXIS_rp};
	struct prog *p = &t->prog;
	int32_t loss = t->model.loss;
	p->segment = SEG_NORM;
	p->chunk = 0;
	if (t->model.targets == NONE) {
		for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
			prog_place(p, loss, rows[i], PLACE_PARTIAL);
		zero(p, loss);
	}
	t->loss = add_over(p, AXES_DATA | AXIS_BIT(cp) | AXIS_BIT(pp), loss);
}

/* What the experts' layers of all stages and ranks have counted; then their routers' biases move. */
static void sum_experts(struct program *t)
{
	struct prog *p = &t->prog;
	struct model *m = &t->model;
	int64_t E = m->spec.config->num_experts;
	if (!m->n_expert_layers)
		return;
	for (int k = 0; k < EXPERT_SUM_COUNT; k++)
		if (p->value[m->expert_sum[k]].def == NONE)
			zero(p, m->expert_sum[k]);
	for (int32_t l = 0; l < m->n_expert_layers; l++)
		if (p->value[m->expert_load_of[l]].def == NONE)
			zero(p, m->expert_load_of[l]);
	t->expert_sums = add_over(p, AXES_DENSE, m->expert_sums);
	t->expert_load = add_over(p, AXES_DENSE, m->expert_load);
	p->segment = SEG_STEP;
	for (int32_t l = 0; l < m->n_expert_layers && m->spec.use == MODEL_TRAIN; l++)
		if (m->expert_bias[l] != NONE)
			EMIT(p, bias_update,
			     ARG(.bias_update = {(float)m->spec.config->moe_router_bias_update_rate}),
			     m->expert_bias[l], prog_view(p, "expert load", t->expert_load, l * E, E));
	p->segment = SEG_NORM;
}

/* Segments whose collectives run beside what follows. */
static uint32_t overlapped(const struct config *c)
{
	return (c->comm_overlap.tp_comm_overlap ? SEG_BIT(BWD) : 0) |
	       (c->ddp.overlap_grad_reduce ? SEG_BIT(REDUCE) : 0);
}

static void take_place(struct program *t, int rank)
{
	t->rank = rank;
	mesh_coords(&t->mesh, rank, t->coord);
	for (int a = 0; a < AXIS_COUNT; a++) {
		t->prog.axis_size[a] = t->mesh.size[a];
		t->prog.axis_rank[a] = t->coord[a];
	}
}

int program_build(struct program *t, const struct config *c, enum model_use use, int32_t rows, int rank,
                  struct err *e)
{
	*t = (struct program){.loss = NONE, .expert_sums = NONE, .expert_load = NONE};
	prog_init(&t->prog);
	if (c->derived.padded_vocab_size == OPTION_NULL_INT)
		return err_set(e, EXIT_CONFIG,
		               "model.vocab_size: how many tokens? Give it, or tokenizer.tokenizer_model");
	int rc = program_mesh(c, use, &t->mesh, e), chunks = 0;
	if (rc)
		return rc;
	take_place(t, rank);
	if ((chunks = split_stages(t, c, e)) < 0)
		return e->code;
	bool generates = use == MODEL_GENERATE;
	if (!generates && (rc = order_work(t, c, use, chunks, e)))
		return rc;
	struct model_spec spec = {.config = &c->model,
	                          .padded_vocab_size = c->derived.padded_vocab_size,
	                          .dtype = program_dtype(c),
	                          .fp8 = c->mixed_precision.precision == PRECISION_FP8 && !generates,
	                          .use = use,
	                          .batch = generates ? 1 : (int32_t)c->train.micro_batch_size,
	                          .rows = generates ? rows : (int32_t)c->model.seq_length,
	                          .exchange = exchanges[c->parallel.cp_comm_type],
	                          .resets_positions = c->dataset.reset_position_ids,
	                          .resets_attention = c->dataset.reset_attention_mask,
	                          .sequence_parallel = c->parallel.sequence_parallel,
	                          .chunk = t->chunk,
	                          .n_chunk = chunks};
	if ((rc = model_build(&t->model, &t->prog, &spec, e)))
		return rc;
	if (use == MODEL_TRAIN)
		run_passes(t, c);
	shard(t, c);
	if (!generates) {
		sum_loss(t);
		sum_experts(t);
	}
	prog_overlap(&t->prog, use == MODEL_TRAIN ? overlapped(c) : 0);
	prog_plan(&t->prog);
	prog_check(&t->prog);
	*e = t->prog.e;
	return e->code;
}

void program_free(struct program *t)
{
	shard_free(&t->sharding);
	schedule_free(&t->schedule);
	model_free(&t->model);
	prog_free(&t->prog);
}

int64_t program_bytes(const struct program *t)
{
	int64_t sum = 0;
	for (int r = 0; r < R_COUNT; r++)
		sum += t->prog.bytes[r];
	return sum;
}

int program_data_rank(const struct program *t)
{
	return t->coord[AXIS_dp] + t->mesh.size[AXIS_dp] * t->coord[AXIS_rp];
}

int program_data_ranks(const struct program *t)
{
	return t->mesh.size[AXIS_dp] * t->mesh.size[AXIS_rp];
}
