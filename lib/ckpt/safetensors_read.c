#include "ckpt/safetensors.h"
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/sys.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INDEX_FILE "model.safetensors.index.json"

enum { MAX_HEADER = 100000000, MAX_INDEX = 100000000, MAX_SHARDS = 1024 };

struct shard {
	char *path;
	int fd;
	size_t bytes;
};

struct st_file {
	struct arena arena;
	struct shard *shards;
	size_t n_shards, cap_shards;
	struct st_tensor *tensors;
	size_t n, cap;
};

static const struct {
	const char *name;
	size_t bytes;
} dtypes[ST_DTYPE_COUNT] = {
#define ST_DTYPE_ROW(name, bytes) {#name, bytes},
        ST_DTYPES(ST_DTYPE_ROW)
#undef ST_DTYPE_ROW
};

const char *st_dtype_name(enum st_dtype t)
{
	return dtypes[t].name;
}

size_t st_dtype_bytes(enum st_dtype t)
{
	return dtypes[t].bytes;
}

static int wrong(const struct shard *s, const struct json *at, struct err *e, const char *what)
{
	return err_set(e, EXIT_BAD_DATA, "%s: tensor %.200s: %s", s->path, at->key, what);
}

static int read_dtype(const struct shard *s, const struct json *v, enum st_dtype *out, struct err *e)
{
	const char *word = json_get_string(v, "dtype", "");
	for (int i = 0; i < ST_DTYPE_COUNT; i++)
		if (!strcmp(word, dtypes[i].name)) {
			*out = (enum st_dtype)i;
			return 0;
		}
	return wrong(s, v, e, "an element type that is unknown here");
}

/* Shape, and its bytes into size_bytes. */
static int read_shape(const struct shard *s, const struct json *v, struct st_tensor *t, struct err *e)
{
	const struct json *shape = json_get_type(v, "shape", JSON_ARRAY);
	t->size_bytes = dtypes[t->dtype].bytes;
	if (!shape || shape->count > ST_MAX_DIM)
		return wrong(s, v, e, "\"shape\" must be an array of at most 8 sizes");
	JSON_EACH (d, shape) {
		if (d->type != JSON_NUMBER || !d->is_integer || d->integer < 0 ||
		    !size_mul(t->size_bytes, (size_t)d->integer, &t->size_bytes))
			return wrong(s, v, e, "a size in \"shape\" that is no count, or too large");
		t->shape[t->nd++] = d->integer;
	}
	return 0;
}

/* data_begin: where the buffer starts in the file. */
static int read_tensor(struct st_file *f, const struct json *v, size_t data_begin, struct err *e)
{
	const struct shard *s = &f->shards[f->n_shards - 1];
	struct st_tensor t = {.file = f->n_shards - 1};
	const struct json *ends = json_get_type(v, "data_offsets", JSON_ARRAY);
	if (strlen(v->key) != v->key_length || v->count != 3)
		return wrong(s, v, e, "expected dtype, shape and data_offsets, nothing else");
	if (read_dtype(s, v, &t.dtype, e) || read_shape(s, v, &t, e))
		return e->code;
	if (!ends || ends->count != 2 || !ends->child->is_integer || !ends->child->next->is_integer)
		return wrong(s, v, e, "\"data_offsets\" must be two integers");
	int64_t from = ends->child->integer, to = ends->child->next->integer;
	size_t room = s->bytes - data_begin;
	if (from < 0 || to < from || (size_t)to > room)
		return wrong(s, v, e, "\"data_offsets\" that reach out of the file");
	if ((size_t)(to - from) != t.size_bytes)
		return wrong(s, v, e, "\"data_offsets\" that are not as far apart as shape and dtype say");
	t.at_bytes = data_begin + (size_t)from;
	t.name = arena_strdup(&f->arena, v->key);
	f->tensors = mem_grow(f->tensors, f->n, &f->cap, sizeof *f->tensors);
	f->tensors[f->n++] = t;
	return 0;
}

