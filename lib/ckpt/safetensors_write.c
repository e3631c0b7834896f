#include "ckpt/safetensors.h"
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/sys.h"

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct out_file {
	char *name;
	int fd;
};

struct st_writer {
	struct arena arena;
	char *dir;
	struct out_file *files;
	size_t n_files;
	struct st_tensor *tensors; /* in the caller's order */
	size_t *written;           /* bytes of each */
	size_t n;
};

struct ordered {
	const struct st_tensor *t;
	size_t i; /* in the caller's order */
};

static int compare_name(const void *a, const void *b)
{
	const struct ordered *x = a, *y = b;
	return strcmp(x->t->name, y->t->name);
}

/* Within a file: types in the format's order from the last, then names. */
static int compare_place(const void *a, const void *b)
{
	const struct ordered *x = a, *y = b;
	if (x->t->file != y->t->file)
		return x->t->file < y->t->file ? -1 : 1;
	if (x->t->dtype != y->t->dtype)
		return x->t->dtype > y->t->dtype ? -1 : 1;
	return strcmp(x->t->name, y->t->name);
}

static int take_tensors(struct st_writer *w, const struct st_tensor *tensors, struct err *e)
{
	for (size_t i = 0; i < w->n; i++) {
		struct st_tensor *t = &w->tensors[i];
		*t = tensors[i];
		t->name = arena_strdup(&w->arena, tensors[i].name);
		t->size_bytes = st_dtype_bytes(t->dtype);
		for (int d = 0; d < t->nd; d++)
			if (t->shape[d] < 0 || !size_mul(t->size_bytes, (size_t)t->shape[d], &t->size_bytes))
				return err_set(e, EXIT_INTERNAL, "tensor %s: an impossible shape", t->name);
	}
	return 0;
}

/* Fills the files one after the other, in the order of names so that a layer stays together. */
static int spread(struct st_writer *w, struct ordered *o, size_t max_bytes, struct err *e)
{
	size_t used = 0;
	w->n_files = 1;
	qsort(o, w->n, sizeof *o, compare_name);
	for (size_t i = 0; i < w->n; i++) {
		struct st_tensor *t = &w->tensors[o[i].i];
		if (i && !strcmp(t->name, o[i - 1].t->name))
			return err_set(e, EXIT_INTERNAL, "tensor %s is there twice", t->name);
		if (used && t->size_bytes > max_bytes - used) {
			w->n_files++;
			used = 0;
		}
		used = t->size_bytes > max_bytes ? max_bytes : used + t->size_bytes;
		t->file = w->n_files - 1;
	}
	return 0;
}

static void put_tensor(struct buf *b, const struct st_tensor *t, size_t from)
{
	buf_puts(b, ",");
	json_put_string(b, t->name, strlen(t->name));
	buf_printf(b, ":{\"dtype\":\"%s\",\"shape\":[", st_dtype_name(t->dtype));
	for (int d = 0; d < t->nd; d++)
		buf_printf(b, d ? ",%" PRId64 : "%" PRId64, t->shape[d]);
	buf_printf(b, "],\"data_offsets\":[%zu,%zu]}", from, from + t->size_bytes);
}

/* Header of the file that holds o[0 … n); sets at_bytes. */
static void make_header(struct st_writer *w, const struct ordered *o, size_t n, struct buf *b)
{
	char size[8] = {0};
	size_t from = 0;
	buf_add(b, size, sizeof size);
	buf_puts(b, "{\"__metadata__\":{\"format\":\"pt\"}");
	for (size_t i = 0; i < n; i++) {
		put_tensor(b, o[i].t, from);
		w->tensors[o[i].i].at_bytes = from;
		from += o[i].t->size_bytes;
	}
	buf_puts(b, "}");
	while (b->length % 8)
		buf_puts(b, " ");
	uint64_t header = b->length - 8;
	for (int i = 0; i < 8; i++)
		b->data[i] = (char)(header >> 8 * i);
	for (size_t i = 0; i < n; i++)
		w->tensors[o[i].i].at_bytes += b->length;
}

static int create_file(struct st_writer *w, size_t k, const struct ordered *o, size_t n, struct err *e)
{
	struct out_file *f = &w->files[k];
	char path[PATH_MAX];
	struct buf header = {0};
	f->name = w->n_files == 1
	                  ? arena_strdup(&w->arena, "model.safetensors")
	                  : arena_printf(&w->arena, "model-%05zu-of-%05zu.safetensors", k + 1, w->n_files);
	if (snprintf(path, sizeof path, "%s/%s", w->dir, f->name) >= (int)sizeof path)
		return err_set(e, EXIT_IO, "%s: path too long", w->dir);
	f->fd = sys.open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
	if (f->fd < 0)
		return err_errno(e, EXIT_IO, "%s: cannot create", path);
	make_header(w, o, n, &header);
	int rc = sys_pwrite_all(f->fd, header.data, header.length, 0) ? err_errno(e, EXIT_IO, "%s", path) : 0;
	buf_free(&header);
	return rc;
}

