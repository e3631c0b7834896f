/* Regular expressions of tokenizer files that no scanner of ours knows. PCRE2 reads them as Oniguruma would,
 * as far as the two differ in what such files use: \s is White_Space, \w has marks, \h is a hexadecimal
 * digit, ^ and $ match at lines. Steps and memory of a match are limited, so that a hostile file cannot hang
 * us. Unicode classes are of PCRE2's version. Local. Floor: data. */
#ifndef PENTAD_DATA_REGEX_H
#define PENTAD_DATA_REGEX_H

#include <stddef.h>

struct err;
struct regex;         /* read-only once compiled */
struct regex_scratch; /* of one thread, for any number of expressions */

/* What is missing in this build, NULL where nothing is. */
const char *regex_missing(void);
/* EXIT_BAD_DATA with the cause and the byte in the pattern; EXIT_UNAVAILABLE in a build without PCRE2. */
int regex_compile(const char *pattern, size_t length_bytes, struct regex **out, struct err *e);
void regex_free(struct regex *r); /* NULL is fine */
struct regex_scratch *regex_scratch_new(void);
void regex_scratch_free(struct regex_scratch *s); /* NULL is fine */
/* The first match at or behind `from` in UTF-8 text: *found, *start, *end. EXIT_BAD_DATA above the limits. */
int regex_find(const struct regex *r, struct regex_scratch *s, const char *text, size_t length_bytes,
               size_t from, int *found, size_t *start, size_t *end, struct err *e);

#endif
