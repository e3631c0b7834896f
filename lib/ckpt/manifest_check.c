/* What a manifest must obey before any of its numbers is used. */
#include "ckpt/manifest.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/sys.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Comparing boxes pair by pair may cost this much for one tensor; honest layouts need far less. */
static const uint64_t max_comparisons = 200000000;

const char *manifest_box_text(char *out, size_t cap, int nd, const int64_t *offset, const int64_t *extent)
{
	size_t n = 0;
	for (int i = 0; i < nd && n < cap; i++)
		n += (size_t)snprintf(out + n, cap - n, "%s%" PRId64 ":%" PRId64, i ? ", " : "[", offset[i],
		                      offset[i] + extent[i]);
	if (n < cap)
		snprintf(out + n, cap - n, nd ? "]" : "[]");
	return out;
}

bool manifest_box_bytes(int nd, const int64_t *shape, const int64_t *offset, const int64_t *extent,
                        size_t element_bytes, uint64_t *bytes)
{
	int64_t product = (int64_t)element_bytes;
	for (int i = 0; i < nd; i++)
		if (shape[i] < 1 || offset[i] < 0 || extent[i] < 1 || offset[i] > shape[i] ||
		    extent[i] > shape[i] - offset[i] || __builtin_mul_overflow(product, extent[i], &product))
			return false;
	*bytes = (uint64_t)product;
	return true;
}

static int wrong(const struct manifest *m, const struct entry *t, struct err *e, const char *what)
{
	return err_set(e, EXIT_BAD_DATA, "%s, line %zu: tensor %s (%s): %s", m->where, t->line, t->show.name,
	               t->show.kind, what);
}

static int check_boxes(const struct manifest *m, struct entry *t, struct err *e)
{
	static const int64_t zero[CKPT_MAX_DIM];
	uint64_t whole, sum = 0;
	struct ckpt_entry *s = &t->show;
	size_t element = dtype_rows[s->dtype].bytes;
	if (!manifest_box_bytes(s->nd, s->shape, zero, s->shape, element, &whole))
		return wrong(m, t, e, "a shape with a dimension of 0, or too large");
	s->bytes = whole;
	for (size_t i = 0; i < s->n_pieces; i++) {
		const struct piece *p = &t->pieces[i];
		uint64_t bytes, file_bytes = m->files[p->file].bytes;
		if (!manifest_box_bytes(s->nd, s->shape, p->offset, p->extent, element, &bytes))
			return wrong(m, t, e, "a piece that is empty or reaches out of the shape");
		if (bytes != p->bytes)
			return wrong(m, t, e, "a piece whose \"bytes\" are not those of its box");
		if (p->at > file_bytes || p->bytes > file_bytes - p->at)
			return wrong(m, t, e, "a piece beyond the end of its file");
		if (__builtin_add_overflow(sum, bytes, &sum) || sum > whole)
			return wrong(m, t, e, "pieces that overlap");
	}
	return sum == whole ? 0 : wrong(m, t, e, "pieces that do not cover the whole tensor");
}

struct ordered {
	const struct piece *piece;
	int64_t from;
};

static int compare_ordered(const void *a, const void *b)
{
	const struct ordered *x = a, *y = b;
	return (x->from > y->from) - (x->from < y->from);
}

static bool boxes_meet(const struct piece *a, const struct piece *b, int nd)
{
	for (int i = 0; i < nd; i++)
		if (a->offset[i] >= b->offset[i] + b->extent[i] ||
		    b->offset[i] >= a->offset[i] + a->extent[i])
			return false;
	return true;
}

static size_t sort_along(struct ordered *o, size_t n, int dim)
{
	size_t distinct = 1;
	for (size_t i = 0; i < n; i++)
		o[i].from = o[i].piece->offset[dim];
	qsort(o, n, sizeof *o, compare_ordered);
	for (size_t i = 1; i < n; i++)
		distinct += o[i].from != o[i - 1].from;
	return distinct;
}

/* A sweep along the dimension that tells most boxes apart. The sum of the sizes is known to be that of the
 * tensor, so that no overlap means: covered exactly once. */
static int check_overlap(const struct manifest *m, const struct entry *t, struct err *e)
{
	size_t n = t->show.n_pieces, best = 0;
	int dim = 0, rc = 0;
	if (n < 2)
		return 0;
	struct ordered *o = mem_array(n, sizeof *o);
	for (size_t i = 0; i < n; i++)
		o[i].piece = &t->pieces[i];
	for (int d = 0; d < t->show.nd; d++) {
		size_t distinct = sort_along(o, n, d);
		dim = distinct > best ? d : dim;
		best = distinct > best ? distinct : best;
	}
	sort_along(o, n, dim);
	uint64_t left = max_comparisons;
	for (size_t i = 0; i < n && !rc; i++) {
		int64_t end = o[i].from + o[i].piece->extent[dim];
		for (size_t j = i + 1; j < n && o[j].from < end && !rc; j++)
			if (!left--)
				rc = wrong(m, t, e, "more pieces side by side than can be checked");
			else if (boxes_meet(o[i].piece, o[j].piece, t->show.nd))
				rc = wrong(m, t, e, "pieces that overlap");
	}
	free(o);
	return rc;
}

