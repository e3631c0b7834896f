#include "base/option.h"
#include "base/err.h"
#include "base/mem.h"
#include "base/text.h"
#include "base/yaml.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One value on its way into its field. `where` begins its messages and becomes its origin. */
struct entry {
	struct option_set *s;
	const struct option *o;
	enum option_source source;
	const char *where;
	struct err *e;
};

int option_violation(struct option_set *s, struct err *e, const char *fmt, ...)
{
	char line[1200];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(line, sizeof line, fmt, ap);
	va_end(ap);
	size_t used = e->code ? strlen(e->text) : 0;
	if (used + strlen(line) + 64 < sizeof e->text)
		return err_add(e, EXIT_CONFIG, "%s", line);
	s->hidden++;
	return EXIT_CONFIG;
}

int option_end_violations(struct option_set *s, struct err *e)
{
	if (s->hidden)
		err_add(e, EXIT_CONFIG, "… and %zu more", s->hidden);
	s->hidden = 0;
	return e->code;
}

void *option_field(const struct option_set *s, const struct option *o)
{
	return (char *)s->values + o->offset_bytes;
}

/* "KEY: WHAT; allowed: …; did you mean …?" */
static int wrong(const struct entry *x, const char *meant, const char *fmt, ...)
{
	char what[600];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	struct buf allowed = {0};
	option_put_allowed(x->o, &allowed);
	int rc = option_violation(x->s, x->e, "%s: %s: %s; allowed: %s%s%s%s", x->where, x->o->key, what,
	                          allowed.data, meant ? "; did you mean " : "", meant ? meant : "",
	                          meant ? "?" : "");
	buf_free(&allowed);
	return rc;
}

static bool is_null(const struct yaml_node *v)
{
	return v->type == YAML_SCALAR && v->plain &&
	       (!*v->scalar || !strcmp(v->scalar, "~") || !strcasecmp(v->scalar, "null"));
}

static int read_bool(const struct entry *x, const struct yaml_node *v)
{
	static const struct {
		const char *word, *meant;
	} near[] = {{"yes", "true"}, {"on", "true"},   {"y", "true"},  {"1", "true"},  {"true", "true"},
	            {"no", "false"}, {"off", "false"}, {"n", "false"}, {"0", "false"}, {"false", "false"}};
	const char *text = v->scalar, *meant = NULL;
	bool yes = !strcmp(text, "true");
	if (v->plain && (yes || !strcmp(text, "false"))) {
		*(bool *)option_field(x->s, x->o) = yes;
		return 0;
	}
	for (size_t i = 0; i < sizeof near / sizeof *near; i++)
		if (!strcasecmp(text, near[i].word))
			meant = near[i].meant;
	return wrong(x, meant, "%s%.80s%s is not true or false", v->plain ? "" : "\"", text,
	             v->plain ? "" : "\"");
}

static size_t skip_digits(const char *s)
{
	return strspn(s, "0123456789");
}

/* [+-]digits, without leading zeros: 010 is 8 to some readers of YAML and 10 to others. */
static bool is_integer(const char *s)
{
	s += *s == '+' || *s == '-';
	size_t n = skip_digits(s);
	return n && !s[n] && (n == 1 || *s != '0');
}

/* [+-]digits[.digits][e[+-]digits] with a digit on at least one side of the point. */
static bool is_number(const char *s)
{
	s += *s == '+' || *s == '-';
	size_t whole = skip_digits(s), part = 0;
	s += whole;
	if (*s == '.') {
		part = skip_digits(s + 1);
		s += part + 1;
	}
	if (whole + part == 0)
		return false;
	if (*s == 'e' || *s == 'E') {
		s += 1 + (s[1] == '+' || s[1] == '-');
		size_t n = skip_digits(s);
		if (!n)
			return false;
		s += n;
	}
	return !*s;
}

/* What a number with separators, a fraction of zero, quotes or leading zeros was meant to be. */
static const char *meant_number(const char *text, bool whole, char out[static 40])
{
	char digits[40];
	size_t n = 0;
	for (; *text && n + 1 < sizeof digits; text++)
		if (*text != '_' && *text != ',' && *text != '\'')
			digits[n++] = *text;
	digits[n] = 0;
	if (*text || !is_number(digits))
		return NULL;
	double x = strtod(digits, NULL);
	if (whole && (x != floor(x) || fabs(x) > 9007199254740992.0))
		return NULL;
	snprintf(out, 40, whole ? "%.0f" : "%.12g", x);
	return out;
}

