/* Names and shapes: the table, and its expansion for one model. */
#include "base/mem.h"
#include "model/hf.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static const struct {
	const char *type, *class;
} families[HF_FAMILY_COUNT] = {
#define HF_FAMILY_ROW(id, type, class) {type, class},
        HF_FAMILIES(HF_FAMILY_ROW)
#undef HF_FAMILY_ROW
};

const char *hf_family_name(enum hf_family f)
{
	return families[f].type;
}

const char *hf_family_class(enum hf_family f)
{
	return families[f].class;
}

/* When a row is there. */
enum when { ALWAYS, LINEAR_BIAS, QKV_BIAS, QK_NORM, GATED, GATED_BIAS, UNTIED };

static bool is_gated(const struct model_config *c)
{
	return c->activation == MODEL_SWIGLU || c->activation == MODEL_GEGLU;
}

static bool is_there(enum when when, const struct model_config *c)
{
	const bool there[] = {[ALWAYS] = true,
	                      [LINEAR_BIAS] = c->add_bias_linear,
	                      [QKV_BIAS] = c->add_bias_linear || c->add_qkv_bias,
	                      [QK_NORM] = c->qk_layernorm,
	                      [GATED] = is_gated(c),
	                      [GATED_BIAS] = is_gated(c) && c->add_bias_linear,
	                      [UNTIED] = c->untie_embeddings_and_output_weights};
	return there[when];
}

/* '#' is the layer. Rows with the same HF name lie side by side in that tensor, in this order. Dimensions: V
 * vocabulary, C hidden, P positions, Q all query heads, K all key heads, D one head, F feed-forward. */
struct row {
	enum { GPT2 = 1, LLAMA = 2 } style;
	const char *hf, *ours, *dims;
	bool transposed;
	enum when when;
};

#define L "decoder.layers.#."
#define G "transformer.h.#."
#define M "model.layers.#."
static const struct row rows[] = {
        {GPT2, "transformer.wte.weight", "embedding.word_embeddings.weight", "VC", false, ALWAYS},
        {GPT2, "transformer.wpe.weight", "embedding.position_embeddings.weight", "PC", false, ALWAYS},
        {GPT2, G "ln_1.weight", L "input_layernorm.weight", "C", false, ALWAYS},
        {GPT2, G "ln_1.bias", L "input_layernorm.bias", "C", false, ALWAYS},
        {GPT2, G "attn.c_attn.weight", L "attention.query.weight", "QC", true, ALWAYS},
        {GPT2, G "attn.c_attn.weight", L "attention.key.weight", "KC", true, ALWAYS},
        {GPT2, G "attn.c_attn.weight", L "attention.value.weight", "KC", true, ALWAYS},
        {GPT2, G "attn.c_attn.bias", L "attention.query.bias", "Q", false, ALWAYS},
        {GPT2, G "attn.c_attn.bias", L "attention.key.bias", "K", false, ALWAYS},
        {GPT2, G "attn.c_attn.bias", L "attention.value.bias", "K", false, ALWAYS},
        {GPT2, G "attn.c_proj.weight", L "attention.output.weight", "CQ", true, ALWAYS},
        {GPT2, G "attn.c_proj.bias", L "attention.output.bias", "C", false, ALWAYS},
        {GPT2, G "ln_2.weight", L "pre_mlp_layernorm.weight", "C", false, ALWAYS},
        {GPT2, G "ln_2.bias", L "pre_mlp_layernorm.bias", "C", false, ALWAYS},
        {GPT2, G "mlp.c_fc.weight", L "mlp.fc1.weight", "FC", true, ALWAYS},
        {GPT2, G "mlp.c_fc.bias", L "mlp.fc1.bias", "F", false, ALWAYS},
        {GPT2, G "mlp.c_proj.weight", L "mlp.fc2.weight", "CF", true, ALWAYS},
        {GPT2, G "mlp.c_proj.bias", L "mlp.fc2.bias", "C", false, ALWAYS},
        {GPT2, "transformer.ln_f.weight", "decoder.final_layernorm.weight", "C", false, ALWAYS},
        {GPT2, "transformer.ln_f.bias", "decoder.final_layernorm.bias", "C", false, ALWAYS},
        {LLAMA, "model.embed_tokens.weight", "embedding.word_embeddings.weight", "VC", false, ALWAYS},
        {LLAMA, M "input_layernorm.weight", L "input_layernorm.weight", "C", false, ALWAYS},
        {LLAMA, M "self_attn.q_proj.weight", L "attention.query.weight", "QC", false, ALWAYS},
        {LLAMA, M "self_attn.q_proj.bias", L "attention.query.bias", "Q", false, QKV_BIAS},
        {LLAMA, M "self_attn.k_proj.weight", L "attention.key.weight", "KC", false, ALWAYS},
        {LLAMA, M "self_attn.k_proj.bias", L "attention.key.bias", "K", false, QKV_BIAS},
        {LLAMA, M "self_attn.v_proj.weight", L "attention.value.weight", "KC", false, ALWAYS},
        {LLAMA, M "self_attn.v_proj.bias", L "attention.value.bias", "K", false, QKV_BIAS},
        {LLAMA, M "self_attn.q_norm.weight", L "attention.query_norm.weight", "D", false, QK_NORM},
        {LLAMA, M "self_attn.k_norm.weight", L "attention.key_norm.weight", "D", false, QK_NORM},
        {LLAMA, M "self_attn.o_proj.weight", L "attention.output.weight", "CQ", false, ALWAYS},
        {LLAMA, M "self_attn.o_proj.bias", L "attention.output.bias", "C", false, LINEAR_BIAS},
        {LLAMA, M "post_attention_layernorm.weight", L "pre_mlp_layernorm.weight", "C", false, ALWAYS},
        {LLAMA, M "mlp.gate_proj.weight", L "mlp.gate.weight", "FC", false, GATED},
        {LLAMA, M "mlp.gate_proj.bias", L "mlp.gate.bias", "F", false, GATED_BIAS},
        {LLAMA, M "mlp.up_proj.weight", L "mlp.up.weight", "FC", false, GATED},
        {LLAMA, M "mlp.up_proj.bias", L "mlp.up.bias", "F", false, GATED_BIAS},
        {LLAMA, M "mlp.down_proj.weight", L "mlp.fc2.weight", "CF", false, ALWAYS},
        {LLAMA, M "mlp.down_proj.bias", L "mlp.fc2.bias", "C", false, LINEAR_BIAS},
        {LLAMA, "model.norm.weight", "decoder.final_layernorm.weight", "C", false, ALWAYS},
        {GPT2 | LLAMA, "lm_head.weight", "output_layer.weight", "VC", false, UNTIED},
};
enum { N_ROWS = sizeof rows / sizeof *rows };

