/* What training gives, and how it is written. Inside floor data. Local. */
#ifndef PENTAD_DATA_BPE_TRAIN_FILE_H
#define PENTAD_DATA_BPE_TRAIN_FILE_H

#include "data/pattern.h"

struct buf;

struct bpe_result {
	struct span *tokens; /* by id; the first n_specials are special tokens */
	size_t n_tokens, tokens_cap, n_specials;
	uint64_t *merges; /* pair_key of ids, in the order of their ranks */
	size_t n_merges, merges_cap;
};

/* Appends a tokenizer.json, laid out as Hugging Face `tokenizers` 0.20 and later do. */
void bpe_result_write(const struct bpe_result *r, struct buf *out);

#endif
