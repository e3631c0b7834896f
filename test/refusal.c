#include "test/refusal.h"
#include "test/test.h"

int here;

static void check_refusal(const struct example *x, const struct prog *p)
{
	char where[100];
	const char *slash = strrchr(x->file, '/');
	/* NONE: an adjoint, which names a line of the forward pass. */
	snprintf(where, sizeof where, "layer 7: %s (%s:%.0d", x->op, slash ? slash + 1 : x->file,
	         here == NONE ? 0 : here);
	if (p->e.code != EXIT_INTERNAL)
		test_failed(__FILE__, __LINE__, "%s: accepted", x->name);
	CHECK_HAS(p->e.text, where);
	CHECK_HAS(p->e.text, x->part);
}

void refusal_check(const struct example *examples, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		struct prog p;
		prog_init(&p);
		p.axis_size[AXIS_tp] = p.axis_size[AXIS_dp] = 2;
		p.layer = 7;
		here = 0;
		examples[i].build(&p);
		if (examples[i].op)
			check_refusal(&examples[i], &p);
		else if (p.e.code)
			test_failed(__FILE__, __LINE__, "%s: %s", examples[i].name, p.e.text);
		prog_free(&p);
	}
}
