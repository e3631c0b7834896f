/* `pentad verify` finds mistakes: each case makes one on one rank, and the report must name the tensor, its
 * layer and the rank. Ranks are threads. */
#include "base/err.h"
#include "comm/comm.h"
#include "test/ranks.h"
#include "test/test.h"
#include "train/verify.h"

#include <stdlib.h>

enum { STEPS = 2, MAX_SETS = 40 };

/* What is done wrong, on this rank, when. */
enum moment { BEFORE_START, BEFORE_STEP, BEFORE_GRADIENTS, BEFORE_UPDATE, BEFORE_WEIGHTS };
typedef void meddle_fn(struct verify *v, enum moment when);

struct trial {
	const char *const *sets; /* ended by NULL */
	int ranks, code;         /* code: out */
	double tolerance;        /* 0: 1 */
	meddle_fn *meddle;
	struct config config, reference;
	char *text; /* out: rank 0's report */
	struct err e;
};

static bool load(struct config *c, const struct trial *t)
{
	static const char *const common[] = {"model.num_layers=4",
	                                     "model.hidden_size=24",
	                                     "model.num_attention_heads=4",
	                                     "model.ffn_hidden_size=40",
	                                     "model.vocab_size=131",
	                                     "model.seq_length=12",
	                                     "model.make_vocab_size_divisible_by=4",
	                                     "train.train_iters=5",
	                                     "train.global_batch_size=8"};
	const char *sets[MAX_SETS];
	size_t n = 0;
	struct err e = {0};
	for (; n < sizeof common / sizeof *common; n++)
		sets[n] = common[n];
	for (const char *const *s = t->sets; s && *s; s++)
		sets[n++] = *s;
	return CHECK(!config_load(c, &(struct config_source){.sets = sets, .n_sets = n}, &e));
}

/* verify_run, with mistakes between. */
static int run(struct verify *v, struct trial *t, struct err *e)
{
	t->meddle(v, BEFORE_START);
	int rc = verify_compare(v, VERDICT_START, e);
	while (!rc && v->done < STEPS && !v->lost) {
		t->meddle(v, BEFORE_STEP);
		rc = verify_gradients(v, e);
		t->meddle(v, BEFORE_GRADIENTS);
		if (!rc && v->done == 1)
			rc = verify_compare(v, VERDICT_GRADIENTS, e);
		t->meddle(v, BEFORE_UPDATE);
		if (!rc && !v->lost)
			rc = verify_update(v, e);
	}
	t->meddle(v, BEFORE_WEIGHTS);
	if (!rc && !v->lost)
		rc = verify_compare(v, VERDICT_WEIGHTS, e);
	return rc ? rc : verify_conclude(v, e);
}

static void run_rank(int rank, struct comm *world, void *shared)
{
	struct trial *t = shared;
	struct verify *v = mem_array(1, sizeof *v);
	struct err e = {0};
	char *text = NULL;
	size_t length = 0;
	FILE *out = open_memstream(&text, &length);
	struct verify_options options = {
	        .steps = STEPS, .tolerance = t->tolerance > 0 ? t->tolerance : 1, .host = {0, 1}, .out = out};
	int rc = verify_open(v, &t->config, &t->reference, world, &options, &e);
	if (!rc)
		rc = run(v, t, &e);
	verify_close(v);
	free(v);
	fclose(out);
	CHECK_INT(rc, e.code);
	if (rank) {
		free(text);
		return;
	}
	t->text = text;
	t->code = rc;
	t->e = e;
}

static void nothing(struct verify *v, enum moment when)
{
	(void)v, (void)when;
}

/* Runs a trial; the caller looks at code, e and text, and frees text. */
static void try(struct trial *t)
{
	struct err e = {0};
	t->meddle = t->meddle ? t->meddle : nothing;
	bool good = load(&t->config, t);
	good &= load(&t->reference, t);
	good = good && CHECK(!config_check(&t->config, t->ranks, &e)) &&
	       CHECK(!verify_reference_config(&t->reference, &t->config, &e));
	if (!good || !ranks_run(t->ranks, run_rank, t))
		test_failed(__FILE__, __LINE__, "%s", e.text);
	config_free(&t->config);
	config_free(&t->reference);
}

/* Adds `by` to the first element of the rank's first piece of a tensor. */
static void bump(struct verify *v, enum shard_state state, const char *name, float by)
{
	struct piece *list;
	size_t n = pieces_list(&v->step.program, state, &list), i = 0;
	while (i < n && strcmp(list[i].part->name, name))
		i++;
	if (CHECK(i < n)) {
		float *host = mem_array((size_t)piece_count(&list[i]), sizeof *host);
		piece_read(&v->step.program, v->step.exec, &list[i], host);
		host[0] += by;
		piece_write(&v->step.program, v->step.exec, &list[i], host);
		free(host);
	}
	free(list);
}

