/* Names and shapes: the table, and its expansion for one model. */
#include "base/err.h"
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

/* When a row is there; one layer differs from another in whether it has experts. */
enum when {
	ALWAYS,
	LINEAR_BIAS,
	QKV_BIAS,
	QK_NORM,
	UNTIED,
	DENSE,
	DENSE_BIAS,
	HEADS,        /* keys and values come straight from the input */
	QUERY,        /* and so do queries */
	LATENT,       /* keys and values come from a latent */
	QUERY_LATENT, /* and so do queries */
	MOE,
	MOE_BIAS,
	SHARED,
	SHARED_GATE
};

struct layer { /* number; whether it has experts */
	int64_t i;
	bool moe;
};

static bool is_there(enum when when, const struct model_config *c, const struct layer *l)
{
	bool query_latent = c->multi_latent_attention && c->q_lora_rank != OPTION_NULL_INT;
	bool shared = l->moe && c->moe_shared_expert_intermediate_size != OPTION_NULL_INT;
	const bool there[] = {[ALWAYS] = true,
	                      [LINEAR_BIAS] = c->add_bias_linear,
	                      [QKV_BIAS] = c->add_bias_linear || c->add_qkv_bias,
	                      [QK_NORM] = c->qk_layernorm,
	                      [UNTIED] = c->untie_embeddings_and_output_weights,
	                      [DENSE] = !l->moe,
	                      [DENSE_BIAS] = !l->moe && c->add_bias_linear,
	                      [HEADS] = !c->multi_latent_attention,
	                      [QUERY] = !query_latent,
	                      [LATENT] = c->multi_latent_attention,
	                      [QUERY_LATENT] = query_latent,
	                      [MOE] = l->moe,
	                      [MOE_BIAS] = l->moe && c->moe_router_enable_expert_bias,
	                      [SHARED] = shared,
	                      [SHARED_GATE] = shared && c->moe_shared_expert_gate};
	return there[when];
}

/* What a family's tensors are called: the layers, and beside them the experts. */
enum style { GPT2 = 1, LLAMA = 2, MIXTRAL = 4, EXPERTS = 8, FUSED = 16, DEEPSEEK = 32, QWEN = 64 };

static unsigned style_of(enum hf_family family, bool fused)
{
	static const struct {
		unsigned base, apart;
	} styles[HF_FAMILY_COUNT] = {
	        [HF_GPT2] = {GPT2, 0},
	        [HF_LLAMA] = {LLAMA, 0},
	        [HF_MISTRAL] = {LLAMA, 0},
	        [HF_QWEN2] = {LLAMA, 0},
	        [HF_QWEN3] = {LLAMA, 0},
	        [HF_MIXTRAL] = {LLAMA, MIXTRAL},
	        [HF_QWEN2_MOE] = {LLAMA | QWEN, EXPERTS},
	        [HF_QWEN3_MOE] = {LLAMA, EXPERTS},
	        [HF_DEEPSEEK_V3] = {LLAMA | DEEPSEEK, EXPERTS},
	};
	return styles[family].base | (fused ? FUSED : styles[family].apart);
}

/* '#' is the layer, '@' the expert. Rows with the same HF name lie side by side in that tensor, in this
 * order, expert by expert. Dimensions: V vocabulary, C hidden, P positions, Q all query heads, K all key
 * heads, D one head, A all heads of values, F feed-forward, E experts, X one expert, S the shared expert, 1;
 * of latent attention q and l the ranks of the queries' latent and the other, L the latter with the rotated
 * key, U all heads of keys without that and values. */
