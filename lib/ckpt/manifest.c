#include "ckpt/manifest.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/json.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FILES = 1 << 20, MAX_LINE_BYTES = 8 << 20 };

struct lines {
	const char *at, *end;
	const char *line;
	size_t length, number;
};

/* One line of the text as JSON, in an arena of its own. */
struct item {
	struct manifest *m;
	struct arena arena;
	const struct json *json;
	size_t number;
	struct err *e;
};

static bool next_line(struct lines *l)
{
	if (l->at >= l->end)
		return false;
	const char *nl = memchr(l->at, '\n', (size_t)(l->end - l->at));
	l->line = l->at;
	l->length = (size_t)((nl ? nl : l->end) - l->at);
	l->at = nl ? nl + 1 : l->end;
	l->number++;
	return true;
}

static int wrong(const struct item *it, const char *what)
{
	return err_set(it->e, EXIT_BAD_DATA, "%s, line %zu: %s", it->m->where, it->number, what);
}

static int parse_item(struct item *it, const char *text, size_t length)
{
	char name[512];
	struct json *v;
	if (length > MAX_LINE_BYTES)
		return wrong(it, "longer than 8 MiB");
	snprintf(name, sizeof name, "%.480s, line %zu", it->m->where, it->number);
	if (json_parse(&it->arena, name, text, length, &v, it->e))
		return it->e->code;
	it->json = v;
	return v->type == JSON_OBJECT ? 0 : wrong(it, "expected an object");
}

bool manifest_word_ok(const char *s, size_t longest)
{
	static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
	size_t n = strspn(s, letters);
	return n > 0 && n <= longest && !s[n] && s[0] != '.';
}

/* A member that is a word; NULL after an error. */
static const char *get_word(const struct item *it, const char *key, size_t longest)
{
	const struct json *v = json_get_type(it->json, key, JSON_STRING);
	if (v && strlen(v->string) == v->length && manifest_word_ok(v->string, longest))
		return v->string;
	err_set(it->e, EXIT_BAD_DATA,
	        "%s, line %zu: \"%s\" must be 1 to %zu letters, digits, '.', '_' or '-', not beginning with "
	        "'.'",
	        it->m->where, it->number, key, longest);
	return NULL;
}

static int get_count(const struct item *it, const struct json *in, const char *key, int64_t most,
                     int64_t *out)
{
	const struct json *v = json_get_type(in, key, JSON_NUMBER);
	if (!v || !v->is_integer || v->integer < 0 || v->integer > most)
		return err_set(it->e, EXIT_BAD_DATA,
		               "%s, line %zu: \"%s\" must be an integer from 0 to %" PRId64, it->m->where,
		               it->number, key, most);
	*out = v->integer;
	return 0;
}

static int get_crc(const struct item *it, const struct json *in, const char *key, uint32_t *out)
{
	const char *s = json_get_string(in, key, "");
	if (strlen(s) != 8 || strspn(s, "0123456789abcdef") != 8)
		return err_set(it->e, EXIT_BAD_DATA, "%s, line %zu: \"%s\" must be 8 hexadecimal digits",
		               it->m->where, it->number, key);
	*out = (uint32_t)strtoul(s, NULL, 16);
	return 0;
}

/* An array of dimensions; nd < 0 takes any length up to CKPT_MAX_DIM. Returns the length or -1. */
static int get_dims(const struct item *it, const struct json *in, const char *key, int nd, int64_t *out)
{
	const struct json *v = json_get_type(in, key, JSON_ARRAY);
	int n = 0;
	if (!v || v->count > CKPT_MAX_DIM || (nd >= 0 && v->count != (size_t)nd)) {
		err_set(it->e, EXIT_BAD_DATA, "%s, line %zu: \"%s\" must be an array of %s%d integers",
		        it->m->where, it->number, key, nd < 0 ? "at most " : "", nd < 0 ? CKPT_MAX_DIM : nd);
		return -1;
	}
	JSON_EACH (x, v) {
		if (x->type != JSON_NUMBER || !x->is_integer || x->integer < 0) {
			err_set(it->e, EXIT_BAD_DATA, "%s, line %zu: \"%s\" holds something that is no count",
			        it->m->where, it->number, key);
			return -1;
		}
		out[n++] = x->integer;
	}
	return n;
}

