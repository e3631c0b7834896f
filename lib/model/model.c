#include "model/model.h"
#include "base/rng.h"

#include <math.h>
#include <stdlib.h>

void model_free(struct model *m)
{
	free(m->param);
	free(m->part);
	m->param = NULL;
	m->part = NULL;
}

int32_t rope_rotated(const struct model_config *c)
{
	if (c->multi_latent_attention)
		return (int32_t)c->qk_pos_emb_head_dim;
	return (int32_t)((double)c->kv_channels * c->rotary_percent) / 2 * 2;
}

/* Llama 3.1: low frequencies are divided by the factor, high ones kept, those between interpolated. */
static double scale_frequency(const struct model_config *c, double f)
{
	double original = (double)c->rope_scaling_original_max_position_embeddings, wave = 2 * M_PI / f;
	double low = c->rope_scaling_low_freq_factor, high = c->rope_scaling_high_freq_factor;
	if (wave < original / high)
		return f;
	if (wave > original / low)
		return f / c->rope_scaling_factor;
	double smooth = (original / wave - low) / (high - low);
	return (1 - smooth) * f / c->rope_scaling_factor + smooth * f;
}

/* YaRN (Peng et al. 2023): pairs of channels that turn more than beta_fast times in the original context keep
 * their frequency, those that turn less than beta_slow times are slowed by the factor, between them lies a
 * ramp, over whole pairs as DeepSeek-V3 has it. */

/* The pair, a fraction, that turns so many times. */
static double turning_pair(const struct model_config *c, int32_t rotated, double turns)
{
	double original = (double)c->yarn_original_max_position_embeddings;
	return rotated * log(original / (turns * 2 * M_PI)) / (2 * log(c->rotary_base));
}

static double stretch_frequency(const struct model_config *c, int32_t rotated, int32_t pair, double f)
{
	double low = fmax(floor(turning_pair(c, rotated, c->yarn_beta_fast)), 0);
	double high = fmin(ceil(turning_pair(c, rotated, c->yarn_beta_slow)), rotated - 1);
	double width = high == low ? 0.001 : high - low;
	double slowed = fmin(fmax((pair - low) / width, 0), 1);
	return f / c->rotary_scaling_factor * slowed + f * (1 - slowed);
}

static bool uses_yarn(const struct model_config *c)
{
	return c->position_embedding_type == MODEL_POSITION_ROPE && c->rope_type == MODEL_ROPE_YARN;
}

double model_attention_scale(const struct model_config *c)
{
	double m =
	        c->multi_latent_attention && uses_yarn(c) ? model_yarn_temperature(c, c->mscale_all_dim) : 1;
	return m * m / sqrt((double)c->kv_channels);
}

void rope_fill_table(const struct model_config *c, int32_t positions, int32_t rotated, float *table)
{
	int32_t half = rotated / 2;
	bool yarn = uses_yarn(c);
	double m = yarn ? model_yarn_temperature(c, c->mscale) / model_yarn_temperature(c, c->mscale_all_dim)
	                : 1;
	for (int32_t i = 0; i < half; i++) {
		double f = pow(c->rotary_base, -2.0 * i / rotated);
		if (yarn)
			f = stretch_frequency(c, rotated, i, f);
		else if (c->use_rope_scaling)
			f = scale_frequency(c, f);
		for (int32_t t = 0; t < positions; t++) {
			table[(int64_t)t * rotated + i] = (float)(m * cos(t * f));
			table[(int64_t)t * rotated + half + i] = (float)(m * sin(t * f));
		}
	}
}

void model_fill_constants(const struct model *m, struct exec *x)
{
	if (m->rope_table == NONE)
		return;
	const struct value *v = &m->prog->value[m->rope_table];
	float *table = mem_array((size_t)value_count(v), sizeof *table);
	rope_fill_table(m->spec.config, v->dim[0], v->dim[1], table);
	exec_upload(x, m->rope_table, table);
	free(table);
}

/* Elements that are worth a team of threads. */
enum { PARALLEL_FROM = 1 << 16 };

void part_init(const struct part *part, uint64_t seed, float *out)
{
	uint64_t key = rng_key(seed, part->name);
#pragma omp parallel for if (part->extent[0] * part->extent[1] >= PARALLEL_FROM)
	for (int64_t r = 0; r < part->extent[0]; r++) {
		int64_t first = (part->offset[0] + r) * part->shape[1] + part->offset[1];
		float *row = out + r * part->extent[1];
		if (part->init == INIT_NORMAL)
			rng_normal(key, (uint64_t)first, (size_t)part->extent[1], 0, (float)part->std, row);
		else
			for (int64_t j = 0; j < part->extent[1]; j++)
				row[j] = part->init == INIT_ONE;
	}
}

int64_t model_count_parameters(const struct model_config *c, int64_t padded_vocab_size)
{
	struct prog p;
	struct model m;
	struct err e = {0};
	struct model_spec spec = {.config = c,
	                          .padded_vocab_size = padded_vocab_size,
	                          .use = MODEL_EVALUATE,
	                          .batch = 1,
	                          .rows = (int32_t)c->seq_length};
	int64_t n = 0;
	prog_init(&p);
	if (!model_build(&m, &p, &spec, &e))
		for (size_t i = 0; i < m.n_part; i++)
			n += m.part[i].shape[0] * m.part[i].shape[1];
	model_free(&m);
	prog_free(&p);
	return n;
}

/* Multiplications of one token in the projections of one layer's attention. */
static double projections(const struct model_config *c)
{
	double h = (double)c->hidden_size, n = (double)c->num_attention_heads,
	       g = (double)c->num_query_groups;
	double d = (double)c->kv_channels, rank = (double)c->kv_lora_rank, q_rank = (double)c->q_lora_rank;
	double v = (double)c->v_head_dim, rotated = (double)c->qk_pos_emb_head_dim;
	if (!c->multi_latent_attention)
		return h * (n + 2 * g) * d + n * d * h;
	double queries = c->q_lora_rank == OPTION_NULL_INT ? h * n * d : q_rank * (h + n * d + 1);
	return queries + rank * (h + n * (d - rotated + v) + 1) + h * rotated + n * v * h;
}

/* The same in the feed-forward blocks of all layers. */
static double feed_forward(const struct model_config *c)
{
	double parts = model_is_gated(c) ? 3 : 2, experts = (double)model_count_moe_layers(c);
	double dense = (double)c->num_layers - experts, shared = 0, chosen = 0;
	if (c->num_experts != OPTION_NULL_INT)
		chosen = (double)c->moe_ffn_hidden_size * (double)c->moe_router_topk;
	if (c->moe_shared_expert_intermediate_size != OPTION_NULL_INT)
		shared = (double)c->moe_shared_expert_intermediate_size;
	return parts * (double)c->hidden_size *
	       (dense * (double)c->ffn_hidden_size + experts * (chosen + shared));
}

double model_flops(const struct model_config *c, int64_t padded_vocab_size, double tokens)
{
	double layers = (double)c->num_layers, values = (double)c->kv_channels;
	if (c->multi_latent_attention)
		values = (double)c->v_head_dim;
	double weights = feed_forward(c) + layers * projections(c) +
	                 (double)c->hidden_size * (double)padded_vocab_size;
	/* 3 passes · 2 flop · half of the scores and of the sums of values, causal */
	double core = 3 * (double)c->num_attention_heads * ((double)c->kv_channels + values) *
	              (double)c->seq_length;
	return tokens * (6 * weights + layers * core);
}
