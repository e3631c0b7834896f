/* Ranks that share sequences and experts train the same model as one rank alone, and so do all five axes
 * together. Ranks are threads. */
#include "data/dataset.h"
#include "test/layouts.h"
#include "test/test.h"
#include "test/walk.h"

#include <stdio.h>
#include <string.h>

enum { LENGTH = 16, MAX_EXTRA = 40 };

#define SAME(layouts, extra, tolerance) \
	layouts_compare(layouts, sizeof(layouts) / sizeof *(layouts), "mbs 6", LENGTH, extra, true, tolerance)

#define LONGER "model.seq_length=16"
#define EXPERTS                                                                                   \
	LONGER, "model.num_experts=4", "model.moe_ffn_hidden_size=16", "model.moe_router_topk=2", \
	        "model.add_qkv_bias=false", "model.init_method_std=0.1", "model.moe_aux_loss_coeff=0.02"
#define LATENT                                                                                   \
	"model.add_qkv_bias=false", "model.multi_latent_attention=true", "model.q_lora_rank=12", \
	        "model.kv_lora_rank=8", "model.qk_head_dim=8", "model.qk_pos_emb_head_dim=4",    \
	        "model.v_head_dim=6"

TEST(context_parallel_ranks_share_the_sequence)
{
	static const char *const extra[] = {LONGER, NULL};
	static const struct layout layouts[] = {{2, "cp 2 mbs 6"},
	                                        {2, "cp 2 mbs 6 overlap 1"},
	                                        {4, "cp 4 mbs 6"},
	                                        {4, "cp 4 exchange all_gather mbs 6"},
	                                        {4, "cp 4 exchange a2a mbs 6"},
	                                        {4, "cp 2 mbs 3 zero 1"},
	                                        {4, "tp 2 sp 1 cp 2 mbs 6"},
	                                        {4, "tp 2 cp 2 exchange a2a mbs 6"},
	                                        {4, "pp 2 cp 2 exchange all_gather mbs 6"},
	                                        {8, "pp 2 cp 2 schedule zero_bubble zero 2 mbs 3"},
	                                        {8, "cp 4 zero 3 mbs 6 recompute full"}};
	SAME(layouts, extra, &layout_fp32);
}

TEST(windows_reach_across_chunks)
{
	static const char *const extra[] = {LONGER, "model.window_size=5", "model.num_query_groups=2", NULL};
	static const struct layout layouts[] = {{2, "cp 2 mbs 6"},
	                                        {2, "cp 2 mbs 6 overlap 1"},
	                                        {4, "cp 4 mbs 6"},
	                                        {2, "cp 2 exchange all_gather mbs 6"},
	                                        {2, "cp 2 exchange a2a mbs 6"}};
	SAME(layouts, extra, &layout_fp32);
}

/* Token 3 ends a document: some samples hold several. */
TEST(documents_keep_to_themselves)
{
	static const char *const rope[] = {LONGER, "tokenizer.eod_id=3", "dataset.reset_attention_mask=true",
	                                   "dataset.reset_position_ids=true", NULL};
	static const char *const learned[] = {LONGER,
	                                      "tokenizer.eod_id=3",
	                                      "dataset.reset_attention_mask=true",
	                                      "dataset.reset_position_ids=true",
	                                      "model.position_embedding_type=learned_absolute",
	                                      "model.hidden_dropout=0.1",
	                                      "model.attention_dropout=0.1",
	                                      NULL};
	static const struct layout layouts[] = {{2, "cp 2 mbs 6"},
	                                        {2, "cp 2 mbs 6 overlap 1"},
	                                        {4, "cp 4 mbs 3 exchange all_gather"},
	                                        {4, "cp 4 mbs 3 exchange a2a"},
	                                        {4, "tp 2 sp 1 cp 2 mbs 6"},
	                                        {4, "pp 2 cp 2 mbs 3 recompute selective"}};
	SAME(layouts, rope, &layout_fp32);
	SAME(layouts, learned, &layout_fp32);
}

