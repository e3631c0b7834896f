#include "test/golden_run.h"
#include "ckpt/safetensors.h"
#include "test/ranks.h"
#include "test/test.h"
#include "train/generate.h"
#include "train/pieces.h"
#include "train/state.h"
#include "train/step.h"

#include <hdf5.h>
#include <pthread.h>
#include <stdlib.h>

#define SIZES                                                                                                \
	"model.num_layers=2", "model.hidden_size=48", "model.num_attention_heads=4", "model.vocab_size=131", \
	        "model.seq_length=24", "model.max_position_embeddings=64"
#define NO_BALANCING "model.moe_router_load_balancing_type=none", "model.moe_aux_loss_coeff=0"
#define LLAMA SIZES, "model.num_query_groups=2", "model.ffn_hidden_size=80"

const struct golden golden_models[GOLDEN_MODELS] = {
        {"gpt2",
         {SIZES, "model.position_embedding_type=learned_absolute", "model.normalization=LayerNorm",
          "model.activation=gelu", "model.add_bias_linear=true",
          "model.untie_embeddings_and_output_weights=false"}},
        {"llama", {LLAMA}},
        {"llama3",
         {LLAMA, "model.kv_channels=16", "model.untie_embeddings_and_output_weights=false",
          "model.rotary_base=500000", "model.use_rope_scaling=true", "model.rope_scaling_factor=8",
          "model.rope_scaling_original_max_position_embeddings=16"}},
        {"qwen2", {LLAMA, "model.add_qkv_bias=true", "model.norm_epsilon=1.0e-6"}},
        {"qwen3",
         {LLAMA, "model.kv_channels=24", "model.qk_layernorm=true", "model.norm_epsilon=1.0e-6",
          "model.untie_embeddings_and_output_weights=false"}},
        {"mistral", {LLAMA, "model.window_size=10"}},
        {"mixtral",
         {LLAMA, NO_BALANCING, "model.rotary_base=1000000", "model.num_experts=4",
          "model.moe_router_topk=2"}},
        {"deepseek_v3",
         {SIZES,
          NO_BALANCING,
          "model.ffn_hidden_size=80",
          "model.norm_epsilon=1.0e-6",
          "model.rotary_interleaved=true",
          "model.multi_latent_attention=true",
          "model.q_lora_rank=24",
          "model.kv_lora_rank=16",
          "model.qk_head_dim=16",
          "model.qk_pos_emb_head_dim=8",
          "model.v_head_dim=16",
          "model.num_experts=8",
          "model.moe_layer_freq=([0]+[1])",
          "model.moe_ffn_hidden_size=40",
          "model.moe_shared_expert_intermediate_size=40",
          "model.moe_router_topk=2",
          "model.moe_router_score_function=sigmoid",
          "model.moe_router_num_groups=2",
          "model.moe_router_group_topk=1",
          "model.moe_router_topk_scaling_factor=2.5",
          "model.moe_router_enable_expert_bias=true",
          "model.moe_router_bias_update_rate=0"}},
};

/* Where a logical parameter stands in the Hugging Face file. %d is the layer; `third` picks q, k or v of
 * GPT-2's joined projection, whose matrices are stored [in, out]. */
struct name_row {
	const char *ours, *theirs;
	int transposed, third; /* third: 1, 2, 3 or 0 = the whole */
};

