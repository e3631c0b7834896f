#include "base/err.h"
#include "data/byte_level.h"
#include "data/load.h"
#include "data/tokenizer.h"
#include "data/tokenizer_chain.h"

#include <string.h>

struct decoder_kind {
	const char *type;
	bool byte_level, sequence;
};
static const struct decoder_kind kinds[] = {
        {"ByteLevel", true, false},
        {"Fuse", false, false},
        {"Sequence", false, true},
};

static int load_chain(struct decoder *d, struct load *l, const struct json *spec)
{
	int k = load_type(l, spec, "decoder", kinds, sizeof kinds / sizeof *kinds, sizeof *kinds);
	if (k < 0)
		return l->e->code;
	if (!kinds[k].sequence) {
		if (d->joined && !d->byte_level && kinds[k].byte_level)
			return load_wrong(l, spec, "decoder: ByteLevel must come before Fuse");
		d->joined = true;
		d->byte_level |= kinds[k].byte_level;
		return 0;
	}
	const struct json *members = json_get_type(spec, "decoders", JSON_ARRAY);
	if (!members)
		return load_wrong(l, spec, "decoder.decoders must be an array");
	d->joined |= members->count == 0;
	JSON_EACH (m, members)
		if (load_chain(d, l, m))
			return l->e->code;
	return 0;
}

int decoder_load(struct tokenizer *t, struct load *l, const struct json *spec)
{
	struct decoder *d = &t->decoder;
	if (spec && spec->type != JSON_NULL && load_chain(d, l, spec))
		return l->e->code;
	for (int32_t i = 0; i < t->n_tokens; i++) {
		struct token *k = &t->tokens[i];
		if (!d->byte_level || !k->content.text)
			continue;
		char *raw = arena_alloc(&t->arena, k->decoded.length_bytes, 1);
		size_t n;
		if (byte_level_decode(k->decoded.text, k->decoded.length_bytes, raw, &n))
			k->decoded = (struct span){raw, n};
	}
	return 0;
}

int tokenizer_decode_bytes(const struct tokenizer *t, int32_t id, struct buf *out, struct err *e)
{
	if (id < 0 || id >= t->n_tokens || !t->tokens[id].content.text)
		return err_set(e, EXIT_BAD_DATA, "id %d: %s has no such token; its ids are 0 to %d", id,
		               t->name, t->n_tokens - 1);
	buf_add(out, t->tokens[id].decoded.text, t->tokens[id].decoded.length_bytes);
	return 0;
}

int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, struct buf *out, struct err *e)
{
	struct buf raw = {0};
	int rc = 0;
	for (size_t i = 0; !rc && i < n; i++) {
		if (i && !t->decoder.joined)
			buf_add(&raw, " ", 1);
		rc = tokenizer_decode_bytes(t, ids[i], &raw, e);
	}
	if (!rc)
		unicode_add_lossy(out, raw.data, raw.length);
	buf_free(&raw);
	return rc;
}
