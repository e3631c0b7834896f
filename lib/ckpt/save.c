#include "ckpt/ckpt.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/sys.h"
#include "ckpt/folder.h"
#include "ckpt/h5.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Written and checksummed in steps that stay in the cache. */
enum { WRITE_BYTES = 4 << 20 };

struct ckpt_shard {
	char path[PATH_MAX], name[32];
	int fd;
	bool failed;
	uint64_t bytes;
	struct ckpt_tensor *tensors; /* the caller's strings */
	struct piece *pieces;        /* verified: written */
	size_t n;
};

static int folder_paths(const struct ckpt_save *s, char tmp[PATH_MAX], char final[PATH_MAX], struct err *e)
{
	const char *attempt = s->attempt ? s->attempt : "0";
	if (s->step < 0 || s->step > CKPT_LAST_STEP || !manifest_word_ok(attempt, 64))
		return err_set(e, EXIT_INTERNAL, "checkpoint of step %" PRId64 ", attempt '%s': out of range",
		               s->step, attempt);
	int n = snprintf(tmp, PATH_MAX, "%s/" CKPT_STEP_FORMAT ".tmp.%s", s->dir, s->step, attempt);
	if (n >= PATH_MAX - 64)
		return err_set(e, EXIT_IO, "%s: path too long", s->dir);
	snprintf(final, PATH_MAX, "%s/" CKPT_STEP_FORMAT, s->dir, s->step);
	return 0;
}

int ckpt_save_begin(const struct ckpt_save *s, struct err *e)
{
	char tmp[PATH_MAX], final[PATH_MAX];
	if (folder_paths(s, tmp, final, e) || sys_make_dirs(s->dir, e) || sys_remove_tree(tmp, e))
		return e->code;
	if (sys.mkdir(tmp, 0777) != 0)
		return err_errno(e, EXIT_IO, "%s: cannot create folder", tmp);
	return 0;
}

void ckpt_save_abort(const struct ckpt_save *s)
{
	char tmp[PATH_MAX], final[PATH_MAX];
	struct err ignored = {0}; /* what is left is passed over by readers and removed by ckpt_prune */
	if (!folder_paths(s, tmp, final, &ignored))
		sys_remove_tree(tmp, &ignored);
}

static int check_row(const struct ckpt_tensor *t, struct piece *p, struct err *e)
{
	bool ok = manifest_word_ok(t->name, CKPT_MAX_NAME) && manifest_word_ok(t->kind, CKPT_MAX_KIND) &&
	          (unsigned)t->dtype < DT_COUNT && t->nd >= 0 && t->nd <= CKPT_MAX_DIM;
	memset(p, 0, sizeof *p);
	if (!ok ||
	    !manifest_box_bytes(t->nd, t->shape, t->offset, t->extent, dtype_rows[t->dtype].bytes, &p->bytes))
		return err_set(e, EXIT_INTERNAL,
		               "tensor %s (%s): a name, type or box that a checkpoint cannot hold", t->name,
		               t->kind);
	memcpy(p->offset, t->offset, sizeof p->offset);
	memcpy(p->extent, t->extent, sizeof p->extent);
	return 0;
}

static void shard_free(struct ckpt_shard *w)
{
	if (w->fd >= 0)
		sys.close(w->fd);
	free(w->tensors);
	free(w->pieces);
	free(w);
}

/* Takes the space from the disk now: "early allocation" of libhdf5 only makes a hole. */
static int reserve(int fd, uint64_t bytes)
{
	if (fallocate(fd, 0, 0, (off_t)bytes) == 0)
		return 0;
	if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL)
		return -1;
	return sys.ftruncate(fd, (off_t)bytes);
}

static int shard_open(struct ckpt_shard *w, struct err *e)
{
	uint64_t *at = mem_array(w->n, sizeof *at);
	int rc = h5_lay_out(w->path, w->tensors, w->n, at, &w->bytes, e);
	for (size_t i = 0; i < w->n; i++)
		w->pieces[i].at = at[i];
	free(at);
	if (rc)
		return rc;
	w->fd = sys.open(w->path, O_RDWR, 0);
	struct stat st;
	if (w->fd < 0 || sys.fstat(w->fd, &st) != 0)
		return err_errno(e, EXIT_IO, "%s: cannot open", w->path);
	w->bytes = (uint64_t)st.st_size > w->bytes ? (uint64_t)st.st_size : w->bytes;
	if (reserve(w->fd, w->bytes) != 0)
		return err_errno(e, EXIT_IO, "%s: no room for %" PRIu64 " bytes", w->path, w->bytes);
	return 0;
}

