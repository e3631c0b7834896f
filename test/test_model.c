/* What a model's configuration means: which layers hold experts, rotary tables, floating-point operations. */
#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "model/model.h"
#include "test/test.h"

#include <stdlib.h>

/* Layers with experts. */

/* "0111" from what moe_layer_freq says, or the sentence that refuses it. */
static const char *layers_of(const char *freq, int64_t layers, char out[static 400])
{
	struct model_config c = {.num_layers = layers, .num_experts = 4, .moe_layer_freq = freq};
	struct err e = {0};
	bool *moe = mem_array((size_t)layers, sizeof *moe);
	if (model_moe_layers(&c, moe, &e)) {
		CHECK_INT(e.code, EXIT_CONFIG);
		CHECK_INT(model_count_moe_layers(&c), 0);
		CHECK(!model_is_moe_layer(&c, 0));
		snprintf(out, 400, "%.399s", e.text);
	} else {
		int64_t n = 0;
		for (int64_t i = 0; i < layers; i++) {
			out[i] = moe[i] ? '1' : '0';
			n += moe[i];
			CHECK_INT(model_is_moe_layer(&c, i), moe[i]);
		}
		out[layers] = 0;
		CHECK_INT(model_count_moe_layers(&c), n);
	}
	free(moe);
	return out;
}

