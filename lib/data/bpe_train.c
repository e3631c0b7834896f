#include "data/bpe_train.h"
#include "base/err.h"
#include "base/mem.h"
#include "data/bpe_train_file.h"
#include "data/byte_level.h"
#include "data/heap.h"
#include "data/pretokenize.h"
#include "data/string_map.h"
#include "data/tokenizer.h"
#include "data/unicode.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A distinct word: its symbols are a range of the pool. */
struct word {
	const char *bytes;
	uint32_t n; /* bytes, later symbols */
	int32_t *symbols;
	int64_t count;
};

struct index_list {
	uint32_t *items;
	size_t n, cap;
};

/* A pair that has occurred. `fresh` gathers the words in which this merge has made it occur. */
struct pair {
	uint64_t key;
	int64_t count;
	uint32_t fresh; /* index into lists, valid where `step` is the current one */
	uint64_t step;
};

struct bpe_trainer {
	struct arena arena;
	struct pre_tokenizer gpt2;
	struct splitter splitter;
	struct buf repaired;
	struct string_map seen; /* a word's bytes → its index */
	struct word *words;
	size_t n_words, words_cap;
	uint64_t text_bytes;

	struct bpe_result result;
	struct string_map ids; /* content → id */
	int32_t *pool;
	struct pair_map pair_index;
	struct pair *pairs;
	size_t n_pairs, pairs_cap;
	struct index_list *lists; /* words of one entry of the heap */
	size_t n_lists, lists_cap;
	size_t *touched; /* pairs that this step has made occur */
	size_t n_touched, touched_cap;
	uint64_t step;
	struct heap heap; /* key: UINT64_MAX - count; value: pair; note: list */
};

static int count_word(void *context, struct span piece, struct err *e)
{
	struct bpe_trainer *t = context;
	if (piece.length_bytes > INT32_MAX)
		return err_set(e, EXIT_BAD_DATA, "a word of %zu bytes; %d are allowed", piece.length_bytes,
		               INT32_MAX);
	int32_t index = string_map_get(&t->seen, piece.text, piece.length_bytes);
	if (index < 0) {
		if (t->n_words == INT32_MAX)
			return err_set(e, EXIT_BAD_DATA, "more than %d different words", INT32_MAX);
		const char *bytes = arena_strndup(&t->arena, piece.text, piece.length_bytes);
		index = (int32_t)t->n_words;
		*string_map_put(&t->seen, bytes, piece.length_bytes) = index;
		t->words = mem_grow(t->words, t->n_words, &t->words_cap, sizeof *t->words);
		t->words[t->n_words++] = (struct word){.bytes = bytes, .n = (uint32_t)piece.length_bytes};
	}
	t->words[index].count++;
	return 0;
}

struct bpe_trainer *bpe_trainer_new(void)
{
	struct bpe_trainer *t = mem_array(1, sizeof *t);
	pattern_gpt2(&t->gpt2.pattern);
	t->gpt2.behavior = SPLIT_ISOLATED;
	t->splitter = (struct splitter){.piece = count_word, .context = t};
	return t;
}

void bpe_trainer_free(struct bpe_trainer *t)
{
	if (!t)
		return;
	for (size_t i = 0; i < t->n_lists; i++)
		free(t->lists[i].items);
	buf_free(&t->splitter.prefixed);
	buf_free(&t->repaired);
	string_map_free(&t->seen);
	string_map_free(&t->ids);
	pair_map_free(&t->pair_index);
	heap_free(&t->heap);
	free(t->words);
	free(t->result.tokens);
	free(t->result.merges);
	free(t->pool);
	free(t->pairs);
	free(t->lists);
	free(t->touched);
	arena_free(&t->arena);
	free(t);
}

int bpe_trainer_add(struct bpe_trainer *t, const char *text, size_t length_bytes, struct err *e)
{
	struct span s = {text, length_bytes};
	t->text_bytes += length_bytes;
	if (unicode_valid_bytes(text, length_bytes) < length_bytes) {
		t->repaired.length = 0;
		unicode_add_lossy(&t->repaired, text, length_bytes);
		s = (struct span){t->repaired.data, t->repaired.length};
	}
	return pre_tokenizer_split(&t->gpt2, &t->splitter, s, e);
}

