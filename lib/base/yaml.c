#include "base/yaml.h"
#include "base/err.h"
#include "base/mem.h"
#include "base/sys.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

enum { MAX_REFUSALS = 20 };

struct reader {
	yaml_parser_t parser;
	struct arena *a;
	const char *name;
	struct err *e;
	int depth, refusals;
	size_t events;
	bool broken; /* no further event can be read */
};

static const char *const type_words[] = {
        [YAML_SCALAR] = "a single value", [YAML_SEQUENCE] = "a list", [YAML_MAPPING] = "a mapping"};

const char *yaml_type_word(enum yaml_type type)
{
	return type_words[type];
}

/* Adds a refusal; reading goes on, so that all of them are reported together. */
static void refuse(struct reader *r, yaml_mark_t at, const char *what)
{
	if (r->refusals++ < MAX_REFUSALS)
		err_add(r->e, EXIT_CONFIG, "%s:%zu:%zu: %s", r->name, at.line + 1, at.column + 1, what);
}

static void stop(struct reader *r, yaml_mark_t at, const char *what)
{
	if (!r->broken)
		err_add(r->e, EXIT_CONFIG, "%s:%zu:%zu: %s", r->name, at.line + 1, at.column + 1, what);
	r->broken = true;
}

static bool next_event(struct reader *r, yaml_event_t *event)
{
	if (r->broken)
		return false;
	if (!yaml_parser_parse(&r->parser, event)) {
		const yaml_parser_t *p = &r->parser;
		char what[300];
		snprintf(what, sizeof what, "YAML: %s%s%s", p->context ? p->context : "",
		         p->context ? ", " : "", p->problem ? p->problem : "out of memory");
		yaml_mark_t at = p->problem_mark.index || p->problem_mark.line ? p->problem_mark : p->mark;
		stop(r, at, what);
		return false;
	}
	if (++r->events > YAML_MAX_EVENTS) {
		stop(r, event->start_mark, "YAML: more than 10000 keys and values; allowed: 10000 events");
		yaml_event_delete(event);
		return false;
	}
	return true;
}

static void check_properties(struct reader *r, const yaml_event_t *event, const void *anchor, const void *tag)
{
	if (anchor)
		refuse(r, event->start_mark,
		       "anchors (&name) are not allowed; write the value where it is needed");
	if (tag)
		refuse(r, event->start_mark, "tags (!name) are not allowed; types follow from the key");
}

static struct yaml_node *new_node(struct reader *r, enum yaml_type type, yaml_mark_t at)
{
	struct yaml_node *node = arena_alloc(r->a, 1, sizeof *node);
	node->type = type;
	node->scalar = "";
	node->place = (struct yaml_place){r->name, at.line + 1, at.column + 1};
	return node;
}

static struct yaml_node *build(struct reader *r, const yaml_event_t *event);

static struct yaml_node *build_scalar(struct reader *r, const yaml_event_t *event)
{
	const char *text = (const char *)event->data.scalar.value;
	check_properties(r, event, event->data.scalar.anchor, event->data.scalar.tag);
	if (memchr(text, 0, event->data.scalar.length)) {
		refuse(r, event->start_mark, "a string must not hold a NUL character");
		return NULL;
	}
	struct yaml_node *node = new_node(r, YAML_SCALAR, event->start_mark);
	node->scalar = arena_strdup(r->a, text);
	node->plain = event->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
	return node;
}

/* Links a child behind **tail. */
static void append(struct yaml_node *parent, struct yaml_node ***tail, struct yaml_node *child)
{
	**tail = child;
	*tail = &child->next;
	parent->count++;
}

static struct yaml_node *build_sequence(struct reader *r, const yaml_event_t *event)
{
	check_properties(r, event, event->data.sequence_start.anchor, event->data.sequence_start.tag);
	struct yaml_node *node = new_node(r, YAML_SEQUENCE, event->start_mark), **tail = &node->child;
	yaml_event_t item;
	while (next_event(r, &item)) {
		bool end = item.type == YAML_SEQUENCE_END_EVENT;
		struct yaml_node *child = end ? NULL : build(r, &item);
		yaml_event_delete(&item);
		if (end)
			return node;
		if (child)
			append(node, &tail, child);
	}
	return NULL;
}

static const struct yaml_node *member(const struct yaml_node *mapping, const char *key)
{
	const struct yaml_node *n = mapping->child;
	while (n && strcmp(n->key, key))
		n = n->next;
	return n;
}

static bool key_allowed(struct reader *r, const struct yaml_node *mapping, const struct yaml_node *key,
                        yaml_mark_t at)
{
	char what[400];
	if (!key || r->broken) /* said already */
		return false;
	if (key->type != YAML_SCALAR) {
		refuse(r, at, "a key must be a single word");
		return false;
	}
	if (key->plain && !strcmp(key->scalar, "<<")) {
		refuse(r, at, "merge keys (<<) are not allowed; give -c twice to lay one file over another");
		return false;
	}
	const struct yaml_node *first = member(mapping, key->scalar);
	if (first) {
		snprintf(what, sizeof what, "%.200s: duplicate key, first set in line %zu", key->scalar,
		         first->key_at.line);
		refuse(r, at, what);
	}
	return !first;
}

