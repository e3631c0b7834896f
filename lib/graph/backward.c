/* Reverse-mode differentiation: the adjoint of each node, last node first, from its rule. */
#include "graph/rule.h"

/* A node matters where an adjoint of one of its outputs is wanted by now. */
static bool has_adjoint(const struct prog *p, const struct node *n)
{
	for (int k = 0; k < op_rows[n->op].n_out; k++)
		if (OUT(k)->want_grad && OUT(k)->grad != NONE)
			return true;
	return false;
}

int prog_backward(struct prog *p, int32_t loss, int32_t seed)
{
	if (p->e.code)
		return p->e.code;
	if (!p->value[loss].want_grad)
		return err_set(&p->e, EXIT_INTERNAL, "program: the loss depends on no parameter");
	size_t n_fwd = p->n_node;
	p->segment = SEG_BWD;
	p->value[loss].grad = seed;
	for (size_t i = n_fwd; i-- > 0 && !p->e.code;) {
		struct node n = p->node[i]; /* a copy: emitting moves the array */
		if (!has_adjoint(p, &n))
			continue;
		p->layer = n.layer;
		if (!rules[n.op]->grad)
			prog_refuse(p, &n, "this operation has no gradient");
		else
			rules[n.op]->grad(p, n);
	}
	p->layer = -1;
	return p->e.code;
}
