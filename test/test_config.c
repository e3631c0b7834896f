#include "apps/options.h"
#include "base/err.h"
#include "base/json.h"
#include "base/rng.h"
#include "base/sys.h"
#include "base/yaml.h"
#include "graph/prog.h"
#include "parallel/stages.h"
#include "test/test.h"
#include "train/config.h"
#include "train/run.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

/* Keys that make any configuration complete. */
#define SIZES                                                                                      \
	"model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, seq_length: 32}\ntrain: " \
	"{train_iters: 10}\n"

static char *scratch_file(const char *name, const void *text, size_t bytes)
{
	static char path[4][300];
	static int k;
	char *p = path[k++ % 4];
	snprintf(p, sizeof path[0], "%s/%s", test_dir(), name);
	FILE *f = fopen(p, "wb");
	if (!f || fwrite(text, 1, bytes, f) != bytes || fclose(f))
		abort();
	return p;
}

/* Loads files, then sets, NULL-ended lists; either may be NULL. */
static int load(struct config *c, const char *const *files, const char *const *sets, struct err *e)
{
	struct config_source src = {files, 0, sets, 0};
	while (files && files[src.n_files])
		src.n_files++;
	while (sets && sets[src.n_sets])
		src.n_sets++;
	*e = (struct err){0};
	return config_load(c, &src, e);
}

static int load_text(struct config *c, const void *text, size_t bytes, struct err *e)
{
	const char *files[] = {scratch_file("a.yaml", text, bytes), NULL};
	return load(c, files, NULL, e);
}

static void expect_refused(const char *text, size_t bytes, const char *part, const char *place)
{
	struct config c;
	struct err e;
	CHECK_INT(load_text(&c, text, bytes, &e), EXIT_CONFIG);
	CHECK_INT(e.code, EXIT_CONFIG);
	CHECK_HAS(e.text, part);
	CHECK_HAS(e.text, place);
	config_free(&c);
}

TEST(refuses_bad_yaml)
{
	static const struct {
		const char *text, *part, *place;
	} rows[] = {
	        {"model: {num_layrs: 2}", "model.num_layrs: unknown key; did you mean model.num_layers?",
	         "a.yaml:1:9: "},
	        {"modle: {num_layers: 2}", "unknown group; did you mean model?", "a.yaml:1:1: "},
	        {"qwertyuiop: 2", "qwertyuiop: unknown key", "a.yaml:1:1: "},
	        {"model:\n  num_layers: two",
	         "model.num_layers: two is not a whole number; allowed: a whole number from 1 to",
	         "a.yaml:2:15: "},
	        {"model: {num_layers: 2, num_layers: 3}", "duplicate key, first set in line 1",
	         "a.yaml:1:24: "},
	        {"model: {num_layers: 1}\ntrain: {}\nmodel: {hidden_size: 2}", "model: duplicate key",
	         "a.yaml:3:1: "},
	        {"model: {num_layers: &n 2}", "anchors", "a.yaml:1:21: "},
	        {"model: &m {num_layers: 2}", "anchors", "a.yaml:1:8: "},
	        {"rng: {seed: *n}", "aliases", "a.yaml:1:13: "},
	        {"rng: {seed: !!int 3}", "tags", "a.yaml:1:13: "},
	        {"rng: !!map {seed: 3}", "tags", "a.yaml:1:6: "},
	        {"dataset: {data_path: !<x> [a]}", "tags", "a.yaml:1:22: "},
	        {"rng: {<<: {seed: 3}}", "merge keys", "a.yaml:1:7: "},
	        {"%YAML 1.1\n---\nrng: {seed: 3}", "directives", "a.yaml:1:1: "},
	        {"rng: {seed: 3}\n---\nrng: {seed: 4}", "a second document", "a.yaml:2:1: "},
	        {"- model\n- train", "a mapping of groups belongs here, not a list", "a.yaml:1:1: "},
	        {"model", "a mapping of groups belongs here, not a single value", "a.yaml:1:1: "},
	        {"? [a, b]\n: 3", "a key must be a single word", "a.yaml:1:3: "},
	        {"rng: {seed: 3", "YAML: ", "a.yaml:"},
	        {"rng:\n\tseed: 3", "YAML: ", "a.yaml:2:1: "},
	        {"rng: [seed]", "rng: a mapping of keys belongs here, not a list", "a.yaml:1:6: "},
	        {"rng: {seed: [1, 2]}", "a list where a single value belongs", "a.yaml:1:13: "},
	        {"rng: {seed: {a: 2}}", "a mapping where a single value belongs", "a.yaml:1:13: "},
	        {"dataset: {data_path: [[a]]}", "element 1 is a list", "a.yaml:1:22: "},
	        {"dataset: {data_path: [a, ]}\nrun: {name: \"a\\0b\"}", "NUL", "a.yaml:2:13: "},
	        {"rng: {seed: 3}\n\xc2\x80", "control character 0x80", "a.yaml:2:1: "},
	        {"rng: {seed: 3}\x01", "control character 0x01", "a.yaml:1:15: "},
	        {"run: {dir: \"a\xff\"}", "byte 0xff at offset 13 is not UTF-8", "a.yaml:1:14: "},
	        {"run: {dir: \"\xed\xa0\x80\"}", "not UTF-8", "a.yaml:1:13: "},
	        {"run: {dir: \"\xc0\xaf\"}", "not UTF-8", "a.yaml:1:13: "},
	        {"peft: {peft_scheme: lora}", "not built yet", "a.yaml:1:1: "},
	        {"parallel: {context_parallel_size: 0}",
	         "parallel.context_parallel_size: 0 is too small; allowed: a whole number from 1 to 65536",
	         "a.yaml:1:35: "},
	        {"parallel: {cp_comm_type: ring}",
	         "unknown value 'ring'; allowed: p2p|all_gather|a2a; did you mean p2p?", "a.yaml:1:26: "},
	        {"parallel: autom",
	         "parallel.layout: unknown value 'autom'; allowed: given|auto; did you mean auto?",
	         "a.yaml:1:11: "},
	        {"parallel: [auto]", "parallel: a mapping of keys belongs here, not a list", "a.yaml:1:11: "},
	        {"parallel: {virtual_pipeline_model_parallel_size: 65}",
	         "65 is too large; allowed: a whole number from 1 to 64", "a.yaml:1:50: "},
	        {"model: {architecture: t5}", "t5 is not built yet; allowed: gpt", "a.yaml:1:23: "},
	        {"ddp: {zero_stage: 4}", "4 is too large; allowed: a whole number from 0 to 3",
	         "a.yaml:1:19: "},
	};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		expect_refused(rows[i].text, strlen(rows[i].text), rows[i].part, rows[i].place);
}

TEST(types_are_strict)
{
	static const struct {
		const char *set, *part;
	} bad[] = {
	        {"model.qk_layernorm=yes",
	         "yes is not true or false; allowed: true|false; did you mean true?"},
	        {"model.qk_layernorm=no", "did you mean false?"},
	        {"model.qk_layernorm=On", "did you mean true?"},
	        {"model.qk_layernorm=1", "did you mean true?"},
	        {"model.qk_layernorm=\"true\"", "did you mean true?"},
	        {"model.qk_layernorm=", "must not be empty"},
	        {"model.num_layers=4.0", "did you mean 4?"},
	        {"model.num_layers=1_000", "did you mean 1000?"},
	        {"model.num_layers=4k", "4k is not a whole number"},
	        {"model.num_layers=0x10", "is not a whole number"},
	        {"model.num_layers=010", "did you mean 10?"},
	        {"model.num_layers=\"4\"", "did you mean 4?"},
	        {"model.num_layers=0", "0 is too small; allowed: a whole number from 1 to 100000"},
	        {"model.num_layers=-1", "too small"},
	        {"model.num_layers=99999999999999999999", "too large"},
	        {"train.micro_batch_size=null", "must not be empty"},
	        {"optimizer.lr=1e400", "too large"},
	        {"optimizer.lr=.nan", "not a number"},
	        {"optimizer.lr=.inf", "not a number"},
	        {"optimizer.lr=0x1p3", "not a number"},
	        {"optimizer.lr=1e", "not a number"},
	        {"optimizer.lr=.", "not a number"},
	        {"optimizer.lr=-1", "too small; allowed: a number from 0 to 1000"},
	        {"optimizer.adam_beta1=1", "1 is too large; allowed: a number from 0 and below 1"},
	        {"model.norm_epsilon=0", "0 is too small; allowed: a number above 0"},
	        {"model.normalization=rmsnorm", "allowed: LayerNorm|RMSNorm; did you mean RMSNorm?"},
	        {"model.activation=silu", "did you mean swiglu?"},
	        {"mixed_precision=bf17", "did you mean bf16?"},
	        {"mixed_precision=float16", "did you mean fp16?"},
	        {"mixed_precision.loss_scale=0", "0 is too small; allowed: a number above 0"},
	        {"mixed_precision.hysteresis=0", "allowed: a whole number from 1 to"},
	        {"optimizer=adam", "a mapping of keys belongs here"},
	        {"run.dir=[a", "YAML"},
	        {"run.dir=*a", "aliases"},
	        {"lr=3", "did you mean optimizer.lr?"},
	        {"num_layers", "group.key=value"},
	        {"=3", "group.key=value"},
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		struct config c;
		struct err e;
		const char *sets[] = {bad[i].set, NULL};
		CHECK_INT(load(&c, NULL, sets, &e), EXIT_CONFIG);
		CHECK_HAS(e.text, bad[i].part);
		CHECK_HAS(e.text, "--set ");
		CHECK_HAS(e.text, bad[i].set);
		config_free(&c);
	}
}

TEST(takes_what_yaml_writes)
{
	const char *sets[] = {"optimizer.lr=1e-5",
	                      "optimizer.min_lr=0",
	                      "optimizer.clip_grad=2",
	                      "model.rotary_base=5e5",
	                      "run.name=123",
	                      "run.dir=",
	                      "dataset.data_path=[a, \"b c\"]",
	                      "model.qk_layernorm=true",
	                      "mixed_precision=bf16",
	                      "model.window_size=null",
	                      "model.num_layers=+7",
	                      "optimizer={lr: .5, adam_eps: 1.e-6}",
	                      "dataset.split='1,2,3'",
	                      "model.init_method_std=1E-2",
	                      NULL};
	struct config c;
	struct err e;
	CHECK_INT(load(&c, NULL, sets, &e), 0);
	CHECK_NEAR(c.optimizer.lr, 0.5, 0);
	CHECK_NEAR(c.optimizer.adam_eps, 1e-6, 0);
	CHECK_NEAR(c.optimizer.clip_grad, 2, 0);
	CHECK_NEAR(c.model.rotary_base, 5e5, 0);
	CHECK_NEAR(c.model.init_method_std, 0.01, 0);
	CHECK_STR(c.run.name, "123");
	CHECK(!c.run.dir);
	CHECK_INT(c.dataset.data_path.n, 2);
	CHECK_STR(c.dataset.data_path.items[1], "b c");
	CHECK(c.model.qk_layernorm);
	CHECK_INT(c.mixed_precision.precision, PRECISION_BF16);
	CHECK_INT(c.model.window_size, OPTION_NULL_INT);
	CHECK_INT(c.model.num_layers, 7);
	CHECK_STR(c.dataset.split, "1,2,3");
	config_free(&c);
}

TEST(precisions_have_two_forms)
{
	static const char yaml[] =
	        "mixed_precision: {precision: fp16, loss_scale: null, initial_loss_scale: "
	        "4294967296, min_loss_scale: 1.0, loss_scale_window: 500, hysteresis: 3}\n";
	static const char *const word[] = {"mixed_precision=fp16", NULL};
	struct config c, d;
	struct err e;
	CHECK_INT(load_text(&c, yaml, sizeof yaml - 1, &e), 0);
	CHECK_INT(load(&d, NULL, word, &e), 0);
	CHECK_INT(c.mixed_precision.precision, PRECISION_FP16);
	CHECK_INT(d.mixed_precision.precision, PRECISION_FP16);
	CHECK(isnan(c.mixed_precision.loss_scale) && isnan(d.mixed_precision.loss_scale));
	CHECK_NEAR(c.mixed_precision.initial_loss_scale, d.mixed_precision.initial_loss_scale, 0);
	CHECK_NEAR(c.mixed_precision.min_loss_scale, d.mixed_precision.min_loss_scale, 0);
	CHECK_INT(c.mixed_precision.loss_scale_window, 500);
	CHECK_INT(c.mixed_precision.hysteresis, 3);
	CHECK_INT(d.mixed_precision.loss_scale_window, 1000);
	CHECK_INT(d.mixed_precision.hysteresis, 2);
	config_free(&c);
	config_free(&d);
}

/* n times `unit`, then `tail`. */
static char *repeat(const char *unit, size_t n, const char *tail)
{
	struct buf b = {0};
	while (n--)
		buf_puts(&b, unit);
	buf_puts(&b, tail);
	return b.data;
}

TEST(limits_hold)
{
	char *deep = repeat("[", 5000, ""), *block = repeat("- ", 400, "x"), *braces = repeat("{a: ", 40, "");
	expect_refused(deep, strlen(deep), "nested too deep; allowed: 32 levels", "a.yaml:1:33: ");
	expect_refused(block, strlen(block), "nested too deep", "a.yaml:1:");
	expect_refused(braces, strlen(braces), "nested too deep", "a.yaml:1:");
	char *many = repeat("- 1\n", 20000, ""),
	     *large = repeat("# 0123456789012345678901234567890\n", 70000, "");
	expect_refused(many, strlen(many), "allowed: 10000 events", "a.yaml:");
	expect_refused(large, strlen(large), "1048576", "a.yaml");
	char *bomb = repeat("a: &a [*a, *a, *a, *a]\n", 50, "");
	expect_refused(bomb, strlen(bomb), "aliases (*name) are not allowed", "a.yaml:1:8: ");
	static const char utf16[] = "\xff\xfer\0n\0g\0:\0 \0{\0}\0";
	expect_refused(utf16, sizeof utf16 - 1, "is the file UTF-16? save it as UTF-8", "a.yaml:1:1: ");
	expect_refused("r\0n", 3, "not UTF-8 text", "a.yaml:1:2: ");
	char *lists[] = {deep, block, braces, many, large, bomb};
	for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
		free(lists[i]);
}