TEST(expert_parallel_ranks_share_the_experts)
{
	static const char *const extra[] = {EXPERTS, NULL};
	static const struct layout layouts[] = {{2, "mbs 6"},
	                                        {2, "ep 2 mbs 6"},
	                                        {4, "ep 4 mbs 6"},
	                                        {4, "ep 2 mbs 6 zero 1"},
	                                        {4, "ep 2 etp 2 mbs 6"},
	                                        {4, "ep 2 dispatch allgather mbs 6"},
	                                        {4, "ep 2 etp 2 dispatch allgather mbs 6"},
	                                        {4, "tp 2 sp 1 ep 2 etp 1 mbs 6"},
	                                        {4, "tp 2 sp 1 ep 2 etp 2 mbs 6 zero 2"},
	                                        {4, "cp 2 ep 2 mbs 6 zero 3"},
	                                        {4, "cp 2 ep 2 mbs 6 recompute selective modules [moe]"},
	                                        {4, "cp 2 ep 4 mbs 6 exchange a2a recompute full"},
	                                        {4, "pp 2 ep 2 mbs 6"}};
	SAME(layouts, extra, &layout_fp32);
}

/* What balances, and what is shared: per sequence, with a bias, over the whole batch; capacities. */
TEST(routers_and_balance)
{
	static const char *const sequences[] = {EXPERTS,
	                                        "model.moe_router_load_balancing_type=seq_aux_loss",
	                                        "model.moe_z_loss_coeff=0.01",
	                                        "model.moe_layer_freq=2",
	                                        "model.moe_shared_expert_intermediate_size=12",
	                                        "model.moe_shared_expert_gate=true",
	                                        "model.moe_input_jitter_eps=0.1",
	                                        NULL};
	static const char *const biased[] = {EXPERTS,
	                                     "model.num_experts=8",
	                                     "model.moe_router_score_function=sigmoid",
	                                     "model.moe_router_enable_expert_bias=true",
	                                     "model.moe_router_bias_update_rate=0.01",
	                                     "model.moe_router_num_groups=4",
	                                     "model.moe_router_group_topk=2",
	                                     "model.moe_router_topk_scaling_factor=2.5",
	                                     "model.moe_layer_freq=([0]+[1]*3)",
	                                     "model.moe_shared_expert_intermediate_size=12",
	                                     NULL};
	static const char *const full[] = {EXPERTS, "model.moe_expert_capacity_factor=0.8", NULL};
	static const char *const padded[] = {EXPERTS, "model.moe_expert_capacity_factor=1.0",
	                                     "model.moe_token_drop_policy=position",
	                                     "model.moe_pad_expert_input_to_capacity=true", NULL};
	static const struct layout layouts[] = {{2, "ep 2 mbs 6"},
	                                        {4, "cp 2 ep 2 mbs 6"},
	                                        {4, "tp 2 sp 1 ep 2 etp 1 mbs 6"},
	                                        {4, "pp 2 ep 2 mbs 6 recompute full dispatch allgather"},
	                                        {8, "tp 2 sp 1 cp 2 ep 4 etp 2 mbs 6"}};
	static const struct layout meanwhile[] = {{4, "cp 2 ep 2 mbs 6 share 1"},
	                                          {4, "tp 2 sp 1 ep 2 etp 1 mbs 6 share 1"}};
	SAME(layouts, sequences, &layout_fp32);
	SAME(meanwhile, sequences, &layout_fp32);
	SAME(layouts, biased, &layout_fp32);
	SAME(layouts, full, &layout_fp32);
	SAME(layouts, padded, &layout_fp32);
}

/* Counts of the step so far know the ranks' micro-batches one after the other: samples that are dealt to the
 * same micro-batches give the same. */
TEST(balance_over_the_whole_batch)
{
	static const char *const extra[] = {EXPERTS, "model.moe_router_load_balancing_type=global_aux_loss",
	                                    NULL};
	static const struct layout layouts[] = {{2, "cp 2 ep 2 mbs 6"},
	                                        {2, "tp 2 sp 1 ep 2 etp 1 mbs 6"},
	                                        {2, "pp 2 mbs 6"},
	                                        {4, "pp 2 cp 2 ep 2 mbs 6 recompute full"}};
	SAME(layouts, extra, &layout_fp32);
}

