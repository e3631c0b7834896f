/* A build without PCRE2: only the patterns that have a scanner of their own can be read. */
#include "base/err.h"
#include "data/regex.h"

const char *regex_missing(void)
{
	return "PCRE2 (build with libpcre2-dev)";
}

int regex_compile(const char *pattern, size_t length_bytes, struct regex **out, struct err *e)
{
	(void)pattern, (void)length_bytes, (void)out;
	return err_set(e, EXIT_UNAVAILABLE, "this regular expression needs %s", regex_missing());
}

void regex_free(struct regex *r)
{
	(void)r;
}

struct regex_scratch *regex_scratch_new(void)
{
	return NULL;
}

void regex_scratch_free(struct regex_scratch *s)
{
	(void)s;
}

int regex_find(const struct regex *r, struct regex_scratch *s, const char *text, size_t length_bytes,
               size_t from, int *found, size_t *start, size_t *end, struct err *e)
{
	(void)r, (void)s, (void)text, (void)length_bytes, (void)from, (void)found, (void)start, (void)end;
	return err_set(e, EXIT_UNAVAILABLE, "regular expressions need %s", regex_missing());
}
