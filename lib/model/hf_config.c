/* config.json <-> the group `model`. Values pass through the table of options, so that ranges are checked
 * there. */
#include "model/hf_config.h"
#include "base/err.h"
#include "base/json.h"
#include "base/yaml.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct option option_rows[] = {
#define OPTION_VALUES struct hf_values
#define OPTION_GROUP model
#include "base/option_rows.h"
#include "model/config.def"
#include "base/option_end.h"
#undef OPTION_GROUP
};
enum { N_OPTIONS = sizeof option_rows / sizeof *option_rows };
static const struct option_group group = {.name = "model", .doc = "the network"};
static const struct option_table table = {
        .rows = option_rows, .n = N_OPTIONS, .groups = &group, .n_groups = 1};

/* keep NULL: strings of the values live as long as *r. */
static void begin(struct config_reader *r, const char *name, struct arena *keep, struct err *e)
{
	memset(r, 0, sizeof *r);
	r->name = name;
	r->e = e;
	r->origins = arena_alloc(&r->arena, N_OPTIONS, sizeof *r->origins);
	r->set = (struct option_set){.table = &table,
	                             .values = &r->values,
	                             .origins = r->origins,
	                             .arena = keep ? keep : &r->arena};
	option_set_defaults(&r->set);
}

int hf_refuse(struct config_reader *r, const char *key, const char *what)
{
	return err_set(r->e, EXIT_BAD_DATA, "%s: \"%s\": %s", r->name, key, what);
}

int hf_set_text(struct config_reader *r, const char *key, const char *text)
{
	struct err why = {0};
	if (!option_set_text(&r->set, arena_printf(&r->arena, "model.%s=%s", key, text), OPTION_FROM_OTHER,
	                     r->name, &why))
		return 0;
	return err_set(r->e, EXIT_BAD_DATA, "%s", why.text);
}

int hf_set_number(struct config_reader *r, const char *key, double x)
{
	struct buf b = {0};
	json_put_number(&b, x);
	int rc = hf_set_text(r, key, b.data);
	buf_free(&b);
	return rc;
}

int hf_set_integer(struct config_reader *r, const char *key, int64_t x)
{
	return hf_set_text(r, key, arena_printf(&r->arena, "%" PRId64, x));
}

/* What is called differently and means the same. `optional`: transformers fills it in where it is absent. */
#define GPT2 HF_BIT(HF_GPT2)
#define MIXTRAL HF_BIT(HF_MIXTRAL)
#define DEEPSEEK HF_BIT(HF_DEEPSEEK_V3)
static const struct key {
	unsigned families;
	const char *hf, *ours;
	bool integer, optional;
} keys[] = {
        {GPT2, "n_layer", "num_layers", true, false},
        {GPT2, "n_embd", "hidden_size", true, false},
        {GPT2, "n_head", "num_attention_heads", true, false},
        {GPT2, "n_inner", "ffn_hidden_size", true, true},
        {GPT2, "n_positions", "max_position_embeddings", true, false},
        {GPT2, "layer_norm_epsilon", "norm_epsilon", false, true},
        {GPT2, "attn_pdrop", "attention_dropout", false, true},
        {GPT2, "resid_pdrop", "hidden_dropout", false, true},
        {HF_LLAMAS, "num_hidden_layers", "num_layers", true, false},
        {HF_LLAMAS, "hidden_size", "hidden_size", true, false},
        {HF_LLAMAS, "num_attention_heads", "num_attention_heads", true, false},
        {HF_LLAMAS, "num_key_value_heads", "num_query_groups", true, true},
        {HF_LLAMAS & ~DEEPSEEK, "head_dim", "kv_channels", true, true},
        {HF_LLAMAS & ~MIXTRAL, "intermediate_size", "ffn_hidden_size", true, false},
        {HF_LLAMAS, "max_position_embeddings", "max_position_embeddings", true, false},
        {HF_LLAMAS, "rms_norm_eps", "norm_epsilon", false, false},
        {HF_LLAMAS, "attention_dropout", "attention_dropout", false, true},
        {HF_ALL, "vocab_size", "vocab_size", true, false},
        {HF_ALL, "initializer_range", "init_method_std", false, true},
        {DEEPSEEK, "q_lora_rank", "q_lora_rank", true, true},
        {DEEPSEEK, "kv_lora_rank", "kv_lora_rank", true, false},
        {DEEPSEEK, "qk_nope_head_dim", "qk_head_dim", true, false},
        {DEEPSEEK, "qk_rope_head_dim", "qk_pos_emb_head_dim", true, false},
        {DEEPSEEK, "v_head_dim", "v_head_dim", true, false},
        {MIXTRAL, "num_local_experts", "num_experts", true, false},
        {HF_QWENS_MOE, "num_experts", "num_experts", true, false},
        {DEEPSEEK, "n_routed_experts", "num_experts", true, false},
        {HF_MOES, "num_experts_per_tok", "moe_router_topk", true, false},
        {MIXTRAL, "intermediate_size", "moe_ffn_hidden_size", true, false},
        {HF_QWENS_MOE | DEEPSEEK, "moe_intermediate_size", "moe_ffn_hidden_size", true, false},
        {HF_BIT(HF_QWEN2_MOE), "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", true,
         false},
        {DEEPSEEK, "routed_scaling_factor", "moe_router_topk_scaling_factor", false, false},
        {MIXTRAL, "router_jitter_noise", "moe_input_jitter_eps", false, true},
};
enum { N_KEYS = sizeof keys / sizeof *keys };