TEST(latent_attention)
{
	static const char *const extra[] = {LONGER, LATENT, NULL};
	static const char *const direct[] = {LONGER, LATENT, "model.q_lora_rank=null",
	                                     "model.rotary_interleaved=true", NULL};
	static const struct layout layouts[] = {{2, "tp 2 mbs 6"},
	                                        {2, "tp 2 sp 1 mbs 6"},
	                                        {2, "cp 2 mbs 6"},
	                                        {2, "cp 2 mbs 6 overlap 1"},
	                                        {4, "cp 4 mbs 3 exchange all_gather"},
	                                        {4, "cp 2 tp 2 mbs 3 exchange a2a"},
	                                        {4, "pp 2 tp 2 sp 1 mbs 3 recompute selective zero 1"}};
	SAME(layouts, extra, &layout_fp32);
	SAME(layouts, direct, &layout_fp32);
}

TEST(five_axes_at_once)
{
	static const char *const extra[] = {EXPERTS, "model.hidden_dropout=0.1",
	                                    "model.moe_shared_expert_intermediate_size=12", NULL};
	static const struct layout layouts[] = {
	        {16, "tp 2 sp 1 cp 2 ep 2 etp 2 pp 2 zero 1 mbs 6"},
	        {16, "tp 2 sp 1 cp 2 ep 4 etp 1 pp 2 vpp 2 schedule interleaved zero 3 mbs 6 exchange a2a "
	             "share 1"},
	        {16, "tp 2 sp 1 cp 2 ep 2 etp 1 pp 2 schedule zero_bubble zero 2 mbs 6 exchange all_gather "
	             "dispatch allgather recompute selective"},
	        {32, "tp 2 sp 1 cp 4 ep 4 etp 1 pp 2 zero 1 mbs 6 recompute full overlap 1 tp_overlap 1"},
	        {32, "tp 4 sp 1 cp 2 ep 2 etp 2 pp 2 schedule zero_bubble zero 3 mbs 6"},
	};
	SAME(layouts, extra, &layout_fp32);
}

/* The walk: every pair of choices that can go together, and triples. */

enum { TP, CP, EP, ETP, PP, DP, ZERO, SCHEDULE, RECOMPUTE, EXCHANGE, DISPATCH, MBS, AXES, MOST_RANKS = 16 };
static const struct walk_axis axes[AXES] = {
        [TP] = {"tp", 3, {1, 2, 4}},
        [CP] = {"cp", 3, {1, 2, 4}},
        [EP] = {"ep", 3, {1, 2, 4}},
        [ETP] = {"etp", 2, {1, 2}},
        [PP] = {"pp", 2, {1, 2}},
        [DP] = {"dp", 2, {1, 2}},
        [ZERO] = {"zero", 4, {0, 1, 2, 3}},
        [SCHEDULE] = {"schedule", 3, {PARALLEL_1F1B, PARALLEL_INTERLEAVED, PARALLEL_ZERO_BUBBLE}},
        [RECOMPUTE] = {"recompute", 3, {0, 1, 2}},
        [EXCHANGE] = {"exchange", 3, {PARALLEL_CP_P2P, PARALLEL_CP_ALL_GATHER, PARALLEL_CP_A2A}},
        [DISPATCH] = {"dispatch", 2, {MODEL_DISPATCHER_ALLTOALL, MODEL_DISPATCHER_ALLGATHER}},
        [MBS] = {"mbs", 2, {2, 6}},
};

static bool is_legal(const int *v)
{
	int sharing = v[TP] * v[CP] * v[DP];
	return sharing * v[PP] <= MOST_RANKS && sharing % (v[EP] * v[ETP]) == 0 &&
	       (v[SCHEDULE] == PARALLEL_1F1B || v[PP] > 1) && (!v[ZERO] || v[DP] * v[CP] > 1) &&
	       (v[EXCHANGE] == PARALLEL_CP_P2P || v[CP] > 1) &&
	       (v[EXCHANGE] != PARALLEL_CP_A2A || v[TP] * v[CP] <= 4) &&
	       (v[DISPATCH] == MODEL_DISPATCHER_ALLTOALL || v[EP] > 1);
}