/* The token's id; a new one where the content is new. */
static int32_t add_token(struct bpe_trainer *t, struct span content)
{
	struct bpe_result *r = &t->result;
	int32_t *id = string_map_put(&t->ids, content.text, content.length_bytes);
	if (*id >= 0)
		return *id;
	r->tokens = mem_grow(r->tokens, r->n_tokens, &r->tokens_cap, sizeof *r->tokens);
	r->tokens[r->n_tokens] = content;
	return *id = (int32_t)r->n_tokens++;
}

/* Special tokens, then the alphabet. */
static void begin_vocab(struct bpe_trainer *t, const struct bpe_train_spec *spec, int32_t byte_ids[256])
{
	for (size_t i = 0; i < spec->n_specials; i++) {
		size_t n = strlen(spec->specials[i]);
		if (n)
			add_token(t, (struct span){arena_strndup(&t->arena, spec->specials[i], n), n});
	}
	t->result.n_specials = t->result.n_tokens;
	for (uint32_t c = BYTE_LEVEL_FIRST; c < BYTE_LEVEL_END; c++) {
		struct buf b = {0};
		int byte = byte_level_byte(c);
		if (byte < 0)
			continue;
		unicode_put(&b, c);
		byte_ids[byte] =
		        add_token(t, (struct span){arena_strndup(&t->arena, b.data, b.length), b.length});
		buf_free(&b);
	}
}

static struct pair *pair_of(struct bpe_trainer *t, uint64_t key)
{
	uint64_t *index = pair_map_put(&t->pair_index, key);
	if (*index == PAIR_NONE) {
		*index = t->n_pairs;
		t->pairs = mem_grow(t->pairs, t->n_pairs, &t->pairs_cap, sizeof *t->pairs);
		t->pairs[t->n_pairs++] = (struct pair){.key = key};
	}
	return &t->pairs[*index];
}

/* The pair occurs `count` times more, in this word. */
static void pair_more(struct bpe_trainer *t, uint64_t key, int64_t count, uint32_t word)
{
	struct pair *p = pair_of(t, key);
	p->count += count;
	if (p->step != t->step) {
		p->step = t->step;
		p->fresh = (uint32_t)t->n_lists;
		t->lists = mem_grow(t->lists, t->n_lists, &t->lists_cap, sizeof *t->lists);
		t->lists[t->n_lists++] = (struct index_list){0};
		t->touched = mem_grow(t->touched, t->n_touched, &t->touched_cap, sizeof *t->touched);
		t->touched[t->n_touched++] = (size_t)(p - t->pairs);
	}
	struct index_list *l = &t->lists[p->fresh];
	if (l->n && l->items[l->n - 1] == word)
		return;
	l->items = mem_grow(l->items, l->n, &l->cap, sizeof *l->items);
	l->items[l->n++] = word;
}

/* What this step has made occur may merge next. */
static void push_touched(struct bpe_trainer *t)
{
	for (size_t i = 0; i < t->n_touched; i++) {
		const struct pair *p = &t->pairs[t->touched[i]];
		if (p->count > 0)
			heap_push(&t->heap,
			          (struct heap_entry){UINT64_MAX - (uint64_t)p->count, p->key, p->fresh});
	}
	t->n_touched = 0;
	t->step++;
}

static void begin_words(struct bpe_trainer *t, const int32_t byte_ids[256])
{
	size_t total = 0;
	for (size_t i = 0; i < t->n_words; i++)
		total += t->words[i].n;
	int32_t *next = t->pool = mem_array(total, sizeof *t->pool);
	t->step = 1;
	for (size_t i = 0; i < t->n_words; i++) {
		struct word *w = &t->words[i];
		w->symbols = next;
		next += w->n;
		for (uint32_t k = 0; k < w->n; k++)
			w->symbols[k] = byte_ids[(unsigned char)w->bytes[k]];
		for (uint32_t k = 0; k + 1 < w->n; k++)
			pair_more(t, pair_key(w->symbols[k], w->symbols[k + 1]), w->count, (uint32_t)i);
	}
	push_touched(t);
}

