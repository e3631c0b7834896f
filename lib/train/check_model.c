/* The rules of the model: widths, positions, vocabulary, latent attention, experts. Floor: train. */
#include "train/check.h"
#include "base/err.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

/* Heads and widths. */

/* Multi-latent attention: heads of one kind, as wide as their two parts together. */
static void check_latent_heads(struct check *k)
{
	struct model_config *m = &k->c->model;
	int64_t width = m->qk_head_dim + m->qk_pos_emb_head_dim;
	if (m->num_query_groups != m->num_attention_heads)
		check_broken(k, "model.num_query_groups",
		             "%" PRId64 ", but under %s every query head has a key of its own; allowed: "
		             "%" PRId64,
		             m->num_query_groups, check_named(k, "model.multi_latent_attention"),
		             m->num_attention_heads);
	if (check_derive(k, "model.kv_channels", &m->kv_channels, width))
		check_equation(
		        k, "kv_channels %" PRId64 " = qk_head_dim %" PRId64 " + qk_pos_emb_head_dim %" PRId64,
		        width, m->qk_head_dim, m->qk_pos_emb_head_dim);
	else if (m->kv_channels != width)
		check_broken(k, "model.kv_channels",
		             "%" PRId64 ", but under multi_latent_attention it is %s + %s = %" PRId64
		             "; allowed: %" PRId64 ", or leave it out",
		             m->kv_channels, check_named(k, "model.qk_head_dim"),
		             check_named(k, "model.qk_pos_emb_head_dim"), width, width);
}

static void check_head_width(struct check *k)
{
	struct model_config *m = &k->c->model;
	int64_t heads = m->num_attention_heads;
	if (m->kv_channels != OPTION_NULL_INT || m->hidden_size == OPTION_NULL_INT)
		return;
	if (m->hidden_size % heads) {
		check_broken(k, "model.num_attention_heads",
		             "%s is not a multiple of %" PRId64 "; nearest: %s, or give model.kv_channels",
		             check_named(k, "model.hidden_size"), heads,
		             check_near(k, 1, m->hidden_size, heads));
		return;
	}
	check_derive(k, "model.kv_channels", &m->kv_channels, m->hidden_size / heads);
	check_equation(k, "kv_channels %" PRId64 " = hidden_size %" PRId64 " / num_attention_heads %" PRId64,
	               m->kv_channels, m->hidden_size, heads);
}

static void check_heads(struct check *k)
{
	struct model_config *m = &k->c->model;
	int64_t heads = m->num_attention_heads;
	if (heads == OPTION_NULL_INT)
		return;
	if (check_derive(k, "model.num_query_groups", &m->num_query_groups, heads))
		check_equation(k, "num_query_groups %" PRId64 " = num_attention_heads", heads);
	if (m->multi_latent_attention) {
		check_latent_heads(k);
		return;
	}
	if (heads % m->num_query_groups)
		check_broken(k, "model.num_query_groups", "%s is not a multiple of %" PRId64 "; nearest: %s",
		             check_named(k, "model.num_attention_heads"), m->num_query_groups,
		             check_near(k, 1, heads, m->num_query_groups));
	check_head_width(k);
}

static void check_sizes(struct check *k)
{
	struct model_config *m = &k->c->model;
	if (m->hidden_size != OPTION_NULL_INT &&
	    check_derive(k, "model.ffn_hidden_size", &m->ffn_hidden_size, 4 * m->hidden_size))
		check_equation(k, "ffn_hidden_size %" PRId64 " = 4 · hidden_size %" PRId64,
		               m->ffn_hidden_size, m->hidden_size);
	if (check_derive(k, "model.max_position_embeddings", &m->max_position_embeddings, m->seq_length))
		check_equation(k, "max_position_embeddings %" PRId64 " = seq_length", m->seq_length);
	if (m->position_embedding_type == MODEL_POSITION_LEARNED_ABSOLUTE &&
	    m->seq_length > m->max_position_embeddings)
		check_broken(k, "model.seq_length",
		             "%" PRId64 " is more than %s, the rows of the learned position table",
		             m->seq_length, check_named(k, "model.max_position_embeddings"));
}