int ckpt_shard_create(const struct ckpt_save *s, struct ckpt_shard **out, struct err *e)
{
	char tmp[PATH_MAX], final[PATH_MAX];
	if (!s->n_tensors || s->rank < 0)
		return err_set(e, EXIT_INTERNAL, "a shard of rank %d without tensors", s->rank);
	if (folder_paths(s, tmp, final, e))
		return e->code;
	struct ckpt_shard *w = mem_array(1, sizeof *w);
	w->fd = -1;
	w->n = s->n_tensors;
	w->tensors = mem_array(w->n, sizeof *w->tensors);
	w->pieces = mem_array(w->n, sizeof *w->pieces);
	memcpy(w->tensors, s->tensors, w->n * sizeof *w->tensors);
	snprintf(w->name, sizeof w->name, "shard-%05d.h5", s->rank);
	int n = snprintf(w->path, sizeof w->path, "%s/%s", tmp, w->name), rc = 0;
	if (n >= (int)sizeof w->path)
		rc = err_set(e, EXIT_IO, "%s: path too long", tmp);
	for (size_t i = 0; i < w->n && !rc; i++)
		rc = check_row(&w->tensors[i], &w->pieces[i], e);
	if (!rc && (rc = shard_open(w, e)))
		sys.unlink(w->path);
	if (rc)
		shard_free(w);
	else
		*out = w;
	return rc;
}

int ckpt_shard_write(struct ckpt_shard *w, size_t tensor, const void *data, struct err *e)
{
	ASSERT(tensor < w->n);
	struct piece *p = &w->pieces[tensor];
	uint32_t crc = 0;
	for (uint64_t done = 0; done < p->bytes;) {
		size_t n = p->bytes - done < WRITE_BYTES ? (size_t)(p->bytes - done) : WRITE_BYTES;
		const char *from = (const char *)data + done;
		crc = hash_crc32c(crc, from, n);
		if (sys_pwrite_all(w->fd, from, n, (off_t)(p->at + done)) != 0) {
			w->failed = true;
			return err_errno(e, EXIT_IO, "%s: cannot write %s", w->path, w->tensors[tensor].name);
		}
		done += n;
	}
	p->crc = crc;
	p->verified = true;
	return 0;
}

static int compare_at(const void *a, const void *b)
{
	const struct byte_range *x = a, *y = b;
	return (x->at > y->at) - (x->at < y->at);
}

static int structure_crc(const struct ckpt_shard *w, uint32_t *crc)
{
	struct byte_range *r = mem_array(w->n, sizeof *r);
	for (size_t i = 0; i < w->n; i++)
		r[i] = (struct byte_range){w->pieces[i].at, w->pieces[i].bytes};
	qsort(r, w->n, sizeof *r, compare_at);
	int rc = manifest_structure_crc(w->fd, w->bytes, r, w->n, crc);
	free(r);
	return rc;
}

static void put_record(const struct ckpt_shard *w, uint32_t crc, struct buf *record)
{
	struct shard_file f = {(char *)w->name, w->bytes, crc};
	manifest_print_file(&f, record);
	buf_puts(record, "\n");
	for (size_t i = 0; i < w->n; i++) {
		const struct ckpt_tensor *t = &w->tensors[i];
		struct ckpt_entry show = {.name = t->name, .kind = t->kind, .dtype = t->dtype, .nd = t->nd};
		memcpy(show.shape, t->shape, sizeof show.shape);
		manifest_print_tensor(&show, &w->pieces[i], 1, record);
		buf_puts(record, "\n");
	}
}

int ckpt_shard_close(struct ckpt_shard *w, struct buf *record, struct err *e)
{
	uint32_t crc = 0;
	int rc = 0;
	if (!record || w->failed)
		rc = err_set(e, EXIT_IO, "%s: given up", w->path);
	for (size_t i = 0; i < w->n && !rc; i++)
		if (!w->pieces[i].verified)
			rc = err_set(e, EXIT_INTERNAL, "%s: %s was never written", w->path,
			             w->tensors[i].name);
	if (!rc && (structure_crc(w, &crc) || sys.fsync(w->fd)))
		rc = err_errno(e, EXIT_IO, "%s: cannot flush to disk", w->path);
	int fd = w->fd;
	w->fd = -1;
	if (sys.close(fd) != 0 && !rc)
		rc = err_errno(e, EXIT_IO, "%s: cannot close", w->path);
	if (rc)
		sys.unlink(w->path);
	else
		put_record(w, crc, record);
	shard_free(w);
	return rc;
}

int ckpt_save_shard(const struct ckpt_save *s, struct buf *record, struct err *e)
{
	struct ckpt_shard *w;
	if (!s->n_tensors)
		return 0;
	if (ckpt_shard_create(s, &w, e))
		return e->code;
	for (size_t i = 0; i < s->n_tensors; i++)
		if (ckpt_shard_write(w, i, s->tensors[i].data, e)) {
			struct err second = {0}; /* the first cause is the one to tell */
			ckpt_shard_close(w, NULL, &second);
			return e->code;
		}
	return ckpt_shard_close(w, record, e);
}

/* The object as one line: a raw line end can only stand between JSON's tokens. */
static int take_meta(const struct ckpt_save *s, struct manifest *m, struct err *e)
{
	const char *text = s->meta_json ? s->meta_json : "{}";
	struct arena a = {0};
	struct json *v = NULL;
	struct err cause = {0};
	int rc = json_parse(&a, "meta", text, strlen(text), &v, &cause);
	if (rc || v->type != JSON_OBJECT)
		rc = err_set(e, EXIT_INTERNAL, "the meta data of the checkpoint are no JSON object: %s",
		             cause.text);
	arena_free(&a);
	if (rc)
		return rc;
	m->meta = arena_strdup(&m->arena, text);
	for (char *p = m->meta; *p; p++)
		if (*p == '\n' || *p == '\r')
			*p = ' ';
	return 0;
}

