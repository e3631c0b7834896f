/* Options: one row a setting, and everything else (parsing, errors, printing, hashing) walks the rows.
 *
 * Rows are written once, in .def files, as BOOL(name, default, doc, …), INT(name, default, min, max, unit,
 * doc, …), DOUBLE(the same), STRING(name, default, doc, …), LIST(name, default, doc, …) and
 * ENUM(name, tag, default, doc, …); behind the doc follow further fields of struct option by name:
 *
 *	INT(num_query_groups, "null", 1, 65536, "heads", "groups of …", .derived = "num_attention_heads")
 *
 * base/option_fields.h makes them fields of a struct, base/option_rows.h rows of a table. A default of
 * "null" makes an option that may be null. Local. Floor: base. */
#ifndef PENTAD_BASE_OPTION_H
#define PENTAD_BASE_OPTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct arena;
struct buf;
struct err;
struct yaml_node;

/* Type, its name for people, the C type of the field. */
#define OPTION_TYPES(X)                              \
	X(OPTION_BOOL, "true|false", bool)           \
	X(OPTION_INT, "a whole number", int64_t)     \
	X(OPTION_DOUBLE, "a number", double)         \
	X(OPTION_STRING, "a string", const char *)   \
	X(OPTION_LIST, "a list", struct option_list) \
	X(OPTION_ENUM, "a word", int)

enum option_type {
#define OPTION_TYPE_ROW(name, word, ctype) name,
	OPTION_TYPES(OPTION_TYPE_ROW)
#undef OPTION_TYPE_ROW
	        N_OPTION_TYPES
};

/* How null is stored: ints OPTION_NULL_INT, doubles NaN, strings NULL, lists n = 0. */
#define OPTION_NULL_INT ((int64_t)-1)

struct option_list {
	const char *const *items;
	size_t n;
};

/* A value of an enumeration. `later` says why it is refused today; NULL: it works. */
struct option_choice {
	const char *name, *later;
};

/* #define COLOURS(X) X(COLOUR_RED, "red", NULL) X(COLOUR_BLUE, "blue", "blue is not built yet")
 * OPTION_ENUM_DECLARE(colour, COLOURS) gives enum colour and colour_choices[], ended by a NULL name;
 * OPTION_ENUM_DEFINE(colour, COLOURS) belongs into one .c file. */
#define OPTION_ENUM_VALUE(value, name, later) value,
#define OPTION_ENUM_CHOICE(value, name, later) {name, later},
#define OPTION_ENUM_DECLARE(tag, LIST)        \
	enum tag { LIST(OPTION_ENUM_VALUE) }; \
	extern const struct option_choice tag##_choices[];
#define OPTION_ENUM_DEFINE(tag, LIST) \
	const struct option_choice tag##_choices[] = {LIST(OPTION_ENUM_CHOICE){0}};

struct option {
	const char *key; /* "model.num_layers" */
	enum option_type type;
	size_t offset_bytes; /* of the field in the values */
	const char *value;   /* default, as text */
	double min, max;     /* of numbers, both allowed … */
	bool above, below;   /* … unless min, max themselves are excluded */
	const char *unit;
	const struct option_choice *choices;
	const char *doc;
	const char *derived; /* what null becomes */
	const char *later;   /* the sentence for any value but the default: the feature is not there yet */
	bool required;       /* default null, but a value is needed */
	bool local;          /* of this run or machine: leaves the training, and so the hash, as it is */
};

/* A group of keys; `shorthand` is the key that a scalar in the place of the mapping sets. */
struct option_group {
	const char *name, *doc, *shorthand;
	const char *later; /* set for a group that has no keys yet */
};

/* A foreign spelling: "max_steps" → "train.train_iters", or of a value: "model.activation=silu" → "swiglu".
 * `note` follows the suggestion, may be NULL. */
struct option_alias {
	const char *name, *key, *note;
};

/* All there is to know about the rows: constant. */
struct option_table {
	const struct option *rows;
	size_t n;
	const struct option_group *groups;
	size_t n_groups;
	const struct option_alias *aliases;
	size_t n_aliases;
};

enum option_source {
	OPTION_FROM_DEFAULT,
	OPTION_FROM_FILE,
	OPTION_FROM_SET,
	OPTION_FROM_DERIVED,
	OPTION_FROM_OTHER
};

/* Where a value came from. text: "default", "a.yaml:12:3", "--set a.b=c", "derived", "checkpoint …". */
struct option_origin {
	enum option_source source;
	const char *text;
};

/* The values of one table: `values` is the caller's struct, `origins` has table->n elements, strings live in
 * *arena. `hidden` counts violations for which struct err had no room. */
struct option_set {
	const struct option_table *table;
	void *values;
	struct option_origin *origins;
	struct arena *arena;
	size_t hidden;
};

/* Sets every value to its default. A default that does not parse is our bug. */
void option_set_defaults(struct option_set *s);
/* Lays one file's tree over the values. Every violation is added to *e; the rest is applied.
 * 0 or EXIT_CONFIG. The tree's strings are copied. */
int option_set_tree(struct option_set *s, const struct yaml_node *root, struct err *e);
/* Lays "a.b=c" over the values; c is a YAML scalar or flow list. `origin` names it. 0 or EXIT_CONFIG. */
int option_set_text(struct option_set *s, const char *assignment, enum option_source source,
                    const char *origin, struct err *e);
/* Adds a violation for every value of a feature that is not there yet (`later`). Call it after the last
 * layer: a later one may have put the default back. 0 or EXIT_CONFIG. */
int option_check_later(struct option_set *s, struct err *e);
/* Adds one violation, or counts it where *e is nearly full; option_end_violations writes the count. */
int option_violation(struct option_set *s, struct err *e, const char *fmt, ...)
        __attribute__((format(printf, 3, 4)));
int option_end_violations(struct option_set *s, struct err *e);

/* The row of a key, NULL where there is none. */
const struct option *option_find(const struct option_table *t, const char *key);
/* The key that was meant by `word` (foreign spelling, wrong group, typo), or NULL; *note may be set to a
 * remark that belongs to it. `word` may be dotted. */
const char *option_nearest(const struct option_table *t, const char *word, const char **note);
/* The alias spelled exactly `name`, or NULL. */
const char *option_find_alias(const struct option_table *t, const char *name, const char **note);
/* Field of a row in the values of a set. */
void *option_field(const struct option_set *s, const struct option *o);
/* Puts a row back to its default, origin included. */
void option_reset(struct option_set *s, const struct option *o);
bool option_is_null(const struct option_set *s, const struct option *o);
/* true where the value is that of the row, wherever it comes from. */
bool option_is_default(const struct option_set *s, const struct option *o);

/* Appends the value as YAML; reads back to the same value. */
void option_put_value(const struct option_set *s, const struct option *o, struct buf *b);
/* Appends what is allowed: "true|false", "1 to 65536", "gpt|bert|t5", "a string". */
void option_put_allowed(const struct option *o, struct buf *b);
/* Appends the whole set as YAML, groups and keys in the table's order, each value's origin as a comment.
 * open: keys, ended by NULL, that are to be chosen yet: their lines are comments. */
void option_put_yaml(const struct option_set *s, const char *const *open, struct buf *b);
/* Fingerprint of all values whose rows are not `local`. */
uint64_t option_hash(const struct option_set *s);
/* Appends the table for people, or as a JSON Schema (draft 2020-12). */
void option_put_schema(const struct option_table *t, struct buf *b);
void option_put_schema_json(const struct option_table *t, struct buf *b);
/* Appends one key in detail. */
void option_put_help(const struct option *o, struct buf *b);

#endif
