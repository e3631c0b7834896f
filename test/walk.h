/* A walk through the combinations of several choices: every pair of choices that can go together comes up at
 * least once, then others at random. */
#ifndef PENTAD_TEST_WALK_H
#define PENTAD_TEST_WALK_H

#include <stdbool.h>
#include <stdint.h>

enum { WALK_AXES = 14, WALK_CHOICES = 4 };

struct walk_axis {
	const char *name;
	int n, choice[WALK_CHOICES];
};

struct walk {
	const struct walk_axis *axis;
	int n;
	bool (*is_legal)(const int *value); /* value[n], by axis */
	uint64_t turn;                      /* of the random ones */
	bool covered[WALK_AXES][WALK_CHOICES][WALK_AXES][WALK_CHOICES];
};

/* The legal combination that covers most pairs not covered yet; false where it would cover none. */
bool walk_on(struct walk *w, int *value);
/* Any legal combination; the same ones in every run. */
void walk_anywhere(struct walk *w, int *value);
/* How many of these to try: few, but where PENTAD_LONG_TESTS is set many. */
int walk_more(int few, int many);

#endif