static int read_keys(struct config_reader *r)
{
	for (size_t i = 0; i < N_KEYS; i++) {
		const struct key *k = &keys[i];
		const struct json *v = json_get(r->from, k->hf);
		if (!hf_is_one_of(r->family, k->families))
			continue;
		if (!v || v->type == JSON_NULL) {
			if (k->optional)
				continue;
			return hf_refuse(r, k->hf, "missing");
		}
		if (v->type != JSON_NUMBER || (k->integer && !v->is_integer))
			return hf_refuse(r, k->hf, k->integer ? "must be an integer" : "must be a number");
		if (k->integer ? hf_set_integer(r, k->ours, v->integer)
		               : hf_set_number(r, k->ours, v->number))
			return r->e->code;
	}
	return 0;
}

static int derive_heads(struct config_reader *r)
{
	struct model_config *m = &r->values.model;
	if (m->num_query_groups == OPTION_NULL_INT)
		m->num_query_groups = m->num_attention_heads;
	if (m->multi_latent_attention) {
		m->kv_channels = m->qk_head_dim + m->qk_pos_emb_head_dim;
		return m->num_query_groups == m->num_attention_heads
		               ? 0
		               : hf_refuse(r, "num_key_value_heads", "must be the number of attention heads");
	}
	if (m->kv_channels == OPTION_NULL_INT) {
		if (m->hidden_size % m->num_attention_heads)
			return hf_refuse(r, "hidden_size", "is no multiple of the number of attention heads");
		m->kv_channels = m->hidden_size / m->num_attention_heads;
	}
	return m->num_attention_heads % m->num_query_groups == 0
	               ? 0
	               : hf_refuse(r, "num_key_value_heads", "does not divide the number of attention heads");
}

/* What the classes of transformers take where a key is absent or null. A model of experts alone has no other
 * feed-forward block, but a width for it is wanted. */
static int derive(struct config_reader *r)
{
	struct model_config *m = &r->values.model;
	bool experts = m->num_experts != OPTION_NULL_INT;
	if (m->ffn_hidden_size == OPTION_NULL_INT && experts)
		m->ffn_hidden_size = m->moe_ffn_hidden_size;
	if (m->ffn_hidden_size == OPTION_NULL_INT)
		m->ffn_hidden_size = 4 * m->hidden_size;
	if (m->moe_ffn_hidden_size == OPTION_NULL_INT && experts)
		m->moe_ffn_hidden_size = m->ffn_hidden_size;
	enum { LONGEST_SAMPLE = 4096 };
	m->seq_length =
	        m->max_position_embeddings < LONGEST_SAMPLE ? m->max_position_embeddings : LONGEST_SAMPLE;
	return derive_heads(r);
}

