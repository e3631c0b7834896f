#include "model/config.h"
#include "base/err.h"
#include "base/mem.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

OPTION_ENUM_DEFINE(model_architecture, MODEL_ARCHITECTURES)
OPTION_ENUM_DEFINE(model_position, MODEL_POSITIONS)
OPTION_ENUM_DEFINE(model_normalization, MODEL_NORMALIZATIONS)
OPTION_ENUM_DEFINE(model_activation, MODEL_ACTIVATIONS)
OPTION_ENUM_DEFINE(model_rope, MODEL_ROPES)
OPTION_ENUM_DEFINE(model_score, MODEL_SCORES)
OPTION_ENUM_DEFINE(model_balancing, MODEL_BALANCINGS)
OPTION_ENUM_DEFINE(model_drop, MODEL_DROPS)
OPTION_ENUM_DEFINE(model_dispatcher, MODEL_DISPATCHERS)

bool model_is_gated(const struct model_config *c)
{
	return c->activation == MODEL_SWIGLU || c->activation == MODEL_GEGLU;
}

double model_yarn_temperature(const struct model_config *c, double mscale)
{
	return c->rotary_scaling_factor > 1 ? 0.1 * mscale * log(c->rotary_scaling_factor) + 1 : 1;
}

/* moe_layer_freq. Nothing is repeated zero times and no part may be longer than the whole, so that the work
 * is bounded by the layers, whatever the numbers say. */

enum { MAX_DEPTH = 16 };

struct pattern {
	const char *text, *at;
	int64_t layers;
	bool *moe; /* [layers] */
	int64_t n; /* filled */
	int depth;
	struct err *e;
};

static int expected(struct pattern *p, const char *what)
{
	return err_set(p->e, EXIT_CONFIG, "byte %td: %s", p->at - p->text, what);
}

static int too_long(struct pattern *p)
{
	return err_set(p->e, EXIT_CONFIG, "byte %td: more than num_layers %" PRId64 " layers",
	               p->at - p->text, p->layers);
}

/* The next byte that is no blank. */
static char peek(struct pattern *p)
{
	p->at += strspn(p->at, " ");
	return *p->at;
}

static bool take(struct pattern *p, char c)
{
	bool here = peek(p) == c;
	p->at += here;
	return here;
}

static int read_number(struct pattern *p, int64_t *out)
{
	int64_t x = 0;
	peek(p);
	size_t digits = strspn(p->at, "0123456789");
	if (!digits || *p->at == '0')
		return expected(p, "a whole number from 1 on belongs here");
	for (; digits--; p->at++) {
		x = 10 * x + *p->at - '0';
		if (x > p->layers)
			return too_long(p);
	}
	*out = x;
	return 0;
}

static int read_list(struct pattern *p)
{
	do {
		char bit = peek(p);
		if (bit != '0' && bit != '1')
			return expected(p, "0 or 1 belongs here");
		if (p->n == p->layers)
			return too_long(p);
		p->moe[p->n++] = bit == '1';
		p->at++;
	} while (take(p, ','));
	return take(p, ']') ? 0 : expected(p, "a comma or ] belongs here");
}

/* What stands from `first` on, `times` times instead of once. */
static int repeat(struct pattern *p, int64_t first, int64_t times)
{
	int64_t length = p->n - first;
	if (length > (p->layers - first) / times)
		return too_long(p);
	for (; times > 1; times--, p->n += length)
		memcpy(p->moe + p->n, p->moe + p->n - length, (size_t)length * sizeof *p->moe);
	return 0;
}

static int read_sum(struct pattern *p);

static int read_term(struct pattern *p)
{
	int64_t first = p->n, times = 1;
	if (take(p, '[')) {
		if (read_list(p))
			return p->e->code;
	} else if (take(p, '(')) {
		if (++p->depth > MAX_DEPTH)
			return expected(p, "nested too deep");
		if (read_sum(p))
			return p->e->code;
		p->depth--;
		if (!take(p, ')'))
			return expected(p, "+, * or ) belongs here");
	} else {
		return expected(p, "[ or ( belongs here; example: ([0]*3+[1]*58)");
	}
	while (take(p, '*'))
		if (read_number(p, &times) || repeat(p, first, times))
			return p->e->code;
	return 0;
}

static int read_sum(struct pattern *p)
{
	do
		if (read_term(p))
			return p->e->code;
	while (take(p, '+'));
	return 0;
}

static int read_pattern(struct pattern *p)
{
	if (read_sum(p))
		return p->e->code;
	if (peek(p))
		return expected(p, "+, * or the end belongs here");
	if (p->n != p->layers)
		return err_set(p->e, EXIT_CONFIG, "%" PRId64 " layers, but num_layers is %" PRId64, p->n,
		               p->layers);
	return 0;
}

/* Numbers beyond the layers mean the first layer alone. */
static bool read_frequency(const char *text, int64_t *n)
{
	size_t digits = strspn(text, "0123456789");
	if (!digits || text[digits] || *text == '0')
		return false;
	*n = digits < 10 ? strtoll(text, NULL, 10) : INT64_MAX;
	return true;
}

int model_moe_layers(const struct model_config *c, bool *moe, struct err *e)
{
	int64_t layers = c->num_layers, every;
	const char *text = c->moe_layer_freq ? c->moe_layer_freq : "";
	struct pattern p = {.text = text, .at = text, .layers = layers, .moe = moe, .e = e};
	if (c->num_experts == OPTION_NULL_INT) {
		memset(moe, 0, (size_t)layers * sizeof *moe);
		return 0;
	}
	if (!read_frequency(text, &every))
		return read_pattern(&p);
	for (int64_t i = 0; i < layers; i++)
		moe[i] = i % every == 0;
	return 0;
}

/* [num_layers], to be freed; NULL where there is none or it cannot be read */
static bool *read_layers(const struct model_config *c)
{
	struct err e = {0};
	if (c->num_experts == OPTION_NULL_INT || c->num_layers < 1)
		return NULL;
	bool *moe = mem_array((size_t)c->num_layers, sizeof *moe);
	if (model_moe_layers(c, moe, &e)) {
		free(moe);
		return NULL;
	}
	return moe;
}

bool model_is_moe_layer(const struct model_config *c, int64_t layer)
{
	bool *moe = read_layers(c), is = moe && layer >= 0 && layer < c->num_layers && moe[layer];
	free(moe);
	return is;
}

int64_t model_count_moe_layers(const struct model_config *c)
{
	bool *moe = read_layers(c);
	int64_t n = 0;
	for (int64_t i = 0; moe && i < c->num_layers; i++)
		n += moe[i];
	free(moe);
	return n;
}
