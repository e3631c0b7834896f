#include "test/test.h"
#include "base/err.h"
#include "base/sys.h"

#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

static struct test_case *first, **last = &first;
static int failures;
static char scratch[64];

void test_register(struct test_case *c)
{
	*last = c;
	last = &c->next;
}

void test_failed(const char *file, int line, const char *fmt, ...)
{
	char text[2000];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	fprintf(stderr, "%s:%d: %s\n", file, line, text);
	__atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
}

const char *test_dir(void)
{
	if (!*scratch) {
		strcpy(scratch, "/tmp/pentad-test-XXXXXX");
		if (!mkdtemp(scratch))
			abort();
	}
	return scratch;
}

const char *test_golden(const char *name)
{
	static char path[4][1024];
	static int k;
	const char *root = getenv("SRCDIR");
	k = (k + 1) % 4;
	snprintf(path[k], sizeof path[k], "%s/test/golden/%s", root ? root : ".", name);
	return path[k];
}

static bool wanted(const char *name, int argc, char **argv)
{
	for (int i = 1; i < argc; i++)
		if (strstr(name, argv[i]))
			return true;
	return argc < 2;
}

int test_main(int argc, char **argv)
{
	int bad = 0, run = 0;
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (struct test_case *c = first; c; c = c->next) {
		if (!wanted(c->name, argc, argv))
			continue;
		failures = 0;
		c->run();
		printf("%s %s\n", failures ? "FAIL" : "ok  ", c->name);
		bad += failures != 0;
		run++;
	}
	struct err e = {0};
	if (*scratch)
		sys_remove_tree(scratch, &e);
	printf("%d cases, %d failed\n", run, bad);
	return bad || !run;
}
