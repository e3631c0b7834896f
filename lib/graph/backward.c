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

int prog_backward(struct prog *p, const struct seed *seed, size_t n)
{
	size_t n_fwd = p->n_node;
	for (size_t i = 0; i < n && !p->e.code; i++) {
		if (!p->value[seed[i].value].want_grad)
			return err_set(&p->e, EXIT_INTERNAL, "program: %s depends on no parameter",
			               p->value[seed[i].value].name);
		p->value[seed[i].value].grad = seed[i].adjoint;
	}
	p->segment = SEG_BWD;
	for (size_t i = n_fwd; i-- > 0 && !p->e.code;) {
		struct node from = p->node[i]; /* a copy: emitting moves the array */
		if (!has_adjoint(p, &from))
			continue;
		p->layer = from.layer;
		p->chunk = from.chunk;
		p->block = from.block;
		p->where = from.where; /* an adjoint is the builder's doing, not the rule's */
		if (!rules[from.op]->grad)
			prog_refuse(p, &from, "this operation has no gradient");
		else
			rules[from.op]->grad(p, from);
	}
	p->layer = -1;
	p->chunk = p->block = 0;
	p->where = NULL;
	return p->e.code;
}