static struct yaml_node *build_mapping(struct reader *r, const yaml_event_t *event)
{
	check_properties(r, event, event->data.mapping_start.anchor, event->data.mapping_start.tag);
	struct yaml_node *node = new_node(r, YAML_MAPPING, event->start_mark), **tail = &node->child;
	yaml_event_t first, second;
	while (next_event(r, &first)) {
		bool end = first.type == YAML_MAPPING_END_EVENT;
		struct yaml_node *key = end ? NULL : build(r, &first), *value = NULL;
		bool allowed = !end && key_allowed(r, node, key, first.start_mark);
		yaml_event_delete(&first);
		if (end)
			return node;
		if (!next_event(r, &second))
			break;
		value = build(r, &second);
		yaml_event_delete(&second);
		if (!allowed || !value)
			continue;
		value->key = key->scalar;
		value->key_at = key->place;
		append(node, &tail, value);
	}
	return NULL;
}

/* The node that begins with this event, NULL where it is refused or the rest cannot be read. */
static struct yaml_node *build(struct reader *r, const yaml_event_t *event)
{
	if (event->type == YAML_SCALAR_EVENT)
		return build_scalar(r, event);
	if (event->type == YAML_ALIAS_EVENT) {
		refuse(r, event->start_mark,
		       "aliases (*name) are not allowed; write the value where it is needed");
		return NULL;
	}
	if (++r->depth > YAML_MAX_DEPTH) {
		stop(r, event->start_mark, "YAML: nested too deep; allowed: 32 levels");
		return NULL;
	}
	struct yaml_node *node =
	        event->type == YAML_SEQUENCE_START_EVENT ? build_sequence(r, event) : build_mapping(r, event);
	r->depth--;
	return node;
}

static struct yaml_node *build_document(struct reader *r, const yaml_event_t *start)
{
	if (start->data.document_start.version_directive ||
	    start->data.document_start.tag_directives.start != start->data.document_start.tag_directives.end)
		refuse(r, start->start_mark, "directives (%) are not allowed");
	yaml_event_t event;
	if (!next_event(r, &event))
		return NULL;
	struct yaml_node *root = build(r, &event);
	yaml_event_delete(&event);
	if (next_event(r, &event)) /* the end of the document */
		yaml_event_delete(&event);
	return root;
}

static bool is_empty(const struct yaml_node *root)
{
	return root->type == YAML_SCALAR && root->plain && !*root->scalar;
}

static struct yaml_node *build_stream(struct reader *r)
{
	struct yaml_node *root = NULL;
	bool end = false;
	for (size_t documents = 0; !end;) {
		yaml_event_t event;
		if (!next_event(r, &event))
			return NULL;
		end = event.type == YAML_STREAM_END_EVENT;
		if (event.type == YAML_DOCUMENT_START_EVENT && !documents++)
			root = build_document(r, &event);
		else if (event.type == YAML_DOCUMENT_START_EVENT)
			stop(r, event.start_mark, "a second document; allowed: one document a file");
		yaml_event_delete(&event);
	}
	if (!root || is_empty(root))
		root = new_node(r, YAML_MAPPING, (yaml_mark_t){0});
	return root;
}

/* Decodes the UTF-8 sequence at p: its length, 0 where there is none. RFC 3629, no surrogates, nothing
 * overlong. */
static size_t utf8_decode(const unsigned char *p, size_t left, uint32_t *out)
{
	static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
	size_t n = *p < 0x80 ? 1 : *p < 0xc0 ? 0 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : *p < 0xf8 ? 4 : 0;
	if (!n || n > left)
		return 0;
	uint32_t c = n == 1 ? *p : *p & (0x7f >> n);
	for (size_t i = 1; i < n; i++) {
		if ((p[i] & 0xc0) != 0x80)
			return 0;
		c = c << 6 | (p[i] & 0x3f);
	}
	*out = c;
	return n == 1 || (c >= least[n] && c <= 0x10ffff && (c < 0xd800 || c > 0xdfff)) ? n : 0;
}

/* What may stand in a YAML text: section 5.1 of YAML 1.2. */
static bool is_text(uint32_t c)
{
	bool control =
	        (c < 0x20 && c != '\t' && c != '\n' && c != '\r') || (c >= 0x7f && c < 0xa0 && c != 0x85);
	return !control && c != 0xfffe && c != 0xffff;
}

/* What a reader neither refuses nor takes for a line break or a mark. */
static bool is_harmless(uint32_t c)
{
	return c >= 0x20 && c != 0x85 && is_text(c) && c != 0x2028 && c != 0x2029 && c != 0xfeff;
}

