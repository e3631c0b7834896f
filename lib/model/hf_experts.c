/* config.json of mixtures of experts and of latent attention: what is no single number under another name. */
#include "model/hf_config.h"
#include "base/err.h"
#include "base/json.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Which layers have experts. */

/* moe_layer_freq that says moe[n], as runs: "([0]*3+[1]*58)". */
static int set_layers(struct config_reader *r, const bool *moe, int64_t n)
{
	struct buf b = {0};
	for (int64_t i = 0, run; i < n; i += run) {
		for (run = 1; i + run < n && moe[i + run] == moe[i];)
			run++;
		buf_printf(&b, "%s[%d]*%" PRId64, i ? "+" : "(", moe[i], run);
	}
	buf_puts(&b, ")");
	bool all = n && moe[0] && !strchr(b.data, '+');
	int rc = hf_set_text(r, "moe_layer_freq", all ? "1" : b.data);
	buf_free(&b);
	return rc;
}

/* Qwen: every so many layers, but for those that are listed. */
static int read_sparse_layers(struct config_reader *r, bool *moe, int64_t n)
{
	const struct json *dense = json_get_type(r->from, "mlp_only_layers", JSON_ARRAY);
	int64_t step = json_get_integer(r->from, "decoder_sparse_step", 1);
	if (step < 1)
		return hf_refuse(r, "decoder_sparse_step", "must be 1 or more");
	for (int64_t i = 0; i < n; i++)
		moe[i] = (i + 1) % step == 0;
	for (const struct json *v = dense ? dense->child : NULL; v; v = v->next) {
		if (v->type != JSON_NUMBER || !v->is_integer)
			return hf_refuse(r, "mlp_only_layers", "must be a list of integers");
		if (v->integer >= 0 && v->integer < n)
			moe[v->integer] = false;
	}
	return 0;
}

/* DeepSeek: all but the first few. */
static int read_later_layers(struct config_reader *r, bool *moe, int64_t n)
{
	const struct json *first = json_get_type(r->from, "first_k_dense_replace", JSON_NUMBER);
	if (!first || !first->is_integer || first->integer < 0)
		return hf_refuse(r, "first_k_dense_replace", "must be a number of layers");
	if (json_get_integer(r->from, "moe_layer_freq", 1) != 1)
		return hf_refuse(r, "moe_layer_freq", "only 1 is built");
	for (int64_t i = 0; i < n; i++)
		moe[i] = i >= first->integer;
	return 0;
}

static int read_layers(struct config_reader *r)
{
	int64_t n = r->values.model.num_layers;
	if (r->family == HF_MIXTRAL)
		return 0;
	bool *moe = mem_array((size_t)n, sizeof *moe);
	int rc = r->family == HF_DEEPSEEK_V3 ? read_later_layers(r, moe, n) : read_sparse_layers(r, moe, n);
	if (!rc)
		rc = set_layers(r, moe, n);
	free(moe);
	return rc;
}

/* Latent attention and the router of DeepSeek-V3. */

/* A family's own choice of words, where it is said at all. */
static int expect_word(struct config_reader *r, const char *key, const char *only)
{
	return strcmp(json_get_string(r->from, key, only), only)
	               ? hf_refuse(r, key, arena_printf(&r->arena, "only \"%s\" is built", only))
	               : 0;
}

/* transformers ranks groups by the two best experts of each; here by as many as a token takes of a group. */
static int read_groups(struct config_reader *r)
{
	int64_t groups = json_get_integer(r->from, "n_group", 1),
	        used = json_get_integer(r->from, "topk_group", 1), topk = r->values.model.moe_router_topk;
	if (groups < 1 || used < 1 || used > groups)
		return hf_refuse(r, "topk_group", "must be from 1 to n_group");
	if (used == groups)
		return 0;
	if (r->values.model.num_experts % groups || 2 * groups > r->values.model.num_experts)
		return hf_refuse(r, "n_group", "must divide n_routed_experts into groups of two or more");
	if (topk != 2 * used)
		return hf_refuse(r, "topk_group",
		                 "num_experts_per_tok must be twice as many where n_group is more");
	return hf_set_integer(r, "moe_router_num_groups", groups) ||
	                       hf_set_integer(r, "moe_router_group_topk", used)
	               ? r->e->code
	               : 0;
}