static const struct {
	unsigned families;
	const char *hf;
	enum model_activation ours;
} activations[] = {
        {GPT2, "gelu_new", MODEL_GELU},       {GPT2, "gelu_pytorch_tanh", MODEL_GELU},
        {GPT2, "gelu", MODEL_GELU_EXACT},     {GPT2, "relu", MODEL_RELU},
        {GPT2, "relu2", MODEL_SQUARED_RELU},  {HF_LLAMAS, "silu", MODEL_SWIGLU},
        {HF_LLAMAS, "swish", MODEL_SWIGLU},   {HF_LLAMAS, "gelu_pytorch_tanh", MODEL_GEGLU},
        {HF_LLAMAS, "gelu_new", MODEL_GEGLU},
};
enum { N_ACTIVATIONS = sizeof activations / sizeof *activations };

static int read_activation(struct config_reader *r)
{
	bool gpt2 = r->family == HF_GPT2;
	const char *key = gpt2 ? "activation_function" : "hidden_act";
	const char *word = json_get_string(r->from, key, gpt2 ? "gelu_new" : "silu");
	for (size_t i = 0; i < N_ACTIVATIONS; i++)
		if (hf_is_one_of(r->family, activations[i].families) && !strcmp(activations[i].hf, word)) {
			r->values.model.activation = activations[i].ours;
			return 0;
		}
	return hf_refuse(r, key,
	                 gpt2 ? "gelu_new, gelu_pytorch_tanh, gelu, relu and relu2 are built"
	                      : "silu and gelu_pytorch_tanh are built");
}

struct scale_key {
	const char *hf, *ours;
};

static int read_scale_keys(struct config_reader *r, const struct json *from, const struct scale_key *rows,
                           size_t n, const char *missing)
{
	for (size_t i = 0; i < n; i++) {
		const struct json *v = json_get_type(from, rows[i].hf, JSON_NUMBER);
		if (!v)
			return hf_refuse(r, rows[i].hf, missing);
		if (hf_set_number(r, rows[i].ours, v->number))
			return r->e->code;
	}
	return 0;
}

static int read_llama3_scaling(struct config_reader *r, const struct json *from)
{
	static const struct scale_key rows[] = {{"factor", "rope_scaling_factor"},
	                                        {"low_freq_factor", "rope_scaling_low_freq_factor"},
	                                        {"high_freq_factor", "rope_scaling_high_freq_factor"}};
	static const char missing[] = "missing in the rope scaling of llama3";
	const struct json *length = json_get_type(from, "original_max_position_embeddings", JSON_NUMBER);
	if (read_scale_keys(r, from, rows, sizeof rows / sizeof *rows, missing))
		return r->e->code;
	if (!length || !length->is_integer)
		return hf_refuse(r, "original_max_position_embeddings", missing);
	return hf_set_integer(r, "rope_scaling_original_max_position_embeddings", length->integer) ||
	                       hf_set_text(r, "use_rope_scaling", "true")
	               ? r->e->code
	               : 0;
}

/* Either temperature counts only beside the other; a factor of attention may be given, but only the one that
 * follows from them. */
static int read_temperatures(struct config_reader *r, const struct json *from)
{
	const struct model_config *m = &r->values.model;
	double rotated = json_get_number(from, "mscale", 0), all = json_get_number(from, "mscale_all_dim", 0);
	if (all != 0 && rotated == 0)
		return hf_refuse(r, "mscale", "mscale_all_dim needs it in the rope scaling of yarn");
	if (hf_set_number(r, "mscale", all != 0 ? rotated : 1) || hf_set_number(r, "mscale_all_dim", all))
		return r->e->code;
	double follows = model_yarn_temperature(m, m->mscale) / model_yarn_temperature(m, m->mscale_all_dim);
	return fabs(json_get_number(from, "attention_factor", follows) - follows) <= 1e-6
	               ? 0
	               : hf_refuse(
	                         r, "attention_factor",
	                         "only the one that follows from factor, mscale and mscale_all_dim is built");
}

