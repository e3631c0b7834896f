#include "base/hash.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/option.h"
#include "base/yaml.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { COMMENT_COLUMN = 56 };

static const char *const type_words[N_OPTION_TYPES] = {
#define OPTION_TYPE_WORD(name, word, ctype) [name] = word,
        OPTION_TYPES(OPTION_TYPE_WORD)
#undef OPTION_TYPE_WORD
};

static void put_bool(const struct option *o, const void *field, struct buf *b)
{
	(void)o;
	buf_puts(b, *(const bool *)field ? "true" : "false");
}

static void put_int(const struct option *o, const void *field, struct buf *b)
{
	(void)o;
	buf_printf(b, "%" PRId64, *(const int64_t *)field);
}

static void put_double(const struct option *o, const void *field, struct buf *b)
{
	(void)o;
	json_put_number(b, *(const double *)field);
}

static void put_string(const struct option *o, const void *field, struct buf *b)
{
	(void)o;
	yaml_put_string(b, *(const char *const *)field);
}

static void put_list(const struct option *o, const void *field, struct buf *b)
{
	(void)o;
	const struct option_list *l = field;
	for (size_t i = 0; i < l->n; i++) {
		buf_puts(b, i ? ", " : "[");
		yaml_put_string(b, l->items[i]);
	}
	buf_puts(b, "]");
}

static void put_enum(const struct option *o, const void *field, struct buf *b)
{
	buf_puts(b, o->choices[*(const int *)field].name);
}

static void (*const writers[N_OPTION_TYPES])(const struct option *, const void *, struct buf *) = {
        [OPTION_BOOL] = put_bool,     [OPTION_INT] = put_int,   [OPTION_DOUBLE] = put_double,
        [OPTION_STRING] = put_string, [OPTION_LIST] = put_list, [OPTION_ENUM] = put_enum};

void option_put_value(const struct option_set *s, const struct option *o, struct buf *b)
{
	if (option_is_null(s, o))
		buf_puts(b, "null");
	else
		writers[o->type](o, option_field(s, o), b);
}

static void put_choices(const struct option *o, struct buf *b)
{
	const char *separator = "";
	for (const struct option_choice *c = o->choices; c->name; c++) {
		if (c->later)
			continue;
		buf_printf(b, "%s%s", separator, c->name);
		separator = "|";
	}
}

static void put_range(const struct option *o, struct buf *b)
{
	buf_puts(b, o->type == OPTION_INT ? "a whole number from "
	            : o->above            ? "a number above "
	                                  : "a number from ");
	buf_printf(b, "%.16g", o->min);
	buf_puts(b, o->below ? " and below " : o->above ? " and up to " : " to ");
	buf_printf(b, "%.16g", o->max);
}

void option_put_allowed(const struct option *o, struct buf *b)
{
	if (o->later)
		buf_puts(b, o->value);
	else if (o->type == OPTION_ENUM)
		put_choices(o, b);
	else if (o->type == OPTION_INT || o->type == OPTION_DOUBLE)
		put_range(o, b);
	else
		buf_puts(b, type_words[o->type]);
	if (!strcmp(o->value, "null") && !o->required && !o->later)
		buf_puts(b, ", or null");
}

static void put_row(const struct option_set *s, const struct option *o, struct buf *b)
{
	const struct option_origin *from = &s->origins[o - s->table->rows];
	size_t begin = b->length;
	buf_printf(b, "  %s: ", strchr(o->key, '.') + 1);
	option_put_value(s, o, b);
	size_t used = b->length - begin;
	buf_printf(b, "%*s# ", used < COMMENT_COLUMN ? (int)(COMMENT_COLUMN - used) : 1, "");
	yaml_put_comment(b, from->text);
	if (from->source == OPTION_FROM_DERIVED && o->derived)
		buf_printf(b, ": %s", o->derived);
	buf_puts(b, "\n");
}

static bool row_in_group(const struct option *o, const char *group)
{
	size_t n = strlen(group);
	return !strncmp(o->key, group, n) && o->key[n] == '.';
}

static bool is_listed(const char *key, const char *const *list)
{
	while (*list && strcmp(*list, key))
		list++;
	return *list;
}

void option_put_yaml(const struct option_set *s, const char *const *open, struct buf *b)
{
	for (size_t g = 0; g < s->table->n_groups; g++) {
		const struct option_group *group = &s->table->groups[g];
		if (!group->later)
			buf_printf(b, "%s:\n", group->name);
		for (size_t i = 0; i < s->table->n; i++)
			if (!row_in_group(&s->table->rows[i], group->name))
				continue;
			else if (is_listed(s->table->rows[i].key, open))
				buf_printf(b, "  # %s: to be chosen\n",
				           strchr(s->table->rows[i].key, '.') + 1);
			else
				put_row(s, &s->table->rows[i], b);
	}
}

uint64_t option_hash(const struct option_set *s)
{
	struct buf b = {0};
	for (size_t i = 0; i < s->table->n; i++) {
		const struct option *o = &s->table->rows[i];
		if (o->local)
			continue;
		buf_printf(&b, "%s=", o->key);
		option_put_value(s, o, &b);
		buf_puts(&b, "\n");
	}
	uint64_t h = hash_bytes(b.data, b.length, 0);
	buf_free(&b);
	return h;
}

static void put_default(const struct option *o, struct buf *b)
{
	if (o->required)
		buf_puts(b, "required");
	else
		buf_puts(b, o->derived ? o->derived : o->value);
}