static int parse_file(struct item *it)
{
	struct manifest *m = it->m;
	struct shard_file f = {0};
	int64_t bytes = 0;
	const char *name = get_word(it, "name", 64);
	if (!name || get_count(it, it->json, "bytes", INT64_MAX, &bytes) ||
	    get_crc(it, it->json, "structure_crc32c", &f.structure_crc))
		return it->e->code;
	if (m->n_files == MAX_FILES)
		return wrong(it, "more than 1048576 files");
	f.name = arena_strdup(&m->arena, name);
	f.bytes = (uint64_t)bytes;
	m->files = mem_grow(m->files, m->n_files, &m->cap_files, sizeof *m->files);
	m->files[m->n_files++] = f;
	return 0;
}

static int parse_piece(struct item *it, const struct json *v, int nd, uint32_t first_file, struct piece *p)
{
	int64_t file = 0, at = 0, bytes = 0;
	if (get_count(it, v, "file", MAX_FILES, &file) || get_count(it, v, "at", INT64_MAX, &at) ||
	    get_count(it, v, "bytes", INT64_MAX, &bytes) || get_crc(it, v, "crc32c", &p->crc) ||
	    get_dims(it, v, "offset", nd, p->offset) < 0 || get_dims(it, v, "extent", nd, p->extent) < 0)
		return it->e->code;
	if (file + first_file >= (int64_t)it->m->n_files)
		return wrong(it, "\"file\" is not the number of a file");
	p->file = first_file + (uint32_t)file;
	p->at = (uint64_t)at;
	p->bytes = (uint64_t)bytes;
	return 0;
}

static int parse_dtype(struct item *it, enum dtype *out)
{
	const char *name = json_get_string(it->json, "dtype", "");
	for (int t = 0; t < DT_COUNT; t++)
		if (!strcmp(name, dtype_rows[t].name)) {
			*out = (enum dtype)t;
			return 0;
		}
	return wrong(it, "\"dtype\" is none of ours");
}

static int parse_tensor(struct item *it, uint32_t first_file)
{
	struct manifest *m = it->m;
	struct entry t = {.line = it->number};
	const char *name = get_word(it, "name", CKPT_MAX_NAME);
	const char *kind = name ? get_word(it, "kind", CKPT_MAX_KIND) : NULL;
	if (!kind || parse_dtype(it, &t.show.dtype))
		return it->e->code;
	t.show.nd = get_dims(it, it->json, "shape", -1, t.show.shape);
	const struct json *pieces = json_get_type(it->json, "pieces", JSON_ARRAY);
	if (t.show.nd < 0)
		return it->e->code;
	if (!pieces || !pieces->count)
		return wrong(it, "\"pieces\" must be an array with one piece or more");
	t.pieces = mem_array(pieces->count, sizeof *t.pieces);
	t.cap = pieces->count;
	JSON_EACH (v, pieces)
		if (parse_piece(it, v, t.show.nd, first_file, &t.pieces[t.show.n_pieces++])) {
			free(t.pieces);
			return it->e->code;
		}
	t.show.name = arena_strdup(&m->arena, name);
	t.show.kind = arena_strdup(&m->arena, kind);
	m->entries = mem_grow(m->entries, m->n_entries, &m->cap_entries, sizeof *m->entries);
	m->entries[m->n_entries++] = t;
	return 0;
}

static int parse_head(struct item *it)
{
	int64_t version = 0, world = 0;
	if (strcmp(json_get_string(it->json, "format", ""), "pentad-checkpoint"))
		return wrong(it, "\"format\" is not \"pentad-checkpoint\"");
	if (get_count(it, it->json, "version", INT64_MAX, &version) ||
	    get_count(it, it->json, "step", 99999999, &it->m->step) ||
	    get_count(it, it->json, "world_size", MAX_FILES, &world))
		return it->e->code;
	it->m->world_size = (int)world;
	return version == 1 ? 0
	                    : wrong(it, "written by another version of the format; this one reads version 1");
}

static bool line_is(const struct lines *l, const char *text)
{
	return l->length == strlen(text) && !memcmp(l->line, text, l->length);
}

/* Line 1 ends with ',' where a whole object would end with '}'. */
static int read_head(struct manifest *m, struct lines *l, struct err *e)
{
	struct item it = {.m = m, .number = 1, .e = e};
	if (!next_line(l) || !l->length || l->line[l->length - 1] != ',')
		return wrong(&it, "not the beginning of a manifest");
	char *text = arena_strndup(&it.arena, l->line, l->length);
	text[l->length - 1] = '}';
	int rc = parse_item(&it, text, l->length);
	if (!rc)
		rc = parse_head(&it);
	arena_free(&it.arena);
	return rc;
}