struct row {
	unsigned style;
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
        {LLAMA, M "self_attn.q_proj.weight", L "attention.query.weight", "QC", false, QUERY},
        {LLAMA, M "self_attn.q_proj.bias", L "attention.query.bias", "Q", false, QKV_BIAS},
        {LLAMA, M "self_attn.k_proj.weight", L "attention.key.weight", "KC", false, HEADS},
        {LLAMA, M "self_attn.k_proj.bias", L "attention.key.bias", "K", false, QKV_BIAS},
        {LLAMA, M "self_attn.v_proj.weight", L "attention.value.weight", "KC", false, HEADS},
        {LLAMA, M "self_attn.v_proj.bias", L "attention.value.bias", "K", false, QKV_BIAS},
        {LLAMA, M "self_attn.q_norm.weight", L "attention.query_norm.weight", "D", false, QK_NORM},
        {LLAMA, M "self_attn.k_norm.weight", L "attention.key_norm.weight", "D", false, QK_NORM},
        {LLAMA, M "self_attn.q_a_proj.weight", L "attention.query_down.weight", "qC", false, QUERY_LATENT},
        {LLAMA, M "self_attn.q_a_layernorm.weight", L "attention.query_latent_norm.weight", "q", false,
         QUERY_LATENT},
        {LLAMA, M "self_attn.q_b_proj.weight", L "attention.query_up.weight", "Qq", false, QUERY_LATENT},
        {LLAMA, M "self_attn.kv_a_proj_with_mqa.weight", L "attention.key_value_down.weight", "LC", false,
         LATENT},
        {LLAMA, M "self_attn.kv_a_layernorm.weight", L "attention.key_value_latent_norm.weight", "l", false,
         LATENT},
        {LLAMA, M "self_attn.kv_b_proj.weight", L "attention.key_value_up.weight", "Ul", false, LATENT},
        {LLAMA, M "self_attn.o_proj.weight", L "attention.output.weight", "CA", false, ALWAYS},
        {LLAMA, M "self_attn.o_proj.bias", L "attention.output.bias", "C", false, LINEAR_BIAS},
        {LLAMA, M "post_attention_layernorm.weight", L "pre_mlp_layernorm.weight", "C", false, ALWAYS},
        {LLAMA, M "mlp.gate_proj.weight", L "mlp.gate.weight", "FC", false, DENSE},
        {LLAMA, M "mlp.gate_proj.bias", L "mlp.gate.bias", "F", false, DENSE_BIAS},
        {LLAMA, M "mlp.up_proj.weight", L "mlp.up.weight", "FC", false, DENSE},
        {LLAMA, M "mlp.up_proj.bias", L "mlp.up.bias", "F", false, DENSE_BIAS},
        {LLAMA, M "mlp.down_proj.weight", L "mlp.fc2.weight", "CF", false, DENSE},
        {LLAMA, M "mlp.down_proj.bias", L "mlp.fc2.bias", "C", false, DENSE_BIAS},
        {MIXTRAL, M "block_sparse_moe.gate.weight", L "mlp.router.weight", "EC", false, MOE},
        {EXPERTS | FUSED, M "mlp.gate.weight", L "mlp.router.weight", "EC", false, MOE},
        {EXPERTS | FUSED, M "mlp.gate.e_score_correction_bias", L "mlp.router.expert_bias", "E", false,
         MOE_BIAS},
        {MIXTRAL, M "block_sparse_moe.experts.@.w1.weight", L "mlp.experts.@.gate.weight", "XC", false, MOE},
        {MIXTRAL, M "block_sparse_moe.experts.@.w3.weight", L "mlp.experts.@.up.weight", "XC", false, MOE},
        {MIXTRAL, M "block_sparse_moe.experts.@.w2.weight", L "mlp.experts.@.fc2.weight", "CX", false, MOE},
        {EXPERTS, M "mlp.experts.@.gate_proj.weight", L "mlp.experts.@.gate.weight", "XC", false, MOE},
        {EXPERTS, M "mlp.experts.@.up_proj.weight", L "mlp.experts.@.up.weight", "XC", false, MOE},
        {EXPERTS, M "mlp.experts.@.down_proj.weight", L "mlp.experts.@.fc2.weight", "CX", false, MOE},
        {FUSED, M "mlp.experts.gate_up_proj", L "mlp.experts.@.gate.weight", "XC", false, MOE},
        {FUSED, M "mlp.experts.gate_up_proj", L "mlp.experts.@.up.weight", "XC", false, MOE},
        {FUSED, M "mlp.experts.down_proj", L "mlp.experts.@.fc2.weight", "CX", false, MOE},
        {DEEPSEEK, M "mlp.shared_experts.gate_proj.weight", L "mlp.shared_experts.gate.weight", "SC", false,
         SHARED},
        {DEEPSEEK, M "mlp.shared_experts.up_proj.weight", L "mlp.shared_experts.up.weight", "SC", false,
         SHARED},
        {DEEPSEEK, M "mlp.shared_experts.down_proj.weight", L "mlp.shared_experts.fc2.weight", "CS", false,
         SHARED},
        {QWEN, M "mlp.shared_expert.gate_proj.weight", L "mlp.shared_experts.gate.weight", "SC", false,
         SHARED},
        {QWEN, M "mlp.shared_expert.up_proj.weight", L "mlp.shared_experts.up.weight", "SC", false, SHARED},
        {QWEN, M "mlp.shared_expert.down_proj.weight", L "mlp.shared_experts.fc2.weight", "CS", false,
         SHARED},
        {QWEN, M "mlp.shared_expert_gate.weight", L "mlp.shared_expert_gate.weight", "1C", false,
         SHARED_GATE},
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
	static const char letters[] = "VCPQKDAFEXS1qlLU";
	int64_t heads = c->num_attention_heads;
	int64_t value = c->multi_latent_attention ? c->v_head_dim : c->kv_channels;
	const int64_t sizes[] = {c->vocab_size,
	                         c->hidden_size,
	                         c->max_position_embeddings,
	                         heads * c->kv_channels,
	                         c->num_query_groups * c->kv_channels,
	                         c->kv_channels,
	                         heads * value,
	                         c->ffn_hidden_size,
	                         c->num_experts,
	                         c->moe_ffn_hidden_size,
	                         c->moe_shared_expert_intermediate_size,
	                         1,
	                         c->q_lora_rank,
	                         c->kv_lora_rank,
	                         c->kv_lora_rank + c->qk_pos_emb_head_dim,
	                         heads * (c->qk_head_dim + value)};
	return sizes[strchr(letters, letter) - letters];
}

