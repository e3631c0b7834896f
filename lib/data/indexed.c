#include "data/indexed.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/sys.h"
#include "data/guard.h"
#include "data/indexed_layout.h"

#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct mapped {
	char path[PATH_MAX];
	const char *data;
	size_t bytes;
};

struct indexed {
	char prefix[PATH_MAX];
	struct mapped idx, bin;
	const struct type_row *type;
	uint64_t sequences, documents, tokens;
	const char *lengths, *pointers, *borders; /* the arrays of the .idx */
	uint64_t *first; /* [sequences + 1] tokens before a sequence; NULL where sequences lie end to end */
	uint64_t fingerprint;
};

/* Copies n elements to out; the number of the first that is not in [0, limit), n where all are. The check
 * is a sum over all so that the loop vectorises. */
#define COPY(code, name, ctype)                                                                \
	static uint64_t copy_##name(const char *from, uint64_t n, int64_t limit, int32_t *out) \
	{                                                                                      \
		ctype v;                                                                       \
		bool bad = false;                                                              \
		for (uint64_t i = 0; i < n; i++) {                                             \
			memcpy(&v, from + i * sizeof v, sizeof v);                             \
			bad |= (uint64_t)(int64_t)v >= (uint64_t)limit;                        \
			out[i] = (int32_t)v;                                                   \
		}                                                                              \
		for (uint64_t i = 0; bad && i < n; i++) {                                      \
			memcpy(&v, from + i * sizeof v, sizeof v);                             \
			if ((uint64_t)(int64_t)v >= (uint64_t)limit)                           \
				return i;                                                      \
		}                                                                              \
		return n;                                                                      \
	}                                                                                      \
	static int64_t load_##name(const char *from)                                           \
	{                                                                                      \
		ctype v;                                                                       \
		memcpy(&v, from, sizeof v);                                                    \
		return (int64_t)v;                                                             \
	}
INDEXED_INTEGERS(COPY)

struct type_row {
	uint8_t code;
	uint8_t bytes;
	const char *name;
	uint64_t (*copy)(const char *from, uint64_t n, int64_t limit, int32_t *out); /* NULL: no token ids */
	int64_t (*load)(const char *from);
};

static const struct type_row types[] = {
#define INTEGER_ROW(code, name, ctype) {code, sizeof(ctype), #name, copy_##name, load_##name},
#define FLOAT_ROW(code, name, ctype) {code, sizeof(ctype), #name, NULL, NULL},
        INDEXED_INTEGERS(INTEGER_ROW) INDEXED_FLOATS(FLOAT_ROW)};
enum { N_TYPES = sizeof types / sizeof *types };

static uint64_t load_u64(const char *p)
{
	uint64_t v;
	return *(uint64_t *)memcpy(&v, p, sizeof v);
}

static int64_t length_at(const struct indexed *x, uint64_t s)
{
	int32_t v;
	return *(int32_t *)memcpy(&v, x->lengths + 4 * s, sizeof v);
}

static uint64_t pointer_at(const struct indexed *x, uint64_t s)
{
	return load_u64(x->pointers + 8 * s);
}

static uint64_t border_at(const struct indexed *x, uint64_t d)
{
	return load_u64(x->borders + 8 * d);
}

/* Tokens before sequence s, s <= sequences. */
static uint64_t first_of(const struct indexed *x, uint64_t s)
{
	if (x->first)
		return x->first[s];
	return s < x->sequences ? pointer_at(x, s) / x->type->bytes : x->tokens;
}

static int bad_at(const struct mapped *m, const char *at, struct err *e, const char *fmt, ...)
        __attribute__((format(printf, 4, 5)));
static int bad_at(const struct mapped *m, const char *at, struct err *e, const char *fmt, ...)
{
	char text[400];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	return err_set(e, EXIT_BAD_DATA, "%s: byte offset %zu: %s", m->path, (size_t)(at - m->data), text);
}

static int map_file(struct mapped *m, const char *prefix, const char *suffix, struct err *e)
{
	const void *data = NULL;
	if (snprintf(m->path, sizeof m->path, "%s%s", prefix, suffix) >= (int)sizeof m->path)
		return err_set(e, EXIT_NO_INPUT, "%.200s…: path too long", prefix);
	int rc = sys_map(m->path, &data, &m->bytes, e);
	m->data = data;
	if (!rc)
		guard_add(m->path, data, m->bytes);
	return rc;
}

static void unmap_file(struct mapped *m)
{
	guard_remove(m->data);
	sys_unmap(m->data, m->bytes);
}