static int read_yarn(struct config_reader *r, const struct json *from)
{
	static const struct scale_key factor[] = {{"factor", "rotary_scaling_factor"}},
	                              turns[] = {{"beta_fast", "yarn_beta_fast"},
	                                         {"beta_slow", "yarn_beta_slow"}};
	int64_t longest = r->values.model.max_position_embeddings;
	if (read_scale_keys(r, from, factor, 1, "missing in the rope scaling of yarn"))
		return r->e->code;
	for (size_t i = 0; i < sizeof turns / sizeof *turns; i++)
		if (json_get_type(from, turns[i].hf, JSON_NUMBER) &&
		    read_scale_keys(r, from, &turns[i], 1, ""))
			return r->e->code;
	if (!json_get_bool(from, "truncate", true))
		return hf_refuse(r, "truncate", "only true is built");
	if (hf_set_integer(r, "yarn_original_max_position_embeddings",
	                   json_get_integer(from, "original_max_position_embeddings", longest)) ||
	    hf_set_text(r, "rope_type", "yarn"))
		return r->e->code;
	return read_temperatures(r, from);
}

/* rope_parameters since transformers 5; rope_theta and rope_scaling before. */
static int read_rope(struct config_reader *r)
{
	const struct json *p = json_get_type(r->from, "rope_parameters", JSON_OBJECT);
	const struct json *scaling = p ? p : json_get_type(r->from, "rope_scaling", JSON_OBJECT);
	double theta = json_get_number(p, "rope_theta", json_get_number(r->from, "rope_theta", 10000));
	double part = json_get_number(p, "partial_rotary_factor",
	                              json_get_number(r->from, "partial_rotary_factor", 1));
	const char *type = json_get_string(scaling, "rope_type", json_get_string(scaling, "type", "default"));
	if (hf_set_number(r, "rotary_base", theta))
		return r->e->code;
	if (part != 1)
		return hf_refuse(r, "partial_rotary_factor", "only 1 is built for this family");
	if (!strcmp(type, "default"))
		return 0;
	if (!strcmp(type, "llama3"))
		return read_llama3_scaling(r, scaling);
	if (!strcmp(type, "yarn"))
		return read_yarn(r, scaling);
	return hf_refuse(r, "rope_type", "\"default\", \"llama3\" and \"yarn\" are built");
}

static bool has_window(enum hf_family f)
{
	return !hf_is_one_of(f, GPT2 | DEEPSEEK | HF_BIT(HF_LLAMA));
}

static int read_window(struct config_reader *r)
{
	const struct json *v = json_get_type(r->from, "sliding_window", JSON_NUMBER);
	bool qwen = hf_is_one_of(r->family, HF_QWENS), none = !has_window(r->family);
	if (!v || none || (qwen && !json_get_bool(r->from, "use_sliding_window", false)))
		return 0;
	if (qwen && json_get_integer(r->from, "max_window_layers", 28) != 0)
		return hf_refuse(r, "max_window_layers",
		                 "a window in some layers alone is not built; 0 or no window works");
	return v->is_integer ? hf_set_integer(r, "window_size", v->integer)
	                     : hf_refuse(r, "sliding_window", "must be an integer");
}

static int read_gpt2(struct config_reader *r)
{
	struct model_config *m = &r->values.model;
	if (!json_get_bool(r->from, "scale_attn_weights", true))
		return hf_refuse(r, "scale_attn_weights", "only true is built");
	if (json_get_bool(r->from, "scale_attn_by_inverse_layer_idx", false))
		return hf_refuse(r, "scale_attn_by_inverse_layer_idx", "only false is built");
	if (json_get_bool(r->from, "add_cross_attention", false))
		return hf_refuse(r, "add_cross_attention", "only false is built");
	m->position_embedding_type = MODEL_POSITION_LEARNED_ABSOLUTE;
	m->normalization = MODEL_LAYERNORM;
	m->add_bias_linear = true;
	return 0;
}

