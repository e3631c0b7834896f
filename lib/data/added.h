/* Added tokens: strings that are cut out of a text before anything else sees it. Where several match, the
 * leftmost does, and of those the longest. Local. Floor: data. */
#ifndef PENTAD_DATA_ADDED_H
#define PENTAD_DATA_ADDED_H

#include "data/pattern.h"
#include "data/string_map.h"

#include <stdbool.h>

struct added_token {
	const char *content; /* lives in the tokenizer's arena */
	size_t length_bytes;
	int32_t id;
	bool single_word;    /* not where a word goes on before or behind it */
	bool lstrip, rstrip; /* white space on that side belongs to it */
	bool normalized;     /* sought in normalized text */
};

/* A trie: (node, byte) → node; node 0 is its root. All zero finds nothing. */
struct added_matcher {
	struct pair_map edges;
	const struct added_token **tokens; /* by node, NULL where none ends */
	size_t n, cap;
	bool first[256];
};
/* The first token wins where two have the same pattern; an empty pattern is left out. */
void added_matcher_add(struct added_matcher *m, struct span pattern, const struct added_token *token);
void added_matcher_free(struct added_matcher *m);

/* Where the parts of a text go, in order; text parts are not empty. */
struct added_sink {
	int (*text)(void *context, struct span text, struct err *e);
	int (*token)(void *context, int32_t id, struct err *e);
	void *context;
};
/* Cuts UTF-8 text. Stops at the first error. */
int added_cut(const struct added_matcher *m, const struct added_sink *sink, struct span text, struct err *e);

#endif