static int out_of_range(const struct entry *x, double v, const char *text)
{
	const struct option *o = x->o;
	bool low = v < o->min || (o->above && v == o->min), high = v > o->max || (o->below && v == o->max);
	return low || high ? wrong(x, NULL, "%.80s is too %s", text, low ? "small" : "large") : 0;
}

static int read_int(const struct entry *x, const struct yaml_node *v)
{
	char near[40];
	if (!v->plain || !is_integer(v->scalar))
		return wrong(x, meant_number(v->scalar, true, near), "%s%.80s%s is not a whole number",
		             v->plain ? "" : "\"", v->scalar, v->plain ? "" : "\"");
	errno = 0;
	long long value = strtoll(v->scalar, NULL, 10);
	if (errno)
		return wrong(x, NULL, "%.80s is too %s", v->scalar, value < 0 ? "small" : "large");
	int rc = out_of_range(x, (double)value, v->scalar);
	if (!rc)
		*(int64_t *)option_field(x->s, x->o) = value;
	return rc;
}

static int read_double(const struct entry *x, const struct yaml_node *v)
{
	char near[40];
	if (!v->plain || !is_number(v->scalar))
		return wrong(x, meant_number(v->scalar, false, near), "%s%.80s%s is not a number",
		             v->plain ? "" : "\"", v->scalar, v->plain ? "" : "\"");
	double value = strtod(v->scalar, NULL);
	if (!isfinite(value))
		return wrong(x, NULL, "%.80s is too large", v->scalar);
	int rc = out_of_range(x, value, v->scalar);
	if (!rc)
		*(double *)option_field(x->s, x->o) = value;
	return rc;
}

static int read_string(const struct entry *x, const struct yaml_node *v)
{
	*(const char **)option_field(x->s, x->o) = arena_strdup(x->s->arena, v->scalar);
	return 0;
}

static int read_enum(const struct entry *x, const struct yaml_node *v)
{
	const struct option_choice *c = x->o->choices;
	size_t n = 0, same = SIZE_MAX;
	for (; c[n].name; n++) {
		if (!strcmp(c[n].name, v->scalar)) {
			*(int *)option_field(x->s, x->o) = (int)n;
			return 0;
		}
		if (!strcasecmp(c[n].name, v->scalar))
			same = n;
	}
	const char *note = NULL, *foreign = arena_printf(x->s->arena, "%s=%.80s", x->o->key, v->scalar);
	const char *meant = option_find_alias(x->s->table, foreign, &note);
	if (!meant)
		meant = same < n ? c[same].name : text_nearest(v->scalar, &c[0].name, n, sizeof *c);
	return wrong(x, meant, "unknown value '%.80s'", v->scalar);
}

static int read_list(const struct entry *x, const struct yaml_node *v)
{
	bool single = v->type == YAML_SCALAR;
	size_t n = single ? 1 : v->count, i = 0;
	const char **items = arena_alloc(x->s->arena, n, sizeof *items);
	for (const struct yaml_node *item = single ? v : v->child; item; item = single ? NULL : item->next) {
		if (item->type != YAML_SCALAR)
			return wrong(x, NULL, "element %zu is %s, not a single value", i + 1,
			             yaml_type_word(item->type));
		if (is_null(item))
			return wrong(x, NULL, "element %zu is empty", i + 1);
		items[i++] = arena_strdup(x->s->arena, item->scalar);
	}
	*(struct option_list *)option_field(x->s, x->o) = (struct option_list){items, n};
	return 0;
}

static int (*const readers[N_OPTION_TYPES])(const struct entry *, const struct yaml_node *) = {
        [OPTION_BOOL] = read_bool,     [OPTION_INT] = read_int,   [OPTION_DOUBLE] = read_double,
        [OPTION_STRING] = read_string, [OPTION_LIST] = read_list, [OPTION_ENUM] = read_enum};

static void store_null(const struct option_set *s, const struct option *o)
{
	void *field = option_field(s, o);
	if (o->type == OPTION_INT)
		*(int64_t *)field = OPTION_NULL_INT;
	else if (o->type == OPTION_DOUBLE)
		*(double *)field = (double)NAN;
	else if (o->type == OPTION_STRING)
		*(const char **)field = NULL;
	else
		*(struct option_list *)field = (struct option_list){0};
}

