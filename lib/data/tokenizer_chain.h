/* What a tokenizer is made of: added tokens, normalizers, pre-tokenizers, a model, a decoder. Inside floor
 * data. Local. */
#ifndef PENTAD_DATA_TOKENIZER_CHAIN_H
#define PENTAD_DATA_TOKENIZER_CHAIN_H

#include "base/mem.h"
#include "data/added.h"
#include "data/bpe.h"
#include "data/normalize.h"
#include "data/pretokenize.h"

struct token {
	struct span content; /* as the file writes it; text NULL where no token has this id */
	struct span decoded; /* what the decoder makes of it: any bytes */
};

struct decoder {
	bool byte_level; /* a token of visible characters stands for their bytes */
	bool joined;     /* false: no decoder at all, then tokens are put together with spaces */
};

struct tokenizer {
	char *name;
	uint64_t hash;
	struct arena arena;
	struct token *tokens; /* by id */
	int32_t n_tokens;     /* largest id + 1 */
	struct string_map ids;
	struct added_token *added;
	size_t n_added;
	struct added_matcher literal, normalized; /* added tokens sought before and after normalization */
	struct normalizer *normalizer;
	struct pre_tokenizer *pre_tokenizer;
	struct bpe model;
	struct decoder decoder;
};

/* The member "decoder" into t->decoder, and every token's bytes under it. EXIT_BAD_DATA. */
int decoder_load(struct tokenizer *t, struct load *l, const struct json *spec);

#endif
