#include "base/mem.h"
#include "base/option.h"
#include "base/text.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

static const char *last_part(const char *key)
{
	const char *dot = strrchr(key, '.');
	return dot ? dot + 1 : key;
}

/* Flags of other programs: "--Num-Layers" → "num_layers". */
static char *normal_form(const char *word)
{
	while (*word == '-')
		word++;
	char *out = mem_strdup(word);
	for (char *p = out; *p; p++)
		*p = *p == '-' ? '_' : (char)tolower((unsigned char)*p);
	return out;
}

const char *option_find_alias(const struct option_table *t, const char *word, const char **note)
{
	for (size_t i = 0; i < t->n_aliases; i++)
		if (!strcmp(t->aliases[i].name, word)) {
			*note = t->aliases[i].note;
			return t->aliases[i].key;
		}
	return NULL;
}

/* The key whose own name is `name`, in whatever group. */
static const char *find_own_name(const struct option_table *t, const char *name)
{
	for (size_t i = 0; i < t->n; i++)
		if (!strcmp(last_part(t->rows[i].key), name))
			return t->rows[i].key;
	return NULL;
}

static bool in_group(const char *key, const char *word)
{
	size_t n = strcspn(word, ".");
	return word[n] == '.' && !strncmp(key, word, n + 1);
}

/* The key whose own name is spelled most like that of `word`; only those of its group where `same_group`. */
static const char *find_similar(const struct option_table *t, const char *word, bool same_group)
{
	const char **names = mem_array(t->n, sizeof *names), *key = NULL;
	size_t n = 0;
	for (size_t i = 0; i < t->n; i++)
		if (!same_group || in_group(t->rows[i].key, word))
			names[n++] = last_part(t->rows[i].key);
	const char *near = n ? text_nearest(last_part(word), names, n, sizeof *names) : NULL;
	for (size_t i = 0; near && i < t->n; i++)
		if (last_part(t->rows[i].key) == near)
			key = t->rows[i].key;
	free(names);
	return key;
}

static const char *find_similar_alias(const struct option_table *t, const char *word, const char **note)
{
	const char *near = t->n_aliases
	                           ? text_nearest(word, &t->aliases[0].name, t->n_aliases, sizeof *t->aliases)
	                           : NULL;
	return near && !strchr(near, '=') ? option_find_alias(t, near, note) : NULL;
}

const char *option_nearest(const struct option_table *t, const char *word, const char **note)
{
	char *w = normal_form(word);
	const char *key = option_find_alias(t, w, note);
	if (!key)
		key = find_own_name(t, last_part(w));
	if (!key)
		key = option_find_alias(t, last_part(w), note);
	if (!key)
		key = find_similar(t, w, true);
	if (!key)
		key = find_similar(t, w, false);
	if (!key)
		key = find_similar_alias(t, last_part(w), note);
	free(w);
	return key;
}
