/* Every layout trains the same model: losses, gradient norms and weights are those of one rank, and a layout
 * repeats itself bit for bit. Ranks are threads. */
#include "base/err.h"
#include "base/mem.h"
#include "comm/comm.h"
#include "data/dataset.h"
#include "kernels/kernels.h"
#include "test/layouts.h"
#include "test/ranks.h"
#include "test/test.h"
#include "test/walk.h"
#include "train/pieces.h"
#include "train/step.h"

#include <stdlib.h>

TEST(every_number_of_ranks_trains_the_same_model)
{
	static const struct layout in_order[] = {{2, "mbs 3"}, {3, "mbs 2"}, {4, "mbs 6"}, {8, "mbs 1"}};
	static const struct layout shuffled[] = {{1, "mbs 1"}, {2, "mbs 12"}, {3, "mbs 8"}, {8, "mbs 3"}};
	COMPARE(in_order, NULL, false, &layout_fp32);
	COMPARE(shuffled, NULL, true, &layout_fp32);
}

TEST(accumulation_changes_nothing)
{
	static const struct layout layouts[] = {{1, "mbs 24"}, {1, "mbs 3"}, {2, "mbs 12"}, {2, "mbs 3"}};
	COMPARE(layouts, NULL, true, &layout_fp32);
}

TEST(tensor_parallel_ranks_share_the_layers)
{
	static const struct layout layouts[] = {{2, "tp 2 mbs 6"},      {4, "tp 4 mbs 3"},
	                                        {4, "tp 2 mbs 2"},      {2, "tp 2 sp 1 mbs 6"},
	                                        {4, "tp 4 sp 1 mbs 2"}, {8, "tp 4 sp 1 mbs 3"}};
	COMPARE(layouts, NULL, true, &layout_fp32);
}

TEST(pipeline_stages_share_the_layers)
{
	static const struct layout layouts[] = {
	        {2, "pp 2 mbs 6"},
	        {4, "pp 4 mbs 2"},
	        {4, "pp 2 mbs 3"},
	        {2, "pp 2 vpp 2 schedule interleaved mbs 6"},
	        {4, "pp 2 vpp 2 schedule interleaved mbs 3"},
	        {2, "pp 2 schedule zero_bubble mbs 3"},
	        {4, "pp 4 schedule zero_bubble mbs 3"},
	        {3, "pp 3 layout Et|tt|tL mbs 4"},
	};
	COMPARE(layouts, NULL, true, &layout_fp32);
}

TEST(data_parallel_ranks_share_the_optimizer)
{
	static const struct layout layouts[] = {{2, "zero 0 mbs 3"},
	                                        {2, "zero 1 mbs 3"},
	                                        {2, "zero 2 mbs 3"},
	                                        {2, "zero 3 mbs 3"},
	                                        {4, "zero 1 instances 2 mbs 3"},
	                                        {4, "zero 2 instances 2 mbs 3"},
	                                        {4, "zero 3 instances 2 mbs 3"},
	                                        {3, "zero 3 mbs 2 bucket 100"},
	                                        {3, "zero 2 mbs 2 bucket 1000"},
	                                        {3, "zero 1 mbs 2 bucket 1000"}};
	COMPARE(layouts, NULL, true, &layout_fp32);
}

TEST(axes_together)
{
	static const struct layout layouts[] = {
	        {8, "tp 2 sp 1 pp 2 vpp 2 schedule interleaved zero 1 mbs 3"},
	        {8, "tp 4 zero 3 mbs 3"},
	        {4, "pp 4 schedule zero_bubble mbs 1"},
	        {8, "tp 2 pp 2 schedule zero_bubble zero 2 mbs 2"},
	        {8, "tp 2 pp 2 zero 3 sp 1 recompute full mbs 3"},
	        {12, "tp 2 pp 3 layout Et|tt|tL zero 2 mbs 3"},
	        {16, "tp 2 sp 1 pp 2 zero 3 instances 2 mbs 1"},
	};
	COMPARE(layouts, NULL, true, &layout_fp32);
}

TEST(communication_runs_beside_computation)
{
	static const struct layout layouts[] = {
	        {4, "zero 0 mbs 3 overlap 1 bucket 1000"},
	        {4, "zero 1 mbs 3 overlap 1 bucket 1000"},
	        {4, "zero 1 mbs 3 overlap 1 instances 2"},
	        {4, "tp 2 mbs 3 tp_overlap 1"},
	        {4, "tp 4 sp 1 mbs 3 tp_overlap 1"},
	        {8, "tp 2 pp 2 sp 1 overlap 1 tp_overlap 1 mbs 3 bucket 500"},
	        {4, "pp 2 schedule zero_bubble overlap 1 mbs 3"},
	        {4, "pp 2 vpp 2 schedule interleaved overlap 1 zero 2 mbs 3"}};
	COMPARE(layouts, NULL, true, &layout_fp32);
}