TEST(empty_files_are_empty_layers)
{
	static const char *const texts[] = {"",   "\n",           "# nothing\n",      "---\n",
	                                    "{}", "\xef\xbb\xbf", "model:\ntrain:\n", "~"};
	for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
		struct config c;
		struct err e;
		if (!strcmp(texts[i], "~"))
			CHECK_INT(load_text(&c, texts[i], strlen(texts[i]), &e), EXIT_CONFIG);
		else
			CHECK_INT(load_text(&c, texts[i], strlen(texts[i]), &e), 0);
		config_free(&c);
	}
	struct config c;
	struct err e;
	CHECK_INT(load_text(&c, "", 0, &e), 0);
	CHECK_INT(config_check(&c, 1, &e), EXIT_CONFIG);
	static const char *const required[] = {"model.num_layers: required", "model.hidden_size: required",
	                                       "model.num_attention_heads: required",
	                                       "model.seq_length: required", "train.train_iters: required"};
	for (size_t i = 0; i < sizeof required / sizeof *required; i++)
		CHECK_HAS(e.text, required[i]);
	config_free(&c);
}

TEST(missing_file_is_no_input)
{
	struct config c;
	struct err e;
	const char *files[] = {"/nonexistent/a.yaml", NULL}, *sets[] = {"model.num_layers=x", NULL};
	CHECK_INT(load(&c, files, NULL, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "/nonexistent/a.yaml");
	config_free(&c);
	CHECK_INT(load(&c, files, sets, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "/nonexistent/a.yaml");
	CHECK_HAS(e.text, "model.num_layers");
	config_free(&c);
	sys_fail_nth(3, EIO);
	const char *demo[] = {test_golden("config/demo.yaml"), NULL};
	CHECK_INT(load(&c, demo, NULL, &e), EXIT_IO);
	sys_fail_nth(0, 0);
	config_free(&c);
}

TEST(foreign_spellings_find_ours)
{
	static const struct {
		const char *place, *meant;
	} rows[] = {
	        {"1:1: max_steps", "train.train_iters"},
	        {"2:1: bf16", "mixed_precision? (mixed_precision: bf16)"},
	        {"4:3: model.num_hidden_layers", "model.num_layers"},
	        {"5:3: model.num_key_value_heads", "model.num_query_groups"},
	        {"6:3: model.hidden_act", "model.activation"},
	        {"7:3: model.recompute_granularity", "recompute.granularity"},
	        {"9:3: train.lr", "optimizer.lr"},
	        {"10:3: train.per_device_train_batch_size", "train.micro_batch_size"},
	        {"11:3: train.learning_rate", "optimizer.lr"},
	        {"12:12: training.steps", "train.train_iters"},
	        {"12:23: training.max_norm", "optimizer.clip_grad"},
	        {"13:15: parallelism.tp", "parallel.tensor_model_parallel_size"},
	        {"14:7: ddp.use_distributed_optimizer", "ddp.zero_stage? (1 shards the optimizer)"},
	};
	struct config c;
	struct err e;
	const char *files[] = {test_golden("config/foreign.yaml"), NULL};
	CHECK_INT(load(&c, files, NULL, &e), EXIT_CONFIG);
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		char line[200];
		snprintf(line, sizeof line, "foreign.yaml:%s: unknown key; did you mean %s", rows[i].place,
		         rows[i].meant);
		CHECK_HAS(e.text, line);
	}
	CHECK_HAS(e.text, "15:1: optimiser: unknown group; did you mean optimizer?");
	config_free(&c);
}

static const struct {
	const char *foreign, *ours;
} foreign_layouts[] = {
        {"--tensor-model-parallel-size", "parallel.tensor_model_parallel_size"},
        {"--sequence-parallel", "parallel.sequence_parallel"},
        {"--num-layers-per-virtual-pipeline-stage", "parallel.virtual_pipeline_model_parallel_size"},
        {"--num-virtual-stages-per-pipeline-rank", "parallel.virtual_pipeline_model_parallel_size"},
        {"--decoder-first-pipeline-num-layers", "parallel.num_layers_in_first_pipeline_stage"},
        {"--account-for-loss-in-pipeline-split", "parallel.account_for_loss_in_pipeline_split"},
        {"--pipeline-model-parallel-layout", "parallel.pipeline_model_parallel_layout"},
        {"--use-distributed-optimizer", "ddp.zero_stage"},
        {"--ddp-bucket-size", "ddp.bucket_size"},
        {"--grad-reduce-in-bf16", "ddp.grad_reduce_in_fp32"},
        {"--overlap-grad-reduce", "ddp.overlap_grad_reduce"},
        {"--tp-comm-overlap", "comm_overlap.tp_comm_overlap"},
        {"--loss-scale", "mixed_precision.loss_scale"},
        {"--initial-loss-scale", "mixed_precision.initial_loss_scale"},
        {"--min-loss-scale", "mixed_precision.min_loss_scale"},
        {"--loss-scale-window", "mixed_precision.loss_scale_window"},
        {"--hysteresis", "mixed_precision.hysteresis"},
        {"fp16.initial_scale_power", "mixed_precision.initial_loss_scale"},
        {"--fp16", "mixed_precision"},
        {"--recompute-modules", "recompute.modules"},
        {"ddp.data_parallel_sharding_strategy", "ddp.zero_stage"},
        {"parallelism.tensor_parallel_degree", "parallel.tensor_model_parallel_size"},
        {"parallelism.pipeline_parallel_degree", "parallel.pipeline_model_parallel_size"},
        {"parallelism.data_parallel_replicate_degree", "ddp.num_distributed_optimizer_instances"},
        {"parallelism.data_parallel_shard_degree", "ddp.zero_stage"},
        {"parallelism.enable_async_tensor_parallel", "comm_overlap.tp_comm_overlap"},
        {"parallelism.tp", "parallel.tensor_model_parallel_size"},
        {"parallelism.pp", "parallel.pipeline_model_parallel_size"},
        {"parallelism.dp", "parallel.tensor_model_parallel_size"},
        {"parallelism.tp_mode", "parallel.sequence_parallel"},
        {"parallelism.tp_linear_async_communication", "comm_overlap.tp_comm_overlap"},
        {"optimizer.accumulate_grad_in_fp32", "ddp.grad_reduce_in_fp32"},
        {"zero_optimization.stage", "ddp.zero_stage"},
        {"zero_optimization.reduce_bucket_size", "ddp.bucket_size"},
        {"zero_optimization.overlap_comm", "ddp.overlap_grad_reduce"},
        {"megatron_lm_config.megatron_lm_tp_degree", "parallel.tensor_model_parallel_size"},
        {"megatron_lm_config.megatron_lm_pp_degree", "parallel.pipeline_model_parallel_size"},
        {"parallelism_config.parallelism_config_dp_replicate_size",
         "ddp.num_distributed_optimizer_instances"},
        {"fsdp_config.fsdp_sharding_strategy", "ddp.zero_stage"},
        {"--context-parallel-size", "parallel.context_parallel_size"},
        {"--cp-comm-type", "parallel.cp_comm_type"},
        {"--expert-model-parallel-size", "parallel.expert_model_parallel_size"},
        {"--expert-tensor-parallel-size", "parallel.expert_tensor_parallel_size"},
        {"--num-experts", "model.num_experts"},
        {"--moe-layer-freq", "model.moe_layer_freq"},
        {"--moe-router-topk", "model.moe_router_topk"},
        {"--moe-aux-loss-coeff", "model.moe_aux_loss_coeff"},
        {"--kv-lora-rank", "model.kv_lora_rank"},
        {"--reset-attention-mask", "dataset.reset_attention_mask"},
        {"parallelism.context_parallel_degree", "parallel.context_parallel_size"},
        {"parallelism.expert_parallel_degree", "parallel.expert_model_parallel_size"},
        {"parallelism.expert_tensor_parallel_degree", "parallel.expert_tensor_parallel_size"},
        {"parallelism.expert_parallel_size", "parallel.expert_model_parallel_size"},
        {"ulysses_sequence_parallel_size", "parallel.context_parallel_size"},
        {"num_local_experts", "model.num_experts"},
        {"n_routed_experts", "model.num_experts"},
        {"model.num_experts_per_tok", "model.moe_router_topk"},
        {"moe_intermediate_size", "model.moe_ffn_hidden_size"},
        {"router_aux_loss_coef", "model.moe_aux_loss_coeff"},
        {"first_k_dense_replace", "model.moe_layer_freq"},
        {"qk_rope_head_dim", "model.qk_pos_emb_head_dim"},
        {"n_shared_experts", "model.moe_shared_expert_intermediate_size"},
        {"rope_type", "model.rope_type"},
        {"eos_token_id", "tokenizer.eod_id"},
};

TEST(foreign_layouts_find_ours)
{
	for (size_t i = 0; i < sizeof foreign_layouts / sizeof *foreign_layouts; i++) {
		const char *note = NULL;
		CHECK_STR(option_nearest(config_table(), foreign_layouts[i].foreign, &note),
		          foreign_layouts[i].ours);
	}
	struct config c;
	struct err e;
	const char *sets[] = {"parallel.pipeline_schedule=Interleaved1F1B",
	                      "parallel.pipeline_schedule=GPipe", "parallel.pipeline_schedule=1F1B", NULL};
	CHECK_INT(load(&c, NULL, sets, &e), EXIT_CONFIG);
	CHECK_HAS(e.text,
	          "'Interleaved1F1B'; allowed: 1f1b|interleaved|zero_bubble; did you mean interleaved?");
	CHECK_HAS(e.text, "'GPipe'; allowed: 1f1b|interleaved|zero_bubble; did you mean 1f1b?");
	CHECK_HAS(e.text, "'1F1B'; allowed: 1f1b|interleaved|zero_bubble; did you mean 1f1b?");
	config_free(&c);
}

TEST(every_alias_leads_to_a_key)
{
	const struct option_table *t = config_table();
	for (size_t i = 0; i < t->n_aliases; i++) {
		const struct option_alias *a = &t->aliases[i];
		const char *equals = strchr(a->name, '='), *note = NULL;
		char name[100];
		snprintf(name, sizeof name, "%.*s", (int)strcspn(a->name, "="), a->name);
		const struct option *o = option_find(t, equals ? name : a->key);
		if (!equals)
			CHECK(o || !strcmp(a->key, "mixed_precision"));
		else
			MUST(o && o->type == OPTION_ENUM);
		if (equals) {
			const struct option_choice *c = o->choices;
			while (c->name && strcmp(c->name, a->key))
				c++;
			CHECK(c->name);
		}
		CHECK(!option_find(t, a->name)); /* never one of our own */
		CHECK_STR(option_find_alias(t, a->name, &note), a->key);
	}
	const char *note = NULL;
	CHECK_STR(option_nearest(t, "--Num-Layers", &note), "model.num_layers");
	CHECK_STR(option_nearest(t, "model.optimizer", &note), "optimizer.optimizer");
	CHECK(!option_nearest(t, "zzzzzzzzzzzz", &note));
}

TEST(later_layers_win_and_say_where)
{
	struct config c;
	struct err e;
	const char *demo = test_golden("config/demo.yaml"),
	           *experiment = test_golden("config/experiment.yaml");
	const char *files[] = {demo, experiment, NULL};
	const char *sets[] = {"train.micro_batch_size=8", "train.micro_batch_size=4", "optimizer.lr=1e-3",
	                      NULL};
	MUST(!load(&c, files, sets, &e));
	CHECK_INT(c.model.num_layers, 6);
	CHECK_INT(c.model.hidden_size, 256);
	CHECK_INT(c.train.micro_batch_size, 4);
	CHECK_INT(c.model.num_query_groups, OPTION_NULL_INT);
	CHECK_HAS(config_get_origin(&c, "model.num_layers"), "experiment.yaml:4:15");
	CHECK_HAS(config_get_origin(&c, "model.hidden_size"), "demo.yaml:6:16");
	CHECK_STR(config_get_origin(&c, "train.micro_batch_size"), "--set train.micro_batch_size=4");
	CHECK_STR(config_get_origin(&c, "model.rotary_percent"), "default");
	CHECK(!config_get_origin(&c, "model.nothing"));
	CHECK(config_is_given(&c, "optimizer.lr"));
	CHECK(!config_is_given(&c, "model.rotary_percent"));
	MUST(!config_check(&c, 2, &e));
	CHECK_STR(config_get_origin(&c, "model.num_query_groups"), "derived");
	CHECK_INT(c.model.num_query_groups, 8);
	CHECK_INT(c.derived.accumulation, 4);
	config_free(&c);
}

static void check_same_values(const struct config *a, const struct config *b)
{
	for (size_t i = 0; i < config_table()->n; i++) {
		const struct option *o = &config_table()->rows[i];
		struct buf x = {0}, y = {0};
		option_put_value(&a->set, o, &x);
		option_put_value(&b->set, o, &y);
		if (strcmp(x.data, y.data))
			test_failed(__FILE__, __LINE__, "%s: %s became %s", o->key, x.data, y.data);
		buf_free(&x);
		buf_free(&y);
	}
}

/* Writes *c, loads it again, checks again. */
static void check_round_trip(const struct config *c)
{
	struct buf text = {0}, again = {0};
	struct config d;
	struct err e;
	config_write_yaml(c, &text);
	const char *files[] = {scratch_file("resolved.yaml", text.data, text.length), NULL};
	if (CHECK(!load(&d, files, NULL, &e)) && CHECK(!config_check(&d, (int)c->derived.world_size, &e))) {
		check_same_values(c, &d);
		CHECK(config_hash(c) == config_hash(&d));
		CHECK_INT(c->derived.accumulation, d.derived.accumulation);
		CHECK_INT(c->derived.optimizer_shards, d.derived.optimizer_shards);
		if (CHECK(c->derived.stages.n == d.derived.stages.n))
			for (size_t i = 0; i < d.derived.stages.n; i++)
				CHECK_STR(c->derived.stages.items[i], d.derived.stages.items[i]);
	} else {
		test_failed(__FILE__, __LINE__, "%s", e.text);
	}
	config_free(&d);
	buf_free(&text);
	buf_free(&again);
}

TEST(resolved_configuration_loads_again)
{
	struct config c;
	struct err e;
	const char *files[] = {test_golden("config/demo.yaml"), test_golden("config/experiment.yaml"), NULL};
	const char *sets[] = {"run.name=\"# \\\"odd\\\\\\n: \\u2028\\x7f é\"",
	                      "scheduler.lr_warmup_iters=null",
	                      "scheduler.lr_warmup_fraction=0.3",
	                      "recompute.granularity=full",
	                      "optimizer.lr=0.1234567890123456789",
	                      "run.dir='null'",
	                      "checkpoint.load='1e5'",
	                      "checkpoint.pretrained_checkpoint='a\xc2\x85model: 3'",
	                      "tokenizer.tokenizer_model=\"a\nb\"",
	                      NULL};
	MUST(!load(&c, files, sets, &e));
	MUST(!config_check(&c, 1, &e));
	CHECK_INT(c.scheduler.lr_warmup_iters, 150);
	CHECK_INT(c.recompute.num_layers, 6);
	check_round_trip(&c);
	struct buf text = {0};
	config_write_yaml(&c, &text);
	CHECK_HAS(text.data, "# derived: lr_warmup_fraction");
	CHECK_HAS(text.data, "experiment.yaml:4:15");
	CHECK_HAS(text.data, "# --set optimizer.lr=0.1234567890123456789");
	buf_free(&text);
	config_free(&c);
}

TEST(strings_read_back)
{
	static const char *const strings[] = {"a",
	                                      "",
	                                      " a ",
	                                      "null",
	                                      "~",
	                                      "TRUE",
	                                      "no",
	                                      "1e5",
	                                      "0x1f",
	                                      "-",
	                                      "- a",
	                                      "a: b",
	                                      "a#b",
	                                      "a #b",
	                                      "'",
	                                      "\"",
	                                      "\\",
	                                      "a\nb\tc",
	                                      "[a]",
	                                      "{a}",
	                                      "a,b",
	                                      "*a",
	                                      "&a",
	                                      "!a",
	                                      "%a",
	                                      "@a",
	                                      "`a",
	                                      "\x7f",
	                                      "\xc2\x85",
	                                      "\xe2\x80\xa8",
	                                      "\xef\xbb\xbf",
	                                      "\xef\xbf\xbf",
	                                      "é日本",
	                                      "\xf0\x9f\x98\x80",
	                                      "-1",
	                                      "...",
	                                      "---",
	                                      "/a/b.c",
	                                      "a@b",
	                                      "=",
	                                      "<<",
	                                      "?",
	                                      ": ",
	                                      "|",
	                                      ">",
	                                      ".inf"};
	for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
		struct arena a = {0};
		struct buf b = {0};
		struct err e = {0};
		struct yaml_node *v = NULL;
		buf_puts(&b, "k: [");
		yaml_put_string(&b, strings[i]);
		buf_puts(&b, "]");
		CHECK_INT(yaml_parse(&a, "t", b.data, b.length, &v, &e), 0);
		if (CHECK(v && v->child && v->child->child))
			CHECK_STR(v->child->child->scalar, strings[i]);
		buf_free(&b);
		arena_free(&a);
	}
}

