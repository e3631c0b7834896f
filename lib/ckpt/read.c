/* Boxes out of pieces. Everything here relies on manifest_check: pieces lie in their shape and in their
 * file, and cover each tensor exactly once. */
#include "ckpt/read.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/sys.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int file_open(struct ckpt *c, uint32_t file, int *fd, struct err *e)
{
	int slot = (int)(file % CKPT_OPEN_FILES);
	char path[PATH_MAX];
	if (c->open[slot].fd >= 0 && c->open[slot].file != file) {
		sys.close(c->open[slot].fd);
		c->open[slot].fd = -1;
	}
	if (c->open[slot].fd < 0) {
		if (snprintf(path, sizeof path, "%s/%s", c->path, c->m.files[file].name) >= (int)sizeof path)
			return err_set(e, EXIT_IO, "%s: path too long", c->path);
		c->open[slot].fd = sys.open(path, O_RDONLY, 0);
		c->open[slot].file = file;
		if (c->open[slot].fd < 0)
			return err_errno(e, EXIT_IO, "%s", path);
	}
	*fd = c->open[slot].fd;
	return 0;
}

static int read_bytes(struct ckpt *c, uint32_t file, uint64_t at, void *out, size_t n, struct err *e)
{
	int fd;
	if (file_open(c, file, &fd, e))
		return e->code;
	if (sys_pread_all(fd, out, n, (off_t)at) != 0)
		return err_errno(e, EXIT_IO, "%s/%s: cannot read %zu bytes at byte %" PRIu64, c->path,
		                 c->m.files[file].name, n, at);
	return 0;
}

/* *p = n bytes of a file, n at most CKPT_WINDOW_BYTES; nothing at or behind `end` is read ahead. */
static int window_get(struct ckpt *c, uint32_t file, uint64_t at, size_t n, uint64_t end, const char **p,
                      struct err *e)
{
	struct window *w = &c->window;
	if (!w->data)
		w->data = mem_array(CKPT_WINDOW_BYTES, 1);
	if (!w->bytes || w->file != file || at < w->at || at + n > w->at + w->bytes) {
		uint64_t want = end - at < CKPT_WINDOW_BYTES ? end - at : CKPT_WINDOW_BYTES;
		w->bytes = 0;
		if (read_bytes(c, file, at, w->data, (size_t)want, e))
			return e->code;
		w->file = file;
		w->at = at;
		w->bytes = want;
	}
	*p = w->data + (at - w->at);
	return 0;
}

static int crc_wrong(const struct ckpt *c, const struct entry *t, const struct piece *p, uint32_t got,
                     struct err *e)
{
	char box[128];
	manifest_box_text(box, sizeof box, t->show.nd, p->offset, p->extent);
	return err_set(e, EXIT_BAD_DATA,
	               "%s/%s: tensor %s (%s), box %s, bytes %" PRIu64 " to %" PRIu64
	               ": checksum %08x, the manifest says %08x",
	               c->path, c->m.files[p->file].name, t->show.name, t->show.kind, box, p->at,
	               p->at + p->bytes, got, p->crc);
}

static int verify_piece(struct ckpt *c, const struct entry *t, struct piece *p, struct err *e)
{
	uint32_t crc = 0;
	uint64_t end = p->at + p->bytes;
	if (p->verified)
		return 0;
	for (uint64_t at = p->at; at < end;) {
		const char *data = NULL;
		size_t n = end - at < CKPT_WINDOW_BYTES ? (size_t)(end - at) : CKPT_WINDOW_BYTES;
		if (window_get(c, p->file, at, n, end, &data, e))
			return e->code;
		crc = hash_crc32c(crc, data, n);
		at += n;
	}
	if (crc != p->crc)
		return crc_wrong(c, t, p, crc, e);
	p->verified = true;
	return 0;
}

typedef void convert_fn(void *to, const void *from, size_t n);

