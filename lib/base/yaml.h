/* YAML: the part of it that configuration needs, as a tree of nodes that know their place.
 *
 * Plain mappings, sequences and scalars, one document, UTF-8. Refused, with the place: anchors, aliases,
 * tags, merge keys, directives, several documents, duplicate keys, keys that are no scalars, more than 1 MiB,
 * 32 levels or 10,000 events. Reads libyaml's events, so nothing is expanded before it is judged. Local.
 * Floor: base. */
#ifndef PENTAD_BASE_YAML_H
#define PENTAD_BASE_YAML_H

#include <stdbool.h>
#include <stddef.h>

struct arena;
struct buf;
struct err;

enum { YAML_MAX_BYTES = 1 << 20, YAML_MAX_DEPTH = 32, YAML_MAX_EVENTS = 10000 };

enum yaml_type { YAML_SCALAR, YAML_SEQUENCE, YAML_MAPPING };

struct yaml_place {
	const char *file;
	size_t line, column; /* from 1; line 0: the text has no file */
};

struct yaml_node {
	enum yaml_type type;
	bool plain;         /* scalar without quotes */
	const char *scalar; /* NUL-terminated, holds no NUL; "" for a scalar left out */
	struct yaml_place place;
	size_t count;             /* children */
	struct yaml_node *child;  /* first member or element, in the file's order */
	struct yaml_node *next;   /* next sibling */
	const char *key;          /* of a member of a mapping */
	struct yaml_place key_at; /* of that key */
};

/* Parses text[0..length) into *a; `name` is what messages call it. An empty text is an empty mapping.
 * *out is the root, of any type. EXIT_CONFIG: all refused things are added to *e, a line each, and *out is
 * the tree without them, so that more can be said about it; NULL where the syntax is broken. */
int yaml_parse(struct arena *a, const char *name, const char *text, size_t length_bytes,
               struct yaml_node **out, struct err *e);
/* The same for a file. EXIT_NO_INPUT where it is missing, EXIT_IO, EXIT_CONFIG. */
int yaml_parse_file(struct arena *a, const char *path, struct yaml_node **out, struct err *e);

/* Appends s as a scalar that reads back as the same string: plain where that is safe, else double-quoted. */
void yaml_put_string(struct buf *b, const char *s);
/* Appends s as the rest of a comment: what could end the line becomes '?'. */
void yaml_put_comment(struct buf *b, const char *s);

/* The word for a node's type: "a scalar", "a list", "a mapping". */
const char *yaml_type_word(enum yaml_type type);

#endif
