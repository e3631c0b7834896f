/* pentad bench: measures this machine. */
#include "apps/bench.h"
#include "apps/commands.h"
#include "base/err.h"
#include "base/log.h"
#include "base/text.h"

#include <stdio.h>
#include <string.h>

static const struct benchmark {
	const char *name;
	int (*run)(int argc, char **argv);
	const char *doc;
} benchmarks[] = {
#define BENCH_ROW(name, doc) {#name, bench_##name##_main, doc},
        BENCHMARKS(BENCH_ROW)
#undef BENCH_ROW
};
enum { N_BENCHMARKS = sizeof benchmarks / sizeof *benchmarks };

static void help(void)
{
	puts("usage: pentad bench NAME [options]\nMeasures this machine.\n");
	for (size_t i = 0; i < N_BENCHMARKS; i++)
		printf("  %-10s %s\n", benchmarks[i].name, benchmarks[i].doc);
	puts("\nexample: pentad bench matmul --hidden 1024 --vocab 0");
}

int bench_main(int argc, char **argv)
{
	const char *word = argc > 1 ? argv[1] : NULL;
	if (word && (!strcmp(word, "--help") || !strcmp(word, "-h"))) {
		help();
		return 0;
	}
	for (size_t i = 0; i < N_BENCHMARKS && word; i++)
		if (!strcmp(word, benchmarks[i].name))
			return benchmarks[i].run(argc - 1, argv + 1);
	const char *near =
	        word ? text_nearest(word, &benchmarks[0].name, N_BENCHMARKS, sizeof benchmarks[0]) : NULL;
	if (near)
		log_error("bench: no benchmark '%s'; did you mean '%s'?", word, near);
	else
		log_error("bench: name a benchmark; see `pentad bench --help`");
	return EXIT_USAGE;
}