static int read_meta(struct manifest *m, struct lines *l, struct err *e)
{
	static const char key[] = "\"meta\": ";
	struct item it = {.m = m, .number = 2, .e = e};
	size_t skip = sizeof key - 1;
	if (!next_line(l) || l->length < skip + 3 || memcmp(l->line, key, skip) ||
	    l->line[l->length - 1] != ',')
		return wrong(&it, "expected \"meta\"");
	size_t length = l->length - skip - 1;
	int rc = parse_item(&it, l->line + skip, length);
	if (!rc)
		m->meta = arena_strndup(&m->arena, l->line + skip, length);
	arena_free(&it.arena);
	return rc;
}

/* `"files": [`, items of one line each, `],` */
static int read_section(struct manifest *m, struct lines *l, bool tensors, struct err *e)
{
	struct item it = {.m = m, .e = e};
	bool begun = next_line(l) && line_is(l, tensors ? "\"tensors\": [" : "\"files\": [");
	it.number = l->number;
	if (!begun)
		return wrong(&it, tensors ? "expected \"tensors\": [" : "expected \"files\": [");
	while (next_line(l) && !line_is(l, "],")) {
		it.number = l->number;
		size_t length = l->length - (l->length && l->line[l->length - 1] == ',');
		int rc = parse_item(&it, l->line, length);
		if (!rc)
			rc = tensors ? parse_tensor(&it, 0) : parse_file(&it);
		arena_free(&it.arena);
		if (rc)
			return rc;
	}
	it.number = l->number;
	return line_is(l, "],") ? 0 : wrong(&it, "the text ends in the middle of a list");
}

/* Takes the last line off and compares it with the bytes before it. */
static int check_text(const struct manifest *m, const char *text, size_t *bytes, struct err *e)
{
	char last[32];
	size_t n = (size_t)snprintf(last, sizeof last, "\"crc32c\": \"%08x\"}\n", 0u);
	if (*bytes <= n)
		return err_set(e, EXIT_BAD_DATA, "%s: %zu bytes are no manifest", m->where, *bytes);
	*bytes -= n;
	snprintf(last, sizeof last, "\"crc32c\": \"%08x\"}\n", hash_crc32c(0, text, *bytes));
	if (memcmp(last, text + *bytes, n))
		return err_set(e, EXIT_BAD_DATA,
		               "%s: the checksum in its last line is not that of its %zu bytes", m->where,
		               *bytes);
	return 0;
}

static int compare_entries(const void *a, const void *b)
{
	const struct entry *x = a, *y = b;
	int c = strcmp(x->show.kind, y->show.kind);
	if (!c)
		c = strcmp(x->show.name, y->show.name);
	return c ? c : (x->line > y->line) - (x->line < y->line);
}

static void sort_entries(struct manifest *m)
{
	if (m->n_entries)
		qsort(m->entries, m->n_entries, sizeof *m->entries, compare_entries);
}

int manifest_parse(struct manifest *m, const char *text, size_t bytes, struct err *e)
{
	if (check_text(m, text, &bytes, e))
		return e->code;
	struct lines l = {.at = text, .end = text + bytes};
	if (read_head(m, &l, e) || read_meta(m, &l, e) || read_section(m, &l, false, e) ||
	    read_section(m, &l, true, e))
		return e->code;
	if (next_line(&l))
		return err_set(e, EXIT_BAD_DATA, "%s, line %zu: something after the tensors", m->where,
		               l.number);
	sort_entries(m);
	for (size_t i = 1; i < m->n_entries; i++)
		if (!strcmp(m->entries[i - 1].show.name, m->entries[i].show.name) &&
		    !strcmp(m->entries[i - 1].show.kind, m->entries[i].show.kind))
			return err_set(e, EXIT_BAD_DATA, "%s, line %zu: tensor %s (%s) is there twice",
			               m->where, m->entries[i].line, m->entries[i].show.name,
			               m->entries[i].show.kind);
	return manifest_check(m, e);
}

static int read_record_line(struct item *it, const struct lines *l)
{
	it->number = l->number;
	int rc = parse_item(it, l->line, l->length);
	if (!rc && json_get(it->json, "pieces"))
		rc = it->m->n_files ? parse_tensor(it, (uint32_t)it->m->n_files - 1)
		                    : wrong(it, "a tensor before its file");
	else if (!rc)
		rc = parse_file(it);
	arena_free(&it->arena);
	return rc;
}

