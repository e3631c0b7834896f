#include "parallel/stages.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

enum { MAX_DEPTH = 16 };

static int virtual_stages(const struct stages_spec *s)
{
	return s->pipeline * s->chunks;
}

/* "24 or 32": the values x for which x + extra is a positive multiple of step, next to total - extra. */
static const char *nearest(char out[64], int64_t step, int64_t total, int64_t extra)
{
	int64_t times = total > 0 ? total / step : 0, low = times * step - extra, high = low + step;
	if (times && low >= 1)
		snprintf(out, 64, "%" PRId64 " or %" PRId64, low, high);
	else
		snprintf(out, 64, "%" PRId64, high);
	return out;
}

/* stage[] from the layers of one chunk of the first, the last and every other pipeline rank. */
static int fill(const struct stages_spec *s, int64_t first, int64_t middle, int64_t last, struct stage *stage)
{
	int64_t layer = 0;
	for (int v = 0, n = virtual_stages(s); v < n; v++) {
		int p = v % s->pipeline;
		int64_t layers = p == 0 ? first : p == s->pipeline - 1 ? last : middle;
		layers -= v == 0 && s->account_for_embedding;
		layers -= v == n - 1 && s->account_for_loss;
		stage[v] = (struct stage){(int32_t)layer, (int32_t)layers, v == 0, v == n - 1};
		layer += layers;
	}
	ASSERT(layer == s->num_layers);
	return 0;
}

static int split_evenly(const struct stages_spec *s, struct stage *stage, struct err *e)
{
	int64_t extra = s->account_for_embedding + s->account_for_loss;
	int64_t total = s->num_layers + extra, n = virtual_stages(s);
	char near[64];
	if (total % n == 0)
		return fill(s, total / n, total / n, total / n, stage);
	return err_set(
	        e, EXIT_CONFIG,
	        "(num_layers %" PRId64 "%s%s) / (pipeline %d · chunks %d) = %" PRId64 " / %" PRId64
	        " = %.6g, and the layers of a virtual stage must be a whole number; nearest num_layers: "
	        "%s, or give pipeline_model_parallel_layout",
	        s->num_layers, s->account_for_embedding ? " + embedding 1" : "",
	        s->account_for_loss ? " + loss 1" : "", s->pipeline, s->chunks, total, n,
	        (double)total / (double)n, nearest(near, n, total, extra));
}

static int check_divides(const struct stages_spec *s, const char *key, int64_t layers, struct err *e)
{
	char near[64];
	if (layers % s->chunks == 0)
		return 0;
	return err_set(e, EXIT_CONFIG,
	               "%s %" PRId64 " / chunks %d = %.6g, and the layers of a virtual stage must be a whole "
	               "number; nearest: %s",
	               key, layers, s->chunks, (double)layers / s->chunks,
	               nearest(near, s->chunks, layers, 0));
}

/* What the ends leave, evenly on the ranks between them. */
static int split_rest(const struct stages_spec *s, struct stage *stage, struct err *e)
{
	int64_t ends = s->first_stage_layers + s->last_stage_layers, rest = s->num_layers - ends;
	int n_ends = (s->first_stage_layers > 0) + (s->last_stage_layers > 0);
	int64_t n = (int64_t)(s->pipeline - n_ends) * s->chunks;
	char near[64];
	if (n == 0 && rest == 0)
		return fill(s, s->first_stage_layers / s->chunks, 0, s->last_stage_layers / s->chunks, stage);
	if (n == 0)
		return err_set(e, EXIT_CONFIG,
		               "first %" PRId64 " + last %" PRId64 " = %" PRId64
		               " layers, but num_layers is %" PRId64 " and pipeline 2 has no other stage; "
		               "nearest num_layers: %" PRId64,
		               s->first_stage_layers, s->last_stage_layers, ends, s->num_layers, ends);
	if (rest <= 0 || rest % n)
		return err_set(e, EXIT_CONFIG,
		               "(num_layers %" PRId64 " - first %" PRId64 " - last %" PRId64
		               ") / ((pipeline %d - %d) · chunks %d) = %" PRId64 " / %" PRId64
		               " = %.6g, and the layers of a virtual stage must be a positive whole number; "
		               "nearest num_layers: %s",
		               s->num_layers, s->first_stage_layers, s->last_stage_layers, s->pipeline,
		               n_ends, s->chunks, rest, n, (double)rest / (double)n,
		               nearest(near, n, rest, -ends));
	int64_t middle = rest / n;
	return fill(s, s->first_stage_layers ? s->first_stage_layers / s->chunks : middle, middle,
	            s->last_stage_layers ? s->last_stage_layers / s->chunks : middle, stage);
}

