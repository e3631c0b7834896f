/* JSON: a strict reader (RFC 8259, UTF-8, no duplicate keys) into an arena, and writing helpers.
 *
 * Hostile input is expected: depth is limited, every offset is checked, and an error names the file,
 * the line and the column. Local. Floor: base. */
#ifndef PENTAD_BASE_JSON_H
#define PENTAD_BASE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct arena;
struct buf;
struct err;

enum json_type { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

struct json {
	enum json_type type;
	bool boolean;        /* JSON_BOOL */
	bool is_integer;     /* JSON_NUMBER written without fraction or exponent that fits in int64 */
	int64_t integer;     /* valid where is_integer */
	double number;       /* JSON_NUMBER */
	const char *string;  /* JSON_STRING: UTF-8, NUL-terminated; may hold NULs, see length */
	size_t length;       /* JSON_STRING: bytes */
	size_t count;        /* JSON_ARRAY, JSON_OBJECT: members */
	struct json *child;  /* first member */
	struct json *next;   /* next sibling */
	const char *key;     /* of a member of an object */
	size_t key_length;   /* bytes */
	size_t offset_bytes; /* where the value begins in the text */
};

#define JSON_EACH(item, parent) for (const struct json *item = (parent)->child; item; item = item->next)

/* Parses text[0..length); `name` is what messages call it. The tree lives in *a. EXIT_BAD_DATA. */
int json_parse(struct arena *a, const char *name, const char *text, size_t length_bytes, struct json **out,
               struct err *e);
/* Member of an object by name, NULL where absent or where `object` is no object (or NULL). */
const struct json *json_get(const struct json *object, const char *key);
/* Member of the wanted type or NULL. */
const struct json *json_get_type(const struct json *object, const char *key, enum json_type type);
/* The string, integer, number, boolean of a member, or `otherwise`. */
const char *json_get_string(const struct json *object, const char *key, const char *otherwise);
int64_t json_get_integer(const struct json *object, const char *key, int64_t otherwise);
double json_get_number(const struct json *object, const char *key, double otherwise);
bool json_get_bool(const struct json *object, const char *key, bool otherwise);

/* Appends a quoted, escaped string. Invalid UTF-8 becomes U+FFFD. */
void json_put_string(struct buf *b, const char *s, size_t length_bytes);
/* Appends the shortest decimal that reads back as the same double; null where it is not finite. */
void json_put_number(struct buf *b, double x);

#endif
