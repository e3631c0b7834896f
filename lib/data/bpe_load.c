/* The object "model" of a byte-level BPE tokenizer.json. */
#include "base/err.h"
#include "base/mem.h"
#include "data/bpe.h"
#include "data/byte_level.h"
#include "data/load.h"
#include "data/unicode.h"

#include <string.h>

struct merge_reader {
	struct load *l;
	const struct string_map *ids;
	size_t prefix_bytes; /* that the right part has and the result has not */
	struct buf joined;
};

/* The two parts of ["a", "b"] or "a b". */
static int merge_parts(struct load *l, const struct json *m, struct span parts[2])
{
	const char *space = m->type == JSON_STRING ? memchr(m->string, ' ', m->length) : NULL;
	if (m->type == JSON_ARRAY && m->count == 2 && m->child->type == JSON_STRING &&
	    m->child->next->type == JSON_STRING) {
		parts[0] = (struct span){m->child->string, m->child->length};
		parts[1] = (struct span){m->child->next->string, m->child->next->length};
		return 0;
	}
	size_t before = space ? (size_t)(space - m->string) : 0;
	if (!space || memchr(space + 1, ' ', m->length - before - 1))
		return load_wrong(l, m, "model.merges: a merge is [\"a\", \"b\"] or \"a b\"");
	parts[0] = (struct span){m->string, before};
	parts[1] = (struct span){space + 1, m->length - before - 1};
	return 0;
}

static int merge_id(struct merge_reader *r, const struct json *m, struct span part, int32_t *id)
{
	*id = string_map_get(r->ids, part.text, part.length_bytes);
	if (*id >= 0)
		return 0;
	return load_wrong(r->l, m, "model.merges: '%.*s' is not in model.vocab",
	                  (int)(part.length_bytes < 80 ? part.length_bytes : 80), part.text);
}

static int load_merge(struct merge_reader *r, const struct json *m, uint64_t rank, struct pair_map *merges)
{
	struct span parts[2] = {{"", 0}, {"", 0}};
	int32_t left, right, made;
	if (merge_parts(r->l, m, parts) || merge_id(r, m, parts[0], &left) ||
	    merge_id(r, m, parts[1], &right))
		return r->l->e->code;
	if (parts[1].length_bytes < r->prefix_bytes)
		return load_wrong(r->l, m,
		                  "model.merges: the second part is shorter than continuing_subword_prefix");
	r->joined.length = 0;
	buf_add(&r->joined, parts[0].text, parts[0].length_bytes);
	buf_add(&r->joined, parts[1].text + r->prefix_bytes, parts[1].length_bytes - r->prefix_bytes);
	if (merge_id(r, m, (struct span){r->joined.data, r->joined.length}, &made))
		return r->l->e->code;
	*pair_map_put(merges, pair_key(left, right)) = rank << 32 | (uint32_t)made;
	return 0;
}

static int load_merges(struct bpe *b, struct load *l, const struct json *model, const struct string_map *ids,
                       const struct json *prefix)
{
	const struct json *merges = json_get_type(model, "merges", JSON_ARRAY);
	struct merge_reader r = {.l = l, .ids = ids, .prefix_bytes = prefix ? prefix->length : 0};
	uint64_t rank = 0;
	int rc = 0;
	if (!merges)
		return load_wrong(l, model, "model.merges must be an array");
	pair_map_reserve(&b->merges, merges->count + 1);
	JSON_EACH (m, merges)
		if ((rc = load_merge(&r, m, rank++, &b->merges)))
			break;
	buf_free(&r.joined);
	return rc;
}

static int32_t byte_id(const struct string_map *ids, int byte, const struct json *prefix,
                       const struct json *suffix)
{
	struct buf s = {0};
	if (prefix)
		buf_add(&s, prefix->string, prefix->length);
	unicode_put(&s, byte_level_char((uint8_t)byte));
	if (suffix)
		buf_add(&s, suffix->string, suffix->length);
	int32_t id = string_map_get(ids, s.data, s.length);
	buf_free(&s);
	return id;
}

/* The first symbol of a piece has no prefix, the last one has the suffix. True where no byte is missing. */
static bool load_bytes(struct bpe *b, const struct string_map *ids, const struct json *prefix,
                       const struct json *suffix)
{
	bool all = true;
	for (int first = 0; first < 2; first++)
		for (int last = 0; last < 2; last++)
			for (int byte = 0; byte < 256; byte++) {
				int32_t id = byte_id(ids, byte, first ? NULL : prefix, last ? suffix : NULL);
				b->byte_ids[first][last][byte] = id;
				all &= id >= 0;
			}
	return all;
}

/* Pieces that are tokens as a whole, for ignore_merges. */
static void load_whole(struct bpe *b, struct load *l, const struct json *vocab)
{
	JSON_EACH (v, vocab) {
		char *raw = arena_alloc(l->arena, v->key_length, 1);
		size_t n;
		if (byte_level_decode(v->key, v->key_length, raw, &n) && n)
			*string_map_put(&b->whole, raw, n) = (int32_t)v->integer;
	}
}

/* What happens to bytes that the vocabulary lacks. */
static int load_unknown(struct bpe *b, struct load *l, const struct json *model, const struct string_map *ids,
                        bool all_bytes)
{
	const struct json *unknown = NULL;
	bool byte_fallback = false;
	if (load_string(l, model, "unk_token", &unknown) ||
	    load_bool(l, model, "fuse_unk", &b->fuse_unknown) ||
	    load_bool(l, model, "byte_fallback", &byte_fallback))
		return l->e->code;
	b->unknown = -1;
	if (all_bytes)
		return 0;
	if (byte_fallback)
		return load_wrong(l, json_get(model, "byte_fallback"),
		                  "model.byte_fallback is read only where model.vocab has all 256 bytes");
	if (!unknown)
		return 0;
	b->unknown = string_map_get(ids, unknown->string, unknown->length);
	return b->unknown >= 0 ? 0 : load_wrong(l, unknown, "model.unk_token is not in model.vocab");
}

int bpe_load(struct bpe *b, struct load *l, const struct json *model, const struct string_map *ids)
{
	const struct json *prefix = NULL, *suffix = NULL, *dropout = json_get(model, "dropout");
	bool ignore_merges = false;
	if (dropout && dropout->type != JSON_NULL && (dropout->type != JSON_NUMBER || dropout->number != 0))
		return load_wrong(l, dropout, "model.dropout must be null or 0: encoding is deterministic");
	if (load_string(l, model, "continuing_subword_prefix", &prefix) ||
	    load_string(l, model, "end_of_word_suffix", &suffix) ||
	    load_bool(l, model, "ignore_merges", &ignore_merges))
		return l->e->code;
	if (load_unknown(b, l, model, ids, load_bytes(b, ids, prefix, suffix)))
		return l->e->code;
	if (ignore_merges)
		load_whole(b, l, json_get(model, "vocab"));
	return load_merges(b, l, model, ids, prefix);
}
