/* Errors as values.
 *
 * A function that can fail returns 0, or an exit code of the table below after it has written one
 * sentence into *e: what, where (file:line:column, dotted key, byte offset), what is allowed. The
 * first function that knows the cause writes it; callers pass the code on. Local. Floor: base. */
#ifndef PENTAD_BASE_ERR_H
#define PENTAD_BASE_ERR_H

#include <stdarg.h>

#define EXIT_CODES(X)                                         \
	X(USAGE, 64, "wrong command line")                    \
	X(BAD_DATA, 65, "bad or corrupt data")                \
	X(NO_INPUT, 66, "input missing")                      \
	X(UNAVAILABLE, 69, "device or transport unavailable") \
	X(INTERNAL, 70, "our fault, or a hang")               \
	X(IO, 74, "input/output error")                       \
	X(AGAIN, 75, "checkpointed, run me again")            \
	X(CONFIG, 78, "bad configuration")                    \
	X(DIVERGED, 79, "diverged")                           \
	X(SELF_CHECK, 80, "self-check failed")

enum exit_code {
	EXIT_DONE = 0,
#define EXIT_ROW(name, value, doc) EXIT_##name = value,
	EXIT_CODES(EXIT_ROW)
#undef EXIT_ROW
};

struct err {
	int code;
	char text[3000]; /* one sentence, or one line a violation; no newline at the end */
};

/* Writes the message and returns `code`: `return err_set(e, EXIT_BAD_DATA, "%s: …", path);` */
int err_set(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* The same with ": strerror(errno)" behind it. */
int err_errno(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Adds a further line to an error (or begins one), so that all violations are reported at once. */
int err_add(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* The word for an exit code, "unknown" for others; static storage. */
const char *err_code_doc(int code);

/* We were wrong, not the user: prints file:line and leaves with EXIT_INTERNAL. */
void err_bug(const char *file, int line, const char *what) __attribute__((noreturn));
#define ASSERT(x) ((x) ? (void)0 : err_bug(__FILE__, __LINE__, #x))

#endif