bool option_is_null(const struct option_set *s, const struct option *o)
{
	const void *field = option_field(s, o);
	return (o->type == OPTION_INT && *(const int64_t *)field == OPTION_NULL_INT &&
	        !strcmp(o->value, "null")) ||
	       (o->type == OPTION_DOUBLE && isnan(*(const double *)field)) ||
	       (o->type == OPTION_STRING && !*(const char *const *)field) ||
	       (o->type == OPTION_LIST && !((const struct option_list *)field)->n);
}

static int store(const struct entry *x, const struct yaml_node *v)
{
	bool nullable = !strcmp(x->o->value, "null");
	if (v->type == YAML_MAPPING || (v->type == YAML_SEQUENCE && x->o->type != OPTION_LIST))
		return wrong(x, NULL, "%s where a single value belongs", yaml_type_word(v->type));
	if (is_null(v) && !nullable)
		return wrong(x, NULL, "it must not be empty");
	if (is_null(v))
		store_null(x->s, x->o);
	int rc = is_null(v) ? 0 : readers[x->o->type](x, v);
	if (!rc)
		x->s->origins[x->o - x->s->table->rows] =
		        (struct option_origin){x->source, arena_strdup(x->s->arena, x->where)};
	return rc;
}

void option_reset(struct option_set *s, const struct option *o)
{
	struct err e = {0};
	struct yaml_node v = {.type = YAML_SCALAR, .plain = true, .scalar = o->value};
	struct entry x = {s, o, OPTION_FROM_DEFAULT, "default", &e};
	ASSERT(!store(&x, &v));
}

void option_set_defaults(struct option_set *s)
{
	for (size_t i = 0; i < s->table->n; i++)
		option_reset(s, &s->table->rows[i]);
}

const struct option *option_find(const struct option_table *t, const char *key)
{
	for (size_t i = 0; i < t->n; i++)
		if (!strcmp(t->rows[i].key, key))
			return &t->rows[i];
	return NULL;
}

static const struct option_group *find_group(const struct option_table *t, const char *name)
{
	for (size_t i = 0; i < t->n_groups; i++)
		if (!strcmp(t->groups[i].name, name))
			return &t->groups[i];
	return NULL;
}

bool option_is_default(const struct option_set *s, const struct option *o)
{
	struct buf now = {0};
	if (o->type == OPTION_STRING && !option_is_null(s, o)) /* written as YAML it may have quotes */
		return !strcmp(*(const char *const *)option_field(s, o), o->value);
	option_put_value(s, o, &now);
	bool same = o->type == OPTION_DOUBLE && strcmp(o->value, "null")
	                    ? *(const double *)option_field(s, o) == strtod(o->value, NULL)
	                    : !strcmp(now.data, o->value);
	buf_free(&now);
	return same;
}

int option_check_later(struct option_set *s, struct err *e)
{
	int rc = 0;
	for (size_t i = 0; i < s->table->n; i++) {
		const struct option *o = &s->table->rows[i];
		const char *why = o->later && !option_is_default(s, o) ? o->later : NULL;
		if (!why && o->type == OPTION_ENUM)
			why = o->choices[*(const int *)option_field(s, o)].later;
		struct entry x = {s, o, s->origins[i].source, s->origins[i].text, e};
		if (why)
			rc = wrong(&x, NULL, "%s", why);
	}
	return rc;
}

/* A layer on its way in: a file, whose nodes know their place, or one --set. */
struct layer {
	struct option_set *s;
	enum option_source source;
	const char *where; /* NULL: the nodes know */
	struct err *e;
	int rc;
};

static const char *place_of(const struct layer *l, const struct yaml_place *at)
{
	return l->where ? l->where : arena_printf(l->s->arena, "%s:%zu:%zu", at->file, at->line, at->column);
}

static void unknown_key(struct layer *l, const struct yaml_node *v, const char *key)
{
	const char *note = NULL, *meant = option_nearest(l->s->table, key, &note);
	l->rc = option_violation(l->s, l->e, "%s: %.100s: unknown key%s%s%s%s%s", place_of(l, &v->key_at),
	                         key, meant ? "; did you mean " : "", meant ? meant : "", meant ? "?" : "",
	                         note ? " " : "", note ? note : "");
}

