#include "train/generate.h"
#include "base/json.h"
#include "base/rng.h"
#include "base/yaml.h"
#include "ckpt/ckpt.h"
#include "model/hf.h"
#include "train/state.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 64 }; /* tokens of a prompt at a time */

struct generator {
	const struct config *config;
	struct program chunk, single; /* the same parameters and caches in the same order */
	struct exec *chunk_exec, *single_exec;
	int64_t length; /* tokens so far */
	float *logits;  /* [V] */
	char *raw;      /* [CHUNK, V] as the device has them */
};

/* "model.num_layers=4" for every member of the checkpoint's model. */
static size_t list_settings(const struct json *model, struct arena *a, const char **out)
{
	size_t n = 0;
	JSON_EACH (m, model) {
		struct buf b = {0};
		if (m->type == JSON_NULL)
			continue;
		if (m->type == JSON_STRING)
			yaml_put_string(&b, m->string);
		else if (m->type == JSON_BOOL)
			buf_puts(&b, m->boolean ? "true" : "false");
		else if (m->is_integer)
			buf_printf(&b, "%lld", (long long)m->integer);
		else
			json_put_number(&b, m->number);
		out[n++] = arena_printf(a, "model.%s=%s", m->key, b.data);
		buf_free(&b);
	}
	return n;
}

static int config_of_model(const struct json *model, enum dtype dtype, struct config *c, struct err *e)
{
	struct arena a = {0};
	const char **sets = mem_array(model->count + 2, sizeof *sets);
	size_t n = list_settings(model, &a, sets);
	sets[n++] = "train.train_iters=1";
	sets[n++] = dtype == DT_bf16  ? "mixed_precision=bf16"
	            : dtype == DT_f16 ? "mixed_precision=fp16"
	                              : "mixed_precision=fp32";
	struct config_source source = {.sets = sets, .n_sets = n};
	int rc = config_load(c, &source, e);
	if (!rc)
		rc = config_check(c, 1, e);
	free(sets);
	arena_free(&a);
	return rc;
}

static int config_of_folder(const struct hf *hf, struct config *c, struct err *e)
{
	struct arena a = {0};
	struct buf text = {0};
	struct json *model;
	hf_model_put_json(hf_model(hf), &text);
	int rc = json_parse(&a, "config.json", text.data, text.length, &model, e);
	if (!rc)
		rc = config_of_model(model, hf_count(hf) ? hf_dtype(hf, 0) : DT_f32, c, e);
	buf_free(&text);
	arena_free(&a);
	return rc;
}

int generate_read_config(const struct weights *w, struct config *c, struct err *e)
{
	memset(c, 0, sizeof *c);
	if (w->hf)
		return config_of_folder(w->hf, c, e);
	const struct json *model = json_get_type(ckpt_meta(w->ckpt), "model", JSON_OBJECT);
	const struct ckpt_entry *table = ckpt_find(w->ckpt, "model", "embedding.word_embeddings.weight");
	if (!model || !table)
		return err_set(e, EXIT_BAD_DATA, "%s: says nothing of the model it holds",
		               ckpt_path(w->ckpt));
	return config_of_model(model, table->dtype, c, e);
}

static int open_program(struct generator *g, struct program *t, int32_t rows, struct exec **x,
                        const struct backend *backend, struct stream *stream, struct err *e)
{
	struct exec_options options = {
	        .share = g->chunk_exec,
	        .share_regions = g->chunk_exec ? 1u << R_PARAM | 1u << R_CONST | 1u << R_STATE : 0};
	int rc = program_build(t, g->config, MODEL_GENERATE, rows, 0, e);
	return rc ? rc : exec_create(x, &t->prog, backend, stream, &options, e);
}

int generator_new(const struct config *c, const struct weights *w, const struct backend *backend,
                  struct stream *stream, struct generator **out, struct err *e)
{
	struct generator *g = mem_array(1, sizeof *g);
	g->config = c;
	int rc = open_program(g, &g->chunk, CHUNK, &g->chunk_exec, backend, stream, e);
	if (!rc)
		rc = open_program(g, &g->single, 1, &g->single_exec, backend, stream, e);
	if (!rc)
		rc = state_load_weights(&g->chunk, g->chunk_exec, w, e);
	if (rc) {
		generator_free(g);
		return rc;
	}
	model_fill_constants(&g->chunk.model, g->chunk_exec);
	g->logits = mem_array((size_t)c->derived.padded_vocab_size, sizeof *g->logits);
	g->raw = mem_array((size_t)value_bytes(&g->chunk.prog.value[g->chunk.model.logits]), 1);
	*out = g;
	return 0;
}

