#include "test/walk.h"
#include "base/rng.h"

#include <stdlib.h>
#include <string.h>

static void values_of(const struct walk *w, const int *pick, int *value)
{
	for (int a = 0; a < w->n; a++)
		value[a] = w->axis[a].choice[pick[a]];
}

static bool next_pick(const struct walk *w, int *pick)
{
	for (int a = 0; a < w->n; a++) {
		if (++pick[a] < w->axis[a].n)
			return true;
		pick[a] = 0;
	}
	return false;
}

/* Pairs of choices that this pick covers and none before did; marks them where asked. */
static int news_in(struct walk *w, const int *pick, bool mark)
{
	int news = 0;
	for (int a = 0; a < w->n; a++)
		for (int b = a + 1; b < w->n; b++) {
			bool *seen = &w->covered[a][pick[a]][b][pick[b]];
			news += !*seen;
			*seen |= mark;
		}
	return news;
}

bool walk_on(struct walk *w, int *value)
{
	int pick[WALK_AXES] = {0}, best[WALK_AXES] = {0}, most = 0;
	do {
		values_of(w, pick, value);
		int news = w->is_legal(value) ? news_in(w, pick, false) : 0;
		if (news > most) {
			most = news;
			memcpy(best, pick, sizeof pick);
		}
	} while (next_pick(w, pick));
	news_in(w, best, most > 0);
	values_of(w, best, value);
	return most > 0;
}

void walk_anywhere(struct walk *w, int *value)
{
	int pick[WALK_AXES];
	do {
		for (int a = 0; a < w->n; a++)
			pick[a] = (int)(rng_bits(2026, w->turn++) % (uint64_t)w->axis[a].n);
		values_of(w, pick, value);
	} while (!w->is_legal(value));
}

int walk_more(int few, int many)
{
	return getenv("PENTAD_LONG_TESTS") ? many : few;
}
