#include "data/bpe.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/mem.h"
#include "data/heap.h"

#include <stdlib.h>
#include <string.h>

/* Pieces up to SHORT symbols merge in an array, whose shifts cost less than a heap; longer ones in a heap,
 * so that a text without spaces takes n log n. */
enum { SHORT = 64, CACHE_SLOTS = 1 << 15, CACHE_KEY = 30, CACHE_IDS = 8 };

/* One cache line. */
struct bpe_slot {
	uint8_t length_bytes, n; /* length 0: free */
	char key[CACHE_KEY];
	int32_t ids[CACHE_IDS];
};

struct bpe_scratch {
	struct bpe_slot *cache;
	struct id_list symbols;
	int32_t *next, *previous; /* of a long piece: indices into symbols, -1 at the ends */
	size_t links_cap;
	struct heap heap;
};

void bpe_free(struct bpe *b)
{
	pair_map_free(&b->merges);
	string_map_free(&b->whole);
}

void id_list_add(struct id_list *l, const int32_t *ids, size_t n)
{
	if (l->n + n > l->cap) {
		l->cap = 2 * (l->n + n) + 64;
		l->items = mem_resize(l->items, l->cap, sizeof *l->items);
	}
	if (n)
		memcpy(l->items + l->n, ids, n * sizeof *ids);
	l->n += n;
}

struct bpe_scratch *bpe_scratch_new(void)
{
	struct bpe_scratch *s = mem_array(1, sizeof *s);
	s->cache = mem_aligned(CACHE_SLOTS * sizeof *s->cache);
	return s;
}

void bpe_scratch_free(struct bpe_scratch *s)
{
	if (!s)
		return;
	free(s->cache);
	free(s->symbols.items);
	free(s->next);
	free(s->previous);
	heap_free(&s->heap);
	free(s);
}

/* One symbol a byte that the vocabulary has. */
static void begin_symbols(const struct bpe *b, struct span piece, struct id_list *symbols)
{
	bool after_unknown = false;
	symbols->n = 0;
	id_list_add(symbols, NULL, 0);
	if (piece.length_bytes > symbols->cap) {
		symbols->cap = piece.length_bytes;
		symbols->items = mem_resize(symbols->items, symbols->cap, sizeof *symbols->items);
	}
	for (size_t i = 0; i < piece.length_bytes; i++) {
		int32_t id = b->byte_ids[i == 0][i + 1 == piece.length_bytes][(unsigned char)piece.text[i]];
		bool is_unknown = id < 0;
		id = is_unknown ? b->unknown : id;
		if (id >= 0 && !(is_unknown && after_unknown && b->fuse_unknown))
			symbols->items[symbols->n++] = id;
		after_unknown = is_unknown;
	}
}

static uint64_t merge_of(const struct bpe *b, int32_t left, int32_t right)
{
	return pair_map_get(&b->merges, pair_key(left, right));
}

static void merge_short(const struct bpe *b, struct id_list *symbols)
{
	uint64_t merges[SHORT];
	int32_t *ids = symbols->items;
	size_t n = symbols->n;
	for (size_t i = 0; i + 1 < n; i++)
		merges[i] = merge_of(b, ids[i], ids[i + 1]);
	while (n > 1) {
		size_t best = 0;
		for (size_t i = 1; i + 1 < n; i++)
			best = merges[i] < merges[best] ? i : best;
		if (merges[best] == PAIR_NONE)
			break;
		ids[best] = (int32_t)(uint32_t)merges[best];
		n--;
		for (size_t i = best + 1; i < n; i++) {
			ids[i] = ids[i + 1];
			merges[i - 1] = merges[i];
		}
		if (best > 0)
			merges[best - 1] = merge_of(b, ids[best - 1], ids[best]);
		if (best + 1 < n)
			merges[best] = merge_of(b, ids[best], ids[best + 1]);
	}
	symbols->n = n;
}