/* What has no place in multi-latent attention. */
static void check_latent(struct check *k)
{
	const struct model_config *m = &k->c->model;
	const struct {
		const char *key;
		bool set;
		const char *why;
	} list[] = {
	        {"model.add_qkv_bias", m->add_qkv_bias, "its projections have no biases; allowed: false"},
	        {"model.add_bias_linear", m->add_bias_linear,
	         "its projections have no biases; allowed: false"},
	        {"model.qk_layernorm", m->qk_layernorm,
	         "its latents have norms of their own; allowed: false"},
	        {"model.position_embedding_type", m->position_embedding_type != MODEL_POSITION_ROPE,
	         "a part of its heads is made for rotation; allowed: rope"},
	        {"model.rotary_percent", m->rotary_percent != 1,
	         "qk_pos_emb_head_dim says how many channels rotate; allowed: 1"},
	};
	for (size_t i = 0; m->multi_latent_attention && i < sizeof list / sizeof *list; i++)
		if (list[i].set)
			check_broken(k, list[i].key, "%s does not go with %s: %s",
			             check_named(k, list[i].key),
			             check_named(k, "model.multi_latent_attention"), list[i].why);
	if (m->multi_latent_attention && m->qk_pos_emb_head_dim % 2)
		check_broken(k, "model.qk_pos_emb_head_dim",
		             "%" PRId64 " is odd, but rope rotates channels in pairs; nearest: %" PRId64
		             " or %" PRId64,
		             m->qk_pos_emb_head_dim, m->qk_pos_emb_head_dim - 1, m->qk_pos_emb_head_dim + 1);
}

/* Positions. */

static void check_rotated(struct check *k)
{
	const struct model_config *m = &k->c->model;
	int64_t width = m->kv_channels == OPTION_NULL_INT ? 2 : m->kv_channels;
	int64_t rotated = (int64_t)((double)width * m->rotary_percent + 1e-9);
	if (m->multi_latent_attention)
		return;
	if (width % 2)
		check_broken(k, "model.kv_channels",
		             "%" PRId64 " is odd, but rope rotates channels in pairs; nearest: %" PRId64
		             " or %" PRId64,
		             width, width > 1 ? width - 1 : 2, width + 1);
	else if (rotated < 2 || rotated % 2)
		check_broken(k, "model.rotary_percent",
		             "%g of kv_channels %" PRId64 " is %" PRId64
		             " rotated channels; an even number from 2 on is needed",
		             m->rotary_percent, width, rotated);
}

/* Two ways to stretch the context; each has one range of frequencies between kept and stretched ones. */
static void check_scaling(struct check *k)
{
	const struct model_config *m = &k->c->model;
	bool yarn = m->rope_type == MODEL_ROPE_YARN;
	if (m->use_rope_scaling && yarn)
		check_broken(k, "model.use_rope_scaling", "true does not go with %s; allowed: false",
		             check_named(k, "model.rope_type"));
	if (m->use_rope_scaling && m->rope_scaling_low_freq_factor >= m->rope_scaling_high_freq_factor)
		check_broken(k, "model.rope_scaling_low_freq_factor", "%g must be below %s",
		             m->rope_scaling_low_freq_factor,
		             check_named(k, "model.rope_scaling_high_freq_factor"));
	if (yarn && m->yarn_beta_slow >= m->yarn_beta_fast)
		check_broken(k, "model.yarn_beta_slow", "%g must be below %s", m->yarn_beta_slow,
		             check_named(k, "model.yarn_beta_fast"));
}

static void check_rope(struct check *k)
{
	const struct model_config *m = &k->c->model;
	if (m->position_embedding_type == MODEL_POSITION_ROPE) {
		check_rotated(k);
		check_scaling(k);
		return;
	}
	const char *not_rope = check_named(k, "model.position_embedding_type");
	if (m->use_rope_scaling)
		check_broken(k, "model.use_rope_scaling",
		             "true needs model.position_embedding_type rope, not %s", not_rope);
	if (m->rope_type == MODEL_ROPE_YARN)
		check_broken(k, "model.rope_type", "yarn needs model.position_embedding_type rope, not %s",
		             not_rope);
}

static void check_vocabulary(struct check *k)
{
	const struct model_config *m = &k->c->model;
	int64_t *padded = &k->c->derived.padded_vocab_size, step = m->make_vocab_size_divisible_by;
	*padded = OPTION_NULL_INT;
	if (m->vocab_size == OPTION_NULL_INT)
		return;
	*padded = (m->vocab_size + step - 1) / step * step;
	check_equation(k, "padded_vocab_size %" PRId64 " = ⌈vocab_size %" PRId64 " / %" PRId64 "⌉ · %" PRId64,
	               *padded, m->vocab_size, step, step);
}

/* Experts. */

static void check_moe_layers(struct check *k)
{
	const struct model_config *m = &k->c->model;
	struct err why = {0};
	if (m->num_layers == OPTION_NULL_INT)
		return;
	bool *moe = mem_array((size_t)m->num_layers, sizeof *moe);
	int64_t n = 0;
	if (model_moe_layers(m, moe, &why))
		check_broken(k, "model.moe_layer_freq",
		             "'%.80s': %s; allowed: a number N, or a 0 or 1 for each of %s; example: "
		             "\"([0]*3+[1]*58)\"",
		             m->moe_layer_freq ? m->moe_layer_freq : "", why.text,
		             check_named(k, "model.num_layers"));
	for (int64_t i = 0; i < m->num_layers; i++)
		n += moe[i];
	if (!why.code && !n)
		check_broken(k, "model.moe_layer_freq",
		             "'%.80s' leaves no layer for the experts of %s; a 1 is needed",
		             m->moe_layer_freq, check_named(k, "model.num_experts"));
	free(moe);
}