TEST(cross_checks)
{
	static const struct {
		const char *set, *set2, *part;
	} rows[] = {
	        {"model.num_query_groups=3", NULL, "model.num_attention_heads 4 (/"},
	        {"model.num_query_groups=3", NULL, "is not a multiple of 3; nearest: 2 or 4"},
	        {"model.num_attention_heads=5", NULL, "model.hidden_size 64"},
	        {"model.num_attention_heads=5", NULL, "is not a multiple of 5; nearest: 4 or 8"},
	        {"model.kv_channels=15", NULL,
	         "15 is odd, but rope rotates channels in pairs; nearest: 14 or 16"},
	        {"model.rotary_percent=0.2", NULL, "0.2 of kv_channels 16 is 3 rotated channels"},
	        {"model.use_rope_scaling=true", "model.rope_scaling_low_freq_factor=4",
	         "must be below model.rope_scaling_high_freq_factor 4 (default)"},
	        {"model.use_rope_scaling=true", "model.position_embedding_type=none",
	         "needs model.position_embedding_type rope"},
	        {"model.position_embedding_type=learned_absolute", "model.max_position_embeddings=16",
	         "32 is more than model.max_position_embeddings 16 (--set model.max_position_embeddings=16)"},
	        {"model.rope_type=yarn", "model.use_rope_scaling=true",
	         "model.use_rope_scaling: true does not go with model.rope_type yarn (--set "
	         "model.rope_type=yarn); allowed: false"},
	        {"model.rope_type=yarn", "model.yarn_beta_slow=32",
	         "32 must be below model.yarn_beta_fast 32 (default)"},
	        {"model.rope_type=yarn", "model.position_embedding_type=none",
	         "yarn needs model.position_embedding_type rope, not "},
	        {"dataset.reset_position_ids=true", NULL,
	         "dataset.reset_position_ids: true needs to know which token ends a document: give "
	         "tokenizer.eod_id, or tokenizer.tokenizer_model"},
	        {"dataset.reset_attention_mask=true", NULL,
	         "dataset.reset_attention_mask: true needs to know"},
	        {"tokenizer.eod_id=500", "model.vocab_size=500",
	         "tokenizer.eod_id: 500 is not below model.vocab_size 500 (--set "},
	        {"train.global_batch_size=30", "train.micro_batch_size=4",
	         "30 = micro_batch_size 4 (--set train.micro_batch_size=4) · data_parallel 1 · accumulation "
	         "7.5, and accumulation must be a whole number; nearest: 28 or 32"},
	        {"train.global_batch_size=2", "train.micro_batch_size=4", "nearest: 4"},
	        {"scheduler.lr_warmup_iters=10", NULL,
	         "10 must be below scheduler.lr_decay_iters 10 (derived)"},
	        {"scheduler.lr_warmup_iters=12", "scheduler.lr_decay_iters=20",
	         "12 must be below train.train_iters 10"},
	        {"scheduler.lr_warmup_iters=4", "scheduler.lr_warmup_fraction=0.5",
	         "is 5 steps, not scheduler.lr_warmup_iters 4"},
	        {"optimizer.min_lr=1", NULL, "1 is more than optimizer.lr 0.0003 (default)"},
	        {"scheduler.lr_warmup_init=1", NULL, "1 is more than optimizer.lr"},
	        {"mixed_precision={precision: fp16, min_loss_scale: 16}",
	         "mixed_precision.initial_loss_scale=8",
	         "16 is more than mixed_precision.initial_loss_scale 8 (--set "},
	        {"scheduler.lr_decay_style=WSD", NULL,
	         "scheduler.lr_wsd_decay_iters: scheduler.lr_decay_style WSD"},
	        {"scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=11",
	         "11 is more than scheduler.lr_decay_iters 10"},
	        {"dataset.split=1,2", NULL, "'1,2' is not three numbers"},
	        {"dataset.split=1,2,x", NULL, "is not three numbers"},
	        {"dataset.split=1,2,3,4", NULL, "is not three numbers"},
	        {"dataset.split='1,2,'", NULL, "is not three numbers"},
	        {"dataset.split=1,-2,3", NULL, "is not three numbers"},
	        {"dataset.split=0,0,0", NULL, "is not three numbers"},
	        {"dataset.split=null", NULL, "must not be empty"},
	        {"dataset.split=0,1,1", NULL, "leaves nothing to train on"},
	        {"dataset.split=1,0,0", "validation.eval_interval=5",
	         "leaves nothing to validate on, but validation.eval_interval 5"},
	        {"dataset.data_path=[0.5, a, 0.5]", NULL, "3 elements are not pairs of weight and path"},
	        {"dataset.data_path=[0.5, a, b, c]", NULL, "element 3, 'b', is not a weight above 0"},
	        {"dataset.data_path=[0, a]", NULL, "element 1, '0', is not a weight above 0"},
	        {"validation.eval_iters=0", "validation.eval_interval=5",
	         "0 with validation.eval_interval 5"},
	        {"checkpoint.finetune=true", NULL, "needs checkpoint.pretrained_checkpoint"},
	        {"recompute.num_layers=1", NULL, "only recompute.granularity full reads it"},
	        {"recompute.num_layers=3", "recompute.granularity=full", "3 is more than model.num_layers 2"},
	};
	const char *files[] = {scratch_file("sizes.yaml", SIZES, strlen(SIZES)), NULL};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		struct config c;
		struct err e;
		const char *sets[] = {rows[i].set, rows[i].set2, NULL};
		int rc = load(&c, files, sets, &e);
		CHECK_INT(rc ? rc : config_check(&c, 1, &e), EXIT_CONFIG);
		CHECK_HAS(e.text, rows[i].part);
		config_free(&c);
	}
}

#define MLA                                                                                         \
	"model.multi_latent_attention=true", "model.qk_head_dim=16", "model.qk_pos_emb_head_dim=8", \
	        "model.v_head_dim=16", "model.kv_lora_rank=16"
#define EXPERTS "model.num_experts=8"

/* What a model of experts, or with latent attention, may not be. */
static const struct {
	const char *sets[8], *part;
} bad_models[] = {
        {{MLA, "model.num_query_groups=2"},
         "model.num_query_groups: 2, but under model.multi_latent_attention true (--set "
         "model.multi_latent_attention=true) every query head has a key of its own; allowed: 4"},
        {{MLA, "model.kv_channels=16"},
         "model.kv_channels: 16, but under multi_latent_attention it is model.qk_head_dim 16 (--set "
         "model.qk_head_dim=16) + model.qk_pos_emb_head_dim 8 (--set model.qk_pos_emb_head_dim=8) = 24; "
         "allowed: 24, or leave it out"},
        {{MLA, "model.add_qkv_bias=true"},
         "model.add_qkv_bias: model.add_qkv_bias true (--set model.add_qkv_bias=true) does not go with "
         "model.multi_latent_attention true (--set model.multi_latent_attention=true): its projections have "
         "no biases; allowed: false"},
        {{MLA, "model.add_bias_linear=true"}, "model.add_bias_linear: "},
        {{MLA, "model.qk_layernorm=true"}, "its latents have norms of their own; allowed: false"},
        {{MLA, "model.position_embedding_type=learned_absolute"}, "made for rotation; allowed: rope"},
        {{MLA, "model.position_embedding_type=none"}, "made for rotation; allowed: rope"},
        {{MLA, "model.rotary_percent=0.5"}, "qk_pos_emb_head_dim says how many channels rotate; allowed: 1"},
        {{MLA, "model.qk_pos_emb_head_dim=7"},
         "7 is odd, but rope rotates channels in pairs; nearest: 6 or 8"},
        {{EXPERTS, "model.moe_router_topk=9"},
         "model.moe_router_topk: 9 is more than model.num_experts 8 (--set model.num_experts=8)"},
        {{EXPERTS, "model.moe_router_group_topk=2"},
         "2 needs model.moe_router_num_groups too; give both or neither"},
        {{EXPERTS, "model.moe_router_num_groups=2"},
         "model.moe_router_num_groups: 2 needs model.moe_router_group_topk too; give both or neither"},
        {{EXPERTS, "model.moe_router_num_groups=3", "model.moe_router_group_topk=1"},
         "is not a multiple of 3; nearest: 2 or 4"},
        {{EXPERTS, "model.moe_router_num_groups=2", "model.moe_router_group_topk=4",
          "model.moe_router_topk=4"},
         "model.moe_router_group_topk: 4 is more than model.moe_router_num_groups 2 (--set "},
        {{EXPERTS, "model.moe_router_num_groups=4", "model.moe_router_group_topk=2",
          "model.moe_router_topk=3"},
         "model.moe_router_topk 3 (--set model.moe_router_topk=3) is not a multiple of 2, and every group "
         "gives as many; nearest: 1 or 3"},
        {{EXPERTS, "model.moe_router_num_groups=4", "model.moe_router_group_topk=1",
          "model.moe_router_topk=4"},
         "moe_router_topk 4 / 1 = 4 experts of a group are more than num_experts 8 / "
         "model.moe_router_num_groups 4 (--set model.moe_router_num_groups=4) = 2"},
        {{EXPERTS, "model.moe_router_enable_expert_bias=true"},
         "true needs model.moe_router_score_function sigmoid or sqrtsoftplus, not "
         "model.moe_router_score_function softmax (default)"},
        {{EXPERTS, "model.add_bias_linear=true"},
         "true does not go with model.num_experts 8 (--set model.num_experts=8): experts have no biases; "
         "allowed: false"},
        {{EXPERTS, "model.moe_pad_expert_input_to_capacity=true"},
         "true needs model.moe_expert_capacity_factor"},
        {{EXPERTS, "model.moe_shared_expert_gate=true"},
         "model.moe_shared_expert_gate: true needs model.moe_shared_expert_intermediate_size"},
        {{EXPERTS, "model.moe_shared_expert_overlap=true"},
         "model.moe_shared_expert_overlap: true needs model.moe_shared_expert_intermediate_size"},
        {{EXPERTS, "model.moe_layer_freq=([1]*3)"},
         "model.moe_layer_freq: '([1]*3)': byte 5: more than num_layers 2 layers; allowed: a number N, or a "
         "0 "
         "or 1 for each of model.num_layers 2 (/"},
        {{EXPERTS, "model.moe_layer_freq=\"[1]\""},
         "'[1]': 1 layers, but num_layers is 2; allowed: a number N, or"},
        {{EXPERTS, "model.moe_layer_freq=0"}, "'0': byte 0: [ or ( belongs here"},
        {{EXPERTS, "model.moe_layer_freq=null"}, "must not be empty"},
        {{EXPERTS, "model.moe_layer_freq=([0]*2)"},
         "'([0]*2)' leaves no layer for the experts of model.num_experts 8"},
};

TEST(models_that_cannot_be_are_refused)
{
	const char *files[] = {scratch_file("sizes.yaml", SIZES, strlen(SIZES)), NULL};
	for (size_t i = 0; i < sizeof bad_models / sizeof *bad_models; i++) {
		struct config c;
		struct err e;
		int rc = load(&c, files, bad_models[i].sets, &e);
		CHECK_INT(rc ? rc : config_check(&c, 1, &e), EXIT_CONFIG);
		CHECK_HAS(e.text, bad_models[i].part);
		CHECK_STR(strchr(e.text, '\n') ? e.text : "", "");
		config_free(&c);
	}
}