/* libyaml says where in bytes, or not at all; people need line and column, so bytes are judged here. */
static int check_bytes(const char *name, const char *text, size_t length, struct err *e)
{
	size_t line = 1, column = 1;
	if (length > YAML_MAX_BYTES)
		return err_add(e, EXIT_CONFIG, "%s: %zu bytes; allowed: %d", name, length, YAML_MAX_BYTES);
	for (size_t i = 0, n; i < length; i += n) {
		uint32_t c = 0;
		n = utf8_decode((const unsigned char *)text + i, length - i, &c);
		if (!n || !c)
			return err_add(e, EXIT_CONFIG,
			               "%s:%zu:%zu: byte 0x%02x at offset %zu is not UTF-8 text%s", name,
			               line, column, (unsigned char)text[i], i,
			               i < 2 ? "; is the file UTF-16? save it as UTF-8" : "");
		if (!is_text(c))
			return err_add(e, EXIT_CONFIG, "%s:%zu:%zu: control character 0x%02x is not allowed",
			               name, line, column, (unsigned)c);
		column = c == '\n' ? 1 : column + 1;
		line += c == '\n';
	}
	return 0;
}

int yaml_parse(struct arena *a, const char *name, const char *text, size_t length_bytes,
               struct yaml_node **out, struct err *e)
{
	struct reader r = {.a = a, .name = arena_strdup(a, name), .e = e};
	*out = NULL;
	int rc = check_bytes(name, text, length_bytes, e);
	if (rc)
		return rc;
	if (length_bytes >= 3 && !memcmp(text, "\xef\xbb\xbf", 3)) { /* byte order mark */
		text += 3;
		length_bytes -= 3;
	}
	if (!yaml_parser_initialize(&r.parser))
		return err_add(e, EXIT_INTERNAL, "%s: out of memory", name);
	yaml_parser_set_encoding(&r.parser, YAML_UTF8_ENCODING);
	yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, length_bytes);
	struct yaml_node *root = build_stream(&r);
	yaml_parser_delete(&r.parser);
	if (r.refusals > MAX_REFUSALS)
		err_add(e, EXIT_CONFIG, "%s: … and %d more of that kind", name, r.refusals - MAX_REFUSALS);
	*out = r.broken ? NULL : root;
	return r.broken || r.refusals ? EXIT_CONFIG : 0;
}

int yaml_parse_file(struct arena *a, const char *path, struct yaml_node **out, struct err *e)
{
	char *text = NULL;
	size_t bytes = 0;
	struct err cause = {0};
	*out = NULL;
	int rc = sys_read_file(path, YAML_MAX_BYTES, &text, &bytes, &cause);
	if (rc)
		return err_add(e, rc == EXIT_BAD_DATA ? EXIT_CONFIG : rc, "%s", cause.text);
	rc = yaml_parse(a, path, text, bytes, out, e);
	free(text);
	return rc;
}

/* Words that some YAML reader takes for something else than a string. */
static bool is_reserved(const char *s)
{
	static const char *const words[] = {"null", "~", "true", "false", "yes", "no", "on", "off", "y", "n"};
	for (size_t i = 0; i < sizeof words / sizeof *words; i++)
		if (!strcasecmp(s, words[i]))
			return true;
	char *end;
	strtod(s, &end);
	return end != s && !*end;
}

static bool is_plain(const char *s)
{
	static const char first[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_/.";
	static const char inner[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_/.+=@-";
	return *s && strchr(first, *s) && strspn(s, inner) == strlen(s) && !is_reserved(s);
}

/* One code point, escaped where a YAML reader would drop, fold or refuse it. Returns its bytes. */
static size_t put_quoted(struct buf *b, const unsigned char *p, size_t left)
{
	uint32_t c = *p;
	size_t n = utf8_decode(p, left, &c);
	if (c == '"' || c == '\\')
		buf_printf(b, "\\%c", (char)c);
	else if (n && is_harmless(c))
		buf_add(b, p, n);
	else
		buf_printf(b, c < 0x100 ? "\\x%02x" : "\\u%04x", (unsigned)c);
	return n ? n : 1;
}

void yaml_put_string(struct buf *b, const char *s)
{
	if (is_plain(s)) {
		buf_puts(b, s);
		return;
	}
	buf_puts(b, "\"");
	for (size_t left = strlen(s), n; left; s += n, left -= n)
		n = put_quoted(b, (const unsigned char *)s, left);
	buf_puts(b, "\"");
}

void yaml_put_comment(struct buf *b, const char *s)
{
	uint32_t c;
	for (size_t left = strlen(s), n; left; s += n, left -= n) {
		n = utf8_decode((const unsigned char *)s, left, &c);
		if (n && is_harmless(c))
			buf_add(b, s, n);
		else
			buf_puts(b, "?");
		n = n ? n : 1;
	}
}