static int create_files(struct st_writer *w, struct ordered *o, struct err *e)
{
	qsort(o, w->n, sizeof *o, compare_place);
	w->files = mem_array(w->n_files, sizeof *w->files);
	for (size_t k = 0; k < w->n_files; k++)
		w->files[k].fd = -1;
	for (size_t k = 0, i = 0; k < w->n_files; k++) {
		size_t first = i;
		while (i < w->n && o[i].t->file == k)
			i++;
		if (create_file(w, k, o + first, i - first, e))
			return e->code;
	}
	return 0;
}

static void writer_free(struct st_writer *w)
{
	for (size_t k = 0; k < w->n_files && w->files; k++)
		if (w->files[k].fd >= 0)
			sys.close(w->files[k].fd);
	free(w->files);
	free(w->tensors);
	free(w->written);
	arena_free(&w->arena);
	free(w);
}

int st_write_create(const char *dir, const struct st_tensor *tensors, size_t n, size_t max_shard_bytes,
                    struct st_writer **out, struct err *e)
{
	struct st_writer *w = mem_array(1, sizeof *w);
	struct ordered *o = mem_array(n, sizeof *o);
	w->n = n;
	w->dir = arena_strdup(&w->arena, dir);
	w->tensors = mem_array(n, sizeof *w->tensors);
	w->written = mem_array(n, sizeof *w->written);
	for (size_t i = 0; i < n; i++)
		o[i] = (struct ordered){&w->tensors[i], i};
	int rc = take_tensors(w, tensors, e);
	if (!rc)
		rc = spread(w, o, max_shard_bytes, e);
	if (!rc)
		rc = create_files(w, o, e);
	free(o);
	if (rc)
		writer_free(w);
	else
		*out = w;
	return rc;
}

int st_write(struct st_writer *w, size_t i, size_t from, size_t n, const void *data, struct err *e)
{
	ASSERT(i < w->n && from <= w->tensors[i].size_bytes && n <= w->tensors[i].size_bytes - from);
	const struct st_tensor *t = &w->tensors[i];
	if (sys_pwrite_all(w->files[t->file].fd, data, n, (off_t)(t->at_bytes + from)))
		return err_errno(e, EXIT_IO, "%s/%s: cannot write tensor %s", w->dir, w->files[t->file].name,
		                 t->name);
	w->written[i] += n;
	return 0;
}

static int write_index(const struct st_writer *w, struct err *e)
{
	struct buf b = {0};
	char path[PATH_MAX];
	size_t total = 0;
	for (size_t i = 0; i < w->n; i++)
		total += w->tensors[i].size_bytes;
	buf_printf(&b, "{\n  \"metadata\": {\n    \"total_size\": %zu\n  },\n  \"weight_map\": {\n", total);
	for (size_t i = 0; i < w->n; i++) {
		buf_puts(&b, "    ");
		json_put_string(&b, w->tensors[i].name, strlen(w->tensors[i].name));
		buf_printf(&b, ": \"%s\"%s\n", w->files[w->tensors[i].file].name, i + 1 < w->n ? "," : "");
	}
	buf_puts(&b, "  }\n}\n");
	int rc = snprintf(path, sizeof path, "%s/model.safetensors.index.json", w->dir) >= (int)sizeof path
	                 ? err_set(e, EXIT_IO, "%s: path too long", w->dir)
	                 : sys_write_file(path, b.data, b.length, e);
	buf_free(&b);
	return rc;
}

int st_write_close(struct st_writer *w, struct err *e)
{
	int rc = 0;
	for (size_t i = 0; i < w->n && !rc; i++)
		if (w->written[i] != w->tensors[i].size_bytes)
			rc = err_set(e, EXIT_INTERNAL, "%s: %zu of %zu bytes of tensor %s were written",
			             w->dir, w->written[i], w->tensors[i].size_bytes, w->tensors[i].name);
	for (size_t k = 0; k < w->n_files && !rc; k++) {
		if (sys.fsync(w->files[k].fd))
			rc = err_errno(e, EXIT_IO, "%s/%s: cannot flush to disk", w->dir, w->files[k].name);
		int fd = w->files[k].fd;
		w->files[k].fd = -1;
		if (sys.close(fd) && !rc)
			rc = err_errno(e, EXIT_IO, "%s/%s: cannot close", w->dir, w->files[k].name);
	}
	if (!rc && w->n_files > 1)
		rc = write_index(w, e);
	writer_free(w);
	return rc;
}