static int flush_file(const char *path, struct err *e)
{
	int fd = sys.open(path, O_RDONLY, 0);
	if (fd < 0)
		return err_errno(e, EXIT_IO, "%s", path);
	int rc = sys.fsync(fd) == 0 ? 0 : err_errno(e, EXIT_IO, "%s: cannot flush to disk", path);
	if (sys.close(fd) != 0 && !rc)
		rc = err_errno(e, EXIT_IO, "%s: cannot close", path);
	return rc;
}

/* What a reader would refuse must not be published. */
static int check_text(const struct buf *text, const char *tmp, struct err *e)
{
	struct manifest back = {.where = "the new manifest"};
	int rc = manifest_parse(&back, text->data, text->length, e) ? EXIT_INTERNAL : 0;
	manifest_free(&back);
	if (!rc && text->length > MANIFEST_MAX_BYTES)
		rc = err_set(e, EXIT_INTERNAL, "%s: a manifest of %zu bytes; at most %zu can be read back",
		             tmp, text->length, MANIFEST_MAX_BYTES);
	return rc ? (e->code = rc) : 0;
}

static int write_manifest(const struct manifest *m, const char *tmp, struct err *e)
{
	char path[PATH_MAX];
	struct buf text = {0};
	manifest_print(m, &text);
	int rc = check_text(&text, tmp, e);
	if (!rc && snprintf(path, sizeof path, "%s/" MANIFEST_FILE, tmp) >= (int)sizeof path)
		rc = err_set(e, EXIT_IO, "%s: path too long", tmp);
	if (!rc)
		rc = sys_write_file(path, text.data, text.length, e);
	buf_free(&text);
	return rc;
}

static int write_view(const struct manifest *m, const char *tmp, struct err *e)
{
	char path[PATH_MAX];
	if (snprintf(path, sizeof path, "%s/model.h5", tmp) >= (int)sizeof path)
		return err_set(e, EXIT_IO, "%s: path too long", tmp);
	return h5_present(path, m, e) ? e->code : flush_file(path, e);
}

/* One atomic step, also where the same step was saved before: then the two folders change places. */
static int publish(const char *tmp, const char *final, struct err *e)
{
	struct stat st;
	if (sys.rename(tmp, final) == 0)
		return 0;
	if ((errno != ENOTEMPTY && errno != EEXIST) || sys.stat(final, &st) != 0)
		return err_errno(e, EXIT_IO, "%s: cannot be renamed to %s", tmp, final);
	if (renameat2(AT_FDCWD, tmp, AT_FDCWD, final, RENAME_EXCHANGE) == 0)
		return sys_remove_tree(tmp, e);
	char old[PATH_MAX];
	if (snprintf(old, sizeof old, "%s.tmp.old", final) >= (int)sizeof old)
		return err_set(e, EXIT_IO, "%s: path too long", final);
	if (sys_remove_tree(old, e))
		return e->code;
	if (sys.rename(final, old) != 0)
		return err_errno(e, EXIT_IO, "%s: cannot be renamed to %s", final, old);
	if (sys.rename(tmp, final) == 0)
		return sys_remove_tree(old, e);
	err_errno(e, EXIT_IO, "%s: cannot be renamed to %s", tmp, final);
	sys.rename(old, final);
	return e->code;
}

static int write_latest(const struct ckpt_save *s, struct err *e)
{
	char path[PATH_MAX], text[32];
	if (snprintf(path, sizeof path, "%s/latest", s->dir) >= (int)sizeof path)
		return err_set(e, EXIT_IO, "%s: path too long", s->dir);
	int n = snprintf(text, sizeof text, CKPT_STEP_FORMAT "\n", s->step);
	return sys_write_file(path, text, (size_t)n, e);
}

static int commit(const struct ckpt_save *s, struct manifest *m, const char *records, size_t bytes,
                  struct err *e)
{
	char tmp[PATH_MAX], final[PATH_MAX];
	if (folder_paths(s, tmp, final, e) || take_meta(s, m, e))
		return e->code;
	if (manifest_add_records(m, records, bytes, e))
		return e->code = EXIT_INTERNAL;
	if (folder_check_files(m, tmp, e) || write_manifest(m, tmp, e) || write_view(m, tmp, e) ||
	    sys_sync_dir(tmp, e) || publish(tmp, final, e) || sys_sync_dir(s->dir, e))
		return e->code;
	return write_latest(s, e);
}

int ckpt_save_commit(const struct ckpt_save *s, const char *records, size_t records_bytes, struct err *e)
{
	struct manifest m = {.where = "records of the ranks", .step = s->step, .world_size = s->world_size};
	int rc = commit(s, &m, records, records_bytes, e);
	manifest_free(&m);
	if (rc)
		ckpt_save_abort(s);
	return rc;
}