/* Replaces the pair in one word, from the left. The count of the pair itself stays: it does not occur again.
 */
static void merge_in_word(struct bpe_trainer *t, uint32_t index, int32_t left, int32_t right, int32_t made)
{
	struct word *w = &t->words[index];
	int32_t *s = w->symbols;
	uint32_t n = 0;
	for (uint32_t i = 0; i < w->n; i++) {
		if (i + 1 == w->n || s[i] != left || s[i + 1] != right) {
			s[n++] = s[i];
			continue;
		}
		if (n) {
			pair_of(t, pair_key(s[n - 1], left))->count -= w->count;
			pair_more(t, pair_key(s[n - 1], made), w->count, index);
		}
		if (i + 2 < w->n) {
			pair_of(t, pair_key(right, s[i + 2]))->count -= w->count;
			pair_more(t, pair_key(made, s[i + 2]), w->count, index);
		}
		s[n++] = made;
		i++;
	}
	w->n = n;
}

static int32_t joined_token(struct bpe_trainer *t, int32_t left, int32_t right)
{
	struct span a = t->result.tokens[left], b = t->result.tokens[right];
	char *s = arena_alloc(&t->arena, a.length_bytes + b.length_bytes + 1, 1);
	memcpy(s, a.text, a.length_bytes);
	memcpy(s + a.length_bytes, b.text, b.length_bytes);
	return add_token(t, (struct span){s, a.length_bytes + b.length_bytes});
}

static void merge_pair(struct bpe_trainer *t, uint64_t key, uint32_t list)
{
	struct bpe_result *r = &t->result;
	int32_t left = (int32_t)(key >> 32), right = (int32_t)(uint32_t)key,
	        made = joined_token(t, left, right);
	r->merges = mem_grow(r->merges, r->n_merges, &r->merges_cap, sizeof *r->merges);
	r->merges[r->n_merges++] = key;
	for (size_t i = 0; i < t->lists[list].n; i++)
		merge_in_word(t, t->lists[list].items[i], left, right, made);
	push_touched(t);
}

static void learn_merges(struct bpe_trainer *t, int64_t vocab_size, int64_t min_frequency)
{
	while ((int64_t)t->result.n_tokens < vocab_size && t->heap.n) {
		struct heap_entry top = heap_pop(&t->heap);
		int64_t count = pair_of(t, top.value)->count, claimed = (int64_t)(UINT64_MAX - top.key);
		struct index_list *l = &t->lists[top.note];
		if (count == claimed && count < min_frequency)
			break;
		if (count == claimed)
			merge_pair(t, top.value, top.note);
		else if (count > 0)
			heap_push(&t->heap,
			          (struct heap_entry){UINT64_MAX - (uint64_t)count, top.value, top.note});
		if (count == claimed || count <= 0) {
			l = &t->lists[top.note];
			free(l->items);
			*l = (struct index_list){0};
		}
	}
}

int bpe_train_check(const struct bpe_train_spec *spec, struct err *e)
{
	int64_t least = (int64_t)spec->n_specials + 256;
	if (spec->vocab_size < least || spec->vocab_size > TOKENIZER_MAX_ID + 1)
		return err_set(e, EXIT_USAGE,
		               "--vocab-size %" PRId64 ": allowed is %" PRId64
		               " (256 bytes and %zu special tokens) to %" PRId64,
		               spec->vocab_size, least, spec->n_specials, TOKENIZER_MAX_ID + 1);
	return 0;
}

int bpe_trainer_run(struct bpe_trainer *t, const struct bpe_train_spec *spec, struct buf *json,
                    struct bpe_train_stats *stats, struct err *e)
{
	int32_t byte_ids[256];
	if (bpe_train_check(spec, e))
		return e->code;
	stats->words = t->n_words;
	stats->text_bytes = t->text_bytes;
	begin_vocab(t, spec, byte_ids);
	begin_words(t, byte_ids);
	learn_merges(t, spec->vocab_size, spec->min_frequency < 1 ? 1 : spec->min_frequency);
	bpe_result_write(&t->result, json);
	stats->vocab_size = (int32_t)t->result.n_tokens;
	stats->merges = t->result.n_merges;
	return 0;
}