/* Groups of experts: a token uses the best of some groups, as many of each (DeepSeek-AI 2024). */
static void check_groups(struct check *k)
{
	static const char groups_key[] = "model.moe_router_num_groups",
	                  used_key[] = "model.moe_router_group_topk";
	const struct model_config *m = &k->c->model;
	int64_t groups = m->moe_router_num_groups, used = m->moe_router_group_topk;
	int64_t experts = m->num_experts, topk = m->moe_router_topk, each = topk / used;
	if (groups == OPTION_NULL_INT && used == OPTION_NULL_INT)
		return;
	if (groups == OPTION_NULL_INT || used == OPTION_NULL_INT) {
		bool has_groups = used == OPTION_NULL_INT;
		check_broken(k, has_groups ? groups_key : used_key,
		             "%" PRId64 " needs %s too; give both or neither", has_groups ? groups : used,
		             has_groups ? used_key : groups_key);
		return;
	}
	if (experts % groups)
		check_broken(k, groups_key, "%s is not a multiple of %" PRId64 "; nearest: %s",
		             check_named(k, "model.num_experts"), groups, check_near(k, 1, experts, groups));
	if (used > groups)
		check_broken(k, used_key, "%" PRId64 " is more than %s", used, check_named(k, groups_key));
	else if (topk % used)
		check_broken(k, used_key,
		             "%s is not a multiple of %" PRId64
		             ", and every group gives as many; nearest: %s",
		             check_named(k, "model.moe_router_topk"), used, check_near(k, 1, topk, used));
	else if (experts % groups == 0 && each > experts / groups)
		check_broken(k, used_key,
		             "moe_router_topk %" PRId64 " / %" PRId64 " = %" PRId64
		             " experts of a group are more than num_experts %" PRId64 " / %s = %" PRId64,
		             topk, used, each, experts, check_named(k, groups_key), experts / groups);
}

static void check_router(struct check *k)
{
	const struct model_config *m = &k->c->model;
	bool softmax = m->moe_router_score_function == MODEL_SCORE_SOFTMAX;
	if (m->moe_router_topk > m->num_experts)
		check_broken(k, "model.moe_router_topk", "%" PRId64 " is more than %s", m->moe_router_topk,
		             check_named(k, "model.num_experts"));
	else
		check_groups(k);
	if (m->moe_router_enable_expert_bias && softmax)
		check_broken(k, "model.moe_router_enable_expert_bias",
		             "true needs model.moe_router_score_function sigmoid or sqrtsoftplus, not %s",
		             check_named(k, "model.moe_router_score_function"));
	if (m->moe_router_topk == 1 && softmax && !m->moe_router_pre_softmax)
		check_note(k,
		           "%s with %s: the softmax over one expert is 1, and the router learns nothing from "
		           "the loss of the tokens",
		           check_named(k, "model.moe_router_topk"),
		           check_named(k, "model.moe_router_pre_softmax"));
}

static void check_expert_parts(struct check *k)
{
	const struct model_config *m = &k->c->model;
	if (m->add_bias_linear)
		check_broken(k, "model.add_bias_linear",
		             "true does not go with %s: experts have no biases; allowed: false",
		             check_named(k, "model.num_experts"));
	if (m->moe_pad_expert_input_to_capacity && isnan(m->moe_expert_capacity_factor))
		check_broken(k, "model.moe_pad_expert_input_to_capacity",
		             "true needs model.moe_expert_capacity_factor, the capacity to fill up to");
	if (m->moe_shared_expert_intermediate_size != OPTION_NULL_INT)
		return;
	if (m->moe_shared_expert_gate)
		check_broken(k, "model.moe_shared_expert_gate",
		             "true needs model.moe_shared_expert_intermediate_size, the width of the expert "
		             "that is gated");
	if (m->moe_shared_expert_overlap)
		check_broken(k, "model.moe_shared_expert_overlap",
		             "true needs model.moe_shared_expert_intermediate_size, the width of the expert "
		             "that computes meanwhile");
}