static int read_llama(struct config_reader *r)
{
	struct model_config *m = &r->values.model;
	bool attention_bias = json_get_bool(r->from, "attention_bias", false);
	bool mlp_bias = json_get_bool(r->from, "mlp_bias", false);
	m->position_embedding_type = MODEL_POSITION_ROPE;
	m->normalization = MODEL_RMSNORM;
	m->add_qkv_bias = hf_is_one_of(r->family, HF_BIT(HF_QWEN2) | HF_BIT(HF_QWEN2_MOE));
	m->qk_layernorm = hf_is_one_of(r->family, HF_BIT(HF_QWEN3) | HF_BIT(HF_QWEN3_MOE));
	if (m->add_qkv_bias && !json_get_bool(r->from, "qkv_bias", true))
		return hf_refuse(r, "qkv_bias", "only true is built");
	if (attention_bias != mlp_bias || (attention_bias && r->family != HF_LLAMA))
		return hf_refuse(r, "attention_bias",
		                 "biases in attention and feed-forward block, both or none, are built");
	m->add_bias_linear = attention_bias;
	return read_rope(r) ? r->e->code : read_window(r);
}

static int read_family(struct config_reader *r)
{
	static const char known[] =
#define FAMILY_WORD(id, type, class) ", " type
	        HF_FAMILIES(FAMILY_WORD);
#undef FAMILY_WORD
	const char *type = json_get_string(r->from, "model_type", NULL);
	if (!type)
		return hf_refuse(r, "model_type", "missing");
	for (int f = 0; f < HF_FAMILY_COUNT; f++)
		if (!strcmp(type, hf_family_name((enum hf_family)f))) {
			r->family = (enum hf_family)f;
			return 0;
		}
	return err_set(r->e, EXIT_BAD_DATA, "%s: \"model_type\" is %.60s; %s can be converted", r->name, type,
	               known + 2);
}

static int read_all(struct config_reader *r)
{
	if (read_family(r) || read_keys(r) || hf_read_experts(r) || derive(r) || read_activation(r))
		return r->e->code;
	bool tied = json_get_bool(r->from, "tie_word_embeddings", r->family == HF_GPT2);
	r->values.model.untie_embeddings_and_output_weights = !tied;
	return r->family == HF_GPT2 ? read_gpt2(r) : read_llama(r);
}

int hf_config_read(const struct json *config, const char *name, struct arena *keep, struct model_config *out,
                   enum hf_family *family, struct err *e)
{
	struct config_reader r;
	begin(&r, name, keep, e);
	r.from = config;
	int rc = read_all(&r);
	const char *why = NULL;
	if (!rc && !hf_family_fits(r.family, &r.values.model, &why))
		rc = err_set(e, EXIT_BAD_DATA, "%s: %s needs %s", name, hf_family_name(r.family), why);
	if (!rc) {
		*out = r.values.model;
		*family = r.family;
	}
	arena_free(&r.arena);
	return rc;
}

static void put_value(const struct option_set *s, const struct option *o, bool quoted, struct buf *b)
{
	struct buf value = {0};
	const char *string = o->type == OPTION_STRING ? *(const char *const *)option_field(s, o) : NULL;
	option_put_value(s, o, &value);
	if (quoted && string)
		json_put_string(b, string, strlen(string));
	else if (quoted && o->type == OPTION_ENUM)
		json_put_string(b, value.data, value.length);
	else
		buf_add(b, value.data, value.length);
	buf_free(&value);
}

void hf_model_put_json(const struct model_config *c, struct buf *b)
{
	struct config_reader r;
	struct err e = {0};
	begin(&r, "", NULL, &e);
	r.values.model = *c;
	const char *comma = "{";
	for (size_t i = 0; i < N_OPTIONS; i++) {
		const struct option *o = &option_rows[i];
		if (option_is_null(&r.set, o))
			continue;
		buf_printf(b, "%s\"%s\": ", comma, o->key + sizeof "model");
		put_value(&r.set, o, true, b);
		comma = ", ";
	}
	buf_puts(b, "}");
	arena_free(&r.arena);
}