TEST(reports_all_violations_at_once)
{
	struct config c;
	struct err e;
	const char *files[] = {scratch_file("sizes.yaml", SIZES, strlen(SIZES)), NULL};
	const char *sets[] = {"model.num_query_groups=3", "optimizer.min_lr=1", "dataset.split=1,2", NULL};
	MUST(!load(&c, files, sets, &e));
	CHECK_INT(config_check(&c, 1, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "model.num_query_groups:");
	CHECK_HAS(e.text, "\n--set optimizer.min_lr=1: optimizer.min_lr:");
	CHECK_HAS(e.text, "\n--set dataset.split=1,2: dataset.split:");
	config_free(&c);
	struct buf many = {0};
	for (int i = 0; i < 200; i++)
		buf_printf(&many, "nonsense_%d_xyzzy: 1\n", i);
	CHECK_INT(load_text(&c, many.data, many.length, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "nonsense_20_xyzzy");
	CHECK_HAS(e.text, " more");
	CHECK(strlen(e.text) < sizeof e.text - 1);
	config_free(&c);
	buf_free(&many);
}

static bool has_line(const struct option_list *l, const char *part)
{
	for (size_t i = 0; i < l->n; i++)
		if (strstr(l->items[i], part))
			return true;
	return false;
}

TEST(derives_and_derives_anew)
{
	struct config c;
	struct err e;
	const char *files[] = {scratch_file("sizes.yaml", SIZES, strlen(SIZES)), NULL};
	const char *sets[] = {
	        "train.micro_batch_size=4", "scheduler.lr_warmup_fraction=0.5", "run.dir=runs/x/",
	        "dataset.split=' 6, 3 ,1'", "scheduler.lr_wsd_decay_iters=3",   NULL};
	MUST(!load(&c, files, sets, &e));
	for (int world = 1; world <= 3; world++) {
		MUST(!config_check(&c, world, &e));
		CHECK_INT(c.derived.data_parallel_size, world);
		CHECK_INT(c.train.global_batch_size, 4 * world);
		CHECK_INT(c.derived.accumulation, 1);
	}
	CHECK(has_line(&c.derived.equations,
	               "global_batch_size 12 = micro_batch_size 4 · data_parallel 3 · accumulation 1"));
	CHECK(has_line(&c.derived.equations, "kv_channels 16 = hidden_size 64 / num_attention_heads 4"));
	CHECK(has_line(
	        &c.derived.notes,
	        "scheduler.lr_wsd_decay_iters 3 (--set scheduler.lr_wsd_decay_iters=3) has no effect"));
	CHECK_INT(c.model.num_query_groups, 4);
	CHECK_INT(c.model.kv_channels, 16);
	CHECK_INT(c.model.ffn_hidden_size, 256);
	CHECK_INT(c.model.max_position_embeddings, 32);
	CHECK_INT(c.scheduler.lr_decay_iters, 10);
	CHECK_INT(c.scheduler.lr_warmup_iters, 5);
	CHECK_INT(c.dataset.random_seed, 1234);
	CHECK_STR(c.run.name, "x");
	CHECK_NEAR(c.derived.split[0], 0.6, 1e-12);
	CHECK_NEAR(c.derived.split[2], 0.1, 1e-12);
	CHECK_INT(c.derived.padded_vocab_size, OPTION_NULL_INT);
	CHECK_INT(config_override(&c, "model.vocab_size", "50257", "tokenizer t.json", &e), 0);
	CHECK_INT(config_check(&c, 1, &e), 0);
	CHECK_INT(c.derived.padded_vocab_size, 50304);
	CHECK_STR(config_get_origin(&c, "model.vocab_size"), "tokenizer t.json");
	CHECK_INT(config_override(&c, "model.num_layers", "2", "checkpoint c", &e), 0);
	CHECK_HAS(config_get_origin(&c, "model.num_layers"), "sizes.yaml:1:");
	CHECK_INT(config_override(&c, "model.num_layers", "3", "checkpoint c", &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "sizes.yaml:1:21: model.num_layers: 2 differs from 3 of checkpoint c");
	CHECK_INT(c.model.num_layers, 2);
	e = (struct err){0};
	CHECK_INT(config_replace(&c, "model.num_layers", "3", "checkpoint c", &e), 0);
	CHECK_INT(c.model.num_layers, 3);
	CHECK_INT(config_replace(&c, "model.nothing", "3", "checkpoint c", &e), EXIT_INTERNAL);
	check_round_trip(&c);
	config_free(&c);
}

/* A model that many layouts fit. */
#define LAYOUT_MODEL                                                                             \
	"model: {num_layers: 8, hidden_size: 96, num_attention_heads: 12, num_query_groups: 6, " \
	"ffn_hidden_size: 240, seq_length: 32, vocab_size: 500}\ntrain: {train_iters: 10}\n"
#define TENSOR "parallel.tensor_model_parallel_size"
#define PIPELINE "parallel.pipeline_model_parallel_size"
#define CHUNKS "parallel.virtual_pipeline_model_parallel_size"
#define SCHEDULE "parallel.pipeline_schedule"
#define PIPELINE_LAYOUT "parallel.pipeline_model_parallel_layout"
#define INSTANCES "ddp.num_distributed_optimizer_instances"
#define CONTEXT "parallel.context_parallel_size"
#define EXPERT "parallel.expert_model_parallel_size"
#define EXPERT_TENSOR "parallel.expert_tensor_parallel_size"
#define SEQUENCE "parallel.sequence_parallel=true"

/* Loads LAYOUT_MODEL and sets, checks it for `world` ranks. config_free is due. */
static int check_layout_of(struct config *c, int world, const char *const *sets, struct err *e)
{
	static char path[300]; /* written once: this is called thousands of times */
	const char *files[] = {path, NULL};
	if (!*path)
		snprintf(path, sizeof path, "%s",
		         scratch_file("layout.yaml", LAYOUT_MODEL, strlen(LAYOUT_MODEL)));
	int rc = load(c, files, sets, e);
	return rc ? rc : config_check(c, world, e);
}

static const struct {
	int world;
	const char *sets[6], *part;
} impossible[] = {
        {6,
         {TENSOR "=4"},
         "--set " TENSOR "=4: " TENSOR ": world size 6 is not a multiple of tensor 4 · context 1 · "
         "pipeline 1 = 4; nearest world size: 4 or 8, or " TENSOR " 3 or 6"},
        {4,
         {PIPELINE "=3"},
         "--set " PIPELINE "=3: " PIPELINE ": world size 4 is not a multiple of tensor 1 · context 1 "
         "· pipeline 3 = 3; nearest world size: 3 or 6, or " PIPELINE " 2 or 4"},
        {8,
         {TENSOR "=8"},
         "layout.yaml:1:62: model.num_attention_heads: 12 is not a multiple of " TENSOR " 8 (--set " TENSOR
         "=8); nearest: 24; legal tensor_model_parallel_size: 1 or 2"},
        {4,
         {TENSOR "=4"},
         "layout.yaml:1:84: model.num_query_groups: 6 is not a multiple of " TENSOR " 4 (--set " TENSOR
         "=4); nearest: 4 or 12; legal tensor_model_parallel_size: 1 or 2"},
        {8,
         {TENSOR "=8"},
         "model.num_query_groups: 6 is not a multiple of " TENSOR " 8 (--set " TENSOR
         "=8); nearest: 8 (with other heads); legal"},
        {5,
         {TENSOR "=5"},
         "12 is not a multiple of " TENSOR " 5 (--set " TENSOR
         "=5); nearest: 30 (give model.kv_channels); legal tensor_model_parallel_size: 1"},
        {6,
         {TENSOR "=3", "model.ffn_hidden_size=64"},
         "model.ffn_hidden_size: 64 is not a multiple of " TENSOR " 3 (--set " TENSOR
         "=3); nearest: 63 or 66; legal tensor_model_parallel_size: 1 or 2"},
        {7,
         {TENSOR "=7", "model.ffn_hidden_size=null"},
         "derived: model.ffn_hidden_size: 384 is not a multiple of " TENSOR " 7"},
        {6,
         {TENSOR "=6", "model.vocab_size=5", "model.make_vocab_size_divisible_by=1"},
         TENSOR ": 6 ranks are more than the padded_vocab_size 5 rows of the embedding; nearest: 1, 2 "
                "or 3"},
        {2,
         {TENSOR "=2", "parallel.sequence_parallel=true", "model.seq_length=33", "train.micro_batch_size=3"},
         "model.seq_length: micro_batch_size 3 (--set train.micro_batch_size=3) · seq_length 33 = 99 "
         "tokens is not a multiple of " TENSOR " 2 (--set " TENSOR
         "=2), and parallel.sequence_parallel true (--set parallel.sequence_parallel=true) cuts "
         "them; "
         "nearest: 32 or 34, or micro_batch_size 2 or 4"},
        {4,
         {TENSOR "=4", "parallel.sequence_parallel=true", "model.seq_length=33", "train.micro_batch_size=2"},
         "cuts them; nearest: 32 or 34, or micro_batch_size 4"},
        {6,
         {INSTANCES "=12"},
         "data_parallel 6 / 12 = 0.5, and the ranks that share an optimizer must be a whole number; nearest: "
         "6"},
        {3,
         {PIPELINE "=3"},
         PIPELINE ": (num_layers 8) / (pipeline 3 · chunks 1) = 8 / 3 = 2.66667, and the layers of a "
                  "virtual stage must be a whole number; nearest num_layers: 6 or 9"},
        {12, {PIPELINE "=3"}, "or " PIPELINE " 2 or 4"},
        {10, {PIPELINE "=5"}, "or " PIPELINE " 2"}, /* 4 would divide the layers, not the world */
        {2,
         {TENSOR "=2", "parallel.sequence_parallel=true", "model.seq_length=33"},
         "nearest: 32 or 34, or micro_batch_size 2"},
        {4,
         {TENSOR "=4", "parallel.sequence_parallel=true", "model.seq_length=34"},
         "nearest: 32 or 36, or micro_batch_size 2"},
        {2,
         {PIPELINE "=2", PIPELINE_LAYOUT "=Etttt|tttL"},
         "--set " PIPELINE_LAYOUT "=Etttt|tttL: " PIPELINE_LAYOUT ": byte 10: "},
        {2, {CHUNKS "=2"}, CHUNKS ": 2 chunks need " PIPELINE " 1 (default) to be 2 or more; nearest: 1"},
        {2,
         {PIPELINE "=2", CHUNKS "=2", SCHEDULE "=1f1b"},
         "--set " SCHEDULE "=1f1b: " SCHEDULE ": 1f1b has one chunk a rank, not " CHUNKS " 2 (--set " CHUNKS
         "=2); allowed: interleaved, or virtual_pipeline_model_parallel_size 1"},
        {2, {PIPELINE "=2", CHUNKS "=2", SCHEDULE "=zero_bubble"}, "zero_bubble has one chunk a rank"},
        {2,
         {PIPELINE "=2", SCHEDULE "=interleaved"},
         SCHEDULE ": interleaved needs virtual_pipeline_model_parallel_size 2 or more and "
                  "pipeline_model_parallel_size 2 or more, not " CHUNKS " 1 (default) and " PIPELINE
                  " 2 (--set " PIPELINE "=2); allowed: 1f1b|zero_bubble"},
        {1, {SCHEDULE "=interleaved"}, PIPELINE " 1 (default); allowed: 1f1b"},
        {1,
         {SCHEDULE "=zero_bubble"},
         SCHEDULE ": zero_bubble needs pipeline_model_parallel_size 2 or more, not " PIPELINE
                  " 1 (default); allowed: 1f1b"},
        {8,
         {PIPELINE "=4", CHUNKS "=2", "train.global_batch_size=20", "train.micro_batch_size=2"},
         "train.global_batch_size: 20 = micro_batch_size 2 (--set train.micro_batch_size=2) · "
         "data_parallel 2 · accumulation 5, and accumulation must be a multiple of " PIPELINE
         " 4 (--set " PIPELINE "=4) under " SCHEDULE " interleaved (derived); nearest: 16 or 32"},
        {8,
         {PIPELINE "=4", CHUNKS "=2", "train.global_batch_size=19", "train.micro_batch_size=2"},
         "accumulation 4.75, and accumulation must be a whole number; nearest: 16 or 32"},
        {8,
         {"train.global_batch_size=4"},
         "4 = micro_batch_size 1 (default) · data_parallel 8 · accumulation 0.5, and accumulation "
         "must "
         "be a whole number; nearest: 8"},
        {12,
         {TENSOR "=2", INSTANCES "=4"},
         "--set " INSTANCES "=4: " INSTANCES ": data_parallel 6 / 4 = 1.5, and the ranks that share an "
         "optimizer must be a whole number; nearest: 3 or 6"},
        {4,
         {CONTEXT "=3"},
         "--set " CONTEXT "=3: " CONTEXT ": world size 4 is not a multiple of tensor 1 · context 3 · "
         "pipeline 1 = 3; nearest world size: 3 or 6, or " CONTEXT " 2 or 4"},
        {12, {PIPELINE "=4", CONTEXT "=2"}, "nearest world size: 8 or 16, or " CONTEXT " 1"},
        {4,
         {CONTEXT "=4", "model.seq_length=36"},
         "model.seq_length: 36 is not a multiple of 2 · " CONTEXT " 4 (--set " CONTEXT
         "=4) = 8: every rank holds two chunks of a sample; nearest: 32 or 40"},
        {8,
         {CONTEXT "=4", "model.seq_length=36", TENSOR "=2", SEQUENCE, "train.micro_batch_size=1"},
         "two chunks of a sample; nearest: 32 or 40"},
        {12,
         {CONTEXT "=2", "model.seq_length=32", TENSOR "=6", SEQUENCE, "train.micro_batch_size=2"},
         "micro_batch_size 2 (--set train.micro_batch_size=2) · seq_length 32 / context 2 = 32 tokens is not "
         "a multiple of " TENSOR " 6 (--set " TENSOR
         "=6), and parallel.sequence_parallel true (--set " SEQUENCE ") cuts them; nearest: 24 or "
         "36, or micro_batch_size 3"},
        {8,
         {CONTEXT "=4", "parallel.cp_comm_type=a2a"},
         "--set parallel.cp_comm_type=a2a: parallel.cp_comm_type: a2a shares heads among tensor 1 · " CONTEXT
         " 4 (--set " CONTEXT "=4) = 4 ranks, and num_attention_heads 12, num_query_groups 6 are not both "
         "multiples of it; allowed: p2p|all_gather, or " CONTEXT " 2"},
        {8,
         {EXPERT "=2"},
         "--set " EXPERT "=2: " EXPERT ": 2, but there are no experts to share: give model.num_experts; "
         "allowed: 1"},
        {8,
         {EXPERT_TENSOR "=4", TENSOR "=2"},
         EXPERT_TENSOR ": 4, but there are no experts to share: give model.num_experts; allowed: 1, or leave "
                       "it out"},
        {12,
         {EXPERTS, EXPERT "=3"},
         EXPERT ": model.num_experts 8 (--set model.num_experts=8) is not a multiple of 3; nearest: 2 or 4"},
        {6,
         {EXPERTS, EXPERT "=4"},
         EXPERT ": world size 6 is not a multiple of expert tensor 1 · expert 4 · pipeline 1 = 4; nearest "
                "world size: 4 or 8, or " EXPERT " 2"},
        {9,
         {EXPERTS, EXPERT "=2", TENSOR "=3", SEQUENCE, "train.micro_batch_size=3"},
         "world size 9 is not a multiple of expert tensor 3 · expert 2 · pipeline 1 = 6; nearest world size: "
         "6 or 12, or " EXPERT " 1"},
        {6,
         {EXPERTS, EXPERT_TENSOR "=4", "model.moe_ffn_hidden_size=24"},
         "--set " EXPERT_TENSOR "=4: " EXPERT_TENSOR ": world size 6 is not a multiple of expert tensor 4 · "
         "expert 1 · pipeline 1 = 4; nearest world size: 4 or 8, or " EXPERT_TENSOR " 3 or 6"},
        {4,
         {EXPERTS, EXPERT_TENSOR "=4", "model.moe_ffn_hidden_size=50"},
         "model.moe_ffn_hidden_size: 50 is not a multiple of " EXPERT_TENSOR " 4 (--set " EXPERT_TENSOR
         "=4); nearest: 48 or 52"},
        {2,
         {EXPERTS, TENSOR "=2"},
         "default: parallel.sequence_parallel: false with " TENSOR " 2 (--set " TENSOR
         "=2) and model.num_experts 8 (--set model.num_experts=8): every tensor-parallel rank sends rows of "
         "its own to the experts; allowed: true"},
        {2,
         {EXPERTS, TENSOR "=2", SEQUENCE, "model.moe_shared_expert_intermediate_size=25"},
         "model.moe_shared_expert_intermediate_size: 25 is not a multiple of " TENSOR " 2 (--set " TENSOR
         "=2); nearest: 24 or 26; legal tensor_model_parallel_size: 1"},
        {1,
         {EXPERTS, "train.micro_batch_size=33554432", "model.num_experts=1024", "model.moe_router_topk=1024",
          "model.moe_expert_rank_capacity_factor=1000"},
         "model.moe_expert_rank_capacity_factor: 1000 is too much: the rows that a rank's experts may get "
         "would be"},
        {1,
         {EXPERTS, "model.moe_expert_capacity_factor=1.0e+6", "model.moe_pad_expert_input_to_capacity=true",
          "train.micro_batch_size=1048576", "model.num_experts=1024"},
         "model.moe_pad_expert_input_to_capacity: true with"},
        {1,
         {"recompute.granularity=selective", "recompute.modules=[mlp, core_atn]"},
         "recompute.modules: element 2, unknown module 'core_atn'; allowed: "
         "core_attn|layernorm|activation|mlp|moe; did you mean core_attn?"},
        {1, {"recompute.modules=gathers"}, "element 1, unknown module 'gathers'"},
        {1, {"recompute.modules=[layers]"}, "element 1, unknown module 'layers'"},
        {1, {"recompute.modules=[zzzzzz]"}, "'zzzzzz'; allowed: core_attn|layernorm|activation|mlp|moe"},
};

TEST(layouts_that_cannot_be_are_refused)
{
	for (size_t i = 0; i < sizeof impossible / sizeof *impossible; i++) {
		struct config c;
		struct err e;
		CHECK_INT(check_layout_of(&c, impossible[i].world, impossible[i].sets, &e), EXIT_CONFIG);
		CHECK_INT(e.code, EXIT_CONFIG);
		CHECK_HAS(e.text, impossible[i].part);
		config_free(&c);
	}
	struct config c;
	struct err e;
	const char *sets[] = {PIPELINE "=3", SCHEDULE "=zero_bubble",
	                      NULL}; /* a pipeline of 1 would not do */
	CHECK_INT(check_layout_of(&c, 3, sets, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, PIPELINE ": (num_layers 8) / (pipeline 3 · chunks 1)");
	CHECK(!strstr(e.text, "or " PIPELINE));
	config_free(&c);
}

TEST(all_that_is_wrong_with_a_layout_is_said_at_once)
{
	static const char text[] = LAYOUT_MODEL "parallel:\n  tensor_model_parallel_size: 5\n"
	                                        "  pipeline_model_parallel_size: 3\n"
	                                        "  virtual_pipeline_model_parallel_size: 2\n"
	                                        "  pipeline_schedule: 1f1b\n  sequence_parallel: true\n"
	                                        "recompute: {modules: [attn]}\n";
	static const char *const parts[] = {
	        "a.yaml:4:31: " TENSOR ": world size 4 is not",
	        "a.yaml:1:62: model.num_attention_heads: 12 is not a multiple of " TENSOR " 5 (",
	        "a.yaml:1:84: model.num_query_groups: 6 is not",
	        "a.yaml:1:121: model.seq_length: micro_batch_size 1 (default) · seq_length 32 = 32",
	        "a.yaml:7:22: " SCHEDULE ": 1f1b has one chunk",
	        "a.yaml:5:33: " PIPELINE ": (num_layers 8) / (pipeline 3 · chunks 2)",
	        "a.yaml:9:22: recompute.modules: element 1",
	};
	struct config c;
	struct err e;
	CHECK_INT(load_text(&c, text, sizeof text - 1, &e), 0);
	CHECK_INT(config_check(&c, 4, &e), EXIT_CONFIG);
	size_t lines = 1;
	for (const char *p = e.text; (p = strchr(p, '\n')); p++)
		lines++;
	CHECK_INT(lines, sizeof parts / sizeof *parts);
	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
		CHECK_HAS(e.text, parts[i]);
	config_free(&c);
}

TEST(layouts_are_derived)
{
	struct config c;
	struct err e;
	const char *sets[] = {TENSOR "=2",
	                      PIPELINE "=2",
	                      CHUNKS "=2",
	                      INSTANCES "=2",
	                      "train.global_batch_size=16",
	                      "recompute.granularity=selective",
	                      NULL};
	static const char *const stages[] = {"stage 0 chunk 0: embedding, layers 0-1",
	                                     "stage 1 chunk 0: layers 2-3", "stage 0 chunk 1: layers 4-5",
	                                     "stage 1 chunk 1: layers 6-7, loss"};
	MUST(!check_layout_of(&c, 16, sets, &e));
	CHECK_INT(c.derived.data_parallel_size, 4);
	CHECK_INT(c.derived.optimizer_shards, 2);
	CHECK_INT(c.parallel.pipeline_schedule, PARALLEL_INTERLEAVED);
	CHECK_STR(config_get_origin(&c, SCHEDULE), "derived");
	CHECK(has_line(&c.derived.equations,
	               "pipeline_schedule interleaved = virtual_pipeline_model_parallel_size 2 > 1"));
	CHECK(has_line(&c.derived.equations,
	               "optimizer_shards 2 = data_parallel 4 / num_distributed_optimizer_instances 2"));
	CHECK(has_line(&c.derived.equations,
	               "bucket_size 40000000 = max(40000000, 1000000 · data_parallel 4)"));
	if (CHECK(c.derived.stages.n == 4))
		for (size_t i = 0; i < 4; i++)
			CHECK_STR(c.derived.stages.items[i], stages[i]);
	CHECK_INT(c.derived.notes.n, 0);
	CHECK_INT(c.ddp.bucket_size, 40000000);
	CHECK_INT(config_recompute_modules(&c), 1u << REPEAT_NORM | 1u << REPEAT_ACTIVATION);
	check_round_trip(&c);
	config_free(&c);
}

static void check_lines(const struct option_list *list, const char *const *lines)
{
	for (; *lines; lines++)
		if (!has_line(list, *lines))
			test_failed(__FILE__, __LINE__, "no line '%s'", *lines);
}

TEST(experts_and_contexts_are_derived)
{
	struct config c;
	struct err e;
	const char *sets[] = {TENSOR "=2", SEQUENCE,           CONTEXT "=2", PIPELINE "=2",
	                      EXPERT "=4", EXPERT_TENSOR "=1", EXPERTS,      "train.global_batch_size=8",
	                      NULL};
	static const char *const lines[] = {
	        "data_parallel 2 = world 16 / (tensor 2 · context 2 · pipeline 2)",
	        "expert_data_parallel 2 = world 16 / (expert_tensor 1 · expert 4 · pipeline 2)",
	        "moe_ffn_hidden_size 240 = ffn_hidden_size", NULL};
	MUST(!check_layout_of(&c, 16, sets, &e));
	check_lines(&c.derived.equations, lines);
	CHECK_INT(c.derived.data_parallel_size, 2);
	CHECK_INT(c.derived.expert_data_parallel_size, 2);
	CHECK_INT(c.derived.accumulation, 4);
	CHECK_INT(c.model.moe_ffn_hidden_size, 240);
	CHECK_INT(c.derived.notes.n, 0);
	check_round_trip(&c);
	config_free(&c);
	const char *same[] = {TENSOR "=2", SEQUENCE, EXPERTS, NULL}, *none[] = {TENSOR "=2", NULL};
	MUST(!check_layout_of(&c, 4, same, &e)); /* an expert is cut as the rest is */
	CHECK_INT(c.parallel.expert_tensor_parallel_size, 2);
	CHECK_STR(config_get_origin(&c, EXPERT_TENSOR), "derived");
	CHECK(has_line(&c.derived.equations, "expert_tensor_parallel_size 2 = tensor_model_parallel_size"));
	CHECK_INT(c.derived.expert_data_parallel_size, 2);
	check_round_trip(&c);
	config_free(&c);
	MUST(!check_layout_of(&c, 4, none, &e));
	CHECK_INT(c.parallel.expert_tensor_parallel_size, 1);
	CHECK_INT(c.model.moe_ffn_hidden_size, OPTION_NULL_INT);
	CHECK(!has_line(&c.derived.equations, "expert"));
	check_round_trip(&c);
	config_free(&c);
}

TEST(latent_attention_derives_its_heads)
{
	struct config c;
	struct err e;
	const char *sets[] = {MLA, TENSOR "=3", "model.num_query_groups=null", "model.hidden_size=100", NULL};
	MUST(!check_layout_of(&c, 3, sets, &e));
	CHECK_INT(c.model.num_query_groups, 12);
	CHECK_INT(c.model.kv_channels, 24);
	CHECK(has_line(&c.derived.equations, "kv_channels 24 = qk_head_dim 16 + qk_pos_emb_head_dim 8"));
	CHECK_INT(c.derived.notes.n, 0);
	check_round_trip(&c);
	config_free(&c);
}

/* parallel.layout auto: what is not given is chosen by somebody else, and then judged like the rest. */

static int choose(const struct config *from, struct config *to, const int64_t *sizes, int world,
                  struct err *e)
{
	config_copy(to, from);
	for (size_t i = 0; config_layout_keys[i]; i++)
		if (!config_is_given(to, config_layout_keys[i]))
			config_choose(to, config_layout_keys[i], sizes[i]);
	*e = (struct err){0};
	return config_check(to, world, e);
}

/* A tokenizer says how many tokens there are, and which of them ends a document where that matters. */
TEST(tokenizers_complete_a_configuration)
{
	char tokenizer[400];
	struct config c;
	struct err e;
	snprintf(tokenizer, sizeof tokenizer, "tokenizer.tokenizer_model=%s",
	         test_golden("tokenizers/byte_level_bpe.json"));
	const char *files[] = {scratch_file("sizes.yaml", SIZES, strlen(SIZES)), NULL};
	const char *plain[] = {tokenizer, NULL},
	           *resets[] = {tokenizer, "dataset.reset_position_ids=true", NULL};
	const char *said[] = {tokenizer, "dataset.reset_attention_mask=true", "tokenizer.eod_id=7",
	                      "model.vocab_size=3000", NULL};
	MUST(!load(&c, files, plain, &e) && !run_complete_config(&c, &e) && !config_check(&c, 1, &e));
	int64_t tokens = c.model.vocab_size;
	CHECK(tokens > 256);
	CHECK_INT(c.tokenizer.eod_id, OPTION_NULL_INT);
	config_free(&c);
	MUST(!load(&c, files, resets, &e));
	CHECK_INT(config_check(&c, 1, &e), 0); /* known as soon as the tokenizer is read */
	CHECK_INT(run_complete_config(&c, &e), 0);
	CHECK_INT(config_check(&c, 1, &e), 0);
	CHECK_INT(c.model.vocab_size, tokens);
	CHECK(c.tokenizer.eod_id >= 0 && c.tokenizer.eod_id < tokens);
	CHECK_HAS(config_get_origin(&c, "tokenizer.eod_id"), "byte_level_bpe.json");
	config_free(&c);
	MUST(!load(&c, files, said, &e) && !run_complete_config(&c, &e) && !config_check(&c, 1, &e));
	CHECK_INT(c.model.vocab_size, 3000);
	CHECK_INT(c.tokenizer.eod_id, 7);
	check_round_trip(&c);
	config_free(&c);
}

TEST(layouts_can_be_left_open)
{
	struct config c, chosen;
	struct err e;
	const char *sets[] = {"parallel=auto", PIPELINE "=2", EXPERTS, "train.global_batch_size=16",
	                      SEQUENCE,        NULL};
	MUST(!check_layout_of(&c, 7, sets, &e)); /* 7 is no multiple of 2 */
	CHECK(config_layout_is_open(&c));
	CHECK(config_is_given(&c, PIPELINE) && !config_is_given(&c, TENSOR));
	CHECK_INT(c.derived.data_parallel_size, 0);
	CHECK_INT(c.derived.accumulation, 0);
	CHECK_INT(c.model.kv_channels, 8);
	CHECK_STR(config_get_origin(&c, "parallel.layout"), "--set parallel=auto");
	const int64_t legal[] = {2, 1, 8, 1, 4, 1}, illegal[] = {5, 1, 8, 1, 4, 1};
	CHECK_INT(choose(&c, &chosen, illegal, 20, &e), EXIT_CONFIG);
	CHECK_HAS(e.text,
	          "model.num_attention_heads: 12 is not a multiple of " TENSOR " 5 (parallel.layout auto)");
	config_free(&chosen);
	MUST(!choose(&c, &chosen, legal, 16, &e));
	CHECK(!config_layout_is_open(&chosen) && config_layout_is_open(&c));
	CHECK_INT(chosen.parallel.pipeline_model_parallel_size, 2);
	CHECK_INT(chosen.parallel.tensor_model_parallel_size, 2);
	CHECK_INT(c.parallel.tensor_model_parallel_size, 1);
	CHECK_INT(chosen.derived.data_parallel_size, 4);
	CHECK_INT(chosen.derived.expert_data_parallel_size, 2);
	CHECK_STR(config_get_origin(&chosen, TENSOR), "parallel.layout auto");
	check_round_trip(&chosen);
	config_free(&chosen);
	CHECK_INT(c.model.num_layers, 8);
	config_free(&c);
	static const char yaml[] = LAYOUT_MODEL "parallel: auto\n", partly[] = LAYOUT_MODEL
	                                                            "parallel: {layout: auto, "
	                                                            "tensor_model_parallel_size: 2}\n";
	MUST(!load_text(&c, yaml, sizeof yaml - 1, &e) && !config_check(&c, 3, &e));
	CHECK(config_layout_is_open(&c) && !config_is_given(&c, TENSOR));
	CHECK_INT(config_replace(&c, "parallel.layout", "given", "test", &e), 0);
	CHECK(!config_layout_is_open(&c) && !config_check(&c, 3, &e));
	CHECK_INT(c.derived.data_parallel_size, 3);
	config_free(&c);
	MUST(!load_text(&c, partly, sizeof partly - 1, &e) && !config_check(&c, 3, &e));
	CHECK(config_layout_is_open(&c) && config_is_given(&c, TENSOR));
	CHECK_INT(c.parallel.tensor_model_parallel_size, 2);
	config_free(&c);
}

/* What follows is derived anew for another world, and put back where it no longer follows. */
TEST(layouts_are_derived_anew)
{
	static const struct {
		int world;
		int64_t bucket;
	} rows[] = {{1, 40000000}, {40, 40000000}, {41, 41000000}, {2000, 1 << 30}, {1, 40000000}};
	struct config c;
	struct err e;
	MUST(!check_layout_of(&c, 1, NULL, &e));
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		CHECK_INT(config_check(&c, rows[i].world, &e), 0);
		CHECK_INT(c.ddp.bucket_size, rows[i].bucket);
		CHECK_INT(c.derived.optimizer_shards, rows[i].world);
		CHECK_INT(c.derived.stages.n, 0);
		check_round_trip(&c);
	}
	CHECK_INT(config_replace(&c, PIPELINE, "2", "test", &e), 0);
	CHECK_INT(config_replace(&c, CHUNKS, "4", "test", &e), 0);
	CHECK_INT(config_replace(&c, "train.global_batch_size", "2", "test", &e), 0);
	CHECK_INT(config_check(&c, 2, &e), 0);
	CHECK_INT(c.parallel.pipeline_schedule, PARALLEL_INTERLEAVED);
	CHECK_INT(c.derived.stages.n, 8);
	CHECK_INT(config_replace(&c, CHUNKS, "1", "test", &e), 0);
	CHECK_INT(config_check(&c, 2, &e), 0);
	CHECK_INT(c.parallel.pipeline_schedule, PARALLEL_1F1B);
	CHECK_STR(config_get_origin(&c, SCHEDULE), "default");
	CHECK_STR(c.derived.stages.items[1], "stage 1: layers 4-7, loss");
	config_free(&c);
}

TEST(stages_say_what_they_hold)
{
	static const struct {
		const char *sets[4], *stages[4];
	} rows[] = {
	        {{PIPELINE_LAYOUT "=E|t*4|tttt|L"},
	         {"stage 0: embedding", "stage 1: layers 0-3", "stage 2: layers 4-7", "stage 3: loss"}},
	        {{"parallel.num_layers_in_first_pipeline_stage=1",
	          "parallel.num_layers_in_last_pipeline_stage=3"},
	         {"stage 0: embedding, layer 0", "stage 1: layers 1-2", "stage 2: layers 3-4",
	          "stage 3: layers 5-7, loss"}},
	        {{"model.num_layers=6", "parallel.account_for_embedding_in_pipeline_split=true",
	          "parallel.account_for_loss_in_pipeline_split=true"},
	         {"stage 0: embedding, layer 0", "stage 1: layers 1-2", "stage 2: layers 3-4",
	          "stage 3: layer 5, loss"}},
	};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		struct config c;
		struct err e;
		const char *sets[6] = {PIPELINE "=4", rows[i].sets[0], rows[i].sets[1], rows[i].sets[2]};
		CHECK_INT(check_layout_of(&c, 4, sets, &e), 0);
		if (CHECK(c.derived.stages.n == 4))
			for (size_t s = 0; s < 4; s++)
				CHECK_STR(c.derived.stages.items[s], rows[i].stages[s]);
		check_round_trip(&c);
		config_free(&c);
	}
}

static const struct {
	int world;
	const char *sets[4], *note; /* NULL: none */
} idle[] = {
        {4,
         {"parallel.sequence_parallel=true"},
         " true (--set parallel.sequence_parallel=true) has no "
         "effect with " TENSOR " 1 (default)"},
        {4, {"parallel.sequence_parallel=false"}, NULL},
        {4, {"comm_overlap.tp_comm_overlap=true"}, "comm_overlap.tp_comm_overlap true (--set "},
        {4, {"comm_overlap.tp_comm_overlap=true", TENSOR "=2"}, NULL},
        {4, {"parallel.account_for_embedding_in_pipeline_split=true"}, "with " PIPELINE " 1 (default)"},
        {4, {"parallel.account_for_loss_in_pipeline_split=true"}, "with " PIPELINE " 1 (default)"},
        {4, {"parallel.num_layers_in_first_pipeline_stage=3"}, "with " PIPELINE " 1 (default)"},
        {4, {"parallel.num_layers_in_first_pipeline_stage=null"}, NULL},
        {4, {"parallel.num_layers_in_last_pipeline_stage=3"}, "with " PIPELINE " 1 (default)"},
        {4, {PIPELINE_LAYOUT "=nonsense"}, PIPELINE_LAYOUT " nonsense (--set "},
        {4, {SCHEDULE "=1f1b"}, NULL},
        {1, {"ddp.overlap_grad_reduce=true"}, "has no effect with data_parallel 1"},
        {2, {"ddp.overlap_grad_reduce=true", TENSOR "=2"}, "has no effect with data_parallel 1"},
        {2, {"ddp.overlap_grad_reduce=true"}, NULL},
        {1, {"ddp.grad_reduce_in_fp32=false"}, "has no effect with data_parallel 1"},
        {1, {"ddp.zero_stage=3"}, NULL},
        {4,
         {INSTANCES "=2", "ddp.zero_stage=0"},
         INSTANCES " 2 (--set " INSTANCES "=2) has no effect with ddp.zero_stage 0"},
        {1, {"recompute.modules=mlp"}, "has no effect with recompute.granularity none (default)"},
        {1, {"mixed_precision.loss_scale=8"}, "has no effect with mixed_precision.precision fp32 (default)"},
        {1,
         {"mixed_precision=bf16", "mixed_precision.hysteresis=3"},
         "mixed_precision.hysteresis 3 (--set mixed_precision.hysteresis=3) has no effect with "
         "mixed_precision.precision bf16"},
        {1,
         {"mixed_precision=fp16", "mixed_precision.loss_scale=8", "mixed_precision.loss_scale_window=7"},
         "has no effect with mixed_precision.loss_scale 8"},
        {1, {"mixed_precision=fp16", "mixed_precision.min_loss_scale=7"}, NULL},
        {1,
         {"mixed_precision=fp16", "profiling.nan_hunt=true"},
         "profiling.nan_hunt stops at the first overflow"},
        {1, {"mixed_precision=fp16", "profiling.nan_hunt=true", "mixed_precision.loss_scale=1"}, NULL},
        {1, {"recompute.modules=mlp", "recompute.granularity=full"}, "with recompute.granularity full"},
        {1, {"recompute.modules=mlp", "recompute.granularity=selective"}, NULL},
        {8,
         {PIPELINE "=4", "train.global_batch_size=8", "train.micro_batch_size=2"},
         "accumulation 2 is less than " PIPELINE " 4 (--set " PIPELINE
         "=4): 1f1b leaves a stage idle for (4 - 1) / (2 + 4 - 1) = 60% of a step; "
         "train.global_batch_size 16 fills the pipeline"},
        {4,
         {PIPELINE "=4", "train.global_batch_size=3"},
         "(4 - 1) / (3 + 4 - 1) = 50% of a step; train.global_batch_size 4 fills"},
        {8, {PIPELINE "=4", "train.global_batch_size=16", "train.micro_batch_size=2"}, NULL},
        {1, {"parallel.cp_comm_type=a2a"}, "has no effect with " CONTEXT " 1 (default)"},
        {2, {"parallel.cp_comm_type=a2a", CONTEXT "=2"}, NULL},
        {1, {"model.yarn_beta_fast=16"}, "has no effect with model.rope_type rope (default)"},
        {1, {"model.yarn_beta_fast=16", "model.rope_type=yarn"}, NULL},
        {1, {"model.yarn_beta_fast=32"}, NULL}, /* what it is anyway */
        {1, {"model.v_head_dim=64"}, "has no effect with model.multi_latent_attention false (default)"},
        {1, {"model.moe_router_topk=4"}, "has no effect with model.num_experts null (default)"},
        {1, {"model.moe_layer_freq=([1]*8)"}, "model.moe_layer_freq \"([1]*8)\" (--set "},
        {1, {"model.moe_layer_freq=1"}, NULL},
        {1, {"model.moe_expert_capacity_factor=1.5"}, "has no effect with model.num_experts null"},
        {1, {EXPERTS, "model.moe_expert_capacity_factor=1.5", "model.moe_token_drop_policy=position"}, NULL},
        {1,
         {EXPERTS, "model.moe_token_drop_policy=position"},
         "has no effect with model.moe_expert_capacity_factor null (default)"},
        {1,
         {EXPERTS, "model.moe_router_bias_update_rate=0.1"},
         "has no effect with model.moe_router_enable_expert_bias false"},
        {1,
         {EXPERTS, "model.moe_router_load_balancing_type=none", "model.moe_aux_loss_coeff=0.1"},
         "model.moe_aux_loss_coeff 0.1 (--set model.moe_aux_loss_coeff=0.1) has no effect with "
         "model.moe_router_load_balancing_type none"},
        {1, {EXPERTS, "model.moe_router_load_balancing_type=none", "model.moe_aux_loss_coeff=0"}, NULL},
        {1,
         {EXPERTS, "model.moe_router_score_function=sigmoid", "model.moe_router_pre_softmax=true"},
         "has no effect with model.moe_router_score_function sigmoid"},
        {1, {EXPERTS, "model.moe_router_topk=1"}, "the softmax over one expert is 1"},
        {1, {EXPERTS, "model.moe_router_topk=1", "model.moe_router_pre_softmax=true"}, NULL},
};

TEST(layout_keys_without_effect_are_noted)
{
	for (size_t i = 0; i < sizeof idle / sizeof *idle; i++) {
		struct config c;
		struct err e;
		CHECK_INT(check_layout_of(&c, idle[i].world, idle[i].sets, &e), 0);
		CHECK_INT(c.derived.notes.n, idle[i].note != NULL);
		if (idle[i].note && c.derived.notes.n)
			CHECK_HAS(c.derived.notes.items[0], idle[i].note);
		config_free(&c);
	}
}

TEST(recompute_modules_are_a_set)
{
	static const struct {
		const char *sets[3];
		uint32_t set;
	} rows[] = {
	        {{NULL}, 0},
	        {{"recompute.granularity=full"}, 0},
	        {{"recompute.granularity=full", "recompute.modules=mlp"}, 0},
	        {{"recompute.granularity=selective"}, 1u << REPEAT_NORM | 1u << REPEAT_ACTIVATION},
	        {{"recompute.granularity=selective", "recompute.modules=[]"},
	         1u << REPEAT_NORM | 1u << REPEAT_ACTIVATION},
	        {{"recompute.granularity=selective", "recompute.modules=core_attn"}, 1u << REPEAT_CORE},
	        {{"recompute.granularity=selective", "recompute.modules=[mlp, core_attn, mlp]"},
	         1u << REPEAT_MLP | 1u << REPEAT_CORE},
	        {{"recompute.granularity=selective", "recompute.modules=[mlp, moe]"},
	         1u << REPEAT_MLP | 1u << REPEAT_EXPERTS},
	        {{"recompute.granularity=selective", "recompute.modules=[activation, layernorm]"},
	         1u << REPEAT_NORM | 1u << REPEAT_ACTIVATION},
	};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		struct config c;
		struct err e;
		CHECK_INT(check_layout_of(&c, 1, rows[i].sets, &e), 0);
		CHECK_INT(config_recompute_modules(&c), rows[i].set);
		CHECK(rows[i].set || !c.recompute.modules.n || config_is_given(&c, "recompute.modules"));
		check_round_trip(&c);
		config_free(&c);
	}
}

/* Random layouts against the facts of division, which this part works out for itself. */

struct random_layout {
	int world;
	int64_t tensor, pipeline, chunks, layers, heads, groups, ffn, rows, length, micro, global, first,
	        last, instances; /* 0: not said */
	int64_t context, experts, expert, expert_tensor, every, moe_ffn, shared;
	bool sequence, count_embedding, count_loss, a2a;
	const char *schedule; /* NULL: not said */
	char text[28][80];
	const char *sets[36];
};

static int64_t pick(uint64_t *n, const char *choices)
{
	static const int64_t values[] = {0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 48, 64};
	return values[choices[rng_bits(7, (*n)++) % strlen(choices)] - 'a'];
}

static void put_set(struct random_layout *l, size_t *n, const char *key, int64_t value)
{
	if (!value)
		return;
	snprintf(l->text[*n], sizeof l->text[*n], "%s=%lld", key, (long long)value);
	l->sets[*n] = l->text[*n];
	++*n;
}

static void draw_layout(struct random_layout *l, uint64_t seed)
{
	static const char *const schedules[] = {NULL,   NULL,          NULL,          NULL,
	                                        "1f1b", "interleaved", "interleaved", "zero_bubble"};
	uint64_t r = seed * 64;
	*l = (struct random_layout){0};
	l->tensor = pick(&r, "bbbbccde");
	l->pipeline = pick(&r, "bbbccdeg");
	l->context = pick(&r, "bbbbbbccde");
	l->experts = pick(&r, "aaaahhgi");
	l->expert = pick(&r, l->experts ? "bbccce" : "bbbbbbbbbc");
	l->expert_tensor = pick(&r, l->experts ? "aabbbc" : "aaaaaabc");
	int64_t dense = l->tensor * l->pipeline * l->context, copies = pick(&r, "bbcde");
	l->world = (int)(pick(&r, "aaab") ? copies : dense * (pick(&r, "ab") ? copies : l->expert));
	l->chunks = pick(&r, "bbbbccd");
	l->layers = pick(&r, "beghiijjkkll");
	l->heads = pick(&r, "beghiii");
	l->groups = pick(&r, "aaabcdgi");
	l->ffn = pick(&r, "aaallmg");
	l->rows = pick(&r, "aaabcem");
	l->length = pick(&r, "bcdfhhk");
	l->micro = pick(&r, "bbbcde");
	l->global = pick(&r, "aaaaahkllllm");
	l->first = pick(&r, "aaaaaaaaaaaaaaaabce");
	l->last = pick(&r, "aaaaaaaaaaaaaaaabce");
	l->instances = pick(&r, "bbbbbbcd");
	l->sequence = pick(&r, "ab");
	l->count_embedding = pick(&r, "aaab");
	l->count_loss = pick(&r, "aaab");
	l->a2a = pick(&r, "aab");
	l->every = pick(&r, "bbc");
	l->moe_ffn = pick(&r, "aaaaklm");
	l->shared = pick(&r, "aaakllg");
	if (l->experts && pick(&r, "aaaaab") == 0)
		l->sequence = true;
	l->schedule = schedules[rng_bits(7, r) % 8];
}

static void write_layout(struct random_layout *l)
{
	size_t n = 0;
	put_set(l, &n, TENSOR, l->tensor);
	put_set(l, &n, PIPELINE, l->pipeline);
	put_set(l, &n, CHUNKS, l->chunks);
	put_set(l, &n, "model.num_layers", l->layers);
	put_set(l, &n, "model.num_attention_heads", l->heads);
	put_set(l, &n, "model.num_query_groups", l->groups ? l->groups : l->heads);
	put_set(l, &n, "model.ffn_hidden_size", l->ffn ? l->ffn : 240);
	put_set(l, &n, "model.vocab_size", l->rows ? l->rows : 500);
	put_set(l, &n, "model.make_vocab_size_divisible_by", 1);
	put_set(l, &n, "model.seq_length", l->length);
	put_set(l, &n, "train.micro_batch_size", l->micro);
	put_set(l, &n, "train.global_batch_size", l->global);
	put_set(l, &n, "parallel.num_layers_in_first_pipeline_stage", l->first);
	put_set(l, &n, "parallel.num_layers_in_last_pipeline_stage", l->last);
	put_set(l, &n, INSTANCES, l->instances);
	put_set(l, &n, CONTEXT, l->context);
	put_set(l, &n, EXPERT, l->expert);
	put_set(l, &n, EXPERT_TENSOR, l->expert_tensor);
	put_set(l, &n, "model.num_experts", l->experts);
	put_set(l, &n, "model.moe_layer_freq", l->every);
	put_set(l, &n, "model.moe_ffn_hidden_size", l->moe_ffn);
	put_set(l, &n, "model.moe_shared_expert_intermediate_size", l->shared);
	if (l->a2a)
		l->sets[n++] = "parallel.cp_comm_type=a2a";
	if (l->sequence)
		l->sets[n++] = SEQUENCE;
	if (l->count_embedding)
		l->sets[n++] = "parallel.account_for_embedding_in_pipeline_split=true";
	if (l->count_loss)
		l->sets[n++] = "parallel.account_for_loss_in_pipeline_split=true";
	if (l->schedule) {
		snprintf(l->text[27], sizeof l->text[27], SCHEDULE "=%s", l->schedule);
		l->sets[n++] = l->text[27];
	}
	l->sets[n] = NULL;
}

static bool schedule_fits(const struct random_layout *l, int64_t accumulation)
{
	bool interleaved = l->schedule ? !strcmp(l->schedule, "interleaved") : l->chunks > 1;
	if (l->schedule && !strcmp(l->schedule, "zero_bubble") && l->pipeline == 1)
		return false;
	if (interleaved != (l->chunks > 1) || (interleaved && l->pipeline == 1))
		return false;
	return !interleaved || accumulation % l->pipeline == 0;
}

/* The stages alone are judged by stages_split, which test_pipeline proves. */
static bool stages_fit(const struct random_layout *l)
{
	struct stages_spec spec = {l->layers,     (int)l->pipeline, (int)l->chunks, l->count_embedding,
	                           l->count_loss, l->first,         l->last,        NULL};
	struct stage stage[64];
	struct err e = {0};
	return l->pipeline == 1 || !stages_split(&spec, stage, &e);
}

static bool has_dense_layers(const struct random_layout *l)
{
	return !l->experts || (l->every == 2 && l->layers > 1);
}

static int64_t ranks_of_expert(const struct random_layout *l)
{
	return l->expert_tensor ? l->expert_tensor : l->experts ? l->tensor : 1;
}

static bool experts_fit(const struct random_layout *l)
{
	int64_t t = l->tensor, ffn = l->ffn ? l->ffn : 240, ranks = ranks_of_expert(l);
	if (!l->experts)
		return l->expert == 1 && (ranks == 1 || ranks == t);
	return l->experts % l->expert == 0 && (l->moe_ffn ? l->moe_ffn : ffn) % ranks == 0 &&
	       l->shared % t == 0 && (t == 1 || l->sequence) &&
	       l->world % (ranks * l->expert * l->pipeline) == 0;
}

static bool contexts_fit(const struct random_layout *l)
{
	int64_t groups = l->groups ? l->groups : l->heads, ranks = l->tensor * l->context;
	if (l->context > 1 && l->length % (2 * l->context))
		return false;
	return !l->a2a || (l->heads % ranks == 0 && groups % ranks == 0);
}

static bool layout_fits(const struct random_layout *l)
{
	int64_t groups = l->groups ? l->groups : l->heads, ffn = l->ffn ? l->ffn : 240, t = l->tensor;
	int64_t data = l->world / (t * l->context * l->pipeline);
	if (data * t * l->context * l->pipeline != l->world || l->heads % groups)
		return false;
	if (!experts_fit(l) || !contexts_fit(l) || (has_dense_layers(l) && ffn % t))
		return false;
	if (l->heads % t || groups % t || (l->rows && l->rows < t))
		return false;
	if (l->sequence && l->micro * (l->length / l->context) % t)
		return false;
	int64_t global = l->global ? l->global : l->micro * data;
	return global % (l->micro * data) == 0 && data % l->instances == 0 &&
	       schedule_fits(l, global / (l->micro * data)) && stages_fit(l);
}

/* What an accepted layout says of itself is the whole model and the whole batch. */
static void check_accepted(const struct random_layout *l, const struct config *c)
{
	const struct config_derived *d = &c->derived;
	CHECK_INT(d->data_parallel_size * l->tensor * l->context * l->pipeline, l->world);
	CHECK_INT(c->parallel.expert_tensor_parallel_size, ranks_of_expert(l));
	CHECK_INT(d->expert_data_parallel_size * ranks_of_expert(l) * l->expert * l->pipeline, l->world);
	CHECK_INT(d->optimizer_shards * l->instances, d->data_parallel_size);
	CHECK_INT(d->accumulation * l->micro * d->data_parallel_size, c->train.global_batch_size);
	CHECK_INT(d->stages.n, l->pipeline > 1 ? l->pipeline * l->chunks : 0);
	CHECK_INT(c->parallel.pipeline_schedule == PARALLEL_INTERLEAVED, l->chunks > 1);
	int next = 0;
	for (size_t v = 0; v < d->stages.n; v++) {
		const char *line = d->stages.items[v], *layers = strstr(line, "layer");
		int first, last;
		char head[40];
		snprintf(head, sizeof head,
		         l->chunks > 1 ? "stage %d chunk %d: " : "stage %d: ", (int)(v % (size_t)l->pipeline),
		         (int)(v / (size_t)l->pipeline));
		CHECK(!strncmp(line, head, strlen(head)));
		CHECK_INT(strstr(line, "embedding") != NULL, v == 0);
		CHECK_INT(strstr(line, "loss") != NULL, v + 1 == d->stages.n);
		int n = layers ? sscanf(layers + strcspn(layers, " "), "%d-%d", &first, &last) : 0;
		if (n)
			CHECK_INT(first, next);
		next = n ? (n > 1 ? last : first) + 1 : next;
	}
	CHECK_INT(next, d->stages.n ? l->layers : 0);
}

/* A refusal with a single line: the values that it names as nearest are no longer blamed. Returns how many
 * were tried. */
static size_t try_nearest(struct random_layout *l, const char *text)
{
	static const char *const keys[] = {"model.num_attention_heads",
	                                   "model.num_query_groups",
	                                   "model.ffn_hidden_size",
	                                   "model.seq_length",
	                                   "train.global_batch_size",
	                                   "model.moe_ffn_hidden_size",
	                                   "model.moe_shared_expert_intermediate_size",
	                                   INSTANCES,
	                                   TENSOR,
	                                   EXPERT,
	                                   CHUNKS};
	const char *at = strstr(text, "; nearest: ");
	size_t n = 0, tried = 0;
	while (l->sets[n])
		n++;
	if (!at || strchr(text, '\n'))
		return 0;
	at += strlen("; nearest: ");
	for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
		char blame[80], set[80];
		int used = 0;
		int64_t value;
		snprintf(blame, sizeof blame, ": %s: ", keys[i]);
		for (const char *p = at;
		     strstr(text, blame) && sscanf(p, "%" SCNd64 "%n", &value, &used) == 1;) {
			struct config c;
			struct err e;
			snprintf(set, sizeof set, "%s=%" PRId64, keys[i], value);
			l->sets[n] = set;
			bool gives_way =
			        p[used] == ' ' && p[used + 1] == '('; /* another key must change too */
			if (!gives_way && check_layout_of(&c, l->world, l->sets, &e) && strstr(e.text, blame))
				test_failed(__FILE__, __LINE__, "%s\nbut with %s: %s", text, set, e.text);
			if (!gives_way)
				config_free(&c);
			tried += !gives_way;
			p += used;
			p += strspn(p, ", or");
		}
	}
	l->sets[n] = NULL;
	return tried;
}