static int merge_into(struct manifest *m, struct entry *to, struct entry *from, struct err *e)
{
	if (to->show.dtype != from->show.dtype || to->show.nd != from->show.nd ||
	    memcmp(to->show.shape, from->show.shape, sizeof to->show.shape))
		return err_set(e, EXIT_BAD_DATA, "%s: ranks disagree on type or shape of tensor %s (%s)",
		               m->where, to->show.name, to->show.kind);
	for (size_t i = 0; i < from->show.n_pieces; i++) {
		to->pieces = mem_grow(to->pieces, to->show.n_pieces, &to->cap, sizeof *to->pieces);
		to->pieces[to->show.n_pieces++] = from->pieces[i];
	}
	free(from->pieces);
	from->pieces = NULL;
	from->show.n_pieces = 0;
	return 0;
}

static int merge_entries(struct manifest *m, struct err *e)
{
	size_t kept = 0;
	int rc = 0;
	for (size_t i = 1; i < m->n_entries && !rc; i++) {
		struct entry *to = &m->entries[kept], *from = &m->entries[i];
		if (!strcmp(to->show.kind, from->show.kind) && !strcmp(to->show.name, from->show.name)) {
			rc = merge_into(m, to, from, e);
		} else if (++kept != i) {
			m->entries[kept] = *from;
			from->pieces = NULL;
		}
	}
	if (m->n_entries && !rc)
		m->n_entries = kept + 1;
	return rc;
}

int manifest_add_records(struct manifest *m, const char *text, size_t bytes, struct err *e)
{
	struct lines l = {.at = text, .end = text + bytes};
	struct item it = {.m = m, .e = e};
	while (next_line(&l))
		if (read_record_line(&it, &l))
			return e->code;
	sort_entries(m);
	return merge_entries(m, e) ? e->code : manifest_check(m, e);
}

void manifest_free(struct manifest *m)
{
	for (size_t i = 0; i < m->n_entries; i++)
		free(m->entries[i].pieces);
	free(m->entries);
	free(m->files);
	arena_free(&m->arena);
	memset(m, 0, sizeof *m);
}

void manifest_print_file(const struct shard_file *f, struct buf *b)
{
	buf_printf(b, "{\"name\": \"%s\", \"bytes\": %" PRIu64 ", \"structure_crc32c\": \"%08x\"}", f->name,
	           f->bytes, f->structure_crc);
}

static void print_dims(struct buf *b, const char *key, int nd, const int64_t *v)
{
	buf_printf(b, "\"%s\": [", key);
	for (int i = 0; i < nd; i++)
		buf_printf(b, "%s%" PRId64, i ? ", " : "", v[i]);
	buf_puts(b, "]");
}

void manifest_print_tensor(const struct ckpt_entry *t, const struct piece *pieces, size_t n, struct buf *b)
{
	buf_printf(b, "{\"name\": \"%s\", \"kind\": \"%s\", \"dtype\": \"%s\", ", t->name, t->kind,
	           dtype_rows[t->dtype].name);
	print_dims(b, "shape", t->nd, t->shape);
	buf_puts(b, ", \"pieces\": [");
	for (size_t i = 0; i < n; i++) {
		const struct piece *p = &pieces[i];
		buf_printf(b,
		           "%s{\"file\": %u, \"at\": %" PRIu64 ", \"bytes\": %" PRIu64
		           ", \"crc32c\": \"%08x\", ",
		           i ? ", " : "", p->file, p->at, p->bytes, p->crc);
		print_dims(b, "offset", t->nd, p->offset);
		buf_puts(b, ", ");
		print_dims(b, "extent", t->nd, p->extent);
		buf_puts(b, "}");
	}
	buf_puts(b, "]}");
}

void manifest_print(const struct manifest *m, struct buf *b)
{
	buf_printf(b,
	           "{\"format\": \"pentad-checkpoint\", \"version\": 1, \"step\": %" PRId64
	           ", \"world_size\": %d,\n",
	           m->step, m->world_size);
	buf_printf(b, "\"meta\": %s,\n\"files\": [\n", m->meta ? m->meta : "{}");
	for (size_t i = 0; i < m->n_files; i++) {
		manifest_print_file(&m->files[i], b);
		buf_puts(b, i + 1 < m->n_files ? ",\n" : "\n");
	}
	buf_puts(b, "],\n\"tensors\": [\n");
	for (size_t i = 0; i < m->n_entries; i++) {
		const struct entry *t = &m->entries[i];
		manifest_print_tensor(&t->show, t->pieces, t->show.n_pieces, b);
		buf_puts(b, i + 1 < m->n_entries ? ",\n" : "\n");
	}
	buf_puts(b, "],\n");
	buf_printf(b, "\"crc32c\": \"%08x\"}\n", hash_crc32c(0, b->data, b->length));
}
