#include "data/normalize.h"
#include "base/err.h"
#include "data/load.h"

#include <string.h>

/* A chain of replacements can make gigabytes of a line; no text of a corpus is that long. */
#define NORMALIZED_MAX ((size_t)2 << 30)

static int run_form(const struct normalizer *n, struct regex_scratch *regex, struct span in, struct buf *out,
                    struct err *e)
{
	(void)regex;
	return unicode_add_form(out, n->form, in.text, in.length_bytes, e);
}

static int run_replace(const struct normalizer *n, struct regex_scratch *regex, struct span in,
                       struct buf *out, struct err *e)
{
	struct pattern_walk walk = PATTERN_WALK;
	size_t start, end, previous = 0;
	for (int found;;) {
		if (pattern_next(&n->pattern, regex, in, &walk, &found, &start, &end, e))
			return e->code;
		if (!found)
			break;
		buf_add(out, in.text + previous, start - previous);
		buf_add(out, n->content.text, n->content.length_bytes);
		if (out->length > NORMALIZED_MAX)
			return err_set(e, EXIT_BAD_DATA,
			               "the tokenizer's normalizer makes a text longer than %zu bytes",
			               NORMALIZED_MAX);
		previous = end;
	}
	buf_add(out, in.text + previous, in.length_bytes - previous);
	return 0;
}

static int run_prepend(const struct normalizer *n, struct regex_scratch *regex, struct span in,
                       struct buf *out, struct err *e)
{
	(void)regex, (void)e;
	if (in.length_bytes)
		buf_add(out, n->content.text, n->content.length_bytes);
	buf_add(out, in.text, in.length_bytes);
	return 0;
}

static bool has_class(struct span s, size_t i, uint8_t bits)
{
	size_t width;
	return unicode_classes()[unicode_read((const unsigned char *)s.text + i, &width)] & bits;
}

static int run_strip(const struct normalizer *n, struct regex_scratch *regex, struct span in, struct buf *out,
                     struct err *e)
{
	size_t begin = 0, end = in.length_bytes, width;
	(void)regex, (void)e;
	for (; n->left && begin < end && has_class(in, begin, UNICODE_SPACE); begin += width)
		unicode_read((const unsigned char *)in.text + begin, &width);
	while (n->right && end > begin && has_class(in, unicode_before(in.text, end), UNICODE_SPACE))
		end = unicode_before(in.text, end);
	buf_add(out, in.text + begin, end - begin);
	return 0;
}

static int run_strip_accents(const struct normalizer *n, struct regex_scratch *regex, struct span in,
                             struct buf *out, struct err *e)
{
	(void)n, (void)regex, (void)e;
	for (size_t i = 0, width; i < in.length_bytes; i += width) {
		unicode_read((const unsigned char *)in.text + i, &width);
		if (!has_class(in, i, UNICODE_MARK))
			buf_add(out, in.text + i, width);
	}
	return 0;
}

struct normalizer_kind {
	const char *type;
	int (*load)(struct load *l, const struct json *spec, struct normalizer *n);
	int (*run)(const struct normalizer *n, struct regex_scratch *regex, struct span in, struct buf *out,
	           struct err *e);
	enum unicode_form form;
};

static int load_form(struct load *l, const struct json *spec, struct normalizer *n)
{
	(void)n;
	if (!unicode_forms_missing())
		return 0;
	err_set(l->e, EXIT_UNAVAILABLE, "this build lacks %s", unicode_forms_missing());
	return load_passed_on(l, spec, "normalizer");
}

static int load_content(struct load *l, const struct json *spec, const char *key, struct normalizer *n)
{
	const struct json *content = NULL;
	if (load_string(l, spec, key, &content))
		return l->e->code;
	if (!content)
		return load_wrong(l, spec, "this normalizer needs %s, a string", key);
	n->content =
	        (struct span){arena_strndup(l->arena, content->string, content->length), content->length};
	return 0;
}

static int load_replace(struct load *l, const struct json *spec, struct normalizer *n)
{
	return load_content(l, spec, "content", n) ? l->e->code : pattern_load(&n->pattern, l, spec);
}

static int load_prepend(struct load *l, const struct json *spec, struct normalizer *n)
{
	return load_content(l, spec, "prepend", n);
}

static int load_strip(struct load *l, const struct json *spec, struct normalizer *n)
{
	n->left = n->right = true;
	if (load_bool(l, spec, "strip_left", &n->left))
		return l->e->code;
	return load_bool(l, spec, "strip_right", &n->right);
}

static int load_nothing(struct load *l, const struct json *spec, struct normalizer *n)
{
	(void)l, (void)spec, (void)n;
	return 0;
}

/* Sequence has no row of its own in the chain: load_chain puts its members there. */
static const struct normalizer_kind kinds[] = {
        {"NFC", load_form, run_form, UNICODE_NFC},
        {"NFD", load_form, run_form, UNICODE_NFD},
        {"NFKC", load_form, run_form, UNICODE_NFKC},
        {"NFKD", load_form, run_form, UNICODE_NFKD},
        {"Lowercase", load_form, run_form, UNICODE_LOWERCASE},
        {"Replace", load_replace, run_replace, 0},
        {"Prepend", load_prepend, run_prepend, 0},
        {"Strip", load_strip, run_strip, 0},
        {"StripAccents", load_nothing, run_strip_accents, 0},
        {"Sequence", NULL, NULL, 0},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

/* Depth is that of the JSON text, which its reader limits. */
static int load_chain(struct load *l, const struct json *spec, struct normalizer ***tail)
{
	int k = load_type(l, spec, "normalizer", kinds, N_KINDS, sizeof *kinds);
	if (k < 0)
		return l->e->code;
	if (kinds[k].load) {
		struct normalizer *n = **tail = arena_alloc(l->arena, 1, sizeof *n);
		*tail = &n->next;
		n->run = kinds[k].run;
		n->form = kinds[k].form;
		return kinds[k].load(l, spec, n);
	}
	const struct json *members = json_get_type(spec, "normalizers", JSON_ARRAY);
	if (!members)
		return load_wrong(l, spec, "normalizer.normalizers must be an array");
	JSON_EACH (m, members)
		if (load_chain(l, m, tail))
			return l->e->code;
	return 0;
}

int normalizer_load(struct load *l, const struct json *spec, struct normalizer **out)
{
	struct normalizer **tail = out;
	*out = NULL;
	return !spec || spec->type == JSON_NULL ? 0 : load_chain(l, spec, &tail);
}

void normalizer_free(struct normalizer *n)
{
	for (; n; n = n->next)
		pattern_free(&n->pattern);
}

int normalizer_run(const struct normalizer *n, struct regex_scratch *regex, struct buf buffers[2],
                   struct span *text, struct err *e)
{
	struct span s = *text;
	for (int turn = 0; n; n = n->next, turn ^= 1) {
		struct buf *out = &buffers[turn];
		out->length = 0;
		if (n->run(n, regex, s, out, e))
			return e->code;
		s = (struct span){out->length ? out->data : "", out->length};
	}
	*text = s;
	return 0;
}
