/* pentad config: what keys there are, and what a set of files makes of them. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/log.h"

#include <stdio.h>
#include <string.h>

struct request {
	struct cli_config config;
	int64_t world_size;
	bool json;
	const struct cli_list *words; /* "schema", "explain KEY", "resolve" */
};

/* Prints *b and frees it. */
static int print(struct buf *b)
{
	fwrite(b->data, 1, b->length, stdout);
	buf_free(b);
	return fflush(stdout) || ferror(stdout) ? EXIT_IO : EXIT_DONE;
}

static int schema(const struct request *q)
{
	struct buf b = {0};
	(q->json ? option_put_schema_json : option_put_schema)(config_table(), &b);
	return print(&b);
}

static int explain(const struct request *q)
{
	if (q->words->n != 2) {
		log_error(
		        "config explain: one key belongs here; example: pentad config explain optimizer.lr");
		return EXIT_USAGE;
	}
	const char *key = q->words->items[1], *note = NULL;
	const struct option *o = option_find(config_table(), key);
	if (!o) {
		const char *meant = option_nearest(config_table(), key, &note);
		log_error("%s: unknown key%s%s%s%s%s", key,
		          meant ? "; did you mean " : "; see `pentad config schema`", meant ? meant : "",
		          meant ? "?" : "", note ? " " : "", note ? note : "");
		return EXIT_CONFIG;
	}
	struct buf b = {0};
	option_put_help(o, &b);
	return print(&b);
}

static void report(const struct config *c)
{
	for (size_t i = 0; i < c->derived.equations.n; i++)
		log_info("%s", c->derived.equations.items[i]);
	for (size_t i = 0; i < c->derived.notes.n; i++)
		log_warn("%s", c->derived.notes.items[i]);
}

static int resolve(const struct request *q)
{
	struct config c;
	struct err e = {0};
	struct config_source source = cli_config_source(&q->config);
	if (!source.n_files && !source.n_sets) {
		log_error("config resolve: -c FILE is missing; example: pentad config resolve -c a.yaml");
		return EXIT_USAGE;
	}
	if (q->world_size < 1 || q->world_size > 1 << 30) {
		log_error("config resolve: --world-size %lld is not a number of ranks",
		          (long long)q->world_size);
		return EXIT_USAGE;
	}
	int rc = config_load(&c, &source, &e);
	if (!rc)
		rc = config_check(&c, (int)q->world_size, &e);
	if (rc) {
		log_error("%s", e.text);
	} else {
		struct buf b = {0};
		report(&c);
		config_write_yaml(&c, &b);
		rc = print(&b);
	}
	config_free(&c);
	return rc;
}

static const struct action {
	const char *name;
	int (*run)(const struct request *);
} actions[] = {{"schema", schema}, {"explain", explain}, {"resolve", resolve}};

int config_main(int argc, char **argv)
{
	struct request q = {.world_size = 1};
	struct cli_option options[] = {
	        CLI_CONFIG(&q.config),
	        {"world-size", CLI_INT, &q.world_size, "N", "ranks that the configuration is checked for"},
	        {"json", CLI_FLAG, &q.json, NULL, "schema as JSON Schema"},
	};
	struct cli cli = {
	        .usage = "config schema [--json] | explain KEY | resolve -c FILE… [--set a.b=c…] "
	                 "[--world-size N]",
	        .doc = "Shows every key, one key in detail, or the merged configuration with each value's "
	               "origin.",
	        .example = "config explain optimizer.lr",
	        .options = options,
	        .n = sizeof options / sizeof *options,
	        .max_words = 2,
	};
	int code;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	q.words = &cli.words;
	code = EXIT_USAGE;
	size_t i = 0, n = sizeof actions / sizeof *actions;
	while (i < n && (!cli.words.n || strcmp(cli.words.items[0], actions[i].name)))
		i++;
	if (i < n)
		code = actions[i].run(&q);
	else
		log_error("config: schema, explain KEY or resolve belongs here; example: pentad %s",
		          cli.example);
	cli_free(&cli);
	return code;
}
