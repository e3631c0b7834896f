#include "data/pattern.h"
#include "base/err.h"
#include "base/mem.h"
#include "data/load.h"
#include "data/regex.h"
#include "data/unicode.h"

#include <stdbool.h>
#include <string.h>

/* A kind either matches at every place of a text (scan: the end of the match that begins at i), or searches.
 */
struct pattern_kind {
	size_t (*scan)(const struct pattern *p, const char *text, size_t n, size_t i);
	bool (*search)(const struct pattern *p, struct span s, size_t from, size_t *start, size_t *end);
};

enum { OTHER_MASK = UNICODE_LETTER | UNICODE_NUMBER | UNICODE_SPACE };

static inline uint8_t class_at(const uint8_t *classes, const char *text, size_t i, size_t *n)
{
	unsigned char c = (unsigned char)text[i];
	return c < 0x80 ? (*n = 1, classes[c]) : classes[unicode_read((const unsigned char *)text + i, n)];
}

/* End of the run from i of characters whose class, under `mask`, is `want`. */
static inline size_t run_end(const uint8_t *classes, const char *text, size_t n, size_t i, uint8_t mask,
                             uint8_t want)
{
	for (size_t width; i < n && (class_at(classes, text, i, &width) & mask) == want;)
		i += width;
	return i;
}

static bool is_newline(char c)
{
	return c == '\n' || c == '\r';
}