static const struct name_row gpt2_names[] = {
        {"embedding.word_embeddings.weight", "transformer.wte.weight", 0, 0},
        {"embedding.position_embeddings.weight", "transformer.wpe.weight", 0, 0},
        {"decoder.layers.%d.input_layernorm.weight", "transformer.h.%d.ln_1.weight", 0, 0},
        {"decoder.layers.%d.input_layernorm.bias", "transformer.h.%d.ln_1.bias", 0, 0},
        {"decoder.layers.%d.attention.query.weight", "transformer.h.%d.attn.c_attn.weight", 1, 1},
        {"decoder.layers.%d.attention.key.weight", "transformer.h.%d.attn.c_attn.weight", 1, 2},
        {"decoder.layers.%d.attention.value.weight", "transformer.h.%d.attn.c_attn.weight", 1, 3},
        {"decoder.layers.%d.attention.query.bias", "transformer.h.%d.attn.c_attn.bias", 0, 1},
        {"decoder.layers.%d.attention.key.bias", "transformer.h.%d.attn.c_attn.bias", 0, 2},
        {"decoder.layers.%d.attention.value.bias", "transformer.h.%d.attn.c_attn.bias", 0, 3},
        {"decoder.layers.%d.attention.output.weight", "transformer.h.%d.attn.c_proj.weight", 1, 0},
        {"decoder.layers.%d.attention.output.bias", "transformer.h.%d.attn.c_proj.bias", 0, 0},
        {"decoder.layers.%d.pre_mlp_layernorm.weight", "transformer.h.%d.ln_2.weight", 0, 0},
        {"decoder.layers.%d.pre_mlp_layernorm.bias", "transformer.h.%d.ln_2.bias", 0, 0},
        {"decoder.layers.%d.mlp.fc1.weight", "transformer.h.%d.mlp.c_fc.weight", 1, 0},
        {"decoder.layers.%d.mlp.fc1.bias", "transformer.h.%d.mlp.c_fc.bias", 0, 0},
        {"decoder.layers.%d.mlp.fc2.weight", "transformer.h.%d.mlp.c_proj.weight", 1, 0},
        {"decoder.layers.%d.mlp.fc2.bias", "transformer.h.%d.mlp.c_proj.bias", 0, 0},
        {"decoder.final_layernorm.weight", "transformer.ln_f.weight", 0, 0},
        {"decoder.final_layernorm.bias", "transformer.ln_f.bias", 0, 0},
        {NULL, NULL, 0, 0},
};

static const struct name_row llama_names[] = {
        {"embedding.word_embeddings.weight", "model.embed_tokens.weight", 0, 0},
        {"decoder.layers.%d.input_layernorm.weight", "model.layers.%d.input_layernorm.weight", 0, 0},
        {"decoder.layers.%d.attention.query.weight", "model.layers.%d.self_attn.q_proj.weight", 0, 0},
        {"decoder.layers.%d.attention.key.weight", "model.layers.%d.self_attn.k_proj.weight", 0, 0},
        {"decoder.layers.%d.attention.value.weight", "model.layers.%d.self_attn.v_proj.weight", 0, 0},
        {"decoder.layers.%d.attention.query.bias", "model.layers.%d.self_attn.q_proj.bias", 0, 0},
        {"decoder.layers.%d.attention.key.bias", "model.layers.%d.self_attn.k_proj.bias", 0, 0},
        {"decoder.layers.%d.attention.value.bias", "model.layers.%d.self_attn.v_proj.bias", 0, 0},
        {"decoder.layers.%d.attention.query_norm.weight", "model.layers.%d.self_attn.q_norm.weight", 0, 0},
        {"decoder.layers.%d.attention.key_norm.weight", "model.layers.%d.self_attn.k_norm.weight", 0, 0},
        {"decoder.layers.%d.attention.output.weight", "model.layers.%d.self_attn.o_proj.weight", 0, 0},
        {"decoder.layers.%d.pre_mlp_layernorm.weight", "model.layers.%d.post_attention_layernorm.weight", 0,
         0},
        {"decoder.layers.%d.mlp.gate.weight", "model.layers.%d.mlp.gate_proj.weight", 0, 0},
        {"decoder.layers.%d.mlp.up.weight", "model.layers.%d.mlp.up_proj.weight", 0, 0},
        {"decoder.layers.%d.mlp.fc2.weight", "model.layers.%d.mlp.down_proj.weight", 0, 0},
        {"decoder.final_layernorm.weight", "model.norm.weight", 0, 0},
        {"output_layer.weight", "lm_head.weight", 0, 0},
        {NULL, NULL, 0, 0},
};

static const struct name_row mixtral_names[] = {
        {"decoder.layers.%d.mlp.router.weight", "model.layers.%d.block_sparse_moe.gate.weight", 0, 0},
        {"decoder.layers.%d.mlp.experts.%d.gate.weight",
         "model.layers.%d.block_sparse_moe.experts.%d.w1.weight", 0, 0},
        {"decoder.layers.%d.mlp.experts.%d.up.weight",
         "model.layers.%d.block_sparse_moe.experts.%d.w3.weight", 0, 0},
        {"decoder.layers.%d.mlp.experts.%d.fc2.weight",
         "model.layers.%d.block_sparse_moe.experts.%d.w2.weight", 0, 0},
        {NULL, NULL, 0, 0},
};

