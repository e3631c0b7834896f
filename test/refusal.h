/* What a builder may not write: examples, each refused with the layer and the line of the mistake. */
#ifndef PENTAD_TEST_REFUSAL_H
#define PENTAD_TEST_REFUSAL_H

#include "graph/prog.h"

struct example {
	const char *name, *file;
	void (*build)(struct prog *p); /* in layer 7, tp and dp of two ranks */
	const char *op, *part;         /* NULL: accepted */
};

/* The line of the builder's mistake; NONE: it shows in backward, whose nodes carry the lines of their rules.
 */
extern int here;

void refusal_check(const struct example *examples, size_t n);

/* clang-format off */
#define EXAMPLE(name, op, part) {#name, __FILE__, name, op, part}
/* clang-format on */

#endif