/* Every leaf below an unknown key, each with the spelling that is nearest to its whole path. */
static void unknown_tree(struct layer *l, const struct yaml_node *v, const char *key)
{
	if (v->type != YAML_MAPPING) {
		unknown_key(l, v, key);
		return;
	}
	for (const struct yaml_node *m = v->child; m; m = m->next)
		unknown_tree(l, m, arena_printf(l->s->arena, "%s.%s", key, m->key));
}

static void set_key(struct layer *l, const struct yaml_node *v, const char *key)
{
	const struct option *o = option_find(l->s->table, key);
	if (!o) {
		unknown_tree(l, v, key);
		return;
	}
	struct entry x = {l->s, o, l->source, place_of(l, &v->place), l->e};
	if (store(&x, v))
		l->rc = EXIT_CONFIG;
}

static void set_group(struct layer *l, const struct yaml_node *v, const struct option_group *g)
{
	if (is_null(v)) /* a group whose keys are all commented out */
		return;
	if (g->later)
		l->rc = option_violation(l->s, l->e, "%s: %s: %s", place_of(l, &v->key_at), g->name,
		                         g->later);
	else if (v->type == YAML_SCALAR && g->shorthand)
		set_key(l, v, g->shorthand);
	else if (v->type != YAML_MAPPING)
		l->rc = option_violation(l->s, l->e, "%s: %s: a mapping of keys belongs here, not %s",
		                         place_of(l, &v->place), g->name, yaml_type_word(v->type));
	else
		for (const struct yaml_node *m = v->child; m; m = m->next)
			set_key(l, m, arena_printf(l->s->arena, "%s.%s", g->name, m->key));
}

static void unknown_group(struct layer *l, const struct yaml_node *v)
{
	const struct option_table *t = l->s->table;
	const char *meant = text_nearest(v->key, &t->groups[0].name, t->n_groups, sizeof *t->groups);
	if (v->type != YAML_MAPPING || (!meant && v->child)) {
		unknown_tree(l, v, v->key);
		return;
	}
	l->rc = option_violation(l->s, l->e, "%s: %.100s: unknown group%s%s%s", place_of(l, &v->key_at),
	                         v->key, meant ? "; did you mean " : "", meant ? meant : "",
	                         meant ? "?" : "");
	for (const struct yaml_node *m = v->child; m; m = m->next) /* keys that would be wrong there too */
		if (!option_find(t, arena_printf(l->s->arena, "%s.%s", meant, m->key)))
			unknown_tree(l, m, arena_printf(l->s->arena, "%s.%s", v->key, m->key));
}

int option_set_tree(struct option_set *s, const struct yaml_node *root, struct err *e)
{
	struct layer l = {s, OPTION_FROM_FILE, NULL, e, 0};
	if (root->type != YAML_MAPPING)
		return option_violation(s, e, "%s: a mapping of groups belongs here, not %s",
		                        place_of(&l, &root->place), yaml_type_word(root->type));
	for (const struct yaml_node *v = root->child; v; v = v->next) {
		const struct option_group *g = find_group(s->table, v->key);
		if (g)
			set_group(&l, v, g);
		else
			unknown_group(&l, v);
	}
	return l.rc;
}

int option_set_text(struct option_set *s, const char *assignment, enum option_source source,
                    const char *origin, struct err *e)
{
	struct layer l = {s, source, origin, e, 0};
	const char *equals = strchr(assignment, '=');
	if (!equals || equals == assignment)
		return option_violation(s, e, "%s: group.key=value belongs here", origin);
	struct err cause = {0};
	struct yaml_node *v;
	char *key = arena_strndup(s->arena, assignment, (size_t)(equals - assignment));
	if (yaml_parse(s->arena, origin, equals + 1, strlen(equals + 1), &v, &cause))
		return option_violation(s, e, "%s", cause.text);
	if (v->type == YAML_MAPPING && !v->child && !strchr(equals, '{'))
		*v = (struct yaml_node){.type = YAML_SCALAR, .plain = true, .scalar = ""};
	const struct option_group *g = find_group(s->table, key);
	v->key = key;
	if (g)
		set_group(&l, v, g);
	else
		set_key(&l, v, key);
	return l.rc;
}