/* Bytes of 's 't 're 've 'm 'll 'd at i, 0 for none. Without case also U+017F, which folds to s. */
static size_t contraction(const char *text, size_t n, size_t i, bool any_case)
{
	char fold = any_case ? 0x20 : 0;
	char a = i + 1 < n ? text[i + 1] : 0, b = i + 2 < n ? text[i + 2] : 0;
	if (any_case && a == '\xc5' && b == '\xbf')
		return 3;
	if (any_case && (unsigned char)a >= 0x80)
		return 0;
	a |= fold;
	b |= (unsigned char)b < 0x80 ? fold : 0;
	if (a == 's' || a == 't' || a == 'm' || a == 'd')
		return 2;
	return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

/* \s+(?!\S)|\s+ : a run keeps its last character for what follows, except at the end of the text. */
static size_t scan_spaces(size_t n, size_t i, size_t end, const char *text)
{
	size_t last = unicode_before(text, end);
	return end == n || last <= i ? end : last;
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t scan_gpt2(const struct pattern *p, const char *text, size_t n, size_t i)
{
	const uint8_t *classes = p->classes;
	size_t width, j = i + (text[i] == ' ');
	size_t short_form = text[i] == '\'' ? contraction(text, n, i, false) : 0;
	if (short_form)
		return i + short_form;
	if (j < n) {
		uint8_t want = class_at(classes, text, j, &width) & OTHER_MASK;
		if (!(want & UNICODE_SPACE))
			return run_end(classes, text, n, j + width, OTHER_MASK, want);
	}
	return scan_spaces(n, i, run_end(classes, text, n, i, UNICODE_SPACE, UNICODE_SPACE), text);
}

static size_t scan_digits(const struct pattern *p, const char *text, size_t n, size_t i)
{
	size_t width;
	for (int k = 0; k < p->max_digits && i < n; k++, i += width)
		if (!(class_at(p->classes, text, i, &width) & UNICODE_NUMBER))
			break;
	return i;
}

/* \s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t scan_lines(const uint8_t *classes, const char *text, size_t n, size_t i)
{
	size_t end = run_end(classes, text, n, i, UNICODE_SPACE, UNICODE_SPACE);
	for (size_t k = end; k > i; k--)
		if (is_newline(text[k - 1]))
			return k;
	return scan_spaces(n, i, end, text);
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|
 * \s+(?!\S)|\s+ with max_digits in place of 3. */
static size_t scan_llama3(const struct pattern *p, const char *text, size_t n, size_t i)
{
	const uint8_t *classes = p->classes;
	size_t width, next_width;
	size_t short_form = text[i] == '\'' ? contraction(text, n, i, true) : 0;
	if (short_form)
		return i + short_form;
	uint8_t first = class_at(classes, text, i, &width);
	if (first & UNICODE_LETTER)
		return run_end(classes, text, n, i + width, UNICODE_LETTER, UNICODE_LETTER);
	if (first & UNICODE_NUMBER)
		return scan_digits(p, text, n, i);
	size_t j = i + width;
	uint8_t second = j < n ? class_at(classes, text, j, &next_width) : UNICODE_SPACE;
	if ((second & UNICODE_LETTER) && !is_newline(text[i]))
		return run_end(classes, text, n, j + next_width, UNICODE_LETTER, UNICODE_LETTER);
	if (!(first & UNICODE_SPACE) || (text[i] == ' ' && !(second & OTHER_MASK))) {
		j = run_end(classes, text, n, j, OTHER_MASK, 0);
		while (j < n && is_newline(text[j]))
			j++;
		return j;
	}
	return scan_lines(classes, text, n, i);
}

static bool search_literal(const struct pattern *p, struct span s, size_t from, size_t *start, size_t *end)
{
	const char *hit = p->literal_bytes
	                          ? memmem(s.text + from, s.length_bytes - from, p->literal, p->literal_bytes)
	                          : s.text + from;
	if (!hit)
		return false;
	*start = (size_t)(hit - s.text);
	*end = *start + p->literal_bytes;
	return true;
}

static bool search_class(const struct pattern *p, struct span s, size_t from, size_t *start, size_t *end)
{
	for (size_t i = from, width; i < s.length_bytes; i += width) {
		if (!(class_at(p->classes, s.text, i, &width) & p->class_bits))
			continue;
		*start = i;
		*end = i + width;
		return true;
	}
	return false;
}

static bool search_words(const struct pattern *p, struct span s, size_t from, size_t *start, size_t *end)
{
	const uint8_t mask = UNICODE_WORD | UNICODE_SPACE;
	for (size_t i = from, width; i < s.length_bytes; i += width) {
		uint8_t c = class_at(p->classes, s.text, i, &width) & mask;
		if (c == UNICODE_SPACE)
			continue;
		*start = i;
		*end = run_end(p->classes, s.text, s.length_bytes, i, mask, c);
		return true;
	}
	return false;
}

static const struct pattern_kind literal_kind = {.search = search_literal},
                                 class_kind = {.search = search_class}, words_kind = {.search = search_words},
                                 gpt2_kind = {.scan = scan_gpt2}, llama3_kind = {.scan = scan_llama3},
                                 regex_kind = {0};

#define CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
static const struct {
	const char *text;
	const struct pattern_kind *kind;
	int max_digits;
} famous[] = {
        {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", &gpt2_kind, 0},
        {CONTRACTIONS
         "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
         "|\\s+(?!\\S)|\\s+",
         &llama3_kind, 3},
        {CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
                      "|\\s+(?!\\S)|\\s+",
         &llama3_kind, 1},
};

static struct pattern of_kind(const struct pattern_kind *kind)
{
	return (struct pattern){.kind = kind, .classes = unicode_classes()};
}

void pattern_literal(struct pattern *p, const char *literal, size_t length_bytes)
{
	*p = of_kind(&literal_kind);
	p->literal = literal;
	p->literal_bytes = length_bytes;
}

void pattern_class(struct pattern *p, uint8_t class_bits)
{
	*p = of_kind(&class_kind);
	p->class_bits = class_bits;
}

void pattern_words(struct pattern *p)
{
	*p = of_kind(&words_kind);
}

void pattern_gpt2(struct pattern *p)
{
	*p = of_kind(&gpt2_kind);
}

static int load_regex(struct pattern *p, struct load *l, const struct json *text)
{
	for (size_t i = 0; i < sizeof famous / sizeof *famous; i++) {
		if (strlen(famous[i].text) != text->length || strcmp(famous[i].text, text->string))
			continue;
		*p = of_kind(famous[i].kind);
		p->max_digits = famous[i].max_digits;
		return 0;
	}
	struct pattern made = of_kind(&regex_kind);
	if (regex_compile(text->string, text->length, &made.regex, l->e))
		return load_passed_on(l, text, "pattern.Regex");
	*p = made;
	return 0;
}

int pattern_load(struct pattern *p, struct load *l, const struct json *spec)
{
	const struct json *pattern = json_get_type(spec, "pattern", JSON_OBJECT);
	const struct json *string = json_get_type(pattern, "String", JSON_STRING);
	const struct json *regex = json_get_type(pattern, "Regex", JSON_STRING);
	if (!string == !regex)
		return load_wrong(l, pattern ? pattern : spec,
		                  "pattern must be {\"String\": \"…\"} or {\"Regex\": \"…\"}");
	if (regex)
		return load_regex(p, l, regex);
	pattern_literal(p, arena_strndup(l->arena, string->string, string->length), string->length);
	return 0;
}

void pattern_free(struct pattern *p)
{
	regex_free(p->regex);
	p->regex = NULL;
}

int pattern_find(const struct pattern *p, struct regex_scratch *scratch, struct span s, size_t from,
                 int *found, size_t *start, size_t *end, struct err *e)
{
	if (p->regex)
		return regex_find(p->regex, scratch, s.text, s.length_bytes, from, found, start, end, e);
	if (p->kind->search) {
		*found = p->kind->search(p, s, from, start, end);
		return 0;
	}
	*found = from < s.length_bytes;
	*start = from;
	*end = *found ? p->kind->scan(p, s.text, s.length_bytes, from) : from;
	return 0;
}

int pattern_next(const struct pattern *p, struct regex_scratch *scratch, struct span s,
                 struct pattern_walk *w, int *found, size_t *start, size_t *end, struct err *e)
{
	for (*found = 0; w->at <= s.length_bytes;) {
		int rc = pattern_find(p, scratch, s, w->at, found, start, end, e);
		if (rc || !*found)
			return rc;
		w->at = *end;
		if (*start != *end || *start != w->last_end) {
			w->last_end = *end;
			return 0;
		}
		size_t width = 1;
		if (w->at < s.length_bytes)
			unicode_read((const unsigned char *)s.text + w->at, &width);
		w->at += width;
		*found = 0;
	}
	return 0;
}
