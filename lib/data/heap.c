#include "data/heap.h"
#include "base/mem.h"

#include <stdbool.h>
#include <stdlib.h>

static bool before(const struct heap_entry *a, const struct heap_entry *b)
{
	return a->key != b->key ? a->key < b->key : a->value < b->value;
}

void heap_push(struct heap *h, struct heap_entry entry)
{
	h->entries = mem_grow(h->entries, h->n, &h->cap, sizeof *h->entries);
	size_t i = h->n++;
	for (size_t up; i && before(&entry, &h->entries[up = (i - 1) / 2]); i = up)
		h->entries[i] = h->entries[up];
	h->entries[i] = entry;
}

struct heap_entry heap_pop(struct heap *h)
{
	struct heap_entry *x = h->entries, least = x[0], last = x[--h->n];
	size_t i = 0;
	for (size_t down; (down = 2 * i + 1) < h->n; i = down) {
		down += down + 1 < h->n && before(&x[down + 1], &x[down]);
		if (!before(&x[down], &last))
			break;
		x[i] = x[down];
	}
	x[i] = last;
	return least;
}

void heap_free(struct heap *h)
{
	free(h->entries);
	*h = (struct heap){0};
}