/* The window is bytes: not aligned for what is in it. */
#define CONVERSION(name, from_type, to_type, FUNCTION)                           \
	static void name(void *to, const void *from, size_t n)                   \
	{                                                                        \
		to_type *t = to;                                                 \
		for (size_t i = 0; i < n; i++) {                                 \
			from_type x;                                             \
			memcpy(&x, (const char *)from + i * sizeof x, sizeof x); \
			t[i] = FUNCTION(x);                                      \
		}                                                                \
	}
#define F16_OF_BF16(x) f16_from_f32(bf16_to_f32(x))
#define BF16_OF_F16(x) bf16_from_f32(f16_to_f32(x))
CONVERSION(f32_bf16, float, uint16_t, bf16_from_f32)
CONVERSION(f32_f16, float, uint16_t, f16_from_f32)
CONVERSION(bf16_f32, uint16_t, float, bf16_to_f32)
CONVERSION(f16_f32, uint16_t, float, f16_to_f32)
CONVERSION(bf16_f16, uint16_t, uint16_t, F16_OF_BF16)
CONVERSION(f16_bf16, uint16_t, uint16_t, BF16_OF_F16)

static convert_fn *const converters[DT_COUNT][DT_COUNT] = {
        [DT_f32] = {[DT_bf16] = f32_bf16, [DT_f16] = f32_f16},
        [DT_bf16] = {[DT_f32] = bf16_f32, [DT_f16] = bf16_f16},
        [DT_f16] = {[DT_f32] = f16_f32, [DT_bf16] = f16_bf16},
};

/* Where elements go from a piece to the box that was asked for, in four dimensions of which the first
 * may be 1. The last `4 - outer` of them are one run in both. */
struct copy {
	uint64_t count[CKPT_MAX_DIM], from_stride[CKPT_MAX_DIM], to_stride[CKPT_MAX_DIM]; /* elements */
	uint64_t from, to, run;
	int outer;
	size_t from_bytes, to_bytes; /* an element */
	convert_fn *convert;         /* NULL: as it is */
};

/* false where the boxes do not meet. */
static bool copy_plan(struct copy *k, const struct entry *t, const struct piece *p, const int64_t *offset,
                      const int64_t *extent)
{
	uint64_t from_stride = 1, to_stride = 1;
	bool joined = true;
	int nd = t->show.nd;
	k->from = k->to = 0;
	k->run = 1;
	k->outer = nd;
	for (int d = nd - 1; d >= 0; d--) {
		int64_t lo = offset[d] > p->offset[d] ? offset[d] : p->offset[d];
		int64_t a = offset[d] + extent[d], b = p->offset[d] + p->extent[d], hi = a < b ? a : b;
		if (lo >= hi)
			return false;
		k->count[d] = (uint64_t)(hi - lo);
		k->from_stride[d] = from_stride;
		k->to_stride[d] = to_stride;
		k->from += (uint64_t)(lo - p->offset[d]) * from_stride;
		k->to += (uint64_t)(lo - offset[d]) * to_stride;
		if (joined) {
			k->run *= k->count[d];
			k->outer = d;
			joined = hi - lo == extent[d] && hi - lo == p->extent[d];
		}
		from_stride *= (uint64_t)p->extent[d];
		to_stride *= (uint64_t)extent[d];
	}
	return true;
}

static int copy_run(struct ckpt *c, const struct copy *k, const struct piece *p, uint64_t from, uint64_t to,
                    char *out, struct err *e)
{
	uint64_t left = k->run, most = CKPT_WINDOW_BYTES / k->from_bytes;
	while (left) {
		const char *data = NULL;
		size_t n = left < most ? (size_t)left : (size_t)most;
		if (window_get(c, p->file, p->at + from * k->from_bytes, n * k->from_bytes, p->at + p->bytes,
		               &data, e))
			return e->code;
		if (k->convert)
			k->convert(out + to * k->to_bytes, data, n);
		else
			memcpy(out + to * k->to_bytes, data, n * k->to_bytes);
		from += n;
		to += n;
		left -= n;
	}
	return 0;
}