static const struct name_row deepseek_names[] = {
        {"decoder.layers.%d.attention.query_down.weight", "model.layers.%d.self_attn.q_a_proj.weight", 0, 0},
        {"decoder.layers.%d.attention.query_latent_norm.weight",
         "model.layers.%d.self_attn.q_a_layernorm.weight", 0, 0},
        {"decoder.layers.%d.attention.query_up.weight", "model.layers.%d.self_attn.q_b_proj.weight", 0, 0},
        {"decoder.layers.%d.attention.key_value_down.weight",
         "model.layers.%d.self_attn.kv_a_proj_with_mqa.weight", 0, 0},
        {"decoder.layers.%d.attention.key_value_latent_norm.weight",
         "model.layers.%d.self_attn.kv_a_layernorm.weight", 0, 0},
        {"decoder.layers.%d.attention.key_value_up.weight", "model.layers.%d.self_attn.kv_b_proj.weight", 0,
         0},
        {"decoder.layers.%d.mlp.router.weight", "model.layers.%d.mlp.gate.weight", 0, 0},
        {"decoder.layers.%d.mlp.router.expert_bias", "model.layers.%d.mlp.gate.e_score_correction_bias", 0,
         0},
        {"decoder.layers.%d.mlp.experts.%d.gate.weight", "model.layers.%d.mlp.experts.%d.gate_proj.weight", 0,
         0},
        {"decoder.layers.%d.mlp.experts.%d.up.weight", "model.layers.%d.mlp.experts.%d.up_proj.weight", 0, 0},
        {"decoder.layers.%d.mlp.experts.%d.fc2.weight", "model.layers.%d.mlp.experts.%d.down_proj.weight", 0,
         0},
        {"decoder.layers.%d.mlp.shared_experts.gate.weight",
         "model.layers.%d.mlp.shared_experts.gate_proj.weight", 0, 0},
        {"decoder.layers.%d.mlp.shared_experts.up.weight",
         "model.layers.%d.mlp.shared_experts.up_proj.weight", 0, 0},
        {"decoder.layers.%d.mlp.shared_experts.fc2.weight",
         "model.layers.%d.mlp.shared_experts.down_proj.weight", 0, 0},
        {NULL, NULL, 0, 0},
};

/* Where a gradient is as small as rounding, Adam's first steps are as large as the learning rate. */
const struct golden_tolerance golden_fp32 = {2e-6, 1e-5, 2e-5, 2e-4};
/* bf16 keeps 8 bits: losses of these models stay within 0.3 %, norms within 3 %. */
const struct golden_tolerance golden_bf16 = {1.5e-2, 3e-2, 0, 0};
/* fp16 keeps 11: gradients stay within 1 %. A router near a tie may choose otherwise, as mixtral's does. */
const struct golden_tolerance golden_fp16 = {1e-3, 2e-3, 1e-2, 0}, golden_fp16_choice = {1e-2, 1e-2, 0, 0};

struct golden_run { /* one model in one layout, shared by its ranks */
	const struct golden *g;
	const struct golden_layout *layout;
	const struct backend *backend;
	const struct golden_tolerance *tolerance;
	char folder[1024];
	struct config config;
	struct dataset *data;
	hid_t expected;
	pthread_mutex_t lock; /* of the file, since HDF5 serves one thread at a time */
	float *loss, *norm;
};

/* Layer and, where there is one, expert of a logical name in the place of its numbers. */
static bool fits(const struct name_row *row, const char *ours, char *theirs, size_t cap)
{
	char name[200];
	for (int layer = 0; layer < 2; layer++)
		for (int expert = 0; expert < 8; expert++) {
			snprintf(name, sizeof name, row->ours, layer, expert);
			snprintf(theirs, cap, row->theirs, layer, expert);
			if (!strcmp(name, ours))
				return true;
		}
	return false;
}

/* By the first table of the model's family that knows it. */
static const struct name_row *find_name(const struct golden *g, const char *ours, char *theirs, size_t cap)
{
	const struct name_row *const gpt2[] = {gpt2_names, NULL},
	                             *const mixtral[] = {mixtral_names, llama_names, NULL},
	                             *const deepseek[] = {deepseek_names, llama_names, NULL},
	                             *const llama[] = {llama_names, NULL};
	const struct name_row *const *tables = g == &golden_models[GPT2]       ? gpt2
	                                       : g == &golden_models[MIXTRAL]  ? mixtral
	                                       : g == &golden_models[DEEPSEEK] ? deepseek
	                                                                       : llama;
	for (; *tables; tables++)
		for (const struct name_row *row = *tables; row->ours; row++)
			if (fits(row, ours, theirs, cap))
				return row;
	return NULL;
}

