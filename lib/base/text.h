/* Words for people: the nearest right spelling, numbers with units. Local. Floor: base. */
#ifndef PENTAD_BASE_TEXT_H
#define PENTAD_BASE_TEXT_H

#include <stddef.h>

/* Levenshtein distance in bytes. */
size_t text_distance(const char *a, const char *b);
/* The candidate nearest to `word`, or NULL where none is near enough to be what was meant.
 * Candidate i is *(const char **)((char *)first + i·stride_bytes). */
const char *text_nearest(const char *word, const void *first, size_t n, size_t stride_bytes);
/* "12.3 GiB", "629M", "9h12m", "1.25 s" (below that ms, from a minute on a duration): written into out[cap], which is
 * returned. */
char *text_bytes(char *out, size_t cap, double bytes);
char *text_count(char *out, size_t cap, double count);
char *text_duration(char *out, size_t cap, double seconds);
char *text_seconds(char *out, size_t cap, double seconds);

#endif
