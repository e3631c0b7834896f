#include "base/err.h"
#include "base/mem.h"
#include "base/sys.h"
#include "data/indexed.h"
#include "data/indexed_layout.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUFFER_BYTES = 1 << 20, SUFFIX_BYTES = 16 };

/* A file under its temporary name. */
struct out_file {
	char path[PATH_MAX + SUFFIX_BYTES], name[PATH_MAX + SUFFIX_BYTES];
	int fd; /* -1: closed */
	size_t used;
	char *buffer; /* [BUFFER_BYTES] */
};

struct indexed_writer {
	const struct pack_row *type;
	struct out_file bin;
	char prefix[PATH_MAX];
	int32_t *lengths;
	size_t documents, lengths_cap;
	size_t length; /* of the open document */
	uint64_t tokens;
};

/* Appends ids[n] as the type's elements; the number of the first that does not fit, n where all do. */
#define PACK(code, name, ctype)                                           \
	static size_t pack_##name(const int32_t *ids, size_t n, char *to) \
	{                                                                 \
		for (size_t i = 0; i < n; i++) {                          \
			ctype v = (ctype)ids[i];                          \
			if (ids[i] < 0 || (int64_t)v != ids[i])           \
				return i;                                 \
			memcpy(to + i * sizeof v, &v, sizeof v);          \
		}                                                         \
		return n;                                                 \
	}
INDEXED_INTEGERS(PACK)

struct pack_row {
	enum indexed_type type;
	size_t bytes;
	size_t (*pack)(const int32_t *ids, size_t n, char *to);
};

static const struct pack_row rows[] = {
#define PACK_ROW(code, name, ctype) {INDEXED_##name, sizeof(ctype), pack_##name},
        INDEXED_INTEGERS(PACK_ROW)};

enum indexed_type indexed_type_for(int64_t vocab_size)
{
	return vocab_size < 65500 ? INDEXED_U16 : INDEXED_I32;
}

static int file_open(struct out_file *f, const char *prefix, const char *suffix, struct err *e)
{
	f->fd = -1;
	snprintf(f->name, sizeof f->name, "%s%s", prefix, suffix);
	snprintf(f->path, sizeof f->path, "%s%s.tmp", prefix, suffix);
	f->fd = sys.open(f->path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW, 0666);
	if (f->fd < 0)
		return err_errno(e, EXIT_IO, "%s: cannot create", f->path);
	f->buffer = mem_array(BUFFER_BYTES, 1);
	return 0;
}

static int file_flush(struct out_file *f, struct err *e)
{
	if (sys_write_all(f->fd, f->buffer, f->used) != 0)
		return err_errno(e, EXIT_IO, "%s: cannot write", f->path);
	f->used = 0;
	return 0;
}

static int file_add(struct out_file *f, const void *data, size_t bytes, struct err *e)
{
	int rc = f->used + bytes > BUFFER_BYTES ? file_flush(f, e) : 0;
	if (!rc) {
		memcpy(f->buffer + f->used, data, bytes);
		f->used += bytes;
	}
	return rc;
}

/* Bytes on disk, descriptor closed. */
static int file_settle(struct out_file *f, struct err *e)
{
	int rc = file_flush(f, e);
	if (!rc && sys.fsync(f->fd) != 0)
		rc = err_errno(e, EXIT_IO, "%s: cannot write to disk", f->path);
	if (sys.close(f->fd) != 0 && !rc)
		rc = err_errno(e, EXIT_IO, "%s: cannot close", f->path);
	f->fd = -1;
	return rc;
}

static void file_discard(struct out_file *f)
{
	if (!f->buffer)
		return;
	if (f->fd >= 0)
		sys.close(f->fd);
	sys.unlink(f->path);
	free(f->buffer);
	f->buffer = NULL;
}

static int file_publish(struct out_file *f, struct err *e)
{
	if (sys.rename(f->path, f->name) != 0)
		return err_errno(e, EXIT_IO, "%s: cannot rename to %s", f->path, f->name);
	return 0;
}

int indexed_writer_open(const char *prefix, enum indexed_type type, struct indexed_writer **out,
                        struct err *e)
{
	const struct pack_row *row = NULL;
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		if (rows[i].type == type)
			row = &rows[i];
	ASSERT(row);
	if (strlen(prefix) >= PATH_MAX - SUFFIX_BYTES)
		return err_set(e, EXIT_IO, "%.200s…: path too long", prefix);
	struct indexed_writer *w = mem_array(1, sizeof *w);
	snprintf(w->prefix, sizeof w->prefix, "%s", prefix);
	w->type = row;
	int rc = file_open(&w->bin, prefix, ".bin", e);
	if (rc)
		indexed_writer_abort(w);
	else
		*out = w;
	return rc;
}