/* Element (r, c) of a logical parameter in a Hugging Face tensor; rows of the padded vocabulary are zero. */
static float element(const struct name_row *row, const struct part *p, const float *theirs, int64_t r,
                     int64_t c)
{
	bool vocabulary = strstr(p->name, "word_embeddings") || !strcmp(p->name, "output_layer.weight");
	int64_t first = row->third ? (row->third - 1) * p->shape[0] : 0;
	int64_t width = row->third ? 3 * p->shape[0] : p->shape[0];
	if (vocabulary && r >= VOCABULARY)
		return 0;
	return theirs[row->transposed ? c * width + first + r : (first + r) * p->shape[1] + c];
}

static void pick(const struct name_row *row, const struct piece *q, const float *theirs, float *ours)
{
	for (int64_t r = 0; r < q->extent[0]; r++)
		for (int64_t c = 0; c < q->extent[1]; c++)
			ours[r * q->extent[1] + c] =
			        element(row, q->part, theirs, q->offset[0] + r, q->offset[1] + c);
}

static double largest(const struct name_row *row, const struct part *p, const float *theirs)
{
	double most = 0;
	for (int64_t r = 0; r < p->shape[0]; r++)
		for (int64_t c = 0; c < p->shape[1]; c++)
			most = fmax(most, fabs(element(row, p, theirs, r, c)));
	return most;
}

/* Weights by the table above, so that what reads Hugging Face folders has a witness. */
static void load_weights(const struct golden_run *run, struct step *s)
{
	struct st_file *file;
	struct piece *list;
	struct err e = {0};
	char path[1200], name[200];
	size_t n = pieces_list(&s->program, SHARD_PARAM, &list);
	snprintf(path, sizeof path, "%s/model.safetensors", run->folder);
	MUST(!st_open(path, &file, &e));
	for (size_t i = 0; i < n; i++) {
		const struct name_row *row = find_name(run->g, list[i].part->name, name, sizeof name);
		const struct st_tensor *t = row ? st_find(file, name) : NULL;
		if (!CHECK(t != NULL))
			continue;
		float *theirs = malloc(t->size_bytes);
		float *ours = malloc((size_t)piece_count(&list[i]) * sizeof *ours);
		CHECK(!st_read(file, t, 0, t->size_bytes, theirs, &e));
		pick(row, &list[i], theirs, ours);
		piece_write(&s->program, s->exec, &list[i], ours);
		free(theirs);
		free(ours);
	}
	free(list);
	st_close(file);
	pieces_refresh_masters(&s->program, s->exec);
}

static void load_share(const struct golden_run *run, struct step *s)
{
	struct weights w;
	struct err e = {0};
	if (!weights_open(run->folder, &w, &e))
		state_load(s, &w, false, &e);
	weights_close(&w);
	if (e.code)
		test_failed(__FILE__, __LINE__, "%s", e.text);
}

static float *read_expected(struct golden_run *run, const char *name, size_t *n)
{
	float *x = NULL;
	pthread_mutex_lock(&run->lock);
	hid_t d = H5Dopen2(run->expected, name, H5P_DEFAULT);
	if (d >= 0) {
		hid_t space = H5Dget_space(d);
		*n = (size_t)H5Sget_simple_extent_npoints(space);
		x = malloc(*n * sizeof *x);
		H5Dread(d, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, x);
		H5Sclose(space);
		H5Dclose(d);
	}
	pthread_mutex_unlock(&run->lock);
	return x;
}

/* Of the first batch, on one rank. */
static void check_logits(struct golden_run *run, struct step *s)
{
	const struct model *m = &s->program.model;
	const struct value *v = &m->prog->value[m->logits];
	struct err e = {0};
	int32_t tokens[72], targets[72];
	size_t n = 0;
	MUST(m->spec.batch == 3);
	MUST(!dataset_batch(run->data, 0, 3, tokens, targets, &e));
	exec_upload(s->exec, m->tokens, tokens);
	exec_upload(s->exec, m->targets, targets);
	MUST(!exec_run(s->exec, &(struct exec_part){.segments = SEG_BIT(FWD), .first = true}, &e));
	float *ours = malloc((size_t)value_bytes(v)), *theirs = read_expected(run, "step0/logits", &n);
	exec_download(s->exec, m->logits, ours);
	MUST(theirs && n == 72 * VOCABULARY);
	double worst = 0;
	for (int r = 0; r < 72; r++)
		for (int c = 0; c < VOCABULARY; c++)
			worst = fmax(worst, fabs(ours[r * v->dim[1] + c] - theirs[r * VOCABULARY + c]));
	CHECK_NEAR(worst, 0, 3e-6);
	free(ours);
	free(theirs);
}