static int split_around_ends(const struct stages_spec *s, struct stage *stage, struct err *e)
{
	if (s->pipeline < 2)
		return err_set(e, EXIT_CONFIG,
		               "num_layers_in_first_pipeline_stage %" PRId64
		               ", num_layers_in_last_pipeline_stage %" PRId64
		               ": they need pipeline_model_parallel_size 2 or more, which is %d",
		               s->first_stage_layers, s->last_stage_layers, s->pipeline);
	int code = check_divides(s, "num_layers_in_first_pipeline_stage", s->first_stage_layers, e);
	if (!code)
		code = check_divides(s, "num_layers_in_last_pipeline_stage", s->last_stage_layers, e);
	return code ? code : split_rest(s, stage, e);
}

/* The layout string: first tokens with their repeat counts, then a walk over them that fills the stages. The
 * walk stops at the first layer or bar too many, so its length is bounded by the stages and layers asked for,
 * whatever the counts say. */

struct token {
	char what; /* one of E t L | ( ) */
	int at;    /* its byte */
	int32_t times;
	int partner; /* of "(": the token that closes it */
};

struct layout {
	const struct stages_spec *spec;
	struct stage *stage;
	struct err *e;
	struct token *token;
	int n_tokens, now; /* now: the virtual stage being filled */
	int64_t layers;
	bool ended; /* L was seen */
	int open[MAX_DEPTH], depth;
};

#define LAYOUT "pipeline_model_parallel_layout: byte %d: "
#define LETTERS "E (embedding), t (layer), L (loss), |, (…)*N, and *N behind each of them"

static int bad_letter(struct layout *l, int at)
{
	unsigned char c = (unsigned char)l->spec->layout[at];
	if (c == 'm')
		return err_set(l->e, EXIT_CONFIG,
		               LAYOUT "m, multi-token prediction, is not supported; allowed: " LETTERS, at);
	if (c > ' ' && c < 0x7f)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "'%c' means nothing; allowed: " LETTERS, at, c);
	return err_set(l->e, EXIT_CONFIG, LAYOUT "0x%02x means nothing; allowed: " LETTERS, at, c);
}

/* "*N" at byte `at` belongs to the token before it; *next is the byte behind it. */
static int read_times(struct layout *l, int at, int *next)
{
	const char *text = l->spec->layout;
	int i = at + 1;
	int64_t times = 0;
	if (!l->n_tokens || l->token[l->n_tokens - 1].what == '(' || l->token[l->n_tokens - 1].times)
		return err_set(l->e, EXIT_CONFIG,
		               LAYOUT "nothing stands before '*' that can be repeated; allowed before it: "
		                      "E, t, L, |, (…)",
		               at);
	for (; text[i] >= '0' && text[i] <= '9'; i++)
		if (times <= STAGES_MAX_LAYERS)
			times = 10 * times + (text[i] - '0');
	if (times < 1 || times > STAGES_MAX_LAYERS)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "allowed behind '*': a whole number, 1 to %d",
		               at + 1, STAGES_MAX_LAYERS);
	l->token[l->n_tokens - 1].times = (int32_t)times;
	*next = i;
	return 0;
}

/* A group is closed: it has something in it. */
static int close_group(struct layout *l, int at)
{
	if (!l->depth)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "')' without '(' before it", at);
	int open = l->open[--l->depth];
	if (open == l->n_tokens - 1)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "the group is empty; allowed in it: " LETTERS, at);
	l->token[open].partner = l->n_tokens;
	return 0;
}

static int open_group(struct layout *l, int at)
{
	if (l->depth == MAX_DEPTH)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "groups nest deeper than the %d allowed", at,
		               MAX_DEPTH);
	l->open[l->depth++] = l->n_tokens;
	return 0;
}