void hf_model_put_yaml(const struct model_config *c, struct buf *b)
{
	struct config_reader r, d;
	struct err e = {0};
	begin(&r, "", NULL, &e);
	begin(&d, "", NULL, &e);
	r.values.model = *c;
	for (size_t i = 0; i < N_OPTIONS; i++) {
		const struct option *o = &option_rows[i];
		struct buf value = {0}, usual = {0};
		put_value(&r.set, o, false, &value);
		put_value(&d.set, o, false, &usual);
		if (o->required || strcmp(value.data, usual.data))
			buf_printf(b, "  %s: %s\n", o->key + sizeof "model", value.data);
		buf_free(&value);
		buf_free(&usual);
	}
	arena_free(&r.arena);
	arena_free(&d.arena);
}

int hf_model_read_json(const struct json *model, const char *name, struct arena *keep,
                       struct model_config *out, struct err *e)
{
	struct config_reader r;
	begin(&r, name, keep, e);
	int rc = model && model->type == JSON_OBJECT
	                 ? 0
	                 : err_set(e, EXIT_BAD_DATA, "%s: its meta data do not say what model it is", name);
	for (const struct json *v = rc ? NULL : model->child; v && !rc; v = v->next) {
		struct buf text = {0};
		if (v->type == JSON_NULL ||
		    !option_find(&table, arena_printf(&r.arena, "model.%.80s", v->key)))
			continue; /* another version's key says nothing about the weights' names */
		if (v->type == JSON_STRING)
			yaml_put_string(&text, v->string);
		else if (v->type == JSON_BOOL)
			buf_puts(&text, v->boolean ? "true" : "false");
		else if (v->type == JSON_NUMBER && v->is_integer)
			buf_printf(&text, "%" PRId64, v->integer);
		else if (v->type == JSON_NUMBER)
			json_put_number(&text, v->number);
		rc = hf_set_text(&r, v->key, text.data ? text.data : "");
		buf_free(&text);
	}
	if (!rc && (r.values.model.num_layers < 1 || r.values.model.hidden_size < 1 ||
	            r.values.model.num_attention_heads < 1 || r.values.model.vocab_size < 1))
		rc = err_set(e, EXIT_BAD_DATA, "%s: its meta data lack sizes of the model", name);
	if (!rc && r.values.model.max_position_embeddings == OPTION_NULL_INT)
		r.values.model.max_position_embeddings = r.values.model.seq_length;
	r.from = model;
	if (!rc) {
		int64_t seq_length = r.values.model.seq_length;
		rc = derive(&r);
		r.values.model.seq_length = seq_length;
	}
	if (!rc)
		*out = r.values.model;
	arena_free(&r.arena);
	return rc;
}

void hf_put(struct config_writer *w, const char *key, char *text)
{
	w->members = mem_grow(w->members, w->n, &w->cap, sizeof *w->members);
	w->members[w->n++] = (struct hf_member){key, text};
}

void hf_put_word(struct config_writer *w, const char *key, const char *word)
{
	hf_put(w, key, arena_printf(&w->arena, "\"%s\"", word));
}

void hf_put_bool(struct config_writer *w, const char *key, bool x)
{
	hf_put(w, key, arena_strdup(&w->arena, x ? "true" : "false"));
}

void hf_put_integer(struct config_writer *w, const char *key, int64_t x)
{
	hf_put(w, key, arena_printf(&w->arena, "%" PRId64, x));
}

char *hf_float_text(struct arena *a, double x)
{
	struct buf b = {0};
	json_put_number(&b, x);
	if (!strpbrk(b.data, ".en"))
		buf_puts(&b, ".0");
	char *text = arena_strdup(a, b.data);
	buf_free(&b);
	return text;
}

static void put_keys(struct config_writer *w, const struct model_config *c, enum hf_family f)
{
	struct hf_values v = {*c};
	for (size_t i = 0; i < N_KEYS; i++) {
		const struct key *k = &keys[i];
		if (!hf_is_one_of(f, k->families))
			continue;
		const struct option *o = option_find(&table, arena_printf(&w->arena, "model.%s", k->ours));
		const void *field = (const char *)&v + o->offset_bytes;
		if (!k->integer)
			hf_put(w, k->hf, hf_float_text(&w->arena, *(const double *)field));
		else if (*(const int64_t *)field == OPTION_NULL_INT)
			hf_put(w, k->hf, arena_strdup(&w->arena, "null"));
		else
			hf_put_integer(w, k->hf, *(const int64_t *)field);
	}
}

