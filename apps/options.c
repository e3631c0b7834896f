#include "apps/options.h"
#include "base/err.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/text.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The words of a command line, and where reading stands. */
struct cursor {
	int argc, at;
	char **argv;
	const char *attached; /* VALUE of --name=VALUE or -cVALUE */
	struct err *e;
};

static void list_add(struct cli_list *l, const char *item)
{
	l->items = mem_grow(l->items, l->n, &l->cap, sizeof *l->items);
	l->items[l->n++] = item;
}

/* An option, or a negative number, which is a value. */
static bool is_option(const char *word)
{
	return word[0] == '-' && word[1] && !strchr("0123456789.", word[1]);
}

static const char *dashes(const char *name)
{
	return name[1] ? "--" : "-";
}

static const char *next_value(struct cursor *at)
{
	const char *v = at->attached;
	at->attached = NULL;
	if (!v && at->at < at->argc && strcmp(at->argv[at->at], "--") && !is_option(at->argv[at->at]))
		v = at->argv[at->at++];
	return v;
}

static int store_number(const struct cli_option *o, const char *text, struct err *e)
{
	char *end;
	errno = 0;
	if (o->type == CLI_INT) {
		long long v = strtoll(text, &end, 10);
		if (end == text || *end || errno)
			return err_set(e, EXIT_USAGE, "%s%s: '%s' is not a whole number", dashes(o->name),
			               o->name, text);
		*(int64_t *)o->target = v;
		return 0;
	}
	double x = strtod(text, &end);
	if (end == text || *end || !isfinite(x))
		return err_set(e, EXIT_USAGE, "%s%s: '%s' is not a number", dashes(o->name), o->name, text);
	*(double *)o->target = x;
	return 0;
}

static int take_value(const struct cli_option *o, struct cursor *at)
{
	const char *v = next_value(at);
	if (!v)
		return err_set(at->e, EXIT_USAGE, "%s%s needs a value: %s", dashes(o->name), o->name,
		               o->value ? o->value : "VALUE");
	if (o->type == CLI_INT || o->type == CLI_DOUBLE)
		return store_number(o, v, at->e);
	if (o->type == CLI_STRING)
		*(const char **)o->target = v;
	else
		list_add(o->target, v);
	while (o->type == CLI_MANY && (v = next_value(at)))
		list_add(o->target, v);
	return 0;
}

static int unknown_option(const struct cli *c, const char *name, size_t length, struct err *e)
{
	char *word = mem_strdup(name);
	word[length] = 0;
	const char *near = c->n ? text_nearest(word, &c->options[0].name, c->n, sizeof *c->options) : NULL;
	if (near)
		err_set(e, EXIT_USAGE, "unknown option %s%s; did you mean %s%s?", dashes(word), word,
		        dashes(near), near);
	else
		err_set(e, EXIT_USAGE, "unknown option %s%s; see --help", dashes(word), word);
	free(word);
	return EXIT_USAGE;
}

/* Reads "--name", "--name=VALUE", "-c" or "-cVALUE". */
static int read_option(const struct cli *c, const char *word, struct cursor *at)
{
	bool is_long = word[1] == '-';
	const char *name = word + (is_long ? 2 : 1);
	size_t length = is_long ? strcspn(name, "=") : 1;
	if (is_long && name[length])
		at->attached = name + length + 1;
	else if (!is_long && name[1])
		at->attached = name + 1;
	for (size_t i = 0; i < c->n; i++) {
		const struct cli_option *o = &c->options[i];
		if (strlen(o->name) != length || strncmp(o->name, name, length) || (length == 1) == is_long)
			continue;
		if (o->type != CLI_FLAG)
			return take_value(o, at);
		if (at->attached)
			return err_set(at->e, EXIT_USAGE, "%s%s takes no value", dashes(o->name), o->name);
		*(bool *)o->target = true;
		return 0;
	}
	return unknown_option(c, name, is_long ? length : strlen(name), at->e);
}

static int read_word(struct cli *c, const char *word, struct cursor *at)
{
	if (c->words.n == c->max_words && !c->stops_at_word)
		return err_set(at->e, EXIT_USAGE, "'%s' is one word too many; see --help", word);
	list_add(&c->words, word);
	return 0;
}

int cli_read(struct cli *c, int argc, char **argv, bool *help, struct err *e)
{
	struct cursor at = {argc, 1, argv, NULL, e};
	bool options_end = false;
	int rc = 0;
	*help = false;
	while (!rc && at.at < argc) {
		const char *word = argv[at.at++];
		if (!options_end && !strcmp(word, "--")) {
			options_end = true;
		} else if (!options_end && (!strcmp(word, "--help") || !strcmp(word, "-h"))) {
			*help = true;
			return 0;
		} else if (!options_end && is_option(word)) {
			rc = read_option(c, word, &at);
		} else {
			rc = read_word(c, word, &at);
			options_end |= c->stops_at_word;
		}
	}
	return rc;
}

void cli_help(const struct cli *c, struct buf *b)
{
	buf_printf(b, "usage: pentad %s\n", c->usage);
	if (c->doc)
		buf_printf(b, "%s\n", c->doc);
	if (c->n)
		buf_puts(b, "\n");
	for (size_t i = 0; i < c->n; i++) {
		const struct cli_option *o = &c->options[i];
		char left[80];
		const char *more = o->type == CLI_LIST ? " (again for more)" : o->type == CLI_MANY ? "…" : "";
		snprintf(left, sizeof left, "%s%s%s%s%s", dashes(o->name), o->name, o->value ? " " : "",
		         o->value ? o->value : "", o->type == CLI_MANY ? more : "");
		buf_printf(b, "  %-28s %s%s\n", left, o->doc, o->type == CLI_LIST ? more : "");
	}
	if (c->example)
		buf_printf(b, "\nexample: pentad %s\n", c->example);
}

bool cli_parse(struct cli *c, int argc, char **argv, int *code)
{
	struct err e = {0};
	bool help;
	*code = cli_read(c, argc, argv, &help, &e);
	if (*code)
		log_error("%s: %s", argv[0], e.text);
	if (help) {
		struct buf b = {0};
		cli_help(c, &b);
		fputs(b.data, stdout);
		buf_free(&b);
	}
	if (*code || help)
		cli_free(c);
	return !*code && !help;
}

static void list_free(struct cli_list *l)
{
	free(l->items);
	*l = (struct cli_list){0};
}

void cli_free(struct cli *c)
{
	list_free(&c->words);
	for (size_t i = 0; i < c->n; i++)
		if (c->options[i].type == CLI_LIST || c->options[i].type == CLI_MANY)
			list_free(c->options[i].target);
}

struct config_source cli_config_source(const struct cli_config *config)
{
	return (struct config_source){config->files.items, config->files.n, config->sets.items,
	                              config->sets.n};
}
