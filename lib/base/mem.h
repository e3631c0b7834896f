/* Memory: an arena for what lives as long as a program, checked array sizes, a growing buffer.
 *
 * Running out of memory is fatal (EXIT_INTERNAL with the size asked for): sizes that come from a
 * file are checked against the file's size before they get here. Local. Floor: base. */
#ifndef PENTAD_BASE_MEM_H
#define PENTAD_BASE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Zeroed memory for n elements of size bytes each; freed with free(). Never NULL, not even for n = 0. */
void *mem_array(size_t n, size_t size_bytes);
/* Resizes to n elements; new elements are not zeroed. p may be NULL. */
void *mem_resize(void *p, size_t n, size_t size_bytes);
/* Makes room for one more element behind *n in a doubling array; *cap in elements. */
void *mem_grow(void *p, size_t n, size_t *cap, size_t size_bytes);
/* Zeroed, 64-byte-aligned (2 MiB above 4 MiB, with huge pages advised); freed with free(). */
void *mem_aligned(size_t bytes);
/* What mem_aligned takes for as many bytes: whole huge pages above 4 MiB. All of it is resident. */
size_t mem_reserved(size_t bytes);
/* Gives freed memory that the process still holds back to the system. */
void mem_trim(void);
char *mem_strdup(const char *s);

/* true and *out = a·b (or a+b) where that fits in size_t. */
bool size_mul(size_t a, size_t b, size_t *out);
bool size_add(size_t a, size_t b, size_t *out);

/* A bump allocator: everything in it is freed at once. All zero is an empty arena. */
struct arena {
	struct arena_block *block;
};
void *arena_alloc(struct arena *a, size_t n, size_t size_bytes); /* zeroed, 16-byte-aligned */
char *arena_strdup(struct arena *a, const char *s);
char *arena_strndup(struct arena *a, const char *s, size_t length_bytes); /* NUL added */
char *arena_printf(struct arena *a, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void arena_free(struct arena *a);

/* A growing byte buffer, always NUL-terminated behind `length`. All zero is an empty buffer. */
struct buf {
	char *data;
	size_t length, cap;
};
void buf_add(struct buf *b, const void *data, size_t length_bytes);
void buf_puts(struct buf *b, const char *s);
void buf_printf(struct buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void buf_free(struct buf *b);

#endif