/* Members of the scaling, without its braces; NULL: there is none. */
static char *rope_scaling(struct arena *a, const struct model_config *c)
{
	if (c->use_rope_scaling)
		return arena_printf(a,
		                    "\"factor\": %s, \"high_freq_factor\": %s, \"low_freq_factor\": %s, "
		                    "\"original_max_position_embeddings\": %" PRId64
		                    ", \"rope_type\": \"llama3\"",
		                    hf_float_text(a, c->rope_scaling_factor),
		                    hf_float_text(a, c->rope_scaling_high_freq_factor),
		                    hf_float_text(a, c->rope_scaling_low_freq_factor),
		                    c->rope_scaling_original_max_position_embeddings);
	if (c->rope_type == MODEL_ROPE_YARN)
		return arena_printf(a,
		                    "\"beta_fast\": %s, \"beta_slow\": %s, \"factor\": %s, \"mscale\": %s, "
		                    "\"mscale_all_dim\": %s, \"original_max_position_embeddings\": %" PRId64
		                    ", \"rope_type\": \"yarn\"",
		                    hf_float_text(a, c->yarn_beta_fast), hf_float_text(a, c->yarn_beta_slow),
		                    hf_float_text(a, c->rotary_scaling_factor), hf_float_text(a, c->mscale),
		                    hf_float_text(a, c->mscale_all_dim),
		                    c->yarn_original_max_position_embeddings);
	return NULL;
}

static void put_rope(struct config_writer *w, const struct model_config *c)
{
	struct arena *a = &w->arena;
	char *theta = hf_float_text(a, c->rotary_base), *scaling = rope_scaling(a, c);
	hf_put(w, "rope_theta", theta);
	hf_put(w, "rope_parameters",
	       arena_printf(a, "{\"rope_theta\": %s, %s}", theta,
	                    scaling ? scaling : "\"rope_type\": \"default\""));
	hf_put(w, "rope_scaling", scaling ? arena_printf(a, "{%s}", scaling) : arena_strdup(a, "null"));
}

static void put_llama(struct config_writer *w, const struct model_config *c, enum hf_family f)
{
	static const unsigned biased = HF_BIT(HF_LLAMA) | HF_BIT(HF_QWEN3) | HF_BIT(HF_QWEN3_MOE) | DEEPSEEK;
	bool window = c->window_size != OPTION_NULL_INT;
	put_rope(w, c);
	if (hf_is_one_of(f, biased))
		hf_put_bool(w, "attention_bias", c->add_bias_linear);
	if (f == HF_LLAMA)
		hf_put_bool(w, "mlp_bias", c->add_bias_linear);
	if (has_window(f))
		hf_put(w, "sliding_window",
		       window ? arena_printf(&w->arena, "%" PRId64, c->window_size)
		              : arena_strdup(&w->arena, "null"));
	if (hf_is_one_of(f, HF_QWENS)) {
		hf_put_bool(w, "use_sliding_window", window);
		hf_put_integer(w, "max_window_layers", window ? 0 : c->num_layers);
	}
}

static void put_activation(struct config_writer *w, const struct model_config *c, enum hf_family f)
{
	for (size_t i = 0; i < N_ACTIVATIONS; i++)
		if (hf_is_one_of(f, activations[i].families) && activations[i].ours == c->activation) {
			hf_put_word(w, f == HF_GPT2 ? "activation_function" : "hidden_act",
			            activations[i].hf);
			return;
		}
}

static void put_extra(struct config_writer *w, const struct json *extra)
{
	static const char *const ids[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
	for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
		const struct json *v = json_get_type(extra, ids[i], JSON_NUMBER);
		if (v && v->is_integer)
			hf_put_integer(w, ids[i], v->integer);
	}
}

static int compare_members(const void *a, const void *b)
{
	return strcmp(((const struct hf_member *)a)->key, ((const struct hf_member *)b)->key);
}

