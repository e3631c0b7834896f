#include "base/err.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int err_set(struct err *e, int code, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(e->text, sizeof e->text, fmt, ap);
	va_end(ap);
	e->code = code;
	return code;
}

int err_errno(struct err *e, int code, const char *fmt, ...)
{
	int cause = errno;
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(e->text, sizeof e->text, fmt, ap);
	va_end(ap);
	size_t n = strlen(e->text);
	snprintf(e->text + n, sizeof e->text - n, ": %s", strerror(cause));
	e->code = code;
	return code;
}

int err_add(struct err *e, int code, const char *fmt, ...)
{
	size_t n = e->code ? strlen(e->text) : 0;
	if (n && n < sizeof e->text - 2)
		e->text[n++] = '\n';
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(e->text + n, sizeof e->text - n, fmt, ap);
	va_end(ap);
	return e->code = code;
}

const char *err_code_doc(int code)
{
	static const struct {
		int code;
		const char *doc;
	} rows[] = {{EXIT_DONE, "done"},
#define EXIT_ROW(name, value, doc) {value, doc},
	            EXIT_CODES(EXIT_ROW)
#undef EXIT_ROW
	};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		if (rows[i].code == code)
			return rows[i].doc;
	return "unknown";
}

void err_bug(const char *file, int line, const char *what)
{
	fprintf(stderr, "pentad: internal error at %s:%d: %s\n", file, line, what);
	fflush(stderr);
	_exit(EXIT_INTERNAL);
}
