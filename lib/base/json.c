#include "base/json.h"
#include "base/err.h"
#include "base/mem.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEPTH = 64 };

struct reader {
	struct arena *a;
	const char *name, *begin, *at, *end;
	struct err *e;
	int depth;
};

static int wrong(struct reader *r, const char *at, const char *what)
{
	int line = 1, column = 1;
	for (const char *p = r->begin; p < at; p++) {
		column = *p == '\n' ? 1 : column + 1;
		line += *p == '\n';
	}
	return err_set(r->e, EXIT_BAD_DATA, "%s:%d:%d: JSON: %s", r->name, line, column, what);
}

static void skip_space(struct reader *r)
{
	while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r'))
		r->at++;
}

static int hex4(const char *p, const char *end, unsigned *out)
{
	if (end - p < 4)
		return -1;
	*out = 0;
	for (int i = 0; i < 4; i++) {
		unsigned c = (unsigned char)p[i], d = c - '0';
		if (d > 9) {
			d = (c | 32) - 'a';
			if (d > 5)
				return -1;
			d += 10;
		}
		*out = *out * 16 + d;
	}
	return 0;
}

static char *put_utf8(char *o, unsigned c)
{
	static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
	int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
	if (n == 1) {
		*o++ = (char)c;
		return o;
	}
	*o++ = (char)(lead[n] | c >> 6 * (n - 1));
	for (int i = n - 2; i >= 0; i--)
		*o++ = (char)(0x80 | (c >> 6 * i & 63));
	return o;
}

/* Bytes of the UTF-8 sequence at p, 0 where it is malformed, overlong or a surrogate. */
static int utf8_length(const unsigned char *p, const unsigned char *end)
{
	static const unsigned least[] = {0, 0, 0x80, 0x800, 0x10000};
	int n = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : p[0] < 0xf5 ? 4 : 0;
	if (n < 2 || end - p < n)
		return n < 2 ? n : 0;
	unsigned c = p[0] & (0x7fu >> n);
	for (int i = 1; i < n; i++) {
		if ((p[i] & 0xc0) != 0x80)
			return 0;
		c = c << 6 | (p[i] & 63);
	}
	return c < least[n] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000) ? 0 : n;
}

static int read_escape(struct reader *r, char **out)
{
	static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
	const char *at = r->at++; /* the backslash */
	if (r->at == r->end)
		return wrong(r, at, "a string that does not end");
	const char *hit = memchr(from, *r->at, sizeof from - 1);
	if (hit) {
		*(*out)++ = to[hit - from];
		r->at++;
		return 0;
	}
	unsigned c, low;
	if (*r->at != 'u' || hex4(r->at + 1, r->end, &c))
		return wrong(r, at, "an escape that JSON does not know");
	r->at += 5;
	if (c >= 0xd800 && c < 0xdc00) {
		if (r->end - r->at < 6 || r->at[0] != '\\' || r->at[1] != 'u' ||
		    hex4(r->at + 2, r->end, &low) || low < 0xdc00 || low > 0xdfff)
			return wrong(r, at, "half of a surrogate pair");
		c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
		r->at += 6;
	} else if (c >= 0xdc00 && c < 0xe000) {
		return wrong(r, at, "half of a surrogate pair");
	}
	*out = put_utf8(*out, c);
	return 0;
}

static int read_string(struct reader *r, const char **string, size_t *length)
{
	const char *open = r->at++;
	const char *close = r->at;
	while (close < r->end && *close != '"')
		close += *close == '\\' ? 2 : 1;
	if (close >= r->end)
		return wrong(r, open, "a string that does not end");
	char *o = arena_alloc(r->a, (size_t)(close - r->at) + 1, 1);
	*string = o;
	while (r->at < close) {
		unsigned char c = (unsigned char)*r->at;
		if (c < 0x20)
			return wrong(r, r->at, "a control character inside a string");
		if (c == '\\') {
			if (read_escape(r, &o))
				return r->e->code;
			continue;
		}
		int n = utf8_length((const unsigned char *)r->at, (const unsigned char *)r->end);
		if (!n)
			return wrong(r, r->at, "bytes that are not UTF-8");
		memcpy(o, r->at, (size_t)n);
		o += n;
		r->at += n;
	}
	*length = (size_t)(o - *string);
	r->at = close + 1;
	return 0;
}

