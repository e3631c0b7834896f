/* Reading the parts of a tokenizer.json: where an error is, and choosing a row of a table by its "type".
 * Inside floor data. Local. */
#ifndef PENTAD_DATA_LOAD_H
#define PENTAD_DATA_LOAD_H

#include "base/json.h"

#include <stdbool.h>
#include <stddef.h>

struct err;
struct arena;

struct load {
	const char *name, *text; /* what messages call the file, and its bytes */
	size_t length_bytes;
	struct arena *arena; /* lives as long as the tokenizer */
	struct err *e;
};

/* EXIT_BAD_DATA with "name:line:column: " before the sentence; `at` may be NULL. */
int load_wrong(struct load *l, const struct json *at, const char *fmt, ...)
        __attribute__((format(printf, 3, 4)));
/* Puts "name:line:column: what: " before an error that a lower function wrote, and returns its code. */
int load_passed_on(struct load *l, const struct json *at, const char *what);

/* The row whose name (a const char * at its beginning) is spec.type: its index, or -1 after the message.
 * `what` is the dotted key. */
int load_type(struct load *l, const struct json *spec, const char *what, const void *rows, size_t n,
              size_t stride_bytes);
/* Members that may be absent or null: *out keeps its value then. Another type is an error. */
int load_bool(struct load *l, const struct json *spec, const char *key, bool *out);
int load_string(struct load *l, const struct json *spec, const char *key, const struct json **out);

#endif
