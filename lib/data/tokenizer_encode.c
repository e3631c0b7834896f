#include "base/err.h"
#include "data/regex.h"
#include "data/tokenizer.h"
#include "data/tokenizer_chain.h"

#include <stdlib.h>

struct encoder {
	const struct tokenizer *t;
	struct bpe_scratch *model;
	struct regex_scratch *regex;
	struct splitter splitter;
	struct buf repaired, normalized[2];
	struct id_list ids;
};

static int add_piece(void *context, struct span piece, struct err *e)
{
	struct encoder *enc = context;
	return bpe_encode(&enc->t->model, enc->model, piece, &enc->ids, e);
}

static int add_token(void *context, int32_t id, struct err *e)
{
	struct encoder *enc = context;
	(void)e;
	id_list_add(&enc->ids, &id, 1);
	return 0;
}

static int add_normalized(void *context, struct span text, struct err *e)
{
	struct encoder *enc = context;
	if (!enc->t->pre_tokenizer)
		return add_piece(enc, text, e);
	return pre_tokenizer_split(enc->t->pre_tokenizer, &enc->splitter, text, e);
}

static int add_literal(void *context, struct span text, struct err *e)
{
	struct encoder *enc = context;
	const struct added_sink sink = {add_normalized, add_token, enc};
	if (normalizer_run(enc->t->normalizer, enc->regex, enc->normalized, &text, e))
		return e->code;
	return added_cut(&enc->t->normalized, &sink, text, e);
}

struct encoder *encoder_new(const struct tokenizer *t)
{
	struct encoder *enc = mem_array(1, sizeof *enc);
	enc->t = t;
	enc->model = bpe_scratch_new();
	enc->regex = regex_scratch_new();
	enc->splitter = (struct splitter){.piece = add_piece, .context = enc, .regex = enc->regex};
	return enc;
}

void encoder_free(struct encoder *enc)
{
	if (!enc)
		return;
	bpe_scratch_free(enc->model);
	regex_scratch_free(enc->regex);
	buf_free(&enc->splitter.prefixed);
	buf_free(&enc->repaired);
	buf_free(&enc->normalized[0]);
	buf_free(&enc->normalized[1]);
	free(enc->ids.items);
	free(enc);
}

int encoder_encode(struct encoder *enc, const char *text, size_t length_bytes, int32_t **ids, size_t *n,
                   struct err *e)
{
	const struct added_sink sink = {add_literal, add_token, enc};
	struct span s = {text, length_bytes};
	if (unicode_valid_bytes(text, length_bytes) < length_bytes) {
		enc->repaired.length = 0;
		unicode_add_lossy(&enc->repaired, text, length_bytes);
		s = (struct span){enc->repaired.data, enc->repaired.length};
	}
	enc->ids.n = 0;
	id_list_add(&enc->ids, NULL, 0);
	if (added_cut(&enc->t->literal, &sink, s, e))
		return e->code;
	*ids = enc->ids.items;
	*n = enc->ids.n;
	return 0;
}
