#include "data/added.h"
#include "base/mem.h"
#include "data/unicode.h"

#include <stdlib.h>

static size_t new_node(struct added_matcher *m)
{
	m->tokens = mem_grow(m->tokens, m->n, &m->cap, sizeof *m->tokens);
	m->tokens[m->n] = NULL;
	return m->n++;
}

void added_matcher_add(struct added_matcher *m, struct span pattern, const struct added_token *token)
{
	size_t node = 0;
	if (!pattern.length_bytes)
		return;
	if (!m->n)
		new_node(m);
	m->first[(unsigned char)pattern.text[0]] = true;
	for (size_t i = 0; i < pattern.length_bytes; i++) {
		uint64_t *to =
		        pair_map_put(&m->edges, pair_key((int32_t)node, (unsigned char)pattern.text[i]));
		if (*to == PAIR_NONE)
			*to = new_node(m);
		node = *to;
	}
	if (!m->tokens[node])
		m->tokens[node] = token;
}

void added_matcher_free(struct added_matcher *m)
{
	pair_map_free(&m->edges);
	free(m->tokens);
	*m = (struct added_matcher){0};
}

/* The longest token that begins at `start`, NULL where none does. */
static const struct added_token *match_at(const struct added_matcher *m, struct span s, size_t start,
                                          size_t *end)
{
	const struct added_token *found = NULL;
	uint64_t node = 0;
	for (size_t i = start; i < s.length_bytes; i++) {
		node = pair_map_get(&m->edges, pair_key((int32_t)node, (unsigned char)s.text[i]));
		if (node == PAIR_NONE)
			break;
		if (!m->tokens[node])
			continue;
		found = m->tokens[node];
		*end = i + 1;
	}
	return found;
}

static const struct added_token *find(const struct added_matcher *m, struct span s, size_t from,
                                      size_t *start, size_t *end)
{
	for (*start = from; m->n && *start < s.length_bytes; ++*start) {
		const struct added_token *t = NULL;
		if (m->first[(unsigned char)s.text[*start]] && (t = match_at(m, s, *start, end)))
			return t;
	}
	return NULL;
}

static uint8_t class_at(struct span s, size_t i, size_t *width)
{
	return unicode_classes()[unicode_read((const unsigned char *)s.text + i, width)];
}

static bool is_single_word(struct span s, size_t start, size_t end)
{
	size_t width;
	return !(start > 0 && class_at(s, unicode_before(s.text, start), &width) & UNICODE_WORD) &&
	       !(end < s.length_bytes && class_at(s, end, &width) & UNICODE_WORD);
}

/* Not before `least`, where the token before this one ends, even if that one has swallowed this one. */
static size_t strip_left(struct span s, size_t start, size_t least)
{
	size_t width;
	while (start > least && class_at(s, unicode_before(s.text, start), &width) & UNICODE_SPACE)
		start = unicode_before(s.text, start);
	return start > least ? start : least;
}

static size_t strip_right(struct span s, size_t end)
{
	for (size_t width; end < s.length_bytes && class_at(s, end, &width) & UNICODE_SPACE;)
		end += width;
	return end;
}

int added_cut(const struct added_matcher *m, const struct added_sink *sink, struct span text, struct err *e)
{
	size_t done = 0, start, end = 0;
	const struct added_token *t;
	int rc = 0;
	for (size_t from = 0; !rc && (t = find(m, text, from, &start, &end));) {
		from = end;
		if (t->single_word && !is_single_word(text, start, end))
			continue;
		if (t->lstrip)
			start = strip_left(text, start, done);
		if (t->rstrip)
			end = strip_right(text, end);
		if (start > done)
			rc = sink->text(sink->context, (struct span){text.text + done, start - done}, e);
		if (!rc && start < end)
			rc = sink->token(sink->context, t->id, e);
		done = end;
	}
	if (!rc && done < text.length_bytes)
		rc = sink->text(sink->context, (struct span){text.text + done, text.length_bytes - done}, e);
	return rc;
}