static int read_metadata(const struct shard *s, const struct json *v, struct err *e)
{
	if (v->type != JSON_OBJECT)
		return wrong(s, v, e, "must be an object");
	JSON_EACH (x, v)
		if (x->type != JSON_STRING)
			return wrong(s, v, e, "holds something that is no string");
	return 0;
}

static int compare_place(const void *a, const void *b)
{
	const struct st_tensor *x = a, *y = b;
	if (x->at_bytes != y->at_bytes)
		return x->at_bytes < y->at_bytes ? -1 : 1;
	return (x->size_bytes > y->size_bytes) - (x->size_bytes < y->size_bytes);
}

/* The tensors of one shard, [first, n), fill its buffer side by side. */
static int check_places(struct st_file *f, size_t first, size_t data_begin, struct err *e)
{
	const struct shard *s = &f->shards[f->n_shards - 1];
	size_t at = data_begin;
	if (f->n > first)
		qsort(f->tensors + first, f->n - first, sizeof *f->tensors, compare_place);
	for (size_t i = first; i < f->n; i++) {
		const struct st_tensor *t = &f->tensors[i];
		if (t->at_bytes != at)
			return err_set(e, EXIT_BAD_DATA, "%s: tensor %.200s begins at byte %zu, which %s",
			               s->path, t->name, t->at_bytes,
			               t->at_bytes < at ? "overlaps the one before it" : "leaves a hole");
		at += t->size_bytes;
	}
	if (at != s->bytes)
		return err_set(e, EXIT_BAD_DATA, "%s: %zu bytes, its tensors end at %zu", s->path, s->bytes,
		               at);
	return 0;
}

/* A hostile header could otherwise name tens of millions of empty values. */
static bool too_dense(const char *text, size_t bytes)
{
	size_t commas = 0;
	for (size_t i = 0; i < bytes; i++)
		commas += text[i] == ',';
	return commas > 16 + bytes / 4;
}

static int read_header(struct st_file *f, const char *text, size_t bytes, struct err *e)
{
	const struct shard *s = &f->shards[f->n_shards - 1];
	struct arena a = {0};
	struct json *v = NULL;
	size_t first = f->n, data_begin = 8 + bytes;
	int rc = 0;
	if (text[0] != '{' || too_dense(text, bytes))
		rc = err_set(e, EXIT_BAD_DATA, "%s: its header is not that of a safetensors file", s->path);
	else
		rc = json_parse(&a, s->path, text, bytes, &v, e);
	for (const struct json *x = rc ? NULL : v->child; x && !rc; x = x->next)
		rc = strcmp(x->key, "__metadata__") ? read_tensor(f, x, data_begin, e)
		                                    : read_metadata(s, x, e);
	arena_free(&a);
	return rc ? rc : check_places(f, first, data_begin, e);
}

static int open_shard(struct shard *s, struct err *e)
{
	struct stat st;
	s->fd = sys.open(s->path, O_RDONLY | O_NONBLOCK, 0); /* a pipe must not hang us */
	if (s->fd < 0)
		return err_errno(e, errno == ENOENT ? EXIT_NO_INPUT : EXIT_IO, "%s", s->path);
	if (sys.fstat(s->fd, &st) != 0)
		return err_errno(e, EXIT_IO, "%s", s->path);
	if (!S_ISREG(st.st_mode))
		return err_set(e, EXIT_NO_INPUT, "%s: not a regular file", s->path);
	s->bytes = (size_t)st.st_size;
	return 0;
}