/* Where a gradient is as small as rounding, Adam's steps have any sign: a few weights may be far off. */
static void compare_piece(struct golden_run *run, struct step *s, const struct piece *q,
                          enum shard_state state, const char *prefix)
{
	bool few_may_differ = state == SHARD_PARAM;
	double tolerance = few_may_differ ? run->tolerance->weight : run->tolerance->grad;
	char name[200], path[300];
	size_t n;
	const struct name_row *row = find_name(run->g, q->part->name, name, sizeof name);
	snprintf(path, sizeof path, "%s%s", prefix, name);
	float *theirs = row ? read_expected(run, path, &n) : NULL;
	MUST(theirs != NULL);
	int64_t count = piece_count(q), far = 0, wild = 0;
	float *want = malloc((size_t)count * sizeof *want), *have = malloc((size_t)count * sizeof *have);
	pick(row, q, theirs, want);
	step_read_piece(s, q, state, have);
	double scale = largest(row, q->part, theirs), worst = 0;
	for (int64_t j = 0; j < count; j++) {
		worst = fmax(worst, fabs(have[j] - want[j]));
		far += !(fabs(have[j] - want[j]) <= tolerance * scale);
		wild += !(fabs(have[j] - want[j]) <= 5e-3);
	}
	if (few_may_differ ? far > 1 + count / 500 || wild : far > 0)
		test_failed(__FILE__, __LINE__,
		            "%s %s: %lld of %lld differ, by up to %.3g; largest element %.3g", run->g->folder,
		            path, (long long)far, (long long)count, worst, scale);
	free(theirs);
	free(want);
	free(have);
}

/* This rank's boxes of every logical parameter. The key bias of gpt2 has a gradient of zero but for rounding,
 * which Adam magnifies; the router's bias is none of the parameters that the file has. */
static void compare_pieces(struct golden_run *run, struct step *s, enum shard_state state, const char *prefix)
{
	struct piece *list;
	size_t n = pieces_list(&s->program, state, &list);
	CHECK(n > 0);
	for (size_t i = 0; i < n; i++)
		if (!strstr(list[i].part->name, "attention.key.bias") &&
		    !strstr(list[i].part->name, "expert_bias"))
			compare_piece(run, s, &list[i], state, prefix);
	free(list);
}

static void train(struct golden_run *run, struct step *s)
{
	const struct golden_tolerance *t = run->tolerance;
	struct err e = {0};
	for (int i = 0; i < STEPS && !e.code; i++) {
		struct step_result r;
		if (step_gradients(s, run->data, (uint64_t)(3 * i), &r, &e))
			break;
		CHECK_NEAR(r.lm_loss, run->loss[i], t->loss);
		CHECK_NEAR(r.grad_norm / run->norm[i], 1, t->norm);
		if (i == 0 && t->grad > 0)
			compare_pieces(run, s, SHARD_GRAD, "step0/grad/");
		step_update(s, i + 1, 1e-3, &e);
	}
	if (!e.code && t->weight > 0)
		compare_pieces(run, s, SHARD_PARAM, "final/");
	if (e.code)
		test_failed(__FILE__, __LINE__, "%s", e.text);
}

static void run_step(struct golden_run *run, struct step *s)
{
	(run->layout->ranks > 1 ? load_share : load_weights)(run, s);
	if (run->layout->ranks == 1 && run->tolerance == &golden_fp32 && s->program.model.spec.batch == 3)
		check_logits(run, s);
	train(run, s);
	step_free(s);
}

static void run_rank(int rank, struct comm *world, void *shared)
{
	struct golden_run *run = shared;
	struct step s;
	struct err e = {0};
	struct groups groups = {0};
	struct place_of_rank at = {.backend = run->backend, .world = world, .groups = world ? &groups : NULL};
	struct stream_options options = {.num_threads = run->layout->threads,
	                                 .host = {rank, run->layout->ranks}};
	if (!run->backend->open(&at.stream, &options, &e) &&
	    !step_create(&s, &run->config, MODEL_TRAIN, &at, NULL, &e))
		run_step(run, &s);
	if (e.code)
		test_failed(__FILE__, __LINE__, "rank %d: %s", rank, e.text);
	groups_close(&groups);
	run->backend->close(at.stream);
}