static int read_shared(struct config_reader *r)
{
	const struct json *shared = json_get_type(r->from, "n_shared_experts", JSON_NUMBER);
	int64_t width = r->values.model.moe_ffn_hidden_size;
	if (!shared || !shared->is_integer || shared->integer < 1 || shared->integer > 65536)
		return hf_refuse(r, "n_shared_experts", "must be a number of experts from 1 to 65536");
	return hf_set_integer(r, "moe_shared_expert_intermediate_size", shared->integer * width);
}

static int read_deepseek(struct config_reader *r)
{
	struct model_config *m = &r->values.model;
	m->multi_latent_attention = true;
	m->rotary_interleaved = json_get_bool(r->from, "rope_interleave", true);
	m->moe_router_score_function = MODEL_SCORE_SIGMOID;
	m->moe_router_enable_expert_bias = true;
	if (expect_word(r, "scoring_func", "sigmoid") || expect_word(r, "topk_method", "noaux_tc"))
		return r->e->code;
	if (json_get_bool(r->from, "norm_topk_prob", true) != (m->moe_router_topk > 1))
		return hf_refuse(r, "norm_topk_prob",
		                 m->moe_router_topk > 1 ? "only true is built"
		                                        : "only false is built for one expert a token");
	return read_groups(r) ? r->e->code : read_shared(r);
}

/* Losses that balance the experts count only where the router's logits are asked for. */
static int read_balance(struct config_reader *r)
{
	bool balanced = json_get_bool(r->from, "output_router_logits", false);
	double weight = json_get_number(r->from, "router_aux_loss_coef", 0.001);
	r->values.model.moe_router_load_balancing_type =
	        balanced ? MODEL_BALANCING_AUX : MODEL_BALANCING_NONE;
	return hf_set_number(r, "moe_aux_loss_coeff", balanced ? weight : 0);
}

int hf_read_experts(struct config_reader *r)
{
	struct model_config *m = &r->values.model;
	if (!hf_is_one_of(r->family, HF_MOES))
		return 0;
	if (m->moe_router_topk > m->num_experts)
		return hf_refuse(r, "num_experts_per_tok", "is more than there are experts");
	if (hf_is_one_of(r->family, HF_QWENS_MOE))
		m->moe_router_pre_softmax = !json_get_bool(r->from, "norm_topk_prob", false);
	m->moe_shared_expert_gate = r->family == HF_QWEN2_MOE;
	if (read_layers(r) || read_balance(r))
		return r->e->code;
	return r->family == HF_DEEPSEEK_V3 ? read_deepseek(r) : 0;
}

/* And out again. */

/* Dense layers before the first with experts; *rest: whether there are more behind it. */
static int64_t count_first_dense(const struct model_config *c, const bool *moe, bool *rest)
{
	int64_t first = 0;
	*rest = false;
	while (first < c->num_layers && !moe[first])
		first++;
	for (int64_t i = first; i < c->num_layers; i++)
		*rest |= !moe[i];
	return first;
}

static void put_dense_layers(struct config_writer *w, const struct model_config *c, const bool *moe)
{
	struct buf b = {0};
	for (int64_t i = 0; i < c->num_layers; i++)
		if (!moe[i])
			buf_printf(&b, "%s%" PRId64, b.length ? ", " : "", i);
	hf_put_integer(w, "decoder_sparse_step", 1);
	hf_put(w, "mlp_only_layers", arena_printf(&w->arena, "[%s]", b.length ? b.data : ""));
	buf_free(&b);
}

static void put_deepseek(struct config_writer *w, const struct model_config *c, const bool *moe)
{
	bool rest, groups = c->moe_router_num_groups != OPTION_NULL_INT;
	hf_put_integer(w, "first_k_dense_replace", count_first_dense(c, moe, &rest));
	hf_put_integer(w, "moe_layer_freq", 1);
	hf_put_integer(w, "n_group", groups ? c->moe_router_num_groups : 1);
	hf_put_integer(w, "topk_group", groups ? c->moe_router_group_topk : 1);
	hf_put_integer(w, "n_shared_experts",
	               c->moe_shared_expert_intermediate_size / c->moe_ffn_hidden_size);
	hf_put_integer(w, "num_nextn_predict_layers", 0);
	hf_put_bool(w, "norm_topk_prob", c->moe_router_topk > 1);
	hf_put_bool(w, "rope_interleave", c->rotary_interleaved);
	hf_put_word(w, "scoring_func", "sigmoid");
	hf_put_word(w, "topk_method", "noaux_tc");
}