static void forget_gradients(struct verify *v, const char *name)
{
	struct piece *list;
	size_t n = pieces_list(&v->step.program, SHARD_GRAD, &list);
	for (size_t i = 0; i < n; i++) {
		if (name && strcmp(list[i].part->name, name))
			continue;
		float *zero = mem_array((size_t)piece_count(&list[i]), sizeof *zero);
		piece_write(&v->step.program, v->step.exec, &list[i], zero);
		free(zero);
	}
	free(list);
}

static const char *const dp4[] = {"ddp.zero_stage=0", NULL};
static const char *const tp2pp2[] = {"parallel.tensor_model_parallel_size=2",
                                     "parallel.sequence_parallel=true",
                                     "parallel.pipeline_model_parallel_size=2",
                                     "ddp.zero_stage=2",
                                     "model.hidden_dropout=0.1",
                                     NULL};

static void expect_first(struct trial *t, const char *const *words)
{
	try(t);
	CHECK_INT(t->code, EXIT_SELF_CHECK);
	MUST(t->text != NULL);
	const char *first = strstr(t->text, "first difference: ");
	if (CHECK(first))
		for (; *words; words++) {
			CHECK_HAS(first, *words);
			CHECK_HAS(t->e.text, *words);
		}
	CHECK(!strstr(t->text, "verified"));
	free(t->text);
}
#define EXPECT_FIRST(t, ...) expect_first(t, (const char *const[]){__VA_ARGS__, NULL})

TEST(honest_layouts_stay_far_within_the_bounds)
{
	static const char *const gpt[] = {"model.normalization=LayerNorm",
	                                  "model.add_bias_linear=true",
	                                  "model.activation=gelu",
	                                  "model.attention_dropout=0.1",
	                                  "model.position_embedding_type=learned_absolute",
	                                  "model.untie_embeddings_and_output_weights=false",
	                                  "parallel.pipeline_model_parallel_size=2",
	                                  "parallel.tensor_model_parallel_size=2",
	                                  "ddp.zero_stage=3",
	                                  NULL};
	static const char *const grouped[] = {"parallel.tensor_model_parallel_size=4",
	                                      "model.num_query_groups=4", "model.qk_layernorm=true",
	                                      "model.add_qkv_bias=true", NULL};
	static const char *const *const sets[] = {dp4, tp2pp2, gpt, grouped};
	for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
		struct trial t = {.sets = sets[i], .ranks = i % 2 ? 8 : 4, .tolerance = 0.5};
		try(&t);
		CHECK_INT(t.code, 0);
		if (t.code)
			test_failed(__FILE__, __LINE__, "layout %zu: %s", i, t.e.text);
		MUST(t.text != NULL);
		CHECK_HAS(t.text, "verified: ");
		free(t.text);
	}
}

TEST(bf16_layouts_stay_within_coarser_bounds)
{
	static const char *const sets[] = {"mixed_precision=bf16", "parallel.tensor_model_parallel_size=2",
	                                   NULL};
	static const char *const reduce[] = {"ddp.grad_reduce_in_fp32=false", NULL};
	struct trial t = {.sets = sets, .ranks = 4}, u = {.sets = reduce, .ranks = 4};
	try(&t);
	CHECK_INT(t.code, 0);
	try(&u);
	CHECK_INT(u.code, 0);
	free(t.text);
	free(u.text);
}

TEST(fp16_layouts_stay_within_their_bounds)
{
	static const char *const sets[] = {"mixed_precision=fp16", "parallel.tensor_model_parallel_size=2",
	                                   "ddp.zero_stage=2", NULL};
	struct trial t = {.sets = sets, .ranks = 4};
	try(&t);
	CHECK_INT(t.code, 0);

	free(t.text);
}

static void bump_a_weight(struct verify *v, enum moment when)
{
	if (when == BEFORE_START && v->world->rank == 5)
		bump(v, SHARD_PARAM, "decoder.layers.2.mlp.fc2.weight", 1e-6f);
}

TEST(a_weight_of_one_rank_begins_otherwise)
{
	struct trial t = {.sets = tp2pp2, .ranks = 8, .meddle = bump_a_weight};
	EXPECT_FIRST(&t, "before step 1: weight decoder.layers.2.mlp.fc2.weight (layer 2) differs on rank 5",
	             "(tp 1, dp 0, pp 1)", "element [0,20]");
}

static void forget_one_gradient(struct verify *v, enum moment when)
{
	if (when == BEFORE_GRADIENTS && v->world->rank == 3 && v->done == 1)
		forget_gradients(v, "decoder.layers.1.attention.key.weight");
}

