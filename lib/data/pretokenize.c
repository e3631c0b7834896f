#include "data/pretokenize.h"
#include "base/err.h"
#include "base/text.h"
#include "data/load.h"
#include "data/unicode.h"

#include <string.h>

struct pre_tokenizer_kind {
	const char *type;
	int (*load)(struct load *l, const struct json *spec, struct pre_tokenizer *p);
};

static const char *const behaviors[] = {
        [SPLIT_REMOVED] = "Removed",
        [SPLIT_ISOLATED] = "Isolated",
        [SPLIT_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
        [SPLIT_MERGED_WITH_NEXT] = "MergedWithNext",
        [SPLIT_CONTIGUOUS] = "Contiguous",
};

static int load_behavior(struct load *l, const struct json *spec, struct pre_tokenizer *p)
{
	const struct json *word = json_get_type(spec, "behavior", JSON_STRING);
	for (size_t i = 0; word && i < sizeof behaviors / sizeof *behaviors; i++) {
		if (strcmp(behaviors[i], word->string))
			continue;
		p->behavior = (enum split_behavior)i;
		return 0;
	}
	return load_wrong(
	        l, word ? word : spec,
	        "behavior must be Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
}

static int load_byte_level(struct load *l, const struct json *spec, struct pre_tokenizer *p)
{
	bool use_regex = true;
	p->prefix_space = true;
	if (load_bool(l, spec, "add_prefix_space", &p->prefix_space) ||
	    load_bool(l, spec, "use_regex", &use_regex))
		return l->e->code;
	p->byte_level = true;
	p->behavior = SPLIT_ISOLATED;
	if (use_regex)
		pattern_gpt2(&p->pattern);
	return 0;
}

static int load_split(struct load *l, const struct json *spec, struct pre_tokenizer *p)
{
	if (load_behavior(l, spec, p) || load_bool(l, spec, "invert", &p->invert))
		return l->e->code;
	return pattern_load(&p->pattern, l, spec);
}

static int load_digits(struct load *l, const struct json *spec, struct pre_tokenizer *p)
{
	bool individual = false;
	if (load_bool(l, spec, "individual_digits", &individual))
		return l->e->code;
	p->behavior = individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS;
	pattern_class(&p->pattern, UNICODE_NUMBER);
	return 0;
}

static int load_punctuation(struct load *l, const struct json *spec, struct pre_tokenizer *p)
{
	p->behavior = SPLIT_ISOLATED;
	pattern_class(&p->pattern, UNICODE_PUNCTUATION);
	return json_get(spec, "behavior") ? load_behavior(l, spec, p) : 0;
}

static int load_whitespace(struct load *l, const struct json *spec, struct pre_tokenizer *p)
{
	(void)l, (void)spec;
	p->behavior = SPLIT_REMOVED;
	p->invert = true;
	pattern_words(&p->pattern);
	return 0;
}

static int load_whitespace_split(struct load *l, const struct json *spec, struct pre_tokenizer *p)
{
	(void)l, (void)spec;
	p->behavior = SPLIT_REMOVED;
	pattern_class(&p->pattern, UNICODE_SPACE);
	return 0;
}

static int load_char_delimiter(struct load *l, const struct json *spec, struct pre_tokenizer *p)
{
	const struct json *delimiter = NULL;
	if (load_string(l, spec, "delimiter", &delimiter))
		return l->e->code;
	if (!delimiter || !delimiter->length)
		return load_wrong(l, spec, "delimiter must be one character");
	p->behavior = SPLIT_REMOVED;
	pattern_literal(&p->pattern, arena_strndup(l->arena, delimiter->string, delimiter->length),
	                delimiter->length);
	return 0;
}

/* Sequence has no row of its own in the chain: load_chain puts its members there. */
static const struct pre_tokenizer_kind kinds[] = {
        {"ByteLevel", load_byte_level},
        {"Split", load_split},
        {"Digits", load_digits},
        {"Punctuation", load_punctuation},
        {"Whitespace", load_whitespace},
        {"WhitespaceSplit", load_whitespace_split},
        {"CharDelimiterSplit", load_char_delimiter},
        {"Sequence", NULL},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

/* Depth is that of the JSON text, which its reader limits. */
static int load_chain(struct load *l, const struct json *spec, struct pre_tokenizer ***tail)
{
	int k = load_type(l, spec, "pre_tokenizer", kinds, N_KINDS, sizeof *kinds);
	if (k < 0)
		return l->e->code;
	if (kinds[k].load) {
		struct pre_tokenizer *p = **tail = arena_alloc(l->arena, 1, sizeof *p);
		*tail = &p->next;
		return kinds[k].load(l, spec, p);
	}
	const struct json *members = json_get_type(spec, "pretokenizers", JSON_ARRAY);
	if (!members)
		return load_wrong(l, spec, "pre_tokenizer.pretokenizers must be an array");
	JSON_EACH (m, members)
		if (load_chain(l, m, tail))
			return l->e->code;
	return 0;
}

int pre_tokenizer_load(struct load *l, const struct json *spec, struct pre_tokenizer **out)
{
	struct pre_tokenizer **tail = out;
	*out = NULL;
	if (!spec || spec->type == JSON_NULL)
		return 0;
	if (load_chain(l, spec, &tail))
		return l->e->code;
	for (const struct pre_tokenizer *p = *out; p; p = p->next)
		if (p->byte_level && p->next)
			return load_wrong(l, spec, "ByteLevel must be the last pre_tokenizer of a Sequence");
	return 0;
}

void pre_tokenizer_free(struct pre_tokenizer *p)
{
	for (; p; p = p->next)
		pattern_free(&p->pattern);
}

static int pass_on(const struct pre_tokenizer *p, struct splitter *sp, struct span piece, struct err *e)
{
	if (!piece.length_bytes)
		return 0;
	return p->next ? pre_tokenizer_split(p->next, sp, piece, e) : sp->piece(sp->context, piece, e);
}

/* Matches and what lies between them, as they come; `held` waits for what may be merged with it. */
struct joiner {
	const struct pre_tokenizer *p;
	struct splitter *sp;
	struct span held;
	bool holds, previous_match;
};

static int joiner_flush(struct joiner *j, struct err *e)
{
	bool had = j->holds;
	j->holds = false;
	return had ? pass_on(j->p, j->sp, j->held, e) : 0;
}

/* Whether a part is joined to the one before it. */
static bool joins(const struct joiner *j, bool match)
{
	bool joined[] = {
	        [SPLIT_REMOVED] = false,
	        [SPLIT_ISOLATED] = false,
	        [SPLIT_MERGED_WITH_PREVIOUS] = match && !j->previous_match,
	        [SPLIT_MERGED_WITH_NEXT] = !match && j->previous_match,
	        [SPLIT_CONTIGUOUS] = match == j->previous_match,
	};
	return j->holds && joined[j->p->behavior];
}

static int joiner_part(struct joiner *j, struct span part, bool match, struct err *e)
{
	match ^= j->p->invert;
	if (match && j->p->behavior == SPLIT_REMOVED)
		return 0;
	if (j->p->behavior == SPLIT_ISOLATED || j->p->behavior == SPLIT_REMOVED)
		return pass_on(j->p, j->sp, part, e);
	bool joined = joins(j, match);
	j->previous_match = match;
	if (joined) {
		j->held.length_bytes += part.length_bytes;
		return 0;
	}
	if (joiner_flush(j, e))
		return e->code;
	j->held = part;
	j->holds = true;
	return 0;
}

static int split_by_pattern(const struct pre_tokenizer *p, struct splitter *sp, struct span text,
                            struct err *e)
{
	struct joiner j = {.p = p, .sp = sp};
	struct pattern_walk walk = PATTERN_WALK;
	size_t start = 0, end = 0, previous = 0;
	for (int found;;) {
		if (pattern_next(&p->pattern, sp->regex, text, &walk, &found, &start, &end, e))
			return e->code;
		if (!found)
			start = text.length_bytes;
		struct span between = {text.text + previous, start - previous},
		            match = {text.text + start, end - start};
		if (start > previous && joiner_part(&j, between, false, e))
			return e->code;
		if (!found)
			return joiner_flush(&j, e);
		if (joiner_part(&j, match, true, e))
			return e->code;
		previous = end;
	}
}

int pre_tokenizer_split(const struct pre_tokenizer *p, struct splitter *sp, struct span text, struct err *e)
{
	if (!text.length_bytes)
		return 0;
	if (p->prefix_space && text.text[0] != ' ') {
		sp->prefixed.length = 0; /* only the last row has a prefix, so the buffer is free */
		buf_add(&sp->prefixed, " ", 1);
		buf_add(&sp->prefixed, text.text, text.length_bytes);
		text = (struct span){sp->prefixed.data, sp->prefixed.length};
	}
	return p->pattern.kind ? split_by_pattern(p, sp, text, e) : pass_on(p, sp, text, e);
}