static const char *digits(const char *p, const char *end)
{
	while (p < end && *p >= '0' && *p <= '9')
		p++;
	return p;
}

static int read_number(struct reader *r, struct json *v)
{
	const char *p = r->at + (*r->at == '-'), *q = digits(p, r->end);
	char text[64];
	if (q == p || (*p == '0' && q - p > 1))
		return wrong(r, r->at, "a value that is none of JSON's");
	v->is_integer = true;
	if (q < r->end && *q == '.') {
		v->is_integer = false;
		p = q + 1;
		if ((q = digits(p, r->end)) == p)
			return wrong(r, r->at, "a number without digits after its point");
	}
	if (q < r->end && (*q == 'e' || *q == 'E')) {
		v->is_integer = false;
		p = q + 1;
		p += p < r->end && (*p == '+' || *p == '-');
		if ((q = digits(p, r->end)) == p)
			return wrong(r, r->at, "a number without digits in its exponent");
	}
	size_t n = (size_t)(q - r->at);
	if (n >= sizeof text)
		return wrong(r, r->at, "a number of more than 63 characters");
	memcpy(text, r->at, n);
	text[n] = 0;
	v->type = JSON_NUMBER;
	v->number = strtod(text, NULL);
	errno = 0;
	v->integer = v->is_integer ? strtoll(text, NULL, 10) : 0;
	v->is_integer &= errno == 0;
	r->at = q;
	return 0;
}

static int read_value(struct reader *r, struct json **out);

static int compare_keys(const void *a, const void *b)
{
	const struct json *x = *(struct json *const *)a, *y = *(struct json *const *)b;
	size_t n = x->key_length < y->key_length ? x->key_length : y->key_length;
	int c = memcmp(x->key, y->key, n);
	return c ? c : (x->key_length > y->key_length) - (x->key_length < y->key_length);
}

static int refuse_duplicates(struct reader *r, const struct json *object)
{
	struct json **all = mem_array(object->count, sizeof *all);
	size_t n = 0;
	for (struct json *m = object->child; m; m = m->next)
		all[n++] = m;
	qsort(all, n, sizeof *all, compare_keys);
	int rc = 0;
	for (size_t i = 1; i < n && !rc; i++)
		if (!compare_keys(&all[i - 1], &all[i]))
			rc = wrong(r, r->begin + all[i]->offset_bytes, "a key that was there before");
	free(all);
	return rc;
}

static int read_key(struct reader *r, const char **key, size_t *length)
{
	skip_space(r);
	if (r->at == r->end || *r->at != '"')
		return wrong(r, r->at, "expected a key in double quotes");
	if (read_string(r, key, length))
		return r->e->code;
	skip_space(r);
	if (r->at == r->end || *r->at++ != ':')
		return wrong(r, r->at, "expected ':' after a key");
	return 0;
}

static int read_members(struct reader *r, struct json *v, char close)
{
	struct json **tail = &v->child;
	r->at++;
	skip_space(r);
	if (r->at < r->end && *r->at == close) {
		r->at++;
		return 0;
	}
	for (;; r->at++) {
		const char *key = NULL;
		size_t key_length = 0;
		if (close == '}' && read_key(r, &key, &key_length))
			return r->e->code;
		if (read_value(r, tail))
			return r->e->code;
		(*tail)->key = key;
		(*tail)->key_length = key_length;
		tail = &(*tail)->next;
		v->count++;
		skip_space(r);
		if (r->at < r->end && *r->at == close)
			break;
		if (r->at == r->end || *r->at != ',')
			return wrong(r, r->at, close == '}' ? "expected ',' or '}'" : "expected ',' or ']'");
	}
	r->at++;
	return close == '}' ? refuse_duplicates(r, v) : 0;
}

