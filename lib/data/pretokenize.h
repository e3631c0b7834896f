/* Pre-tokenizers: a chain of rows that cut text into the pieces the model sees. Every row is a pattern and
 * what becomes of its matches; a new kind is one row of the table in pretokenize.c. Local. Floor: data. */
#ifndef PENTAD_DATA_PRETOKENIZE_H
#define PENTAD_DATA_PRETOKENIZE_H

#include "base/mem.h"
#include "data/pattern.h"

#include <stdbool.h>

/* What becomes of a match (Hugging Face's names). */
enum split_behavior {
	SPLIT_REMOVED,
	SPLIT_ISOLATED,
	SPLIT_MERGED_WITH_PREVIOUS,
	SPLIT_MERGED_WITH_NEXT,
	SPLIT_CONTIGUOUS
};

struct pre_tokenizer {
	struct pre_tokenizer *next; /* in the tokenizer's arena */
	struct pattern pattern;     /* kind NULL: the text stays whole */
	enum split_behavior behavior;
	bool invert;       /* what lies between matches counts as the match */
	bool prefix_space; /* a text that does not begin with a space gets one */
	bool byte_level;   /* the model sees bytes of the pieces; must be the last row */
};

/* The chain of spec (null: empty) in the arena of l; freed with pre_tokenizer_free (also after an error). */
int pre_tokenizer_load(struct load *l, const struct json *spec, struct pre_tokenizer **out);
void pre_tokenizer_free(struct pre_tokenizer *p);

/* Where the pieces go, and one thread's scratch. */
struct splitter {
	int (*piece)(void *context, struct span piece, struct err *e);
	void *context;
	struct regex_scratch *regex;
	struct buf prefixed;
};
/* Cuts one text; every piece that is not empty goes to sp->piece, in order. Stops at the first error. */
int pre_tokenizer_split(const struct pre_tokenizer *p, struct splitter *sp, struct span text, struct err *e);

#endif
