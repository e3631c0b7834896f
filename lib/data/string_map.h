/* A hash map from byte strings to small numbers, and one from pairs of numbers to a number: what
 * vocabularies, merges and the BPE trainer look things up in. Open addressing, at most half full, no removal.
 * Local. Floor: data. */
#ifndef PENTAD_DATA_STRING_MAP_H
#define PENTAD_DATA_STRING_MAP_H

#include <stddef.h>
#include <stdint.h>

/* All zero is an empty map. Keys are not copied: they outlive the map. */
struct string_map {
	struct string_entry {
		const char *key; /* NULL: free */
		uint32_t length_bytes;
		int32_t value;
	} * entries;
	size_t n, cap;
};
/* The value of a key, -1 where it is absent. */
int32_t string_map_get(const struct string_map *m, const char *key, size_t length_bytes);
/* The place of a key's value; where the key is new it is added with value -1. length_bytes < 2^32. */
int32_t *string_map_put(struct string_map *m, const char *key, size_t length_bytes);
void string_map_free(struct string_map *m);

#define PAIR_NONE UINT64_MAX

/* All zero is an empty map. */
struct pair_map {
	struct pair_entry {
		uint64_t key, value; /* key PAIR_NONE: free */
	} * entries;
	size_t n, cap;
	int shift;
};
static inline uint64_t pair_key(int32_t left, int32_t right)
{
	return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}
/* The value of a pair, PAIR_NONE where it is absent. The map must have held a pair once. */
static inline uint64_t pair_map_get(const struct pair_map *m, uint64_t key)
{
	size_t i = (size_t)(key * 0x9e3779b97f4a7c15u >> m->shift);
	while (m->entries[i].key != key) {
		if (m->entries[i].key == PAIR_NONE)
			return PAIR_NONE;
		i = (i + 1) & (m->cap - 1);
	}
	return m->entries[i].value;
}
/* The place of a pair's value; where the pair is new it is added with value PAIR_NONE. */
uint64_t *pair_map_put(struct pair_map *m, uint64_t key);
/* Room for n pairs without growing; also makes an empty map ready for pair_map_get. */
void pair_map_reserve(struct pair_map *m, size_t n);
void pair_map_free(struct pair_map *m);

#endif