TEST(random_layouts_are_accepted_where_they_divide)
{
	size_t accepted = 0, refused = 0, tried = 0, interleaved = 0, contexts = 0, experts = 0, grids = 0;
	for (uint64_t seed = 0; seed < 6000; seed++) {
		struct random_layout l;
		struct config c;
		struct err e;
		draw_layout(&l, seed);
		write_layout(&l);
		int rc = check_layout_of(&c, l.world, l.sets, &e);
		if (!rc != layout_fits(&l)) {
			struct buf b = {0};
			for (size_t i = 0; l.sets[i]; i++)
				buf_printf(&b, " %s", l.sets[i]);
			test_failed(__FILE__, __LINE__, "world %d%s: %s", l.world, b.data,
			            rc ? e.text : "accepted");
			buf_free(&b);
		}
		if (rc)
			tried += try_nearest(&l, e.text);
		else
			check_accepted(&l, &c);
		if (!rc && accepted % 8 == 0)
			check_round_trip(&c);
		accepted += !rc;
		refused += rc != 0;
		interleaved += !rc && l.chunks > 1;
		contexts += !rc && l.context > 1;
		experts += !rc && l.experts;
		grids += !rc && l.expert > 1 && ranks_of_expert(&l) != l.tensor;
		config_free(&c);
	}
	CHECK(accepted > 250 && refused > 1000 && tried > 400 && interleaved > 20);
	CHECK(contexts > 20 && experts > 60 && grids > 10);
}