void hf_put_experts(struct config_writer *w, const struct model_config *c, enum hf_family f)
{
	bool balanced = c->moe_router_load_balancing_type != MODEL_BALANCING_NONE;
	struct err ignored = {0};
	if (!hf_is_one_of(f, HF_MOES))
		return;
	bool *moe = mem_array((size_t)c->num_layers, sizeof *moe);
	model_moe_layers(c, moe, &ignored); /* it could be read when the tensors were listed */
	if (f == HF_DEEPSEEK_V3) {
		put_deepseek(w, c, moe);
	} else {
		hf_put_bool(w, "output_router_logits", balanced && c->moe_aux_loss_coeff > 0);
		hf_put(w, "router_aux_loss_coef",
		       hf_float_text(&w->arena, balanced ? c->moe_aux_loss_coeff : 0));
	}
	if (hf_is_one_of(f, HF_QWENS_MOE)) {
		hf_put_bool(w, "norm_topk_prob", !c->moe_router_pre_softmax);
		put_dense_layers(w, c, moe);
	}
	free(moe);
}

/* What fits. */

static const char *needs_softmax(const struct model_config *c)
{
	if (c->moe_router_score_function != MODEL_SCORE_SOFTMAX || c->moe_router_topk_scaling_factor != 1)
		return "moe_router_score_function softmax, moe_router_topk_scaling_factor 1";
	if (c->moe_router_num_groups != OPTION_NULL_INT)
		return "no moe_router_num_groups";
	return NULL; /* a bias of experts needs other scores anyway */
}

static const char *needs_deepseek(const struct model_config *c, const bool *moe)
{
	bool rest;
	int64_t shared = c->moe_shared_expert_intermediate_size;
	count_first_dense(c, moe, &rest);
	if (!c->multi_latent_attention)
		return "multi_latent_attention true";
	if (c->moe_router_score_function != MODEL_SCORE_SIGMOID || !c->moe_router_enable_expert_bias)
		return "moe_router_score_function sigmoid, moe_router_enable_expert_bias true";
	if (c->moe_router_num_groups != OPTION_NULL_INT &&
	    c->moe_router_group_topk < c->moe_router_num_groups &&
	    c->moe_router_topk != 2 * c->moe_router_group_topk)
		return "moe_router_topk twice moe_router_group_topk";
	if (shared == OPTION_NULL_INT || shared % c->moe_ffn_hidden_size || c->moe_shared_expert_gate)
		return "moe_shared_expert_intermediate_size, a multiple of moe_ffn_hidden_size, without gate";
	return rest ? "all its layers without experts before the first that has some" : NULL;
}

static const char *needs_experts(const struct model_config *c, enum hf_family f, const bool *moe)
{
	bool rest, shared = c->moe_shared_expert_intermediate_size != OPTION_NULL_INT;
	if (f == HF_DEEPSEEK_V3)
		return needs_deepseek(c, moe);
	if (c->multi_latent_attention)
		return "multi_latent_attention false";
	if (f == HF_MIXTRAL && (count_first_dense(c, moe, &rest) || rest))
		return "experts in every layer";
	if (f == HF_MIXTRAL && c->moe_router_pre_softmax)
		return "moe_router_pre_softmax false";
	if (f == HF_QWEN2_MOE && !(shared && c->moe_shared_expert_gate))
		return "moe_shared_expert_intermediate_size, moe_shared_expert_gate true";
	if (f != HF_QWEN2_MOE && shared)
		return "no moe_shared_expert_intermediate_size";
	return needs_softmax(c);
}

const char *hf_experts_need(const struct model_config *c, enum hf_family f)
{
	struct err why = {0};
	if (!hf_is_one_of(f, HF_MOES))
		return c->num_experts != OPTION_NULL_INT ? "no num_experts"
		       : c->multi_latent_attention       ? "multi_latent_attention false"
		                                         : NULL;
	if (c->num_experts == OPTION_NULL_INT)
		return "num_experts";
	bool *moe = mem_array((size_t)c->num_layers, sizeof *moe);
	const char *need = model_moe_layers(c, moe, &why) ? "a moe_layer_freq that can be read"
	                                                  : needs_experts(c, f, moe);
	free(moe);
	return need;
}
