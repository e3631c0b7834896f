#include "base/mem.h"
#include "base/err.h"

#include <malloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static _Noreturn void out_of_memory(size_t n, size_t size)
{
	fprintf(stderr, "pentad: out of memory: %zu elements of %zu bytes\n", n, size);
	_exit(EXIT_INTERNAL);
}

bool size_mul(size_t a, size_t b, size_t *out)
{
	return !__builtin_mul_overflow(a, b, out);
}

bool size_add(size_t a, size_t b, size_t *out)
{
	return !__builtin_add_overflow(a, b, out);
}

void *mem_array(size_t n, size_t size_bytes)
{
	void *p = calloc(n ? n : 1, size_bytes ? size_bytes : 1);
	if (!p)
		out_of_memory(n, size_bytes);
	return p;
}

void *mem_resize(void *p, size_t n, size_t size_bytes)
{
	size_t total;
	if (!size_mul(n ? n : 1, size_bytes, &total) || !(p = realloc(p, total)))
		out_of_memory(n, size_bytes);
	return p;
}

void *mem_grow(void *p, size_t n, size_t *cap, size_t size_bytes)
{
	if (n < *cap)
		return p;
	*cap = 2 * n + 16;
	return mem_resize(p, *cap, size_bytes);
}

enum { HUGE_PAGE = 2 << 20, CACHE_LINE = 64 };

static size_t alignment_of(size_t bytes)
{
	return bytes > (size_t)2 * HUGE_PAGE ? HUGE_PAGE : CACHE_LINE;
}

size_t mem_reserved(size_t bytes)
{
	size_t align = alignment_of(bytes);
	return bytes > SIZE_MAX - align ? SIZE_MAX : (bytes + align - 1) / align * align;
}

void *mem_aligned(size_t bytes)
{
	size_t align = alignment_of(bytes), total = mem_reserved(bytes ? bytes : 1);
	void *p = total == SIZE_MAX ? NULL : aligned_alloc(align, total);
	if (!p)
		out_of_memory(bytes, 1);
	if (align == HUGE_PAGE)
		madvise(p, total, MADV_HUGEPAGE);
	return memset(p, 0, total);
}

#ifdef __GLIBC__
void mem_trim(void)
{
	malloc_trim(0);
}
#else
void mem_trim(void)
{
}
#endif

char *mem_strdup(const char *s)
{
	size_t n = strlen(s) + 1;
	return memcpy(mem_array(n, 1), s, n);
}

struct arena_block {
	struct arena_block *next;
	size_t used, size;
	_Alignas(16) char data[];
};

void *arena_alloc(struct arena *a, size_t n, size_t size_bytes)
{
	size_t need;
	if (!size_mul(n, size_bytes, &need) || need > SIZE_MAX / 2)
		out_of_memory(n, size_bytes);
	need = (need + 15) & ~(size_t)15;
	struct arena_block *b = a->block;
	if (!b || b->size - b->used < need) {
		size_t size = need > 65536 ? need : 65536;
		b = mem_array(1, sizeof *b + size);
		b->size = size;
		b->next = a->block;
		a->block = b;
	}
	void *p = b->data + b->used;
	b->used += need;
	return p;
}

char *arena_strndup(struct arena *a, const char *s, size_t length_bytes)
{
	char *p = arena_alloc(a, length_bytes + 1, 1);
	memcpy(p, s, length_bytes);
	return p;
}

char *arena_strdup(struct arena *a, const char *s)
{
	return arena_strndup(a, s, strlen(s));
}

char *arena_printf(struct arena *a, const char *fmt, ...)
{
	va_list ap, again;
	va_start(ap, fmt);
	va_copy(again, ap);
	int n = vsnprintf(NULL, 0, fmt, ap);
	va_end(ap);
	char *p = arena_alloc(a, (size_t)n + 1, 1);
	vsnprintf(p, (size_t)n + 1, fmt, again);
	va_end(again);
	return p;
}

void arena_free(struct arena *a)
{
	for (struct arena_block *b = a->block, *next; b; b = next) {
		next = b->next;
		free(b);
	}
	a->block = NULL;
}

static void buf_room(struct buf *b, size_t more)
{
	if (b->length + more + 1 <= b->cap)
		return;
	b->cap = 2 * (b->length + more + 1);
	b->data = mem_resize(b->data, b->cap, 1);
}

void buf_add(struct buf *b, const void *data, size_t length_bytes)
{
	buf_room(b, length_bytes);
	if (length_bytes)
		memcpy(b->data + b->length, data, length_bytes);
	b->length += length_bytes;
	b->data[b->length] = 0;
}

void buf_puts(struct buf *b, const char *s)
{
	buf_add(b, s, strlen(s));
}

void buf_printf(struct buf *b, const char *fmt, ...)
{
	va_list ap, again;
	va_start(ap, fmt);
	va_copy(again, ap);
	int n = vsnprintf(NULL, 0, fmt, ap);
	va_end(ap);
	buf_room(b, (size_t)n);
	vsnprintf(b->data + b->length, (size_t)n + 1, fmt, again);
	b->length += (size_t)n;
	va_end(again);
}

void buf_free(struct buf *b)
{
	free(b->data);
	*b = (struct buf){0};
}
