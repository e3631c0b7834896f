/* Normalizers: a chain of rows that rewrite text before it is cut; a new kind is one row of the table in
 * normalize.c. Local. Floor: data. */
#ifndef PENTAD_DATA_NORMALIZE_H
#define PENTAD_DATA_NORMALIZE_H

#include "base/mem.h"
#include "data/pattern.h"
#include "data/unicode.h"

#include <stdbool.h>

struct normalizer {
	struct normalizer *next; /* in the tokenizer's arena */
	int (*run)(const struct normalizer *n, struct regex_scratch *regex, struct span in, struct buf *out,
	           struct err *e);
	enum unicode_form form;
	struct pattern pattern; /* Replace */
	struct span content;    /* Replace, Prepend */
	bool left, right;       /* Strip */
};

/* The chain of spec (null: empty) in the arena of l; freed with normalizer_free (also after an error). */
int normalizer_load(struct load *l, const struct json *spec, struct normalizer **out);
void normalizer_free(struct normalizer *n);

/* Rewrites *text; the result lies in one of the two buffers, or is *text itself. */
int normalizer_run(const struct normalizer *n, struct regex_scratch *regex, struct buf buffers[2],
                   struct span *text, struct err *e);

#endif