static int add_token(struct layout *l, int at)
{
	char c = l->spec->layout[at];
	int code = c == '(' ? open_group(l, at) : c == ')' ? close_group(l, at) : 0;
	if (!code)
		l->token[l->n_tokens++] = (struct token){.what = c, .at = at};
	return code;
}

static int tokenize(struct layout *l)
{
	const char *text = l->spec->layout;
	int code = 0, at = 0;
	while (text[at] && !code)
		if (text[at] == '*') {
			code = read_times(l, at, &at);
		} else {
			if (strchr("EtL|()", text[at]))
				code = add_token(l, at);
			else if (text[at] != ',')
				code = bad_letter(l, at);
			at++;
		}
	if (!code && l->depth)
		code = err_set(l->e, EXIT_CONFIG, LAYOUT "'(' is never closed; allowed: (…)*N",
		               l->token[l->open[l->depth - 1]].at);
	for (int i = 0; i < l->n_tokens && !code; i++)
		if (!l->token[i].times && l->token[i].what == ')')
			code = err_set(l->e, EXIT_CONFIG, LAYOUT "*N must follow the ')' of a group",
			               l->token[i].at);
	for (int i = 0; i < l->n_tokens; i++)
		l->token[i].times += !l->token[i].times; /* once where nothing is said */
	return code;
}

static bool is_empty(const struct stage *s)
{
	return !s->n_layers && !s->has_embedding && !s->has_loss;
}

static int say_empty(struct layout *l, int at)
{
	return err_set(l->e, EXIT_CONFIG,
	               LAYOUT "virtual stage %d (pipeline rank %d, chunk %d) ends empty; "
	                      "allowed: at least one of E, t, L",
	               at, l->now, l->now % l->spec->pipeline, l->now / l->spec->pipeline);
}

static int put_embedding(struct layout *l, const struct token *t)
{
	if (l->stage[0].has_embedding || t->times > 1)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "a second E; allowed: one, at the beginning", t->at);
	l->stage[0].has_embedding = true;
	return 0;
}

static int put_layers(struct layout *l, const struct token *t)
{
	if (t->times > l->spec->num_layers - l->layers)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "more layers (t) than num_layers %" PRId64, t->at,
		               l->spec->num_layers);
	l->stage[l->now].n_layers += t->times;
	l->layers += t->times;
	return 0;
}

static int put_loss(struct layout *l, const struct token *t)
{
	if (t->times > 1)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "a second L; allowed: one, at the end", t->at);
	l->stage[l->now].has_loss = l->ended = true;
	return 0;
}

static int put_bars(struct layout *l, const struct token *t)
{
	for (int32_t i = 0; i < t->times; i++) {
		if (is_empty(&l->stage[l->now]))
			return say_empty(l, t->at);
		if (l->now + 1 == virtual_stages(l->spec))
			return err_set(l->e, EXIT_CONFIG,
			               LAYOUT "'|' begins virtual stage %d, but pipeline %d · chunks %d = %d",
			               t->at, l->now + 1, l->spec->pipeline, l->spec->chunks,
			               virtual_stages(l->spec));
		l->stage[++l->now] = (struct stage){.first_layer = (int32_t)l->layers};
	}
	return 0;
}

static int put(struct layout *l, const struct token *t)
{
	if (l->ended)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "'%c' behind L; allowed: nothing, L is the last",
		               t->at, t->what);
	if (!l->stage[0].has_embedding && t->what != 'E')
		return err_set(l->e, EXIT_CONFIG, LAYOUT "'%c' before E; allowed: E is the first", t->at,
		               t->what);
	static int (*const puts[])(struct layout * l, const struct token *t) = {
	        ['E'] = put_embedding, ['t'] = put_layers, ['L'] = put_loss, ['|'] = put_bars};
	return puts[(unsigned char)t->what](l, t);
}

/* The tokens from … to - 1; recursion ends at MAX_DEPTH. */
static int walk(struct layout *l, int from, int to)
{
	int code = 0;
	for (int i = from; i < to && !code; i++) {
		const struct token *t = &l->token[i];
		if (t->what != '(') {
			code = put(l, t);
			continue;
		}
		for (int32_t k = 0; k < l->token[t->partner].times && !code; k++)
			code = walk(l, i + 1, t->partner);
		i = t->partner;
	}
	return code;
}