static void check_experts(struct check *k)
{
	struct model_config *m = &k->c->model;
	if (m->num_experts == OPTION_NULL_INT)
		return;
	if (check_derive(k, "model.moe_ffn_hidden_size", &m->moe_ffn_hidden_size, m->ffn_hidden_size))
		check_equation(k, "moe_ffn_hidden_size %" PRId64 " = ffn_hidden_size",
		               m->moe_ffn_hidden_size);
	check_moe_layers(k);
	check_router(k);
	check_expert_parts(k);
}

/* Values without effect. */

struct use {
	const char *key;
	bool used;
	const char *because;
};

static void note_all(struct check *k, const struct use *list, size_t n)
{
	for (size_t i = 0; i < n; i++)
		check_unused(k, list[i].key, list[i].used, check_named(k, list[i].because));
}

static void note_attention(struct check *k)
{
	static const char positions[] = "model.position_embedding_type", llama[] = "model.use_rope_scaling",
	                  type[] = "model.rope_type", latent[] = "model.multi_latent_attention";
	const struct model_config *m = &k->c->model;
	bool rope = m->position_embedding_type == MODEL_POSITION_ROPE, scaled = m->use_rope_scaling;
	bool yarn = m->rope_type == MODEL_ROPE_YARN, mla = m->multi_latent_attention;
	const struct use list[] = {
	        {"model.rotary_base", rope, positions},
	        {"model.rotary_percent", rope, positions},
	        {"model.rotary_interleaved", rope, positions},
	        {"model.rope_scaling_factor", scaled, llama},
	        {"model.rope_scaling_low_freq_factor", scaled, llama},
	        {"model.rope_scaling_high_freq_factor", scaled, llama},
	        {"model.rope_scaling_original_max_position_embeddings", scaled, llama},
	        {"model.rotary_scaling_factor", yarn, type},
	        {"model.yarn_original_max_position_embeddings", yarn, type},
	        {"model.yarn_beta_fast", yarn, type},
	        {"model.yarn_beta_slow", yarn, type},
	        {"model.mscale", yarn, type},
	        {"model.mscale_all_dim", yarn, type},
	        {"model.q_lora_rank", mla, latent},
	        {"model.kv_lora_rank", mla, latent},
	        {"model.qk_head_dim", mla, latent},
	        {"model.qk_pos_emb_head_dim", mla, latent},
	        {"model.v_head_dim", mla, latent},
	};
	note_all(k, list, sizeof list / sizeof *list);
}

static void note_experts(struct check *k)
{
	static const char none[] = "model.num_experts", balancing[] = "model.moe_router_load_balancing_type";
	const struct model_config *m = &k->c->model;
	bool any = m->num_experts != OPTION_NULL_INT, capacity = !isnan(m->moe_expert_capacity_factor);
	bool balanced = m->moe_router_load_balancing_type != MODEL_BALANCING_NONE;
	bool softmax = m->moe_router_score_function == MODEL_SCORE_SOFTMAX;
	const struct use list[] = {
	        {"model.moe_layer_freq", any, none},
	        {"model.moe_ffn_hidden_size", any, none},
	        {"model.moe_router_topk", any, none},
	        {"model.moe_router_score_function", any, none},
	        {"model.moe_router_pre_softmax", any && softmax,
	         any ? "model.moe_router_score_function" : none},
	        {"model.moe_router_num_groups", any, none},
	        {"model.moe_router_group_topk", any, none},
	        {"model.moe_router_topk_scaling_factor", any, none},
	        {"model.moe_router_enable_expert_bias", any, none},
	        {"model.moe_router_bias_update_rate", any && m->moe_router_enable_expert_bias,
	         any ? "model.moe_router_enable_expert_bias" : none},
	        {balancing, any, none},
	        {"model.moe_aux_loss_coeff", any && (balanced || m->moe_aux_loss_coeff == 0),
	         any ? balancing : none},
	        {"model.moe_z_loss_coeff", any, none},
	        {"model.moe_input_jitter_eps", any, none},
	        {"model.moe_expert_capacity_factor", any, none},
	        {"model.moe_token_drop_policy", any && capacity,
	         any ? "model.moe_expert_capacity_factor" : none},
	        {"model.moe_pad_expert_input_to_capacity", any, none},
	        {"model.moe_shared_expert_intermediate_size", any, none},
	        {"model.moe_shared_expert_gate", any, none},
	        {"model.moe_shared_expert_overlap", any, none},
	        {"model.moe_token_dispatcher_type", any, none},
	        {"model.moe_expert_rank_capacity_factor", any, none},
	};
	note_all(k, list, sizeof list / sizeof *list);
}

void check_model(struct check *k)
{
	/* In this order: a rule may need what an earlier one derived. */
	static void (*const rules[])(struct check *) = {check_heads,    check_sizes,      check_latent,
	                                                check_rope,     check_vocabulary, check_experts,
	                                                note_attention, note_experts};
	for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
		rules[i](k);
}