/* The same of models with experts or latent attention: what may not be put together. */

struct random_model {
	int64_t experts, topk, groups, used, shared, query_groups, width; /* 0: not said */
	bool bias, capacity, pad, gate, overlap, linear_bias, mla, norms, qkv_bias, half, yarn, llama, slow;
	const char *score, *freq, *position;
	bool freq_fits;
	char text[8][64];
	const char *sets[40];
};

static void draw_model(struct random_model *m, uint64_t seed)
{
	static const struct {
		const char *freq;
		bool fits;
	} freqs[] = {{"1", true},         {"2", true},        {"9", true},        {"([0]*3+[1])", true},
	             {"([0,1]*2)", true}, {"([1]*5)", false}, {"([0]*4)", false}, {"x", false}};
	static const char *const scores[] = {"softmax", "sigmoid", "sqrtsoftplus"};
	static const char *const positions[] = {"rope", "rope", "rope", "rope", "none", "learned_absolute"};
	uint64_t r = seed * 64;
	*m = (struct random_model){0};
	m->experts = pick(&r, "abeghi");
	m->topk = pick(&r, "aaaabcdegh");
	m->groups = pick(&r, "aaabcde");
	m->used = pick(&r, m->groups ? "abbbccde" : "aaaaaaab");
	m->shared = pick(&r, "aal");
	m->mla = pick(&r, "aab");
	m->query_groups = pick(&r, "aaac");
	m->width = pick(&r, "aaaak");
	bool *rare[] = {&m->bias,     &m->capacity, &m->pad,  &m->gate, &m->overlap, &m->linear_bias,
	                &m->qkv_bias, &m->norms,    &m->half, &m->yarn, &m->llama,   &m->slow};
	for (size_t i = 0; i < sizeof rare / sizeof *rare; i++)
		*rare[i] = pick(&r, "aaaaaab");
	size_t f = rng_bits(7, r++) % 24;
	f = f < sizeof freqs / sizeof *freqs ? f : 0;
	m->freq = freqs[f].freq;
	m->freq_fits = freqs[f].fits;
	m->score = scores[rng_bits(7, r++) % 3];
	m->position = positions[rng_bits(7, r++) % 6];
}