/* The string is over: all is there. */
static int check_end(struct layout *l, int at)
{
	const struct stages_spec *s = l->spec;
	if (is_empty(&l->stage[l->now]))
		return say_empty(l, at);
	if (l->layers != s->num_layers)
		return err_set(l->e, EXIT_CONFIG,
		               LAYOUT "the end, with %" PRId64 " layers (t), but num_layers is %" PRId64, at,
		               l->layers, s->num_layers);
	if (!l->ended)
		return err_set(l->e, EXIT_CONFIG, LAYOUT "the end, without L; allowed: L is the last", at);
	if (l->now + 1 != virtual_stages(s))
		return err_set(l->e, EXIT_CONFIG,
		               LAYOUT "the end, with %d virtual stages, but pipeline %d · chunks %d = %d", at,
		               l->now + 1, s->pipeline, s->chunks, virtual_stages(s));
	return 0;
}

static int split_by_layout(const struct stages_spec *s, struct stage *stage, struct err *e)
{
	size_t length = strlen(s->layout);
	if (length > STAGES_MAX_LAYOUT_BYTES)
		return err_set(e, EXIT_CONFIG,
		               "pipeline_model_parallel_layout: %zu bytes long; allowed: at most %d", length,
		               STAGES_MAX_LAYOUT_BYTES);
	struct layout l = {
	        .spec = s, .stage = stage, .e = e, .token = mem_array(length, sizeof(struct token))};
	stage[0] = (struct stage){0};
	int code = tokenize(&l);
	if (!code)
		code = walk(&l, 0, l.n_tokens);
	if (!code)
		code = check_end(&l, (int)length);
	free(l.token);
	return code;
}

static int check_range(const char *key, int64_t value, int64_t low, int64_t high, struct err *e)
{
	if (value >= low && value <= high)
		return 0;
	return err_set(e, EXIT_CONFIG, "%s is %" PRId64 "; allowed: %" PRId64 " to %" PRId64, key, value, low,
	               high);
}

static int check_sizes(const struct stages_spec *s, struct err *e)
{
	const struct {
		const char *key;
		int64_t value, low, high;
	} given[] = {
	        {"num_layers", s->num_layers, 1, STAGES_MAX_LAYERS},
	        {"pipeline_model_parallel_size", s->pipeline, 1, STAGES_MAX},
	        {"virtual_pipeline_model_parallel_size", s->chunks, 1, STAGES_MAX},
	        {"pipeline_model_parallel_size · virtual_pipeline_model_parallel_size",
	         (int64_t)s->pipeline * s->chunks, 1, STAGES_MAX},
	        {"num_layers_in_first_pipeline_stage", s->first_stage_layers, 0, STAGES_MAX_LAYERS},
	        {"num_layers_in_last_pipeline_stage", s->last_stage_layers, 0, STAGES_MAX_LAYERS},
	};
	int code = 0;
	for (size_t i = 0; i < sizeof given / sizeof *given && !code; i++)
		code = check_range(given[i].key, given[i].value, given[i].low, given[i].high, e);
	return code;
}

int stages_split(const struct stages_spec *s, struct stage *stage, struct err *e)
{
	bool accounts = s->account_for_embedding || s->account_for_loss;
	bool ends = s->first_stage_layers || s->last_stage_layers;
	int code = check_sizes(s, e);
	if (code)
		return code;
	if (s->layout && (accounts || ends))
		return err_set(e, EXIT_CONFIG,
		               "pipeline_model_parallel_layout says where every layer is; allowed beside it: "
		               "none of account_for_embedding_in_pipeline_split, "
		               "account_for_loss_in_pipeline_split, num_layers_in_first_pipeline_stage, "
		               "num_layers_in_last_pipeline_stage");
	if (accounts && ends)
		return err_set(
		        e, EXIT_CONFIG,
		        "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage fix the "
		        "ends; allowed beside them: neither account_for_embedding_in_pipeline_split nor "
		        "account_for_loss_in_pipeline_split");
	return s->layout ? split_by_layout(s, stage, e)
	       : ends    ? split_around_ends(s, stage, e)
	                 : split_evenly(s, stage, e);
}