/* At most a buffer full. */
static int append_part(struct indexed_writer *w, const int32_t *ids, size_t n, struct err *e)
{
	size_t bytes = n * w->type->bytes;
	int rc = w->bin.used + bytes > BUFFER_BYTES ? file_flush(&w->bin, e) : 0;
	if (rc)
		return rc;
	size_t good = w->type->pack(ids, n, w->bin.buffer + w->bin.used);
	if (good < n)
		return err_set(e, EXIT_BAD_DATA, "%s: token id %d of document %zu does not fit in %zu bytes",
		               w->prefix, ids[good], w->documents, w->type->bytes);
	w->bin.used += bytes;
	return 0;
}

int indexed_writer_append(struct indexed_writer *w, const int32_t *ids, size_t n, struct err *e)
{
	const size_t room = BUFFER_BYTES / w->type->bytes;
	if (n > (size_t)INT32_MAX - w->length)
		return err_set(
		        e, EXIT_BAD_DATA,
		        "%s: document %zu has more than the %d tokens that a sequence may have; split it",
		        w->prefix, w->documents, INT32_MAX);
	w->length += n;
	w->tokens += n;
	for (size_t part; n; n -= part, ids += part) {
		part = n < room ? n : room;
		int rc = append_part(w, ids, part, e);
		if (rc)
			return rc;
	}
	return 0;
}

void indexed_writer_end_document(struct indexed_writer *w)
{
	w->lengths = mem_grow(w->lengths, w->documents, &w->lengths_cap, sizeof *w->lengths);
	w->lengths[w->documents++] = (int32_t)w->length;
	w->length = 0;
}

int indexed_writer_add_document(struct indexed_writer *w, const int32_t *ids, size_t n, struct err *e)
{
	int rc = indexed_writer_append(w, ids, n, e);
	if (!rc)
		indexed_writer_end_document(w);
	return rc;
}

uint64_t indexed_writer_documents(const struct indexed_writer *w)
{
	return w->documents;
}

uint64_t indexed_writer_tokens(const struct indexed_writer *w)
{
	return w->tokens;
}

static int write_header(const struct indexed_writer *w, struct out_file *f, struct err *e)
{
	char header[INDEXED_HEADER] = INDEXED_MAGIC;
	uint64_t version = 1, sequences = w->documents, borders = sequences + 1;
	memcpy(header + INDEXED_AT_VERSION, &version, sizeof version);
	header[INDEXED_AT_TYPE] = (char)w->type->type;
	memcpy(header + INDEXED_AT_SEQUENCES, &sequences, sizeof sequences);
	memcpy(header + INDEXED_AT_BORDERS, &borders, sizeof borders);
	return file_add(f, header, sizeof header, e);
}

static int write_arrays(const struct indexed_writer *w, struct out_file *f, struct err *e)
{
	int rc = 0;
	int64_t pointer = 0;
	for (size_t s = 0; !rc && s < w->documents; s++)
		rc = file_add(f, &w->lengths[s], sizeof w->lengths[s], e);
	for (size_t s = 0; !rc && s < w->documents; s++) {
		rc = file_add(f, &pointer, sizeof pointer, e);
		pointer += (int64_t)w->lengths[s] * (int64_t)w->type->bytes;
	}
	for (int64_t d = 0; !rc && d <= (int64_t)w->documents; d++)
		rc = file_add(f, &d, sizeof d, e);
	return rc;
}

/* An older index goes first: between the two renames there is a .bin without .idx, which is no dataset, and
 * never a .bin with the index of another. */
static int publish(struct out_file *bin, struct out_file *idx, struct err *e)
{
	if (sys.unlink(idx->name) != 0 && errno != ENOENT)
		return err_errno(e, EXIT_IO, "%s: cannot replace", idx->name);
	int rc = file_publish(bin, e);
	if (rc)
		return rc;
	rc = file_publish(idx, e);
	if (rc)
		sys.unlink(bin->name);
	return rc;
}

static int sync_folder(const char *prefix, struct err *e)
{
	char folder[PATH_MAX];
	const char *slash = strrchr(prefix, '/');
	size_t n = slash ? (size_t)(slash - prefix) + 1 : 1;
	snprintf(folder, sizeof folder, "%.*s", (int)n, slash ? prefix : ".");
	return sys_sync_dir(folder, e);
}

int indexed_writer_finish(struct indexed_writer *w, struct err *e)
{
	struct out_file idx = {.fd = -1};
	int rc = file_open(&idx, w->prefix, ".idx", e);
	if (!rc)
		rc = write_header(w, &idx, e);
	if (!rc)
		rc = write_arrays(w, &idx, e);
	if (!rc)
		rc = file_settle(&idx, e);
	if (!rc)
		rc = file_settle(&w->bin, e);
	if (!rc)
		rc = publish(&w->bin, &idx, e);
	if (!rc) {
		rc = sync_folder(w->prefix, e);
		free(idx.buffer);
		free(w->bin.buffer);
		idx.buffer = w->bin.buffer = NULL; /* nothing left to discard */
	}
	file_discard(&idx);
	indexed_writer_abort(w);
	return rc;
}

void indexed_writer_abort(struct indexed_writer *w)
{
	if (!w)
		return;
	file_discard(&w->bin);
	free(w->lengths);
	free(w);
}