/* `pattern` with `number` in the place of its mark. */
static const char *put_number(struct arena *a, const char *pattern, char mark, int64_t number)
{
	const char *at = strchr(pattern, mark);
	if (!at)
		return pattern;
	return arena_printf(a, "%.*s%" PRId64 "%s", (int)(at - pattern), pattern, number, at + 1);
}

static const char *full_name(struct arena *a, const char *pattern, int64_t layer, int64_t expert)
{
	return put_number(a, put_number(a, pattern, '#', layer), '@', expert);
}

static void add_part(struct hf_plan *plan, const struct row *r, const struct model_config *c, int64_t layer,
                     int64_t expert)
{
	struct hf_part p = {.name = full_name(plan->arena, r->ours, layer, expert),
	                    .hf_name = full_name(plan->arena, r->hf, layer, expert),
	                    .nd = (int)strlen(r->dims),
	                    .transposed = r->transposed};
	p.rows = dimension(r->dims[0], c);
	p.shape[0] = r->dims[0] == 'V' ? hf_padded_vocab(c) : p.rows;
	p.shape[1] = p.nd > 1 ? dimension(r->dims[1], c) : 1;
	if (strchr(r->ours, '@') && !strchr(r->hf, '@'))
		p.hf_blocks = c->num_experts;
	const struct hf_part *before = plan->n ? &plan->parts[plan->n - 1] : NULL;
	if (before && !strcmp(before->hf_name, p.hf_name))
		p.first_row = before->first_row + before->rows;
	plan->parts = mem_grow(plan->parts, plan->n, &plan->cap, sizeof *plan->parts);
	plan->parts[plan->n++] = p;
}

/* Rows `first` … that share an HF name, for every expert where they are of experts. Returns the next row. */
static size_t add_group(struct hf_plan *plan, size_t first, const struct model_config *c, unsigned style,
                        const struct layer *l)
{
	int64_t experts = strchr(rows[first].ours, '@') ? c->num_experts : 1;
	size_t end = first + 1;
	while (end < N_ROWS && !strcmp(rows[end].hf, rows[first].hf))
		end++;
	for (int64_t expert = 0; expert < experts; expert++)
		for (size_t i = first; i < end; i++)
			if ((rows[i].style & style) && is_there(rows[i].when, c, l))
				add_part(plan, &rows[i], c, l->i, expert);
	return end;
}

static bool is_of_layers(size_t row)
{
	return row < N_ROWS && strchr(rows[row].ours, '#');
}

/* Rows from `first` on that belong to layers, or to none. */
static size_t add_rows(struct hf_plan *plan, size_t first, const struct model_config *c, unsigned style,
                       const struct layer *l)
{
	bool of_layers = is_of_layers(first);
	size_t i = first;
	while (i < N_ROWS && is_of_layers(i) == of_layers)
		i = add_group(plan, i, c, style, l);
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

/* A file that names billions of experts must not make us list them. */
static int check_size(const struct model_config *c, int64_t moe_layers, struct err *e)
{
	enum { MOST_PARTS = 1 << 21 };
	double experts = c->num_experts == OPTION_NULL_INT ? 0 : (double)c->num_experts;
	double n = 16 * (double)c->num_layers + 3 * experts * (double)moe_layers;
	return n <= MOST_PARTS ? 0
	                       : err_set(e, EXIT_BAD_DATA,
	                                 "num_layers %" PRId64 " and num_experts %" PRId64
	                                 " make about %.3g tensors; at most %d can be converted",
	                                 c->num_layers, c->num_experts, n, MOST_PARTS);
}

static void add_all(struct hf_plan *plan, const struct model_config *c, unsigned style, const bool *moe)
{
	for (size_t i = 0; i < N_ROWS;) {
		size_t next = i;
		for (int64_t k = 0; k < (is_of_layers(i) ? c->num_layers : 1); k++)
			next = add_rows(plan, i, c, style, &(struct layer){k, moe[k]});
		i = next;
	}
	set_hf_shapes(plan);
}

int hf_plan_make(struct hf_plan *plan, const struct model_config *c, enum hf_family family, bool fused,
                 struct err *e)
{
	bool *moe = mem_array((size_t)c->num_layers, sizeof *moe);
	int64_t n = 0;
	struct err why = {0};
	int rc = model_moe_layers(c, moe, &why) ? err_set(e, EXIT_BAD_DATA, "moe_layer_freq: %s", why.text)
	                                        : 0;
	for (int64_t i = 0; !rc && i < c->num_layers; i++)
		n += moe[i];
	if (!rc)
		rc = check_size(c, n, e);
	if (!rc)
		add_all(plan, c, style_of(family, fused), moe);
	free(moe);
	return rc;
}
