/* A test program is a list of cases; its exit code is the verdict.
 *
 *	TEST(reads_back) { CHECK(x == y); CHECK_NEAR(a, b, 1e-6); }
 *	int main(int argc, char **argv) { return test_main(argc, argv); }
 *
 * Cases register themselves; `prog name…` runs those whose name contains an argument. A failed CHECK
 * prints the expression and goes on; MUST also leaves the case. Each case gets a scratch folder. */
#ifndef PENTAD_TEST_H
#define PENTAD_TEST_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

struct test_case {
	const char *name;
	void (*run)(void);
	struct test_case *next;
};
void test_register(struct test_case *c);
int test_main(int argc, char **argv);
void test_failed(const char *file, int line, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Scratch folder of this process, removed at the end. */
const char *test_dir(void);
/* "$SRCDIR/test/golden/NAME"; static storage, four calls deep. */
const char *test_golden(const char *name);

#define TEST(name)                                                     \
	static void name(void);                                        \
	__attribute__((constructor)) static void register_##name(void) \
	{                                                              \
		static struct test_case c = {#name, name, NULL};       \
		test_register(&c);                                     \
	}                                                              \
	static void name(void)

#define CHECK(x) ((x) ? true : (test_failed(__FILE__, __LINE__, "%s", #x), false))
#define MUST(x)                 \
	do {                    \
		if (!CHECK(x))  \
			return; \
	} while (0)
#define CHECK_INT(a, b)                                                                               \
	do {                                                                                          \
		long long a_ = (long long)(a), b_ = (long long)(b);                                   \
		if (a_ != b_)                                                                         \
			test_failed(__FILE__, __LINE__, "%s is %lld, not %lld (%s)", #a, a_, b_, #b); \
	} while (0)
#define CHECK_NEAR(a, b, tolerance)                                                               \
	do {                                                                                      \
		double a_ = (a), b_ = (b);                                                        \
		if (!(fabs(a_ - b_) <= (tolerance)))                                              \
			test_failed(__FILE__, __LINE__, "%s is %.9g, not %.9g +- %g", #a, a_, b_, \
			            (double)(tolerance));                                         \
	} while (0)
#define CHECK_STR(a, b)                                                                          \
	do {                                                                                     \
		const char *a_ = (a), *b_ = (b);                                                 \
		if (strcmp(a_, b_))                                                              \
			test_failed(__FILE__, __LINE__, "%s is \"%s\", not \"%s\"", #a, a_, b_); \
	} while (0)
/* The message names `part`. */
#define CHECK_HAS(text, part)                                                                    \
	do {                                                                                     \
		const char *a_ = (text);                                                         \
		if (!strstr(a_, part))                                                           \
			test_failed(__FILE__, __LINE__, "\"%s\" does not say \"%s\"", a_, part); \
	} while (0)

#endif
