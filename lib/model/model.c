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

void rope_fill_table(const struct model_config *c, int32_t positions, int32_t rotated, float *table)
{
	int32_t half = rotated / 2;
	for (int32_t i = 0; i < half; i++) {
		double f = pow(c->rotary_base, -2.0 * i / rotated);
		if (c->use_rope_scaling)
			f = scale_frequency(c, f);
		for (int32_t t = 0; t < positions; t++) {
			table[(int64_t)t * rotated + i] = (float)cos(t * f);
			table[(int64_t)t * rotated + half + i] = (float)sin(t * f);
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

void part_init(const struct part *part, uint64_t seed, float *out)
{
	uint64_t key = rng_key(seed, part->name);
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

double model_flops(const struct model_config *c, int64_t padded_vocab_size, double tokens)
{
	double h = (double)c->hidden_size, q = (double)(c->num_attention_heads * c->kv_channels);
	double kv = (double)(c->num_query_groups * c->kv_channels), layers = (double)c->num_layers;
	double gated = c->activation == MODEL_SWIGLU || c->activation == MODEL_GEGLU ? 3 : 2;
	double mlp = h * (double)c->ffn_hidden_size * gated, projections = h * (q + 2 * kv) + q * h;
	double core = 6 * q * (double)c->seq_length; /* 3 passes · 2 products · 2 flop, causal half */
	return tokens * (6 * (layers * (mlp + projections) + h * (double)padded_vocab_size) + layers * core);
}