/* `path` is copied. */
static int add_shard(struct st_file *f, const char *path, struct err *e)
{
	unsigned char head[8];
	uint64_t n = 0;
	f->shards = mem_grow(f->shards, f->n_shards, &f->cap_shards, sizeof *f->shards);
	struct shard *s = &f->shards[f->n_shards++];
	*s = (struct shard){.path = arena_strdup(&f->arena, path), .fd = -1};
	if (open_shard(s, e))
		return e->code;
	if (s->bytes < sizeof head)
		return err_set(e, EXIT_BAD_DATA, "%s: %zu bytes are no safetensors file", s->path, s->bytes);
	if (sys_pread_all(s->fd, head, sizeof head, 0))
		return err_errno(e, EXIT_IO, "%s", s->path);
	for (int i = 8; i-- > 0;)
		n = n << 8 | head[i];
	if (n < 2 || n > MAX_HEADER || n > s->bytes - sizeof head)
		return err_set(e, EXIT_BAD_DATA,
		               "%s: a header of %llu bytes; 2 to 100000000, within the file, are allowed",
		               s->path, (unsigned long long)n);
	char *text = mem_array(n + 1, 1);
	int rc = sys_pread_all(s->fd, text, n, sizeof head) ? err_errno(e, EXIT_IO, "%s", s->path)
	                                                    : read_header(f, text, n, e);
	free(text);
	return rc;
}