void option_put_schema(const struct option_table *t, struct buf *b)
{
	for (size_t g = 0; g < t->n_groups; g++) {
		const struct option_group *group = &t->groups[g];
		buf_printf(b, "%s%s: %s%s%s\n", g ? "\n" : "", group->name, group->doc,
		           group->later ? "; " : "", group->later ? group->later : "");
		for (size_t i = 0; i < t->n; i++) {
			const struct option *o = &t->rows[i];
			if (!row_in_group(o, group->name))
				continue;
			buf_printf(b, "  %s  (", o->key);
			option_put_allowed(o, b);
			buf_printf(b, "%s%s; default: ", o->unit && *o->unit ? "; " : "",
			           o->unit ? o->unit : "");
			put_default(o, b);
			buf_printf(b, ")\n      %s%s%s\n", o->doc, o->later ? "; " : "",
			           o->later ? o->later : "");
		}
	}
}

void option_put_help(const struct option *o, struct buf *b)
{
	buf_printf(b, "%s: %s\n  type:     %s\n  allowed:  ", o->key, o->doc, type_words[o->type]);
	option_put_allowed(o, b);
	buf_puts(b, "\n  default:  ");
	put_default(o, b);
	buf_puts(b, "\n");
	if (o->unit && *o->unit)
		buf_printf(b, "  unit:     %s\n", o->unit);
	if (o->later)
		buf_printf(b, "  note:     %s\n", o->later);
	for (const struct option_choice *c = o->choices; c && c->name; c++)
		if (c->later)
			buf_printf(b, "  note:     %s\n", c->later);
}

static void put_json_member(struct buf *b, const char *name, const char *text)
{
	buf_printf(b, ", \"%s\": ", name);
	json_put_string(b, text, strlen(text));
}

static void put_json_limits(const struct option *o, struct buf *b)
{
	buf_puts(b, o->above ? ", \"exclusiveMinimum\": " : ", \"minimum\": ");
	json_put_number(b, o->min);
	buf_puts(b, o->below ? ", \"exclusiveMaximum\": " : ", \"maximum\": ");
	json_put_number(b, o->max);
}

static void put_json_choices(const struct option *o, struct buf *b)
{
	buf_puts(b, ", \"enum\": [");
	const char *separator = "";
	for (const struct option_choice *c = o->choices; c->name; c++) {
		if (c->later)
			continue;
		buf_puts(b, separator);
		json_put_string(b, c->name, strlen(c->name));
		separator = ", ";
	}
	buf_puts(b, "]");
}

static void put_json_default(const struct option *o, struct buf *b)
{
	bool bare = !strcmp(o->value, "null") || o->type == OPTION_BOOL || o->type == OPTION_INT;
	buf_puts(b, ", \"default\": ");
	if (bare)
		buf_puts(b, o->value);
	else if (o->type == OPTION_DOUBLE)
		json_put_number(b, strtod(o->value, NULL));
	else
		json_put_string(b, o->value, strlen(o->value));
}

static void put_json_row(const struct option *o, struct buf *b)
{
	static const char *const types[N_OPTION_TYPES] = {
	        [OPTION_BOOL] = "\"boolean\"",           [OPTION_INT] = "\"integer\"",
	        [OPTION_DOUBLE] = "\"number\"",          [OPTION_STRING] = "\"string\"",
	        [OPTION_LIST] = "\"array\", \"string\"", [OPTION_ENUM] = "\"string\""};
	bool nullable = !strcmp(o->value, "null");
	buf_printf(b, "\"%s\": {\"type\": [%s%s]", strchr(o->key, '.') + 1, types[o->type],
	           nullable ? ", \"null\"" : "");
	put_json_member(b, "description", o->doc);
	if (!o->required)
		put_json_default(o, b);
	if (o->derived)
		put_json_member(b, "x-derived", o->derived);
	if (o->unit && *o->unit)
		put_json_member(b, "x-unit", o->unit);
	if (o->later)
		put_json_member(b, "x-not-yet", o->later);
	if (o->type == OPTION_INT || o->type == OPTION_DOUBLE)
		put_json_limits(o, b);
	if (o->type == OPTION_ENUM)
		put_json_choices(o, b);
	if (o->type == OPTION_LIST)
		buf_puts(b, ", \"items\": {\"type\": \"string\"}");
	buf_puts(b, "}");
}

static void put_json_group(const struct option_table *t, const struct option_group *g, struct buf *b)
{
	buf_printf(b, "    \"%s\": {\"type\": [\"object\", \"null\"%s], \"additionalProperties\": false",
	           g->name, g->shorthand ? ", \"string\"" : "");
	put_json_member(b, "description", g->doc);
	buf_puts(b, ", \"properties\": {");
	const char *separator = "\n      ";
	for (size_t i = 0; i < t->n; i++) {
		if (!row_in_group(&t->rows[i], g->name))
			continue;
		buf_puts(b, separator);
		put_json_row(&t->rows[i], b);
		separator = ",\n      ";
	}
	buf_puts(b, "}}");
}

void option_put_schema_json(const struct option_table *t, struct buf *b)
{
	buf_puts(b, "{\n  \"$schema\": \"https://json-schema.org/draft/2020-12/schema\",\n"
	            "  \"title\": \"Pentad configuration\",\n  \"type\": \"object\",\n"
	            "  \"additionalProperties\": false,\n  \"properties\": {\n");
	const char *separator = "";
	for (size_t i = 0; i < t->n_groups; i++) {
		if (t->groups[i].later)
			continue;
		buf_puts(b, separator);
		put_json_group(t, &t->groups[i], b);
		separator = ",\n";
	}
	buf_puts(b, "\n  }\n}\n");
}