TEST(layers_with_experts)
{
	static const struct {
		const char *freq, *layers;
	} good[] = {
	        {"1", "11111"},
	        {"2", "101010"},
	        {"3", "10010010"},
	        {"99999999999999999999", "1000"},
	        {"[0]*3+[1]*5", "00011111"},
	        {"([0]*3+[1]*5)", "00011111"},
	        {" ( [ 0 , 1 ] * 2 + [1] ) * 2 ", "0101101011"},
	        {"[0,1,1]", "011"},
	        {"(([1]*1+[0])*2+[1,1])*2", "101011101011"},
	        {"[1]*2*3", "111111"},
	        {"((((((((((((((((([1])*2))))))))))))))))", NULL},
	};
	char text[400];
	for (size_t i = 0; i < sizeof good / sizeof *good; i++)
		if (good[i].layers)
			CHECK_STR(layers_of(good[i].freq, (int64_t)strlen(good[i].layers), text),
			          good[i].layers);
		else
			CHECK_HAS(layers_of(good[i].freq, 2, text), "nested too deep");
	static const struct {
		const char *freq, *says;
	} bad[] = {
	        {"", "byte 0: [ or ( belongs here; example: ([0]*3+[1]*58)"},
	        {"0", "byte 0: [ or ("},
	        {"-1", "byte 0: [ or ("},
	        {"1.5", "byte 0: [ or ("},
	        {"01", "byte 0: [ or ("},
	        {"[2]*4", "byte 1: 0 or 1 belongs here"},
	        {"[0", "byte 2: a comma or ] belongs here"},
	        {"[]*4", "byte 1: 0 or 1"},
	        {"[0]*0", "byte 4: a whole number from 1 on belongs here"},
	        {"[0]*x", "byte 4: a whole number"},
	        {"[0]*4[1]", "byte 5: +, * or the end belongs here"},
	        {"([0]*4", "byte 6: +, * or ) belongs here"},
	        {"[0]*4)", "byte 5: +, * or the end"},
	        {"[0]*3+", "byte 6: [ or ("},
	        {"[0]*3", "3 layers, but num_layers is 4"},
	        {"[0]*5", "byte 4: more than num_layers 4 layers"},
	        {"[0,0]*3", "byte 7: more than num_layers 4"},
	        {"[0]*4+[1]", "byte 7: more than num_layers 4"},
	        {"[0]*99999999999999999999999", "byte 4: more than num_layers 4"},
	        {"(([0]*2)*2)*2", "byte 13: more than num_layers 4"},
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
		CHECK_HAS(layers_of(bad[i].freq, 4, text), bad[i].says);
	struct model_config none = {
	        .num_layers = 4, .num_experts = OPTION_NULL_INT, .moe_layer_freq = "nonsense"};
	bool moe[4] = {true, true, true, true};
	struct err e = {0};
	CHECK_INT(model_moe_layers(&none, moe, &e), 0);
	CHECK(!moe[0] && !moe[3] && !model_is_moe_layer(&none, 0) && !model_count_moe_layers(&none));
	none.num_experts = 2;
	none.moe_layer_freq = "1";
	CHECK(model_is_moe_layer(&none, 3) && !model_is_moe_layer(&none, 4) &&
	      !model_is_moe_layer(&none, -1));
}

enum { MOST_LAYERS = 300 };

/* A random pattern and, beside it, what it stands for. */
static void draw_pattern(uint64_t *turn, int depth, struct buf *text, struct buf *meant)
{
	uint64_t terms = 1 + rng_bits(3, (*turn)++) % 3;
	for (uint64_t i = 0; i < terms; i++) {
		size_t first = meant->length;
		uint64_t r = rng_bits(3, (*turn)++);
		buf_puts(text, i ? "+" : "");
		if (depth && r % 3 == 0) {
			buf_puts(text, "(");
			draw_pattern(turn, depth - 1, text, meant);
			buf_puts(text, ")");
		} else {
			buf_printf(text, r & 64 ? "[%d, %d]" : "[%d]", (int)(r >> 8 & 1), (int)(r >> 9 & 1));
			buf_printf(meant, r & 64 ? "%d%d" : "%d", (int)(r >> 8 & 1), (int)(r >> 9 & 1));
		}
		uint64_t times = 1 + (r >> 16) % 4;
		char *once = mem_strdup(meant->data + first);
		if (times > 1 || r & 128)
			buf_printf(text, " * %d", (int)times);
		for (uint64_t k = 1; k < times; k++)
			buf_puts(meant, once);
		free(once);
	}
}

TEST(random_patterns_mean_what_they_say)
{
	uint64_t turn = 0;
	int tried = 0;
	for (int i = 0; i < 600; i++) {
		struct buf text = {0}, meant = {0};
		char got[400], spoilt[2000];
		draw_pattern(&turn, 3, &text, &meant);
		if (meant.length <= MOST_LAYERS && text.length < sizeof spoilt) {
			CHECK_STR(layers_of(text.data, (int64_t)meant.length, got), meant.data);
			snprintf(spoilt, sizeof spoilt, "%s", text.data);
			for (int k = 0; k < 4; k++) { /* a list of that length, or refused */
				uint64_t r = rng_bits(4, turn++);
				spoilt[(r >> 8) % text.length] = "[]()*+, 0123456789x\xff"[(r & 255) % 21];
			}
			layers_of(spoilt, (int64_t)meant.length, got);
			tried++;
		}
		buf_free(&text);
		buf_free(&meant);
	}
	CHECK(tried > 300);
}

/* Rotary tables. */

static const struct model_config deepseek = {
        .num_layers = 61,
        .hidden_size = 7168,
        .num_attention_heads = 128,
        .num_query_groups = 128,
        .kv_channels = 192,
        .ffn_hidden_size = 18432,
        .seq_length = 4096,
        .activation = MODEL_SWIGLU,
        .position_embedding_type = MODEL_POSITION_ROPE,
        .rotary_base = 10000,
        .rotary_percent = 1,
        .rope_type = MODEL_ROPE_YARN,
        .rotary_scaling_factor = 40,
        .yarn_original_max_position_embeddings = 4096,
        .yarn_beta_fast = 32,
        .yarn_beta_slow = 1,
        .mscale = 1,
        .mscale_all_dim = 1,
        .multi_latent_attention = true,
        .q_lora_rank = 1536,
        .kv_lora_rank = 512,
        .qk_head_dim = 128,
        .qk_pos_emb_head_dim = 64,
        .v_head_dim = 128,
        .num_experts = 256,
        .moe_layer_freq = "([0]*3+[1]*58)",
        .moe_ffn_hidden_size = 2048,
        .moe_router_topk = 8,
        .moe_shared_expert_intermediate_size = 2048,
};

/* Frequency and length of the arrow that pair `i` of 32 points along. */
static void read_pair(const float *table, int i, double *frequency, double *length)
{
	double x = table[64 + i], y = table[64 + 32 + i]; /* position 1 */
	*frequency = atan2(y, x);
	*length = hypot(x, y);
}

/* DeepSeek-V3: 64 channels; pair 10.5 turns 32 times in 4096 tokens, pair 22.5 once, so that pairs up to 10
 * stay, those from 23 on are 40 times slower, and pair 16 is 6/13 of the way. */
TEST(yarn_stretches_the_slow_frequencies)
{
	struct model_config c = deepseek;
	float *table = mem_array(2 * 64, sizeof *table);
	double frequency, length;
	CHECK_INT(rope_rotated(&c), 64);
	rope_fill_table(&c, 2, 64, table);
	for (int i = 0; i < 32; i++) {
		double plain = pow(10, -i / 8.0), slowed = i <= 10 ? 0 : i >= 23 ? 1 : (i - 10) / 13.0;
		read_pair(table, i, &frequency, &length);
		CHECK_NEAR(frequency / (plain * (1 - slowed * 39 / 40)), 1, 1e-5);
		CHECK_NEAR(length, 1, 1e-6);
	}
	CHECK_NEAR(table[0], 1, 0);
	CHECK_NEAR(model_attention_scale(&c), 1.3688879454113936 * 1.3688879454113936 / sqrt(192), 1e-12);
	c.mscale_all_dim = 0; /* all of the temperature is in the table */
	rope_fill_table(&c, 2, 64, table);
	read_pair(table, 5, &frequency, &length);
	CHECK_NEAR(length, 1.3688879454113936, 1e-6);
	CHECK_NEAR(table[0], 1.3688879454113936, 1e-6);
	CHECK_NEAR(model_attention_scale(&c), 1 / sqrt(192), 1e-12);
	c.mscale = 0.707;
	c.mscale_all_dim = 0.707; /* DeepSeek-V2 */
	rope_fill_table(&c, 2, 64, table);
	CHECK_NEAR(table[0], 1, 1e-6);
	CHECK_NEAR(model_attention_scale(&c), pow(0.0707 * log(40) + 1, 2) / sqrt(192), 1e-12);
	c.multi_latent_attention = false; /* the softmax knows nothing of it */
	CHECK_NEAR(model_attention_scale(&c), 1 / sqrt(192), 1e-12);
	CHECK_INT(rope_rotated(&c), 192);
	free(table);
}

TEST(without_yarn_frequencies_are_a_power_series)
{
	struct model_config c = deepseek;
	float *table = mem_array(2 * 64, sizeof *table);
	double frequency, length;
	const struct {
		enum model_rope type;
		double factor;
	} rows[] = {{MODEL_ROPE_PLAIN, 40}, {MODEL_ROPE_YARN, 1}};
	for (int k = 0; k < 2; k++) {
		c.rope_type = rows[k].type;
		c.rotary_scaling_factor = rows[k].factor;
		rope_fill_table(&c, 2, 64, table);
		CHECK_NEAR(model_attention_scale(&c), 1 / sqrt(192), 1e-12);
		for (int i = 0; i < 32; i++) {
			read_pair(table, i, &frequency, &length);
			CHECK_NEAR(frequency * pow(10, i / 8.0), 1, 1e-5);
			CHECK_NEAR(length, 1, 1e-6);
		}
	}
	free(table);
}

/* Floating-point operations of a sample, as Megatron-LM's num_floating_point_operations counted them. */

TEST(flops_are_megatrons)
{
	static const struct model_config llama = {.num_layers = 32,
	                                          .hidden_size = 4096,
	                                          .num_attention_heads = 32,
	                                          .num_query_groups = 8,
	                                          .kv_channels = 128,
	                                          .ffn_hidden_size = 14336,
	                                          .seq_length = 8192,
	                                          .activation = MODEL_SWIGLU,
	                                          .num_experts = OPTION_NULL_INT,
	                                          .moe_shared_expert_intermediate_size = OPTION_NULL_INT,
	                                          .moe_layer_freq = "1"};
	struct model_config gpt3 = llama, mixtral = llama, c = deepseek;
	CHECK_NEAR(model_flops(&llama, 128256, 8192), 421645529382912, 0);
	gpt3.num_layers = 96;
	gpt3.hidden_size = 12288;
	gpt3.num_attention_heads = gpt3.num_query_groups = 96;
	gpt3.ffn_hidden_size = 4 * 12288;
	gpt3.seq_length = 2048;
	gpt3.activation = MODEL_GELU;
	CHECK_NEAR(model_flops(&gpt3, 51200, 2048 * 1536.0) / 3.3405978001601987e18, 1, 1e-15);
	mixtral.num_experts = 8;
	mixtral.moe_router_topk = 2;
	mixtral.moe_ffn_hidden_size = 14336;
	mixtral.ffn_hidden_size = 1; /* no layer has it */
	mixtral.seq_length = 4096;
	CHECK_NEAR(model_flops(&mixtral, 32000, 4096), 326477644038144, 0);
	/* Counted with one layer that predicts a token more: such a layer, its norms and join, its logits. */
	double h = 7168, T = 4096, V = 129280;
	double one_more = T * 6 * (3 * h + 2 * h * h + h * V);
	c.num_layers = 62;
	c.moe_layer_freq = "([0]*3+[1]*59)";
	CHECK_NEAR(model_flops(&c, 129280, T) + one_more, 1064931126411264, 0);
	double layer = T * 6 *
	                       (1536 * (h + 128 * 192 + 1) + 512 * (h + 128 * 256 + 1) + h * 64 +
	                        128 * 128 * h + 3 * h * 2048 * 9) +
	               T * T * 3 * 128 * 320;
	CHECK_NEAR(model_flops(&deepseek, 129280, T) + layer + one_more, 1064931126411264, 0);
	c.q_lora_rank = OPTION_NULL_INT; /* queries straight from the input, in every layer */
	CHECK_NEAR(model_flops(&c, 129280, T) + one_more -
	                   62 * T * 6 * (h * 128 * 192 - 1536 * (h + 128 * 192 + 1)),
	           1064931126411264, 0);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
