/* The subcommands. Each gets argv[0] = its own name and returns the process's exit code. */
#ifndef PENTAD_APPS_COMMANDS_H
#define PENTAD_APPS_COMMANDS_H

struct command {
	const char *name;
	int (*run)(int argc, char **argv);
	const char *doc, *example;
};

#define COMMAND(name, doc, example) int name##_main(int argc, char **argv);
#include "apps/commands.def"
#undef COMMAND

#endif