/* The key is rank and place, so that equal pairs merge from the left; the value is the pair itself, by which
 * an entry that no longer holds is known. */
static void push_pair(const struct bpe *b, struct bpe_scratch *s, int32_t left)
{
	int32_t right = left < 0 ? -1 : s->next[left];
	if (right < 0)
		return;
	uint64_t pair = pair_key(s->symbols.items[left], s->symbols.items[right]);
	uint64_t merge = pair_map_get(&b->merges, pair);
	if (merge != PAIR_NONE)
		heap_push(&s->heap,
		          (struct heap_entry){merge >> 32 << 32 | (uint32_t)left, pair, (uint32_t)merge});
}

static void merge_long(const struct bpe *b, struct bpe_scratch *s)
{
	int32_t n = (int32_t)s->symbols.n, *ids = s->symbols.items;
	if (s->links_cap < (size_t)n) {
		s->links_cap = (size_t)n;
		s->next = mem_resize(s->next, s->links_cap, sizeof *s->next);
		s->previous = mem_resize(s->previous, s->links_cap, sizeof *s->previous);
	}
	for (int32_t i = 0; i < n; i++) {
		s->next[i] = i + 1 < n ? i + 1 : -1;
		s->previous[i] = i - 1;
	}
	s->heap.n = 0;
	for (int32_t i = 0; i < n; i++)
		push_pair(b, s, i);
	while (s->heap.n) {
		struct heap_entry top = heap_pop(&s->heap);
		int32_t left = (int32_t)(uint32_t)top.key, right = s->next[left];
		if (ids[left] < 0 || right < 0 || pair_key(ids[left], ids[right]) != top.value)
			continue;
		ids[left] = (int32_t)top.note;
		ids[right] = -1;
		s->next[left] = s->next[right];
		if (s->next[left] >= 0)
			s->previous[s->next[left]] = left;
		push_pair(b, s, s->previous[left]);
		push_pair(b, s, left);
	}
	s->symbols.n = 0;
	for (int32_t i = 0; i < n; i++)
		if (ids[i] >= 0)
			ids[s->symbols.n++] = ids[i];
}

static void encode_piece(const struct bpe *b, struct bpe_scratch *s, struct span piece)
{
	int32_t id = string_map_get(&b->whole, piece.text, piece.length_bytes);
	if (id >= 0) {
		s->symbols.n = 0;
		id_list_add(&s->symbols, &id, 1);
		return;
	}
	begin_symbols(b, piece, &s->symbols);
	if (s->symbols.n <= SHORT)
		merge_short(b, &s->symbols);
	else
		merge_long(b, s);
}

int bpe_encode(const struct bpe *b, struct bpe_scratch *s, struct span piece, struct id_list *out,
               struct err *e)
{
	struct bpe_slot *slot = NULL;
	if (piece.length_bytes > INT32_MAX)
		return err_set(e, EXIT_BAD_DATA,
		               "a piece of %zu bytes without a place to cut it; %d are allowed",
		               piece.length_bytes, INT32_MAX);
	if (piece.length_bytes <= CACHE_KEY) {
		slot = &s->cache[hash_bytes(piece.text, piece.length_bytes, 0) % CACHE_SLOTS];
		if (slot->length_bytes == piece.length_bytes &&
		    !memcmp(slot->key, piece.text, piece.length_bytes)) {
			id_list_add(out, slot->ids, slot->n);
			return 0;
		}
	}
	encode_piece(b, s, piece);
	id_list_add(out, s->symbols.items, s->symbols.n);
	if (slot && s->symbols.n <= CACHE_IDS) {
		slot->length_bytes = (uint8_t)piece.length_bytes;
		slot->n = (uint8_t)s->symbols.n;
		memcpy(slot->key, piece.text, piece.length_bytes);
		if (slot->n)
			memcpy(slot->ids, s->symbols.items, slot->n * sizeof *slot->ids);
	}
	return 0;
}