static int copy_all(struct ckpt *c, const struct copy *k, const struct piece *p, char *out, struct err *e)
{
	uint64_t index[CKPT_MAX_DIM] = {0};
	for (;;) {
		uint64_t from = k->from, to = k->to;
		for (int d = 0; d < k->outer; d++) {
			from += index[d] * k->from_stride[d];
			to += index[d] * k->to_stride[d];
		}
		if (copy_run(c, k, p, from, to, out, e))
			return e->code;
		int d = k->outer - 1;
		while (d >= 0 && ++index[d] == k->count[d])
			index[d--] = 0;
		if (d < 0)
			return 0;
	}
}

static int check_request(const struct ckpt *c, const struct entry *t, const int64_t *offset,
                         const int64_t *extent, enum dtype dtype, struct err *e)
{
	uint64_t bytes;
	char box[128];
	if (dtype != t->show.dtype && !converters[t->show.dtype][dtype])
		return err_set(e, EXIT_BAD_DATA, "%s: tensor %s (%s) is %s and cannot be read as %s", c->path,
		               t->show.name, t->show.kind, dtype_rows[t->show.dtype].name,
		               dtype_rows[dtype].name);
	if (!manifest_box_bytes(t->show.nd, t->show.shape, offset, extent, dtype_rows[dtype].bytes, &bytes)) {
		char shape[128];
		static const int64_t zero[CKPT_MAX_DIM];
		manifest_box_text(box, sizeof box, t->show.nd, offset, extent);
		manifest_box_text(shape, sizeof shape, t->show.nd, zero, t->show.shape);
		return err_set(e, EXIT_BAD_DATA, "%s: tensor %s (%s) covers %s; %s was asked for", c->path,
		               t->show.name, t->show.kind, shape, box);
	}
	return 0;
}

int ckpt_read_box(struct ckpt *c, const char *kind, const char *name, const int64_t *offset,
                  const int64_t *extent, enum dtype dtype, void *out, struct err *e)
{
	struct entry *t = ckpt_find_entry(c, kind, name);
	if (!t)
		return err_set(e, EXIT_BAD_DATA, "%s: no tensor %s (%s) in this checkpoint", c->path, name,
		               kind);
	if (check_request(c, t, offset, extent, dtype, e))
		return e->code;
	for (size_t i = 0; i < t->show.n_pieces; i++) {
		struct piece *p = &t->pieces[i];
		struct copy k = {.from_bytes = dtype_rows[t->show.dtype].bytes,
		                 .to_bytes = dtype_rows[dtype].bytes,
		                 .convert = converters[t->show.dtype][dtype]};
		if (!copy_plan(&k, t, p, offset, extent))
			continue;
		if (verify_piece(c, t, p, e) || copy_all(c, &k, p, out, e))
			return e->code;
	}
	return 0;
}

static int verify_structure(struct ckpt *c, uint32_t file, struct err *e)
{
	const struct shard_file *f = &c->m.files[file];
	size_t n;
	uint32_t crc = 0;
	int fd;
	if (file_open(c, file, &fd, e))
		return e->code;
	struct byte_range *r = manifest_ranges(&c->m, file, &n);
	int bad = manifest_structure_crc(fd, f->bytes, r, n, &crc);
	free(r);
	if (bad)
		return err_errno(e, EXIT_IO, "%s/%s", c->path, f->name);
	if (crc != f->structure_crc)
		return err_set(
		        e, EXIT_BAD_DATA,
		        "%s/%s: what lies between its tensors has checksum %08x, the manifest says %08x",
		        c->path, f->name, crc, f->structure_crc);
	return 0;
}

int ckpt_verify(struct ckpt *c, struct err *e)
{
	for (size_t i = 0; i < c->m.n_entries; i++)
		for (size_t k = 0; k < c->m.entries[i].show.n_pieces; k++)
			if (verify_piece(c, &c->m.entries[i], &c->m.entries[i].pieces[k], e))
				return e->code;
	for (size_t f = 0; f < c->m.n_files; f++)
		if (verify_structure(c, (uint32_t)f, e))
			return e->code;
	return 0;
}