int64_t hf_padded_vocab(const struct model_config *c)
{
	int64_t step = c->make_vocab_size_divisible_by;
	return (c->vocab_size + step - 1) / step * step;
}

static int64_t dimension(char letter, const struct model_config *c)
{
	static const char letters[] = "VCPQKDF";
	const int64_t sizes[] = {c->vocab_size,
	                         c->hidden_size,
	                         c->max_position_embeddings,
	                         c->num_attention_heads * c->kv_channels,
	                         c->num_query_groups * c->kv_channels,
	                         c->kv_channels,
	                         c->ffn_hidden_size};
	return sizes[strchr(letters, letter) - letters];
}

static const char *layer_name(struct arena *a, const char *pattern, int64_t layer)
{
	const char *mark = strchr(pattern, '#');
	if (!mark)
		return pattern;
	return arena_printf(a, "%.*s%" PRId64 "%s", (int)(mark - pattern), pattern, layer, mark + 1);
}

static void add_part(struct hf_plan *plan, const struct row *r, const struct model_config *c, int64_t layer)
{
	struct hf_part p = {.name = layer_name(plan->arena, r->ours, layer),
	                    .hf_name = layer_name(plan->arena, r->hf, layer),
	                    .nd = (int)strlen(r->dims),
	                    .transposed = r->transposed};
	p.rows = dimension(r->dims[0], c);
	p.shape[0] = r->dims[0] == 'V' ? hf_padded_vocab(c) : p.rows;
	p.shape[1] = p.nd > 1 ? dimension(r->dims[1], c) : 1;
	const struct hf_part *before = plan->n ? &plan->parts[plan->n - 1] : NULL;
	if (before && !strcmp(before->hf_name, p.hf_name))
		p.first_row = before->first_row + before->rows;
	plan->parts = mem_grow(plan->parts, plan->n, &plan->cap, sizeof *plan->parts);
	plan->parts[plan->n++] = p;
}

/* Rows first … last-1 belong to layers, or to none. */
static size_t add_rows(struct hf_plan *plan, size_t first, const struct model_config *c, unsigned style,
                       int64_t layer)
{
	bool per_layer = strchr(rows[first].ours, '#') != NULL;
	size_t i = first;
	for (; i < N_ROWS && (strchr(rows[i].ours, '#') != NULL) == per_layer; i++)
		if ((rows[i].style & style) && is_there(rows[i].when, c))
			add_part(plan, &rows[i], c, layer);
	return i;
}

/* The last part of an HF tensor knows its size; tell the others. */
static void set_hf_shapes(struct hf_plan *plan)
{
	for (size_t i = plan->n; i-- > 0;) {
		struct hf_part *p = &plan->parts[i];
		const struct hf_part *next = i + 1 < plan->n ? p + 1 : NULL;
		if (next && !strcmp(next->hf_name, p->hf_name)) {
			memcpy(p->hf_shape, next->hf_shape, sizeof p->hf_shape);
			continue;
		}
		p->hf_shape[p->transposed] = p->first_row + p->rows;
		p->hf_shape[!p->transposed] = p->shape[1];
	}
}

void hf_plan_make(struct hf_plan *plan, const struct model_config *c, enum hf_family family)
{
	unsigned style = family == HF_GPT2 ? GPT2 : LLAMA;
	for (size_t i = 0; i < N_ROWS;) {
		bool per_layer = strchr(rows[i].ours, '#') != NULL;
		size_t next = i;
		for (int64_t layer = 0; layer < (per_layer ? c->num_layers : 1); layer++)
			next = add_rows(plan, i, c, style, layer);
		i = next;
	}
	set_hf_shapes(plan);
}
