#include "data/string_map.h"
#include "base/hash.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

static struct string_entry *string_find(const struct string_map *m, const char *key, size_t length_bytes)
{
	size_t i = hash_bytes(key, length_bytes, 0) & (m->cap - 1);
	while (m->entries[i].key &&
	       (m->entries[i].length_bytes != length_bytes || memcmp(m->entries[i].key, key, length_bytes)))
		i = (i + 1) & (m->cap - 1);
	return &m->entries[i];
}

int32_t string_map_get(const struct string_map *m, const char *key, size_t length_bytes)
{
	const struct string_entry *s = m->cap ? string_find(m, key, length_bytes) : NULL;
	return s && s->key ? s->value : -1;
}

static void string_map_grow(struct string_map *m)
{
	struct string_map bigger = {.n = m->n, .cap = m->cap ? 2 * m->cap : 64};
	bigger.entries = mem_array(bigger.cap, sizeof *bigger.entries);
	for (size_t i = 0; i < m->cap; i++)
		if (m->entries[i].key)
			*string_find(&bigger, m->entries[i].key, m->entries[i].length_bytes) = m->entries[i];
	free(m->entries);
	*m = bigger;
}

int32_t *string_map_put(struct string_map *m, const char *key, size_t length_bytes)
{
	if (2 * (m->n + 1) > m->cap)
		string_map_grow(m);
	struct string_entry *s = string_find(m, key, length_bytes);
	if (!s->key) {
		*s = (struct string_entry){key, (uint32_t)length_bytes, -1};
		m->n++;
	}
	return &s->value;
}

void string_map_free(struct string_map *m)
{
	free(m->entries);
	*m = (struct string_map){0};
}

static struct pair_entry *pair_find(const struct pair_map *m, uint64_t key)
{
	size_t i = (size_t)(key * 0x9e3779b97f4a7c15u >> m->shift);
	while (m->entries[i].key != key && m->entries[i].key != PAIR_NONE)
		i = (i + 1) & (m->cap - 1);
	return &m->entries[i];
}

void pair_map_reserve(struct pair_map *m, size_t n)
{
	struct pair_map bigger = {.n = m->n, .cap = 64, .shift = 58};
	for (; bigger.cap < 2 * n; bigger.shift--)
		bigger.cap *= 2;
	if (bigger.cap <= m->cap)
		return;
	bigger.entries = mem_array(bigger.cap, sizeof *bigger.entries);
	memset(bigger.entries, 0xff, bigger.cap * sizeof *bigger.entries);
	for (size_t i = 0; i < m->cap; i++)
		if (m->entries[i].key != PAIR_NONE)
			*pair_find(&bigger, m->entries[i].key) = m->entries[i];
	free(m->entries);
	*m = bigger;
}

uint64_t *pair_map_put(struct pair_map *m, uint64_t key)
{
	if (2 * (m->n + 1) > m->cap)
		pair_map_reserve(m, m->n + 1 > 32 ? m->n + 1 : 32);
	struct pair_entry *p = pair_find(m, key);
	if (p->key == PAIR_NONE) {
		*p = (struct pair_entry){key, PAIR_NONE};
		m->n++;
	}
	return &p->value;
}

void pair_map_free(struct pair_map *m)
{
	free(m->entries);
	*m = (struct pair_map){0};
}