static int walk_text(const int *v, char *text, size_t cap)
{
	static const char *const
	        recompute[] = {"none", "selective", "full"},
	        *const schedules[] = {[PARALLEL_1F1B] = "1f1b",
	                              [PARALLEL_INTERLEAVED] = "interleaved vpp 2",
	                              [PARALLEL_ZERO_BUBBLE] = "zero_bubble"},
	        *const exchanges[] = {[PARALLEL_CP_P2P] = "p2p",
	                              [PARALLEL_CP_ALL_GATHER] = "all_gather",
	                              [PARALLEL_CP_A2A] = "a2a"},
	        *const dispatchers[] = {
	                [MODEL_DISPATCHER_ALLTOALL] = "alltoall", [MODEL_DISPATCHER_ALLGATHER] = "allgather"};
	snprintf(text, cap,
	         "tp %d sp %d cp %d ep %d etp %d pp %d zero %d mbs %d recompute %s exchange %s dispatch %s "
	         "schedule %s",
	         v[TP], v[TP] > 1, v[CP], v[EP], v[ETP], v[PP], v[ZERO], v[MBS], recompute[v[RECOMPUTE]],
	         exchanges[v[EXCHANGE]], dispatchers[v[DISPATCH]], schedules[v[SCHEDULE]]);
	return v[TP] * v[CP] * v[PP] * v[DP];
}

/* The balancing loss looks at samples, so that micro-batches may be of any size. */
TEST(all_pairs_of_axes_and_many_triples)
{
	static const char *const extra[] = {EXPERTS, "model.hidden_dropout=0.1",
	                                    "model.moe_router_load_balancing_type=seq_aux_loss", NULL};
	static struct walk w = {.axis = axes, .n = AXES, .is_legal = is_legal};
	CHECK(layouts_walk(&w, walk_more(0, 60), walk_text, "mbs 6", LENGTH, extra) >= 12);
}

TEST(a_layout_repeats_itself_bit_for_bit)
{
	static const char *const extra[] = {EXPERTS, NULL};
	static const struct layout layouts[] = {{4, "tp 2 sp 1 cp 2 ep 2 etp 1 mbs 6"},
	                                        {4, "pp 2 cp 2 ep 2 mbs 3 exchange a2a zero 3"}};
	static const struct tolerance bits = {0, 0, 0};
	struct dataset *data = layout_data(true, 131, LENGTH);
	MUST(data != NULL);
	for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
		struct outcome *a = layout_run(&layouts[i], extra, data),
		               *b = layout_run(&layouts[i], extra, data);
		if (CHECK(a && b))
			outcome_compare(a, b, &bits, layouts[i].text);
		outcome_free(a);
		outcome_free(b);
	}
	dataset_close(data);
}

/* Weights are rounded after every step, and a router that is near a tie may choose otherwise. */
TEST(bf16_agrees_within_its_rounding)
{
	static const char *const dense[] = {LONGER, "mixed_precision=bf16", NULL};
	static const char *const experts[] = {EXPERTS, "mixed_precision=bf16", NULL};
	static const struct tolerance rounding = {1e-4, 5e-3, 1.6e-2}, choices = {1e-3, 5e-2, 0.2};
	static const struct layout layouts[] = {{2, "cp 2 mbs 6"}, {4, "cp 4 exchange a2a mbs 3 zero 1"}};
	static const struct layout shared[] = {{2, "ep 2 mbs 6"},
	                                       {4, "tp 2 sp 1 cp 2 ep 4 etp 1 mbs 6 zero 2"}};
	SAME(layouts, dense, &rounding);
	SAME(shared, experts, &choices);
}

TEST(fp16_agrees_within_its_rounding)
{
	static const char *const dense[] = {LONGER, "mixed_precision=fp16", NULL};
	static const char *const experts[] = {EXPERTS, "mixed_precision=fp16", NULL};
	static const struct tolerance rounding = {2e-5, 5e-4, 5e-3}, choices = {2e-4, 4e-3, 3e-2};
	static const struct layout layouts[] = {{4, "cp 4 exchange a2a mbs 3 zero 1"}};
	static const struct layout shared[] = {{4, "tp 2 sp 1 cp 2 ep 4 etp 1 mbs 6 zero 2"}};
	SAME(layouts, dense, &rounding);
	SAME(shared, experts, &choices);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
