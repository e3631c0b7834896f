/* pentad: one binary, one file per subcommand. This file only finds the subcommand. */
#include "apps/commands.h"
#include "base/err.h"
#include "base/text.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>

static const struct command commands[] = {
#define COMMAND(name, doc, example) {#name, name##_main, doc, example},
#include "apps/commands.def"
#undef COMMAND
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void print_usage(FILE *f)
{
	fprintf(f, "usage: pentad COMMAND …\n\n");
	for (size_t i = 0; i < N_COMMANDS; i++)
		fprintf(f, "  %-11s %s\n", commands[i].name, commands[i].doc);
	fprintf(f, "\n`pentad COMMAND --help` shows its options and an example.\n");
}

static int unknown_command(const char *word)
{
	const char *near = text_nearest(word, &commands[0].name, N_COMMANDS, sizeof commands[0]);
	fprintf(stderr, "pentad: unknown command '%s'", word);
	fprintf(stderr, near ? "; did you mean '%s'?\n" : "; see `pentad --help`\n", near);
	return EXIT_USAGE;
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0); /* srun would otherwise hold lines back for seconds */
	signal(SIGPIPE, SIG_IGN);
	if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "help")) {
		print_usage(argc < 2 ? stderr : stdout);
		return argc < 2 ? EXIT_USAGE : EXIT_DONE;
	}
	if (!strcmp(argv[1], "--version")) {
		puts("pentad " PENTAD_VERSION);
		return EXIT_DONE;
	}
	for (size_t i = 0; i < N_COMMANDS; i++)
		if (!strcmp(argv[1], commands[i].name))
			return commands[i].run(argc - 1, argv + 1);
	return unknown_command(argv[1]);
}
