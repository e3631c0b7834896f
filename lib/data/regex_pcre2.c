/* Regular expressions by PCRE2. */
#include "base/err.h"
#include "base/mem.h"
#include "data/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* A pattern longer than this, or a match that takes more steps, is not one that a tokenizer needs. */
enum { MAX_PATTERN = 1 << 16, MAX_STEPS = 2000000, MAX_HEAP_KIB = 1 << 16, JIT_STACK = 1 << 20 };

struct regex {
	pcre2_code *code;
};

struct regex_scratch {
	pcre2_match_data *data;
	pcre2_match_context *context;
	pcre2_jit_stack *stack;
};

/* The members of Oniguruma's classes, as they stand between brackets; its \w has some of Latin-1's numbers.
 */
#define SPACES \
	"\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define WORDS                                                                                      \
	"\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}\\x{24b6}-\\x{24e9}" \
	"\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"
#define HEX "0-9A-Fa-f"
static const struct {
	char letter;
	bool negated; /* has no members that could be listed inside a larger class */
	const char *members;
} escapes[] = {
        {'s', false, SPACES}, {'S', true, SPACES}, {'w', false, WORDS},
        {'W', true, WORDS},   {'h', false, HEX},   {'H', true, HEX},
};

const char *regex_missing(void)
{
	return NULL;
}

static bool translate_escape(char letter, bool in_class, struct buf *out)
{
	for (size_t i = 0; i < sizeof escapes / sizeof *escapes; i++) {
		if (escapes[i].letter != letter || (in_class && escapes[i].negated))
			continue;
		if (in_class)
			buf_puts(out, escapes[i].members);
		else
			buf_printf(out, "[%s%s]", escapes[i].negated ? "^" : "", escapes[i].members);
		return true;
	}
	return false;
}

static void translate(const char *pattern, size_t length_bytes, struct buf *out)
{
	bool in_class = false;
	for (size_t i = 0; i < length_bytes; i++) {
		char c = pattern[i];
		if (c == '\\' && i + 1 < length_bytes) {
			if (!translate_escape(pattern[i + 1], in_class, out))
				buf_add(out, pattern + i, 2);
			i++;
			continue;
		}
		if (!in_class && c == '[')
			in_class = true;
		else if (in_class && c == ']')
			in_class = false;
		buf_add(out, &c, 1);
	}
}

int regex_compile(const char *pattern, size_t length_bytes, struct regex **out, struct err *e)
{
	int code;
	PCRE2_SIZE at;
	struct buf b = {0};
	PCRE2_UCHAR why[160];
	if (length_bytes > MAX_PATTERN)
		return err_set(e, EXIT_BAD_DATA, "a regular expression of %zu bytes; %d are allowed",
		               length_bytes, MAX_PATTERN);
	translate(pattern, length_bytes, &b);
	pcre2_code *compiled = pcre2_compile(
	        (PCRE2_SPTR)(b.data ? b.data : ""), b.length,
	        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &code, &at, NULL);
	buf_free(&b);
	if (!compiled) {
		pcre2_get_error_message(code, why, sizeof why);
		return err_set(e, EXIT_BAD_DATA, "the regular expression '%.200s': %s", pattern, (char *)why);
	}
	pcre2_jit_compile(compiled,
	                  PCRE2_JIT_COMPLETE); /* where it cannot, matching is slower, not different */
	*out = mem_array(1, sizeof **out);
	(*out)->code = compiled;
	return 0;
}

void regex_free(struct regex *r)
{
	if (r)
		pcre2_code_free(r->code);
	free(r);
}

struct regex_scratch *regex_scratch_new(void)
{
	struct regex_scratch *s = mem_array(1, sizeof *s);
	s->data = pcre2_match_data_create(1, NULL);
	s->context = pcre2_match_context_create(NULL);
	s->stack = pcre2_jit_stack_create(32 * 1024, JIT_STACK, NULL);
	ASSERT(s->data && s->context);
	pcre2_set_match_limit(s->context, MAX_STEPS);
	pcre2_set_heap_limit(s->context, MAX_HEAP_KIB);
	if (s->stack)
		pcre2_jit_stack_assign(s->context, NULL, s->stack);
	return s;
}

void regex_scratch_free(struct regex_scratch *s)
{
	if (!s)
		return;
	pcre2_match_context_free(s->context);
	pcre2_match_data_free(s->data);
	pcre2_jit_stack_free(s->stack);
	free(s);
}

int regex_find(const struct regex *r, struct regex_scratch *s, const char *text, size_t length_bytes,
               size_t from, int *found, size_t *start, size_t *end, struct err *e)
{
	PCRE2_UCHAR why[160];
	int rc = pcre2_match(r->code, (PCRE2_SPTR)text, length_bytes, from, PCRE2_NO_UTF_CHECK, s->data,
	                     s->context);
	if (rc < 0 && rc != PCRE2_ERROR_NOMATCH) {
		pcre2_get_error_message(rc, why, sizeof why);
		return err_set(e, EXIT_BAD_DATA,
		               "the tokenizer's regular expression at byte %zu of a text: %s", from,
		               (char *)why);
	}
	const PCRE2_SIZE *pair = pcre2_get_ovector_pointer(s->data);
	/* \K can put the start behind the end, or before `from` by a lookbehind. */
	*found = rc >= 0 && pair[0] >= from && pair[0] <= pair[1];
	if (*found) {
		*start = pair[0];
		*end = pair[1];
	}
	return 0;
}