static int compare_names(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

static int check_file_names(const struct manifest *m, struct err *e)
{
	const char **names = mem_array(m->n_files, sizeof *names);
	int rc = 0;
	for (size_t i = 0; i < m->n_files; i++)
		names[i] = m->files[i].name;
	qsort(names, m->n_files, sizeof *names, compare_names);
	for (size_t i = 1; i < m->n_files && !rc; i++)
		if (!strcmp(names[i - 1], names[i]))
			rc = err_set(e, EXIT_BAD_DATA, "%s: file %s is there twice", m->where, names[i]);
	free(names);
	return rc;
}

struct placed {
	uint32_t file;
	struct byte_range range;
};

static int compare_placed(const void *a, const void *b)
{
	const struct placed *x = a, *y = b;
	if (x->file != y->file)
		return x->file < y->file ? -1 : 1;
	return (x->range.at > y->range.at) - (x->range.at < y->range.at);
}

/* No byte of a file belongs to two pieces. */
static int check_ranges(const struct manifest *m, struct err *e)
{
	size_t n = 0;
	int rc = 0;
	for (size_t i = 0; i < m->n_entries; i++)
		n += m->entries[i].show.n_pieces;
	struct placed *all = mem_array(n, sizeof *all);
	n = 0;
	for (size_t i = 0; i < m->n_entries; i++)
		for (size_t k = 0; k < m->entries[i].show.n_pieces; k++) {
			const struct piece *p = &m->entries[i].pieces[k];
			all[n++] = (struct placed){p->file, {p->at, p->bytes}};
		}
	qsort(all, n, sizeof *all, compare_placed);
	for (size_t i = 1; i < n && !rc; i++)
		if (all[i].file == all[i - 1].file &&
		    all[i].range.at - all[i - 1].range.at < all[i - 1].range.bytes)
			rc = err_set(e, EXIT_BAD_DATA, "%s: two pieces share byte %" PRIu64 " of %s",
			             m->where, all[i].range.at, m->files[all[i].file].name);
	free(all);
	return rc;
}

int manifest_check(struct manifest *m, struct err *e)
{
	m->bytes = 0;
	if (check_file_names(m, e))
		return e->code;
	for (size_t i = 0; i < m->n_entries; i++) {
		struct entry *t = &m->entries[i];
		if (check_boxes(m, t, e) || check_overlap(m, t, e))
			return e->code;
		if (__builtin_add_overflow(m->bytes, t->show.bytes, &m->bytes))
			return wrong(m, t, e, "more bytes than a number can hold");
	}
	return check_ranges(m, e);
}

static int compare_ranges(const void *a, const void *b)
{
	const struct byte_range *x = a, *y = b;
	return (x->at > y->at) - (x->at < y->at);
}

struct byte_range *manifest_ranges(const struct manifest *m, uint32_t file, size_t *n)
{
	struct byte_range *r = NULL;
	size_t cap = 0;
	*n = 0;
	for (size_t i = 0; i < m->n_entries; i++)
		for (size_t k = 0; k < m->entries[i].show.n_pieces; k++) {
			const struct piece *p = &m->entries[i].pieces[k];
			if (p->file != file)
				continue;
			r = mem_grow(r, *n, &cap, sizeof *r);
			r[(*n)++] = (struct byte_range){p->at, p->bytes};
		}
	if (*n)
		qsort(r, *n, sizeof *r, compare_ranges);
	return r;
}

static int crc_span(int fd, uint64_t from, uint64_t to, uint32_t *crc)
{
	enum { STEP = 65536 };
	char *p = mem_array(STEP, 1);
	int rc = 0;
	while (from < to && !rc) {
		size_t n = to - from < STEP ? (size_t)(to - from) : STEP;
		rc = sys_pread_all(fd, p, n, (off_t)from);
		if (!rc)
			*crc = hash_crc32c(*crc, p, n);
		from += n;
	}
	free(p);
	return rc;
}

int manifest_structure_crc(int fd, uint64_t bytes, const struct byte_range *ranges, size_t n, uint32_t *crc)
{
	uint64_t at = 0;
	*crc = 0;
	for (size_t i = 0; i < n; i++) {
		if (crc_span(fd, at, ranges[i].at, crc))
			return -1;
		at = ranges[i].at + ranges[i].bytes;
	}
	return crc_span(fd, at, bytes, crc);
}