void generator_free(struct generator *g)
{
	if (!g)
		return;
	exec_free(g->single_exec);
	exec_free(g->chunk_exec);
	program_free(&g->single);
	program_free(&g->chunk);
	free(g->logits);
	free(g->raw);
	free(g);
}

void generator_reset(struct generator *g)
{
	g->length = 0;
}

int64_t generator_room(const struct generator *g)
{
	return g->config->model.max_position_embeddings - g->length;
}

/* Rows behind n are padding: what they leave in the caches is overwritten before anything attends to it. */
static int feed_rows(struct generator *g, struct program *t, struct exec *x, const int32_t *ids, int32_t n,
                     struct err *e)
{
	int32_t tokens[CHUNK] = {0}, positions[CHUNK], rows = t->model.spec.rows;
	for (int32_t i = 0; i < rows; i++) {
		tokens[i] = i < n ? ids[i] : 0;
		positions[i] = (int32_t)g->length + i;
	}
	exec_upload(x, t->model.tokens, tokens);
	exec_upload(x, t->model.positions, positions);
	int rc = exec_run(x, &(struct exec_part){.segments = SEG_BIT(FWD), .first = true}, e);
	if (rc)
		return rc;
	const struct value *v = &t->prog.value[t->model.logits];
	exec_download(x, t->model.logits, g->raw);
	if ((rc = exec_status(x, e)))
		return rc;
	int64_t from = (int64_t)(n - 1) * v->dim[1];
	for (int32_t k = 0; k < v->dim[1]; k++)
		g->logits[k] = v->dtype == DT_f32 ? ((float *)g->raw)[from + k]
		                                  : half_to_f32(v->dtype, ((uint16_t *)g->raw)[from + k]);
	g->length += n;
	return 0;
}

int generator_feed(struct generator *g, const int32_t *ids, size_t n, const float **logits, struct err *e)
{
	if ((int64_t)n > generator_room(g))
		return err_set(e, EXIT_USAGE,
		               "%zu tokens do not fit: the model takes %lld positions, %lld are used", n,
		               (long long)g->config->model.max_position_embeddings, (long long)g->length);
	while (n) {
		bool chunk = n > 1 && generator_room(g) >= CHUNK;
		int32_t now = chunk ? (n < CHUNK ? (int32_t)n : CHUNK) : 1;
		int rc = chunk ? feed_rows(g, &g->chunk, g->chunk_exec, ids, now, e)
		               : feed_rows(g, &g->single, g->single_exec, ids, now, e);
		if (rc)
			return rc;
		ids += now;
		n -= (size_t)now;
	}
	*logits = g->logits;
	return 0;
}

struct candidate {
	int32_t id;
	float logit;
};

static int by_logit(const void *a, const void *b)
{
	const struct candidate *x = a, *y = b;
	if (x->logit != y->logit)
		return x->logit < y->logit ? 1 : -1;
	return (x->id > y->id) - (x->id < y->id);
}

int32_t sample_token(const struct sampling *s, const float *logits, int32_t vocab_size, uint64_t index)
{
	struct candidate *c = mem_array((size_t)vocab_size, sizeof *c);
	double *p = mem_array((size_t)vocab_size, sizeof *p), sum = 0, kept = 0;
	for (int32_t i = 0; i < vocab_size; i++)
		c[i] = (struct candidate){i, logits[i]};
	qsort(c, (size_t)vocab_size, sizeof *c, by_logit);
	int32_t n = s->top_k > 0 && s->top_k < vocab_size ? (int32_t)s->top_k : vocab_size, chosen = 0;
	if (s->temperature <= 0)
		n = 1;
	for (int32_t i = 0; i < n; i++)
		sum += p[i] =
		        s->temperature > 0 ? exp(((double)c[i].logit - c[0].logit) / s->temperature) : 1;
	int32_t cut = 0;
	while (cut < n && (cut == 0 || kept < s->top_p * sum))
		kept += p[cut++];
	double draw = rng_uniform(rng_key(s->seed, "sampling"), index) * kept;
	while (chosen + 1 < cut && (draw -= p[chosen]) >= 0)
		chosen++;
	int32_t id = c[chosen].id;
	free(c);
	free(p);
	return id;
}