static int check_type(struct indexed *x, struct err *e)
{
	uint8_t code = (uint8_t)x->idx.data[INDEXED_AT_TYPE];
	for (size_t i = 0; i < N_TYPES; i++)
		if (types[i].code == code)
			x->type = &types[i];
	const char *at = x->idx.data + INDEXED_AT_TYPE;
	if (!x->type)
		return bad_at(
		        &x->idx, at, e,
		        "element type %d, allowed are 1 (u8), 2 (i8), 3 (i16), 4 (i32), 5 (i64), 8 (u16)",
		        code);
	if (!x->type->copy)
		return bad_at(&x->idx, at, e, "elements are %s, token ids are integers", x->type->name);
	return 0;
}

static int check_header(struct indexed *x, struct err *e)
{
	const struct mapped *m = &x->idx;
	if (m->bytes < INDEXED_HEADER)
		return err_set(e, EXIT_BAD_DATA, "%s: %zu bytes, the header of an index alone has %d",
		               m->path, m->bytes, INDEXED_HEADER);
	if (memcmp(m->data, INDEXED_MAGIC, INDEXED_AT_VERSION) != 0)
		return bad_at(m, m->data, e, "not an index of Megatron's: it does not begin with MMIDIDX");
	uint64_t version = load_u64(m->data + INDEXED_AT_VERSION);
	if (version != 1)
		return bad_at(m, m->data + INDEXED_AT_VERSION, e, "version %" PRIu64 ", known is 1", version);
	return check_type(x, e);
}

/* Counts against the size of the file: 34 + 12·S + 8·D, or S more with modes. */
static int check_counts(struct indexed *x, struct err *e)
{
	const struct mapped *m = &x->idx;
	uint64_t s = load_u64(m->data + INDEXED_AT_SEQUENCES), d = load_u64(m->data + INDEXED_AT_BORDERS);
	size_t lengths, pointers, borders, total;
	bool fits = size_mul(s, 4, &lengths) && size_mul(s, 8, &pointers) && size_mul(d, 8, &borders) &&
	            size_add(lengths, pointers, &total) && size_add(total, borders, &total) &&
	            size_add(total, INDEXED_HEADER, &total);
	if (!fits || m->bytes < total || (m->bytes != total && m->bytes - total != s))
		return bad_at(m, m->data + INDEXED_AT_SEQUENCES, e,
		              "%" PRIu64 " sequences and %" PRIu64
		              " document borders do not make a file of %zu bytes",
		              s, d, m->bytes);
	if (!d)
		return bad_at(m, m->data + INDEXED_AT_BORDERS, e,
		              "no document borders; there is at least one");
	x->sequences = s;
	x->documents = d - 1;
	x->lengths = m->data + INDEXED_HEADER;
	x->pointers = x->lengths + lengths;
	x->borders = x->pointers + pointers;
	return 0;
}

static int check_sequence(const struct indexed *x, uint64_t s, uint64_t previous, struct err *e)
{
	const char *at = x->pointers + 8 * s;
	int64_t length = length_at(x, s);
	uint64_t pointer = pointer_at(x, s), end = x->bin.bytes;
	if (length < 0)
		return bad_at(&x->idx, x->lengths + 4 * s, e, "sequence %" PRIu64 " has %" PRId64 " tokens",
		              s, length);
	if (pointer > end || (uint64_t)length * x->type->bytes > end - pointer)
		return bad_at(&x->idx, at, e,
		              "sequence %" PRIu64 ", %" PRId64 " tokens of %d bytes from byte %" PRId64
		              ", is not within the %zu bytes of %s",
		              s, length, x->type->bytes, (int64_t)pointer, x->bin.bytes, x->bin.path);
	if (pointer < previous)
		return bad_at(&x->idx, at, e, "sequence %" PRIu64 " lies before sequence %" PRIu64, s, s - 1);
	return 0;
}

/* Where sequences do not lie end to end, tokens before a sequence need an array of their own. */
static void sum_lengths(struct indexed *x)
{
	x->first = mem_array(x->sequences + 1, sizeof *x->first);
	for (uint64_t s = 0; s < x->sequences; s++)
		x->first[s + 1] = x->first[s] + (uint64_t)length_at(x, s);
}

static int check_sequences(struct indexed *x, struct err *e)
{
	uint64_t tokens = 0, previous = 0, end = 0;
	bool dense = true;
	for (uint64_t s = 0; s < x->sequences; s++) {
		int rc = check_sequence(x, s, previous, e);
		if (rc)
			return rc;
		previous = pointer_at(x, s);
		dense = dense && previous == end;
		tokens += (uint64_t)length_at(x, s);
		end = tokens * x->type->bytes;
		if (tokens >> 58) /* overlapping sequences; products with 8 must not overflow */
			return bad_at(&x->idx, x->lengths + 4 * s, e, "more than 2^58 tokens");
	}
	x->tokens = tokens;
	if (!dense)
		sum_lengths(x);
	if (end < x->bin.bytes && dense)
		log_warn("%s: %zu bytes, its index knows the first %" PRIu64 " only", x->bin.path,
		         x->bin.bytes, end);
	return 0;
}