void hf_config_put(const struct model_config *c, enum hf_family f, enum dtype dtype, const struct json *extra,
                   struct buf *b)
{
	struct config_writer w = {0};
	const char *word = dtype == DT_bf16 ? "bfloat16" : dtype == DT_f16 ? "float16" : "float32";
	hf_put(&w, "architectures", arena_printf(&w.arena, "[\"%s\"]", hf_family_class(f)));
	hf_put_word(&w, "model_type", hf_family_name(f));
	hf_put_word(&w, "dtype", word);
	hf_put_word(&w, "torch_dtype", word);
	hf_put_bool(&w, "tie_word_embeddings", !c->untie_embeddings_and_output_weights);
	hf_put_bool(&w, "use_cache", true);
	put_keys(&w, c, f);
	put_activation(&w, c, f);
	put_extra(&w, extra);
	if (f == HF_GPT2)
		hf_put(&w, "embd_pdrop", hf_float_text(&w.arena, c->hidden_dropout));
	else
		put_llama(&w, c, f);
	hf_put_experts(&w, c, f);
	qsort(w.members, w.n, sizeof *w.members, compare_members);
	for (size_t i = 0; i < w.n; i++)
		buf_printf(b, "%s  \"%s\": %s", i ? ",\n" : "{\n", w.members[i].key, w.members[i].text);
	buf_puts(b, "\n}\n");
	free(w.members);
	arena_free(&w.arena);
}

static const char *needs_gpt2(const struct model_config *c)
{
	if (c->position_embedding_type != MODEL_POSITION_LEARNED_ABSOLUTE)
		return "position_embedding_type learned_absolute";
	if (c->normalization != MODEL_LAYERNORM || !c->add_bias_linear)
		return "normalization LayerNorm and add_bias_linear true";
	if (model_is_gated(c))
		return "an activation without gate";
	if (c->num_query_groups != c->num_attention_heads ||
	    c->kv_channels * c->num_attention_heads != c->hidden_size)
		return "as many key as query heads, and kv_channels · num_attention_heads = hidden_size";
	if (c->qk_layernorm || c->window_size != OPTION_NULL_INT)
		return "neither qk_layernorm nor window_size";
	return NULL;
}

/* transformers takes mscale for 1 where mscale_all_dim is not there. */
static const char *needs_of_rope(const struct model_config *c, enum hf_family f)
{
	if (c->position_embedding_type != MODEL_POSITION_ROPE || c->rotary_percent != 1)
		return "position_embedding_type rope, rotary_percent 1";
	if (c->rotary_interleaved && f != HF_DEEPSEEK_V3)
		return "rotary_interleaved false";
	if (c->rope_type == MODEL_ROPE_YARN && (c->mscale_all_dim == 0 ? c->mscale != 1 : c->mscale == 0))
		return "mscale 1 where mscale_all_dim is 0, neither 0 else";
	return NULL;
}

static const char *needs_llama(const struct model_config *c, enum hf_family f)
{
	bool qkv = hf_is_one_of(f, HF_BIT(HF_QWEN2) | HF_BIT(HF_QWEN2_MOE));
	bool norms = hf_is_one_of(f, HF_BIT(HF_QWEN3) | HF_BIT(HF_QWEN3_MOE));
	const char *rope = needs_of_rope(c, f);
	if (rope)
		return rope;
	if (c->normalization != MODEL_RMSNORM)
		return "normalization RMSNorm";
	if (!model_is_gated(c))
		return "activation swiglu or geglu";
	if (c->add_bias_linear && f != HF_LLAMA)
		return "add_bias_linear false";
	if ((c->add_qkv_bias && !c->add_bias_linear) != qkv)
		return qkv ? "add_qkv_bias true" : "add_qkv_bias false";
	if (c->qk_layernorm != norms)
		return norms ? "qk_layernorm true" : "qk_layernorm false";
	if (c->window_size != OPTION_NULL_INT && !has_window(f))
		return "no window_size";
	return NULL;
}

bool hf_family_fits(enum hf_family f, const struct model_config *c, const char **why_not)
{
	const char *why = hf_experts_need(c, f);
	if (!why)
		why = f == HF_GPT2 ? needs_gpt2(c) : needs_llama(c, f);
	if (why)
		*why_not = why;
	return !why;
}