static int read_word(struct reader *r, struct json *v)
{
	static const struct {
		const char *word;
		enum json_type type;
		bool value;
	} words[] = {{"null", JSON_NULL, false}, {"true", JSON_BOOL, true}, {"false", JSON_BOOL, false}};
	for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
		size_t n = strlen(words[i].word);
		if ((size_t)(r->end - r->at) < n || memcmp(r->at, words[i].word, n))
			continue;
		v->type = words[i].type;
		v->boolean = words[i].value;
		r->at += n;
		return 0;
	}
	return read_number(r, v);
}

static int read_value(struct reader *r, struct json **out)
{
	skip_space(r);
	if (r->at == r->end)
		return wrong(r, r->at, "the text ends where a value should be");
	struct json *v = *out = arena_alloc(r->a, 1, sizeof *v);
	v->offset_bytes = (size_t)(r->at - r->begin);
	char c = *r->at;
	if (c == '"') {
		v->type = JSON_STRING;
		return read_string(r, &v->string, &v->length);
	}
	if (c != '{' && c != '[')
		return read_word(r, v);
	if (++r->depth > MAX_DEPTH)
		return wrong(r, r->at, "nested deeper than 64 levels");
	v->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
	int rc = read_members(r, v, c == '{' ? '}' : ']');
	r->depth--;
	return rc;
}

int json_parse(struct arena *a, const char *name, const char *text, size_t length_bytes, struct json **out,
               struct err *e)
{
	struct reader r = {a, name, text, text, text + length_bytes, e, 0};
	struct json *v;
	int rc = read_value(&r, &v);
	if (rc)
		return rc;
	skip_space(&r);
	if (r.at != r.end)
		return wrong(&r, r.at, "something after the end of the value");
	*out = v;
	return 0;
}

const struct json *json_get(const struct json *object, const char *key)
{
	if (!object || object->type != JSON_OBJECT)
		return NULL;
	size_t n = strlen(key);
	JSON_EACH (m, object)
		if (m->key_length == n && !memcmp(m->key, key, n))
			return m;
	return NULL;
}

const struct json *json_get_type(const struct json *object, const char *key, enum json_type type)
{
	const struct json *m = json_get(object, key);
	return m && m->type == type ? m : NULL;
}

const char *json_get_string(const struct json *object, const char *key, const char *otherwise)
{
	const struct json *m = json_get_type(object, key, JSON_STRING);
	return m ? m->string : otherwise;
}

int64_t json_get_integer(const struct json *object, const char *key, int64_t otherwise)
{
	const struct json *m = json_get_type(object, key, JSON_NUMBER);
	return m && m->is_integer ? m->integer : otherwise;
}

double json_get_number(const struct json *object, const char *key, double otherwise)
{
	const struct json *m = json_get_type(object, key, JSON_NUMBER);
	return m ? m->number : otherwise;
}

bool json_get_bool(const struct json *object, const char *key, bool otherwise)
{
	const struct json *m = json_get_type(object, key, JSON_BOOL);
	return m ? m->boolean : otherwise;
}

void json_put_string(struct buf *b, const char *s, size_t length_bytes)
{
	static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
	const unsigned char *p = (const unsigned char *)s, *end = p + length_bytes;
	buf_add(b, "\"", 1);
	while (p < end) {
		const char *hit = *p ? memchr(from, *p, sizeof from - 1) : NULL;
		int n = utf8_length(p, end);
		if (hit)
			buf_printf(b, "\\%c", to[hit - from]);
		else if (*p < 0x20)
			buf_printf(b, "\\u%04x", *p);
		else if (n)
			buf_add(b, p, (size_t)n);
		else
			buf_puts(b, "\xef\xbf\xbd");
		p += n ? n : 1;
	}
	buf_add(b, "\"", 1);
}

void json_put_number(struct buf *b, double x)
{
	if (!isfinite(x)) {
		buf_puts(b, "null");
		return;
	}
	size_t at = b->length;
	for (int digits10 = 6; digits10 <= 17; digits10++) {
		b->length = at;
		buf_printf(b, "%.*g", digits10, x);
		if (strtod(b->data + at, NULL) == x)
			return;
	}
}