static int compare_name(const void *a, const void *b)
{
	return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

static int sort_names(struct st_file *f, struct err *e)
{
	if (f->n)
		qsort(f->tensors, f->n, sizeof *f->tensors, compare_name);
	for (size_t i = 1; i < f->n; i++)
		if (!strcmp(f->tensors[i - 1].name, f->tensors[i].name))
			return err_set(e, EXIT_BAD_DATA, "%s and %s: tensor %.200s is in both",
			               f->shards[f->tensors[i - 1].file].path,
			               f->shards[f->tensors[i].file].path, f->tensors[i].name);
	return 0;
}

static bool shard_name_ok(const struct json *v)
{
	static const char end[] = ".safetensors";
	size_t n = v->type == JSON_STRING ? v->length : 0, m = sizeof end - 1;
	return n > m && n < 256 && strlen(v->string) == n && v->string[0] != '.' && !strchr(v->string, '/') &&
	       !strcmp(v->string + n - m, end);
}

static int add_shard_once(struct st_file *f, const char *dir, const char *name, struct err *e)
{
	char path[PATH_MAX];
	if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
		return err_set(e, EXIT_NO_INPUT, "%s: path too long", dir);
	for (size_t i = 0; i < f->n_shards; i++)
		if (!strcmp(f->shards[i].path, path))
			return 0;
	if (f->n_shards == MAX_SHARDS)
		return err_set(e, EXIT_BAD_DATA, "%s/" INDEX_FILE ": more than 1024 files", dir);
	return add_shard(f, path, e);
}

/* Every tensor of the map is in the file that the map says, and no other tensor is in any of them. */
static int check_map(struct st_file *f, const char *index, const struct json *map, struct err *e)
{
	if (sort_names(f, e))
		return e->code;
	JSON_EACH (x, map) {
		const struct st_tensor *t = st_find(f, x->key);
		const char *in = t ? strrchr(f->shards[t->file].path, '/') + 1 : "";
		if (!t || strcmp(in, x->string))
			return err_set(e, EXIT_BAD_DATA, "%s: tensor %.200s is not in %.200s", index, x->key,
			               x->string);
	}
	if (f->n != map->count)
		return err_set(e, EXIT_BAD_DATA, "%s: names %zu tensors, its files hold %zu", index,
		               map->count, f->n);
	return 0;
}

static int read_index(struct st_file *f, const char *dir, const char *index, struct err *e)
{
	char *text = NULL;
	size_t bytes = 0;
	struct arena a = {0};
	struct json *v = NULL;
	if (sys_read_file(index, MAX_INDEX, &text, &bytes, e))
		return e->code;
	int rc = too_dense(text, bytes) ? err_set(e, EXIT_BAD_DATA, "%s: not an index of weights", index)
	                                : json_parse(&a, index, text, bytes, &v, e);
	const struct json *map = rc ? NULL : json_get_type(v, "weight_map", JSON_OBJECT);
	if (!rc && !map)
		rc = err_set(e, EXIT_BAD_DATA, "%s: \"weight_map\" is missing", index);
	for (const struct json *x = map ? map->child : NULL; x && !rc; x = x->next)
		rc = shard_name_ok(x) ? add_shard_once(f, dir, x->string, e)
		                      : err_set(e, EXIT_BAD_DATA,
		                                "%s: tensor %.200s: expected the name of a .safetensors file "
		                                "beside it",
		                                index, x->key);
	if (!rc)
		rc = check_map(f, index, map, e);
	arena_free(&a);
	free(text);
	return rc;
}

static bool is_there(const char *dir, const char *name, char path[PATH_MAX])
{
	struct stat st;
	return snprintf(path, PATH_MAX, "%s/%s", dir, name) < PATH_MAX && sys.stat(path, &st) == 0;
}

/* Says what is there instead. */
static int no_weights(const char *dir, struct err *e)
{
	static const char *const pickles[] = {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt",
	                                      "consolidated.00.pth"};
	char path[PATH_MAX];
	for (size_t i = 0; i < sizeof pickles / sizeof *pickles; i++)
		if (is_there(dir, pickles[i], path))
			return err_set(
			        e, EXIT_NO_INPUT,
			        "%s: a pickle, which can run code when it is read, so it is never read here; "
			        "write the model again as safetensors "
			        "(model.save_pretrained(FOLDER, safe_serialization=True))",
			        path);
	return err_set(e, EXIT_NO_INPUT, "%s: neither model.safetensors nor " INDEX_FILE " is there", dir);
}

static int open_folder(struct st_file *f, const char *dir, struct err *e)
{
	char path[PATH_MAX];
	if (is_there(dir, "model.safetensors", path))
		return add_shard(f, path, e) ? e->code : sort_names(f, e);
	if (is_there(dir, INDEX_FILE, path))
		return read_index(f, dir, path, e);
	return no_weights(dir, e);
}

int st_open(const char *path, struct st_file **out, struct err *e)
{
	struct stat st;
	if (sys.stat(path, &st) != 0)
		return err_errno(e, errno == ENOENT || errno == ENOTDIR ? EXIT_NO_INPUT : EXIT_IO, "%s",
		                 path);
	struct st_file *f = mem_array(1, sizeof *f);
	int rc = S_ISDIR(st.st_mode) ? open_folder(f, path, e) : add_shard(f, path, e);
	if (!rc && !S_ISDIR(st.st_mode))
		rc = sort_names(f, e);
	if (rc)
		st_close(f);
	else
		*out = f;
	return rc;
}

void st_close(struct st_file *f)
{
	if (!f)
		return;
	for (size_t i = 0; i < f->n_shards; i++)
		if (f->shards[i].fd >= 0)
			sys.close(f->shards[i].fd);
	free(f->shards);
	free(f->tensors);
	arena_free(&f->arena);
	free(f);
}

size_t st_count(const struct st_file *f)
{
	return f->n;
}

const struct st_tensor *st_get(const struct st_file *f, size_t i)
{
	return &f->tensors[i];
}

const struct st_tensor *st_find(const struct st_file *f, const char *name)
{
	struct st_tensor key = {.name = name};
	return f->n ? bsearch(&key, f->tensors, f->n, sizeof *f->tensors, compare_name) : NULL;
}

int st_read(const struct st_file *f, const struct st_tensor *t, size_t from, size_t n, void *out,
            struct err *e)
{
	const struct shard *s = &f->shards[t->file];
	if (from > t->size_bytes || n > t->size_bytes - from)
		return err_set(e, EXIT_INTERNAL, "%s: bytes %zu + %zu of tensor %s, which has %zu", s->path,
		               from, n, t->name, t->size_bytes);
	if (sys_pread_all(s->fd, out, n, (off_t)(t->at_bytes + from)))
		return err_errno(e, EXIT_IO, "%s: cannot read tensor %s", s->path, t->name);
	return 0;
}
