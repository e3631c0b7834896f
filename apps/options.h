/* Command lines: one row an option, from which parsing, --help and "did you mean" come. Floor: apps.
 *
 *	struct cli_config config = {0};
 *	int64_t world_size = 1;
 *	struct cli_option options[] = {
 *		CLI_CONFIG(&config),
 *		{"world-size", CLI_INT, &world_size, "N", "ranks to plan for"},
 *	};
 *	struct cli cli = {.usage = "plan -c FILE [--world-size N]", .example = "plan -c a.yaml",
 *	                  .options = options, .n = sizeof options / sizeof *options};
 *	int code;
 *	if (!cli_parse(&cli, argc, argv, &code))
 *		return code;
 *	struct config_source source = cli_config_source(&config);
 *
 * A name of one letter is written -c VALUE (or -cVALUE), a longer one --name VALUE or --name=VALUE. */
#ifndef PENTAD_APPS_OPTIONS_H
#define PENTAD_APPS_OPTIONS_H

#include "train/config.h"

struct err;

struct cli_list {
	const char **items; /* point into argv */
	size_t n, cap;
};

/* Name, C type of the target. CLI_LIST takes one value each time it is given, CLI_MANY all words up to the
 * next option, at least one. */
#define CLI_TYPES(X)                 \
	X(CLI_FLAG, bool)            \
	X(CLI_INT, int64_t)          \
	X(CLI_DOUBLE, double)        \
	X(CLI_STRING, const char *)  \
	X(CLI_LIST, struct cli_list) \
	X(CLI_MANY, struct cli_list)
enum cli_type {
#define CLI_TYPE_ROW(name, ctype) name,
	CLI_TYPES(CLI_TYPE_ROW)
#undef CLI_TYPE_ROW
};

struct cli_option {
	const char *name;
	enum cli_type type;
	void *target;      /* keeps its value where the option is not given */
	const char *value; /* what help calls the value: "FILE" */
	const char *doc;
};

struct cli {
	const char *usage, *doc, *example; /* without "pentad " */
	const struct cli_option *options;
	size_t n;
	size_t max_words;      /* words that are no options; one more is a usage error */
	bool stops_at_word;    /* the first such word ends the options (launch) */
	struct cli_list words; /* out */
};

/* true: go on. false: return *code; --help was printed (0), or the message was (EXIT_USAGE). "--" ends the
 * options. */
bool cli_parse(struct cli *c, int argc, char **argv, int *code);
/* The same without printing: 0 or EXIT_USAGE; *help is set where --help or -h was given. */
int cli_read(struct cli *c, int argc, char **argv, bool *help, struct err *e);
void cli_help(const struct cli *c, struct buf *b);
/* Frees the lists, not what they point to. */
void cli_free(struct cli *c);

/* -c FILE and --set a.b=c, of every subcommand that takes a configuration. */
struct cli_config {
	struct cli_list files, sets;
};
#define CLI_CONFIG(config)                                                                        \
	{"c", CLI_LIST, &(config)->files, "FILE", "configuration; the keys of a later FILE win"}, \
	{                                                                                         \
		"set", CLI_LIST, &(config)->sets, "a.b=c", "sets one key, over all files"         \
	}
struct config_source cli_config_source(const struct cli_config *config);

#endif