static int check_borders(const struct indexed *x, struct err *e)
{
	uint64_t previous = 0;
	for (uint64_t d = 0; d <= x->documents; d++) {
		uint64_t border = border_at(x, d);
		if (border < previous || border > x->sequences || (d == 0 && border != 0))
			return bad_at(&x->idx, x->borders + 8 * d, e,
			              "document %" PRIu64 " begins at sequence %" PRId64 ", after %" PRIu64
			              " and of %" PRIu64,
			              d, (int64_t)border, previous, x->sequences);
		previous = border;
	}
	if (previous != x->sequences)
		return bad_at(&x->idx, x->borders + 8 * x->documents, e,
		              "the last document ends at sequence %" PRIu64 " of %" PRIu64, previous,
		              x->sequences);
	return 0;
}

static uint64_t fingerprint(const struct indexed *x)
{
	const size_t part = 65536;
	size_t n = x->bin.bytes < part ? x->bin.bytes : part;
	uint64_t h = hash_bytes(x->idx.data, x->idx.bytes, x->bin.bytes);
	if (n) {
		h = hash_bytes(x->bin.data, n, h);
		h = hash_bytes(x->bin.data + x->bin.bytes - n, n, h);
	}
	return h;
}

int indexed_open(const char *prefix, struct indexed **out, struct err *e)
{
	struct indexed *x = mem_array(1, sizeof *x);
	snprintf(x->prefix, sizeof x->prefix, "%s", prefix);
	int rc = map_file(&x->idx, prefix, ".idx", e);
	if (!rc)
		rc = map_file(&x->bin, prefix, ".bin", e);
	if (!rc)
		rc = check_header(x, e);
	if (!rc)
		rc = check_counts(x, e);
	if (!rc)
		rc = check_sequences(x, e);
	if (!rc)
		rc = check_borders(x, e);
	if (rc) {
		indexed_close(x);
		return rc;
	}
	x->fingerprint = fingerprint(x);
	*out = x;
	return 0;
}

void indexed_close(struct indexed *x)
{
	if (!x)
		return;
	unmap_file(&x->idx);
	unmap_file(&x->bin);
	free(x->first);
	free(x);
}

const char *indexed_prefix(const struct indexed *x)
{
	return x->prefix;
}

uint64_t indexed_sequences(const struct indexed *x)
{
	return x->sequences;
}

uint64_t indexed_documents(const struct indexed *x)
{
	return x->documents;
}

uint64_t indexed_tokens(const struct indexed *x)
{
	return x->tokens;
}

uint64_t indexed_document_first(const struct indexed *x, uint64_t d)
{
	ASSERT(d <= x->documents);
	return first_of(x, border_at(x, d));
}

uint64_t indexed_document_of(const struct indexed *x, uint64_t t)
{
	uint64_t low = 0, high = x->documents;
	ASSERT(t < x->tokens);
	while (high - low > 1) {
		uint64_t middle = low + (high - low) / 2;
		if (indexed_document_first(x, middle) <= t)
			low = middle;
		else
			high = middle;
	}
	return low;
}

/* The last sequence that begins at token t or before. */
static uint64_t sequence_of(const struct indexed *x, uint64_t t)
{
	uint64_t low = 0, high = x->sequences;
	while (high - low > 1) {
		uint64_t middle = low + (high - low) / 2;
		if (x->first[middle] <= t)
			low = middle;
		else
			high = middle;
	}
	return low;
}

/* Where token t lies in the .bin, and how many of the next n follow it without a gap. */
static const char *locate(const struct indexed *x, uint64_t t, uint64_t *n)
{
	if (!x->first)
		return x->bin.data + t * x->type->bytes;
	uint64_t s = sequence_of(x, t);
	if (*n > x->first[s + 1] - t)
		*n = x->first[s + 1] - t;
	return x->bin.data + pointer_at(x, s) + (t - x->first[s]) * x->type->bytes;
}

int indexed_read(const struct indexed *x, uint64_t first, uint64_t n, int64_t vocab_size, int32_t *out,
                 struct err *e)
{
	const int64_t widest = (int64_t)INT32_MAX + 1;
	int64_t limit = vocab_size > 0 && vocab_size < widest ? vocab_size : widest;
	ASSERT(first <= x->tokens && n <= x->tokens - first);
	for (uint64_t done = 0; done < n;) {
		uint64_t part = n - done;
		const char *from = locate(x, first + done, &part);
		uint64_t good = x->type->copy(from, part, limit, out + done);
		if (good < part) {
			const char *at = from + good * x->type->bytes;
			return bad_at(
			        &x->bin, at, e,
			        "token id %" PRId64 " in document %" PRIu64 ", allowed is 0 to %" PRId64,
			        x->type->load(at), indexed_document_of(x, first + done + good), limit - 1);
		}
		done += part;
	}
	return 0;
}

uint64_t indexed_fingerprint(const struct indexed *x)
{
	return x->fingerprint;
}