static void write_model(struct random_model *m)
{
	const struct {
		const char *key;
		int64_t value;
	} numbers[] = {{"model.num_experts", m->experts},
	               {"model.moe_router_topk", m->topk},
	               {"model.moe_router_num_groups", m->groups},
	               {"model.moe_router_group_topk", m->used},
	               {"model.moe_shared_expert_intermediate_size", m->shared},
	               {"model.num_query_groups", m->query_groups},
	               {"model.kv_channels", m->width}};
	const struct {
		const char *set;
		bool said;
	} words[] = {{"model.multi_latent_attention=true", m->mla},
	             {"model.qk_head_dim=16", true},
	             {"model.qk_pos_emb_head_dim=8", true},
	             {"model.moe_router_enable_expert_bias=true", m->bias},
	             {"model.moe_expert_capacity_factor=1.5", m->capacity},
	             {"model.moe_pad_expert_input_to_capacity=true", m->pad},
	             {"model.moe_shared_expert_gate=true", m->gate},
	             {"model.moe_shared_expert_overlap=true", m->overlap},
	             {"model.add_bias_linear=true", m->linear_bias},
	             {"model.add_qkv_bias=true", m->qkv_bias},
	             {"model.qk_layernorm=true", m->norms},
	             {"model.rotary_percent=0.5", m->half},
	             {"model.rope_type=yarn", m->yarn},
	             {"model.use_rope_scaling=true", m->llama},
	             {"model.yarn_beta_slow=40", m->slow}};
	const char *texts[][2] = {{"model.moe_layer_freq", m->freq},
	                          {"model.moe_router_score_function", m->score},
	                          {"model.position_embedding_type", m->position}};
	static char said[3][80];
	size_t n = 0, kept = 0;
	for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
		if (numbers[i].value) {
			snprintf(m->text[kept], sizeof m->text[0], "%s=%lld", numbers[i].key,
			         (long long)numbers[i].value);
			m->sets[n++] = m->text[kept++];
		}
	for (size_t i = 0; i < sizeof words / sizeof *words; i++)
		if (words[i].said)
			m->sets[n++] = words[i].set;
	for (size_t i = 0; i < 3; i++) {
		snprintf(said[i], sizeof said[i], "%s=%s", texts[i][0], texts[i][1]);
		m->sets[n++] = said[i];
	}
	m->sets[n] = NULL;
}

