/* Patterns: what a tokenizer file splits or replaces by. A literal string, a class of characters, one of the
 * famous regular expressions (scanned by hand), or any other regular expression. Local. Floor: data. */
#ifndef PENTAD_DATA_PATTERN_H
#define PENTAD_DATA_PATTERN_H

#include "base/json.h"

#include <stddef.h>
#include <stdint.h>

struct err;
struct load;
struct regex;
struct regex_scratch;

struct span {
	const char *text; /* UTF-8 */
	size_t length_bytes;
};

struct pattern {
	const struct pattern_kind *kind;
	const uint8_t *classes;
	const char *literal; /* kind literal; lives in the tokenizer's arena */
	size_t literal_bytes;
	uint8_t class_bits; /* kind class: any of these */
	int max_digits;     /* kind llama3: digits in a piece */
	struct regex *regex;
};

/* From {"String": …} or {"Regex": …} at spec.pattern. */
int pattern_load(struct pattern *p, struct load *l, const struct json *spec);
void pattern_literal(struct pattern *p, const char *literal, size_t length_bytes);
void pattern_class(struct pattern *p, uint8_t class_bits);
void pattern_words(struct pattern *p); /* \w+|[^\w\s]+ */
void pattern_gpt2(struct pattern *p);
void pattern_free(struct pattern *p);

/* The first match at or behind `from`: *found, *start, *end. A match may be empty. Text is UTF-8. */
int pattern_find(const struct pattern *p, struct regex_scratch *scratch, struct span s, size_t from,
                 int *found, size_t *start, size_t *end, struct err *e);

/* Goes through all matches as Hugging Face does: an empty match right behind another is passed over. */
struct pattern_walk {
	size_t at, last_end;
};
#define PATTERN_WALK ((struct pattern_walk){0, SIZE_MAX})
int pattern_next(const struct pattern *p, struct regex_scratch *scratch, struct span s,
                 struct pattern_walk *w, int *found, size_t *start, size_t *end, struct err *e);

#endif
