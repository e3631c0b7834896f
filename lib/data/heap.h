/* A binary heap whose least entry, by key and then by value, comes first. Local. Floor: data. */
#ifndef PENTAD_DATA_HEAP_H
#define PENTAD_DATA_HEAP_H

#include <stddef.h>
#include <stdint.h>

struct heap_entry {
	uint64_t key, value;
	uint32_t note; /* goes with the entry, has no part in the order */
};

/* All zero is an empty heap; set n to 0 to empty it. */
struct heap {
	struct heap_entry *entries;
	size_t n, cap;
};
void heap_push(struct heap *h, struct heap_entry entry);
/* Removes the least entry of a heap that is not empty. */
struct heap_entry heap_pop(struct heap *h);
void heap_free(struct heap *h);

#endif