static bool router_fits(const struct random_model *m)
{
	int64_t topk = m->topk ? m->topk : 2;
	if (topk > m->experts || !m->groups != !m->used || (m->bias && !strcmp(m->score, "softmax")))
		return false;
	return !m->groups || (m->experts % m->groups == 0 && m->used <= m->groups && topk % m->used == 0 &&
	                      topk / m->used <= m->experts / m->groups);
}

/* Of 4 layers, 4 heads, width 64. */
static bool model_fits(const struct random_model *m)
{
	bool rope = !strcmp(m->position, "rope");
	if (m->experts && (!router_fits(m) || !m->freq_fits || m->linear_bias || (m->pad && !m->capacity) ||
	                   (!m->shared && (m->gate || m->overlap))))
		return false;
	if (m->mla && (m->query_groups || (m->width && m->width != 24) || m->linear_bias || m->qkv_bias ||
	               m->norms || m->half || !rope))
		return false;
	return rope ? !(m->yarn && (m->llama || m->slow)) : !m->yarn && !m->llama;
}

TEST(random_models_are_accepted_where_they_fit)
{
	static const char sizes[] =
	        "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, seq_length: "
	        "32}\ntrain: {train_iters: 10}\n";
	size_t accepted = 0, experts = 0, groups = 0, latents = 0;
	char path[300];
	snprintf(path, sizeof path, "%s", scratch_file("random.yaml", sizes, sizeof sizes - 1));
	for (uint64_t seed = 0; seed < 3000; seed++) {
		struct random_model m;
		struct config c;
		struct err e;
		draw_model(&m, seed);
		write_model(&m);
		const char *files[] = {path, NULL};
		int rc = load(&c, files, m.sets, &e);
		CHECK_INT(rc, 0);
		rc = config_check(&c, 1, &e);
		if (!rc != model_fits(&m)) {
			struct buf b = {0};
			for (size_t i = 0; m.sets[i]; i++)
				buf_printf(&b, " %s", m.sets[i]);
			test_failed(__FILE__, __LINE__, "%s: %s", b.data, rc ? e.text : "accepted");
			buf_free(&b);
		}
		if (!rc && accepted % 8 == 0)
			check_round_trip(&c);
		accepted += !rc;
		experts += !rc && m.experts;
		groups += !rc && m.experts && m.groups;
		latents += !rc && m.mla;
		config_free(&c);
	}
	CHECK(accepted > 400 && accepted < 2000 && experts > 100 && groups > 30 && latents > 50);
}

TEST(layouts_do_not_change_the_hash)
{
	static const struct {
		int world;
		const char *sets[6];
	} rows[] = {
	        {8, {NULL}},
	        {2, {TENSOR "=2", "parallel.sequence_parallel=true", "comm_overlap.tp_comm_overlap=true"}},
	        {4, {PIPELINE "=4", SCHEDULE "=zero_bubble"}},
	        {4, {PIPELINE "=2", CHUNKS "=4", "train.micro_batch_size=2", INSTANCES "=2"}},
	        {2, {PIPELINE "=2", PIPELINE_LAYOUT "=Et|t*7,L", "recompute.granularity=selective"}},
	        {8, {CONTEXT "=2", "parallel.cp_comm_type=all_gather", EXPERT_TENSOR "=1", "parallel=auto"}},
	};
	uint64_t h = 0;
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		struct config c;
		struct err e;
		const char *sets[8] = {"train.global_batch_size=16"};
		memcpy(sets + 1, rows[i].sets, sizeof rows[i].sets);
		CHECK_INT(check_layout_of(&c, rows[i].world, sets, &e), 0);
		h = i ? h : config_hash(&c);
		CHECK(config_hash(&c) == h);
		config_free(&c);
	}
}

static uint64_t hash_with(const char *set)
{
	struct config c;
	struct err e;
	const char *files[] = {test_golden("config/demo.yaml"), NULL}, *sets[] = {set, NULL};
	CHECK_INT(load(&c, files, sets, &e), 0);
	CHECK_INT(config_check(&c, 1, &e), 0);
	uint64_t h = config_hash(&c);
	config_free(&c);
	return h;
}

TEST(hash_covers_what_defines_the_training)
{
	static const char *const same[] = {"run.dir=elsewhere",          "logger.log_interval=1",
	                                   "checkpoint.save_interval=7", "dist.num_threads=2",
	                                   "profiling.nan_hunt=true",    "optimizer.lr=0.0003",
	                                   "train.micro_batch_size=2",   "ddp.zero_stage=3",
	                                   "ddp.bucket_size=1000",       "ddp.overlap_grad_reduce=true",
	                                   "recompute.granularity=full", "comm_overlap.tp_comm_overlap=true"};
	static const char *const other[] = {
	        "optimizer.lr=0.00031",         "model.num_layers=5",   "rng.seed=1",
	        "dataset.shuffle=false",        "mixed_precision=fp32", "train.global_batch_size=64",
	        "ddp.grad_reduce_in_fp32=false"};
	uint64_t h = hash_with(NULL);
	for (size_t i = 0; i < sizeof same / sizeof *same; i++)
		CHECK(hash_with(same[i]) == h);
	for (size_t i = 0; i < sizeof other / sizeof *other; i++)
		CHECK(hash_with(other[i]) != h);
}

static void mutate(const char *name, int world, uint64_t rounds)
{
	char *text;
	size_t bytes, good = 0;
	struct err e = {0};
	MUST(!sys_read_file(test_golden(name), 1 << 20, &text, &bytes, &e));
	char *copy = mem_array(bytes, 1);
	for (uint64_t i = 0; i < rounds; i++) {
		size_t n = i % 5 ? bytes : rng_bits(1, i) % bytes;
		static const char spice[] = "{}[]:,#&*!|>'\"%@`-? \n\t0e.\\<~";
		memcpy(copy, text, n);
		for (uint64_t k = 0; n && k <= i % 3; k++) {
			uint64_t r = rng_bits(2, 8 * i + k);
			copy[(r >> 8) % n] = r & 1 ? (char)(r >> 1) : spice[(r >> 1) % (sizeof spice - 1)];
		}
		struct config c;
		int rc = load_text(&c, copy, n, &e);
		if (!rc)
			rc = config_check(&c, world, &e);
		CHECK(!rc || (rc == EXIT_CONFIG && *e.text));
		good += !rc;
		if (!rc && i % 8 == 0)
			check_round_trip(&c);
		config_free(&c);
	}
	CHECK(good > 5 && good < rounds - 100);
	free(copy);
	free(text);
}

TEST(mutated_files_never_crash)
{
	mutate("config/demo.yaml", 1, 1500);
	mutate("config/experts.yaml", 8, 800);
}

TEST(schema_names_every_key)
{
	struct arena a = {0};
	struct buf b = {0};
	struct json *root;
	struct err e = {0};
	option_put_schema_json(config_table(), &b);
	MUST(!json_parse(&a, "schema", b.data, b.length, &root, &e));
	const struct json *groups = json_get(root, "properties");
	struct buf words = {0};
	option_put_schema(config_table(), &words);
	for (size_t i = 0; i < config_table()->n; i++) {
		const struct option *o = &config_table()->rows[i];
		char group[64];
		snprintf(group, sizeof group, "%.*s", (int)strcspn(o->key, "."), o->key);
		const struct json *key =
		        json_get(json_get(json_get(groups, group), "properties"), strchr(o->key, '.') + 1);
		CHECK(json_get(key, "type") && json_get(key, "description"));
		CHECK_HAS(words.data, o->key);
		struct buf help = {0};
		option_put_help(o, &help);
		CHECK_HAS(help.data, o->doc);
		buf_free(&help);
	}
	buf_free(&b);
	buf_free(&words);
	arena_free(&a);
}

/* Parses one command line, words ended by NULL. */
static int read_line(struct cli *c, bool *help, struct err *e, const char *const *words)
{
	char *argv[16];
	int argc = 0;
	for (; words[argc]; argc++)
		argv[argc] = (char *)words[argc];
	*e = (struct err){0};
	return cli_read(c, argc, argv, help, e);
}

TEST(command_lines)
{
	struct cli_config config = {0};
	struct cli_list input = {0};
	int64_t n = 1;
	double t = 0;
	const char *name = NULL;
	bool explain = false, help;
	struct err e;
	struct cli_option options[] = {
	        CLI_CONFIG(&config),
	        {"n", CLI_INT, &n, "N", "ranks"},
	        {"temperature", CLI_DOUBLE, &t, "T", "heat"},
	        {"name", CLI_STRING, &name, "NAME", "name"},
	        {"explain", CLI_FLAG, &explain, NULL, "more"},
	        {"input", CLI_MANY, &input, "F", "files"},
	};
	struct cli c = {
	        .usage = "x -c FILE", .example = "x -c a", .options = options, .n = 8, .max_words = 1};
	c.n = sizeof options / sizeof *options;
	const char *good[] = {
	        "x",         "-c", "a",       "--set", "a.b=c", "-cb", "-n", "4", "--temperature=-0.5",
	        "--explain", "w",  "--input", "p",     "q",     NULL};
	CHECK_INT(read_line(&c, &help, &e, good), 0);
	struct config_source s = cli_config_source(&config);
	CHECK_INT(s.n_files, 2);
	CHECK_STR(s.files[1], "b");
	CHECK_STR(s.sets[0], "a.b=c");
	CHECK_INT(n, 4);
	CHECK_NEAR(t, -0.5, 0);
	CHECK(explain && !help && !name);
	CHECK_INT(c.words.n, 1);
	CHECK_INT(input.n, 2);
	cli_free(&c);
	static const struct {
		const char *words[4], *part;
	} bad[] = {
	        {{"x", "--explian"}, "unknown option --explian; did you mean --explain?"},
	        {{"x", "--zzzzzz"}, "unknown option --zzzzzz; see --help"},
	        {{"x", "-z"}, "unknown option -z"},
	        {{"x", "-explain"}, "did you mean --explain?"},
	        {{"x", "--n", "3"}, "did you mean -n?"},
	        {{"x", "-n"}, "-n needs a value: N"},
	        {{"x", "--name", "--explain"}, "--name needs a value: NAME"},
	        {{"x", "-n", "4x"}, "'4x' is not a whole number"},
	        {{"x", "-n", "99999999999999999999"}, "is not a whole number"},
	        {{"x", "--temperature", "warm"}, "'warm' is not a number"},
	        {{"x", "--explain=1"}, "--explain takes no value"},
	        {{"x", "a", "b"}, "'b' is one word too many"},
	        {{"x", "--input"}, "--input needs a value"},
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		CHECK_INT(read_line(&c, &help, &e, bad[i].words), EXIT_USAGE);
		CHECK_HAS(e.text, bad[i].part);
		cli_free(&c);
	}
	const char *launch[] = {"x", "-n", "2", "train", "-c", "a", "--zzz", NULL};
	c.stops_at_word = true;
	CHECK_INT(read_line(&c, &help, &e, launch), 0);
	CHECK_INT(n, 2);
	CHECK_INT(c.words.n, 4);
	CHECK_STR(c.words.items[3], "--zzz");
	cli_free(&c);
	const char *ask[] = {"x", "--help", NULL};
	CHECK_INT(read_line(&c, &help, &e, ask), 0);
	CHECK(help);
	struct buf b = {0};
	cli_help(&c, &b);
	CHECK_HAS(b.data, "--temperature T");
	CHECK_HAS(b.data, "example: pentad x -c a");
	buf_free(&b);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