TEST(a_gradient_of_one_rank_is_lost)
{
	struct trial t = {.sets = dp4, .ranks = 4, .meddle = forget_one_gradient};
	EXPECT_FIRST(&t, "in step 1: gradient of decoder.layers.1.attention.key.weight (layer 1)",
	             "differs on rank 3 (dp 3)", " is 0, one rank has ");
}

static void miss_an_update(struct verify *v, enum moment when)
{
	if (when == BEFORE_UPDATE && v->world->rank == 2 && v->done == 2)
		forget_gradients(v, NULL);
}

TEST(one_rank_misses_an_update)
{
	struct trial t = {.sets = dp4, .ranks = 4, .meddle = miss_an_update};
	EXPECT_FIRST(&t, "after step 2: weight embedding.word_embeddings.weight differs on rank 2 (dp 2)");
}

/* Under ZeRO the others gather what the rank made of its part. */
TEST(one_rank_misses_the_update_of_its_part)
{
	struct trial t = {.sets = tp2pp2, .ranks = 8, .meddle = miss_an_update};
	EXPECT_FIRST(&t, "after step 2: weight embedding.word_embeddings.weight differs on rank 0 (tp 0, ");
}

static void drift_a_little(struct verify *v, enum moment when)
{
	if (when == BEFORE_WEIGHTS && v->world->rank == 1)
		bump(v, SHARD_PARAM, "decoder.layers.3.input_layernorm.weight", 1.2e-7f);
}

TEST(a_copy_drifts_by_one_bit)
{
	struct trial t = {.sets = dp4, .ranks = 4, .meddle = drift_a_little};
	EXPECT_FIRST(
	        &t,
	        "after step 2: weight decoder.layers.3.input_layernorm.weight (layer 3) differs on rank 1",
	        "does not hold the bits of that of rank 0 (dp 0)");
}

/* A rank that trains on samples of others: its share is one in four. */
static void look_elsewhere(struct verify *v, enum moment when)
{
	if (when == BEFORE_STEP && v->world->rank == 1 && v->done == 0)
		v->step.program.coord[AXIS_dp] = 0;
}

TEST(one_rank_reads_another_ones_samples)
{
	struct trial t = {.sets = dp4, .ranks = 4, .meddle = look_elsewhere};
	EXPECT_FIRST(&t, "in step 1: lm_loss is ", "; the first tensor: in step 1: gradient of embedding.");
}

static void poison(struct verify *v, enum moment when)
{
	if (when == BEFORE_STEP && v->world->rank == 2 && v->done == 0)
		bump(v, SHARD_PARAM, "decoder.layers.3.mlp.fc2.weight", NAN);
}

TEST(a_layout_alone_is_not_finite)
{
	struct trial t = {.sets = tp2pp2, .ranks = 4, .meddle = poison};
	EXPECT_FIRST(&t, "in step 1: lm_loss is ", "nan", "first tensor: ");
}

static void burn(struct verify *v, enum moment when)
{
	if (when != BEFORE_STEP || v->done)
		return;
	bump(v, SHARD_PARAM, "output_layer.weight", INFINITY);
	if (v->world->rank == 0)
		exec_upload_part(v->reference.exec, v->reference.program.model.param[0].value, 0, 1,
		                 &(float){INFINITY});
}

TEST(nobody_is_finite)
{
	struct trial t = {.sets = dp4, .ranks = 4, .meddle = burn};
	try(&t);
	CHECK_INT(t.code, EXIT_DIVERGED);
	CHECK_HAS(t.e.text, "step 1 is not finite, nor is that of one rank");
	free(t.text);
}

TEST(one_rank_has_the_same_batch_and_no_layout)
{
	static const char *const sets[] = {"parallel.tensor_model_parallel_size=2",
	                                   "recompute.granularity=full", "train.micro_batch_size=2", NULL};
	struct trial t = {.sets = sets, .ranks = 4};
	struct err e = {0};
	MUST(load(&t.config, &t) && load(&t.reference, &t));
	CHECK_INT(config_check(&t.config, 4, &e), 0);
	CHECK_INT(verify_reference_config(&t.reference, &t.config, &e), 0);
	CHECK_INT(t.reference.train.global_batch_size, 8);
	CHECK_INT(t.reference.train.micro_batch_size, 2);
	CHECK_INT(t.reference.derived.accumulation, 4);
	CHECK_INT(t.reference.parallel.tensor_model_parallel_size, 1);
	CHECK_INT(t.reference.recompute.granularity, RECOMPUTE_NONE);
	config_free(&t.config);
	config_free(&t.reference);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