TEST(dropout_masks_belong_to_samples_not_to_ranks)
{
	static const char *const extra[] = {"model.hidden_dropout=0.2", "model.attention_dropout=0.1", NULL};
	static const struct layout layouts[] = {
	        {1, "mbs 1"},      {2, "mbs 3"},           {8, "mbs 1"},
	        {4, "tp 4 mbs 3"}, {4, "tp 4 sp 1 mbs 2"}, {4, "tp 2 sp 1 pp 2 mbs 3 recompute full"}};
	COMPARE(layouts, extra, true, &layout_fp32);
}

TEST(other_models_too)
{
	static const char *const gpt[] = {"model.normalization=LayerNorm",
	                                  "model.position_embedding_type=learned_absolute",
	                                  "model.activation=gelu",
	                                  "model.add_bias_linear=true",
	                                  "model.hidden_dropout=0.1",
	                                  "model.untie_embeddings_and_output_weights=false",
	                                  NULL};
	static const char *const qwen[] = {"model.qk_layernorm=true", "model.num_query_groups=2", NULL};
	static const struct layout layouts[] = {
	        {3, "mbs 4 recompute full"},
	        {2, "tp 2 mbs 4"},
	        {2, "tp 2 sp 1 mbs 4 recompute selective"},
	        {2, "pp 2 mbs 4 recompute full"},
	        {4, "pp 2 zero 2 mbs 4"},
	        {4, "pp 2 zero 3 mbs 4 schedule zero_bubble"},
	        {8, "tp 2 pp 2 vpp 2 schedule interleaved sp 1 zero 1 mbs 2"}};
	static const struct layout pairs[] = {{2, "tp 2 mbs 4"}, {4, "tp 2 sp 1 pp 2 mbs 4"}};
	COMPARE(layouts, gpt, true, &layout_fp32);
	COMPARE(pairs, qwen, true, &layout_fp32);
}

/* The walk: every pair of choices of two axes that can go together is run at least once, and many triples. */

enum { TP, PP, DP, ZERO, SP, SCHEDULE, RECOMPUTE, MBS, OVERLAP, AXES, MOST_RANKS = 12 };
static const struct walk_axis axes[AXES] = {
        [TP] = {"tp", 3, {1, 2, 4}},
        [PP] = {"pp", 3, {1, 2, 3}},
        [DP] = {"dp", 3, {1, 2, 3}},
        [ZERO] = {"zero", 4, {0, 1, 2, 3}},
        [SP] = {"sp", 2, {0, 1}},
        [SCHEDULE] = {"schedule", 3, {PARALLEL_1F1B, PARALLEL_INTERLEAVED, PARALLEL_ZERO_BUBBLE}},
        [RECOMPUTE] = {"recompute", 3, {0, 1, 2}},
        [MBS] = {"mbs", 3, {1, 2, 4}},
        [OVERLAP] = {"overlap", 2, {0, 1}},
};

static bool is_legal(const int *v)
{
	int accumulation = GLOBAL_BATCH / (v[DP] * v[MBS]);
	return v[TP] * v[PP] * v[DP] <= MOST_RANKS && (!v[SP] || v[TP] > 1) &&
	       (v[SCHEDULE] == PARALLEL_1F1B || v[PP] > 1) &&
	       (v[SCHEDULE] != PARALLEL_INTERLEAVED || accumulation % v[PP] == 0) && (!v[ZERO] || v[DP] > 1);
}

static int walk_text(const int *v, char *text, size_t cap)
{
	static const char *const recompute[] = {"none", "selective", "full"};
	int n = snprintf(text, cap, "tp %d pp %d zero %d sp %d mbs %d recompute %s overlap %d tp_overlap %d",
	                 v[TP], v[PP], v[ZERO], v[SP], v[MBS], recompute[v[RECOMPUTE]], v[OVERLAP],
	                 v[OVERLAP]);
	if (v[SCHEDULE] == PARALLEL_INTERLEAVED) /* six layers: one each chunk */
		snprintf(text + n, cap - (size_t)n, " schedule interleaved vpp %d", 6 / v[PP]);
	if (v[SCHEDULE] == PARALLEL_ZERO_BUBBLE)
		snprintf(text + n, cap - (size_t)n, " schedule zero_bubble");
	return v[TP] * v[PP] * v[DP];
}

TEST(all_pairs_of_axes_and_many_triples)
{
	static const char *const extra[] = {"model.num_layers=6", "model.hidden_dropout=0.1", NULL};
	static struct walk w = {.axis = axes, .n = AXES, .is_legal = is_legal};
	CHECK(layouts_walk(&w, walk_more(0, 40), walk_text, "mbs 4", 12, extra) >= 12);
}