static bool open_config(struct config *c, const struct golden *g, const struct golden_layout *l)
{
	static const char *const common[] = {
	        "train.train_iters=5",        "train.global_batch_size=3",
	        "optimizer.lr=1.0e-3",        "scheduler.lr_decay_style=constant",
	        "optimizer.weight_decay=0.1", "dataset.shuffle=false"};
	const char *sets[WORDS + 12];
	struct err e = {0};
	size_t n = 0;
	for (; g->sets[n]; n++)
		sets[n] = g->sets[n];
	for (size_t i = 0; i < sizeof common / sizeof *common; i++)
		sets[n++] = common[i];
	for (size_t i = 0; i < sizeof l->sets / sizeof *l->sets && l->sets[i]; i++)
		sets[n++] = l->sets[i];
	struct config_source source = {.sets = sets, .n_sets = n};
	bool good = !config_load(c, &source, &e) && !config_check(c, l->ranks, &e);
	if (!good)
		test_failed(__FILE__, __LINE__, "%s on %d ranks: %s", g->folder, l->ranks, e.text);
	return good;
}

static struct dataset *open_data(const char *folder)
{
	struct dataset *d = NULL;
	struct err e = {0};
	char path[1200];
	snprintf(path, sizeof path, "%s/tokens", folder);
	const char *paths[] = {path};
	struct dataset_spec spec = {
	        .paths = paths, .n = 1, .split = {1, 0, 0}, .seq_length = 24, .vocab_size = VOCABULARY};
	if (dataset_open(&spec, &d, &e))
		test_failed(__FILE__, __LINE__, "%s", e.text);
	return d;
}

void golden_check(const struct golden *g, const struct golden_layout *l, const struct backend *backend,
                  const struct golden_tolerance *tolerance)
{
	struct golden_run run = {.g = g, .layout = l, .backend = backend, .tolerance = tolerance};
	char path[1200];
	size_t n = 0;
	snprintf(run.folder, sizeof run.folder, "%s", test_golden(g->folder));
	snprintf(path, sizeof path, "%s/expected.h5", run.folder);
	run.data = open_data(run.folder);
	run.expected = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
	pthread_mutex_init(&run.lock, NULL);
	run.loss = read_expected(&run, "loss", &n);
	CHECK_INT(n, STEPS);
	run.norm = read_expected(&run, "grad_norm", &n);
	CHECK_INT(n, STEPS);
	if (open_config(&run.config, g, l) && CHECK(run.data && run.loss && run.norm))
		ranks_run(l->ranks, run_rank, &run);
	pthread_mutex_destroy(&run.lock);
	free(run.loss);
	free(run.norm);
	H5Fclose(run.expected);
	dataset_close(run.data);
	config_free(&run.config);
}

void golden_check_generation(const struct golden *g, const struct backend *backend)
{
	struct golden_run run = {.g = g};
	struct weights w;
	struct config c;
	struct err e = {0};
	struct generator *generator = NULL;
	struct stream *stream = NULL;
	int32_t tokens[24], targets[24];
	const float *logits;
	char path[1200];
	size_t n = 0;
	snprintf(path, sizeof path, "%s/expected.h5", test_golden(g->folder));
	struct dataset *data = open_data(test_golden(g->folder));
	run.expected = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
	pthread_mutex_init(&run.lock, NULL);
	float *want = read_expected(&run, "step0/logits", &n);
	MUST(data && want && !dataset_batch(data, 0, 1, tokens, targets, &e));
	MUST(!weights_open(test_golden(g->folder), &w, &e) && !generate_read_config(&w, &c, &e));
	MUST(!backend->open(&stream, THREADS(1), &e) &&
	     !generator_new(&c, &w, backend, stream, &generator, &e));
	for (size_t at = 0, some = 10; at < 24 && !e.code; at += some, some = 1) {
		if (generator_feed(generator, tokens + at, some, &logits, &e))
			break;
		for (int v = 0; v < VOCABULARY; v++)
			CHECK_NEAR(logits[v], want[(at + some - 1) * VOCABULARY + (size_t)v], 3e-6);
	}
	if (e.code)
		test_failed(__FILE__, __LINE__, "%s: %s", g->folder, e.text);
	generator_free(generator);
	backend->close(stream);
	weights_close(&w);
	config_free(&c);
	free(want);
	H5Fclose(run.expected);
	pthread_mutex_destroy(&run.lock);
	dataset_close(data);
}
