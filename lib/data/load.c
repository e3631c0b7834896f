#include "data/load.h"
#include "base/err.h"
#include "base/mem.h"
#include "base/text.h"

#include <stdio.h>
#include <string.h>

static void place(const struct load *l, const struct json *at, char *out, size_t cap)
{
	int line = 1, column = 1;
	size_t end = at ? at->offset_bytes : 0;
	for (size_t i = 0; i < end; i++) {
		column = l->text[i] == '\n' ? 1 : column + 1;
		line += l->text[i] == '\n';
	}
	snprintf(out, cap, at ? ":%d:%d" : "", line, column);
}

int load_wrong(struct load *l, const struct json *at, const char *fmt, ...)
{
	char where[40], what[1000];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	place(l, at, where, sizeof where);
	return err_set(l->e, EXIT_BAD_DATA, "%s%s: %s", l->name, where, what);
}

int load_passed_on(struct load *l, const struct json *at, const char *what)
{
	char where[40];
	struct err inner = *l->e;
	place(l, at, where, sizeof where);
	return err_set(l->e, inner.code, "%s%s: %s: %s", l->name, where, what, inner.text);
}

int load_type(struct load *l, const struct json *spec, const char *what, const void *rows, size_t n,
              size_t stride_bytes)
{
	const struct json *type = json_get_type(spec, "type", JSON_STRING);
	if (!type)
		return load_wrong(l, spec, "%s has no \"type\"", what), -1;
	struct buf known = {0};
	for (size_t i = 0; i < n; i++) {
		const char *name = *(const char *const *)((const char *)rows + i * stride_bytes);
		if (!strcmp(name, type->string))
			return buf_free(&known), (int)i;
		buf_printf(&known, "%s%s", i ? ", " : "", name);
	}
	const char *near = text_nearest(type->string, rows, n, stride_bytes);
	load_wrong(l, type, "%s.type is '%.60s', which is not read; allowed: %s%s%s%s", what, type->string,
	           known.data, near ? " (did you mean " : "", near ? near : "", near ? "?)" : "");
	buf_free(&known);
	return -1;
}

static const struct json *member(const struct json *spec, const char *key)
{
	const struct json *m = json_get(spec, key);
	return m && m->type != JSON_NULL ? m : NULL;
}

int load_bool(struct load *l, const struct json *spec, const char *key, bool *out)
{
	const struct json *m = member(spec, key);
	if (m && m->type != JSON_BOOL)
		return load_wrong(l, m, "%s must be true or false", key);
	*out = m ? m->boolean : *out;
	return 0;
}

int load_string(struct load *l, const struct json *spec, const char *key, const struct json **out)
{
	const struct json *m = member(spec, key);
	if (m && m->type != JSON_STRING)
		return load_wrong(l, m, "%s must be a string", key);
	*out = m ? m : *out;
	return 0;
}