TEST(a_layout_repeats_itself_bit_for_bit)
{
	static const struct layout layouts[] = {{1, "mbs 4"},
	                                        {3, "mbs 2"},
	                                        {4, "tp 2 sp 1 zero 2 mbs 3"},
	                                        {4, "pp 4 schedule zero_bubble mbs 2"}};
	static const struct tolerance bits = {0, 0, 0};
	struct dataset *data = layout_data(true, 131, 12);
	MUST(data != NULL);
	for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
		struct outcome *a = layout_run(&layouts[i], NULL, data),
		               *b = layout_run(&layouts[i], NULL, data);
		if (CHECK(a && b))
			outcome_compare(a, b, &bits, layouts[i].text);
		outcome_free(a);
		outcome_free(b);
	}
	dataset_close(data);
}

/* Weights are rounded after every step, so layouts agree within that rounding alone: two units in the last of
 * a bfloat16's eight bits, of the largest weight. */
TEST(bf16_agrees_within_its_rounding)
{
	static const char *const extra[] = {"mixed_precision=bf16", NULL};
	static const struct tolerance rounding = {1e-4, 5e-3, 1.6e-2};
	static const struct layout layouts[] = {{1, "mbs 2"},
	                                        {2, "mbs 6"},
	                                        {4, "tp 2 sp 1 mbs 3"},
	                                        {4, "pp 2 zero 3 mbs 3"},
	                                        {4, "zero 2 fp32_reduce 0 mbs 3"},
	                                        {4, "zero 1 fp32_reduce 0 overlap 1 instances 2 mbs 3"}};
	COMPARE(layouts, extra, true, &rounding);
}

/* The same with three bits more; small biases have fewer. */
TEST(fp16_agrees_within_its_rounding)
{
	static const char *const extra[] = {"mixed_precision=fp16", NULL};
	static const struct tolerance rounding = {2e-5, 5e-4, 5e-3};
	static const struct layout layouts[] = {{4, "tp 2 sp 1 zero 2 mbs 3"},
	                                        {4, "pp 2 schedule zero_bubble mbs 3 overlap 1"}};
	COMPARE(layouts, extra, true, &rounding);
}

struct mishap { /* one thread of a layout in which something goes wrong on one rank */
	const struct config *config;
	const struct dataset *data; /* this rank's */
	bool poisoned;              /* a weight that is not a number */
	int rc;
	struct step_result result;
	struct err e;
};

static void run_mishap(int rank, struct comm *world, void *mishaps)
{
	struct mishap *m = (struct mishap *)mishaps + rank;
	struct step s;
	struct groups groups = {0};
	struct place_of_rank at = {.backend = &cpu_backend, .world = world, .groups = &groups};
	float nan = NAN;
	CHECK(!cpu_backend.open(&at.stream, THREADS(1), &m->e));
	if (CHECK(!step_create(&s, m->config, MODEL_TRAIN, &at, NULL, &m->e))) {
		pieces_init(&s.program, s.exec, 99);
		if (m->poisoned)
			exec_upload_part(s.exec, s.program.model.param[3].value, 0, 1, &nan);
		m->rc = step_gradients(&s, m->data, 0, &m->result, &m->e);
		step_free(&s);
	}
	groups_close(&groups);
	cpu_backend.close(at.stream);
}

/* Four ranks; rank 2 reads bad data or holds a broken weight. */
static void run_mishaps(struct mishap m[4], bool bad_data, bool poisoned)
{
	static const struct layout four = {4, "mbs 3"};
	struct config c;
	struct dataset *good = layout_data(true, 131, 12), *bad = layout_data(true, 7, 12);
	if (good && bad && layout_config(&c, &four, NULL)) {
		for (int i = 0; i < 4; i++)
			m[i] = (struct mishap){.config = &c,
			                       .data = bad_data && i == 2 ? bad : good,
			                       .poisoned = poisoned && i == 2};
		ranks_run(4, run_mishap, m);
	}
	config_free(&c);
	dataset_close(good);
	dataset_close(bad);
}

TEST(one_ranks_bad_data_end_the_step_on_all)
{
	static struct mishap m[4];
	run_mishaps(m, true, false);
	for (int i = 0; i < 4; i++) {
		CHECK_INT(m[i].rc, EXIT_BAD_DATA);
		CHECK_HAS(m[i].e.text, i == 2 ? "allowed is 0 to 6" : "rank 2");
	}
}

TEST(one_ranks_broken_weight_skips_the_step_on_all)
{
	static struct mishap m[4];
	run_mishaps(m, false, true);
	for (int i = 0; i < 4; i++) {
		CHECK_INT(m[i].rc, 0);
		CHECK(m[i].result.skipped);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
