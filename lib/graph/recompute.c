/* Recomputation: a value of the forward pass that may be computed again is not kept; its node is repeated
 * just before the first backward node that reads it (Chen et al. 2016, "Training deep nets with sublinear
 * memory cost"; selective: Korthikanti et al. 2022). */
#include "graph/prog.h"

#include <stdlib.h>
#include <string.h>

struct again {
	struct prog *p;
	const struct node *old; /* the nodes as they were */
	size_t n_old;
	bool *repeat;  /* by value: may be computed again */
	int32_t *twin; /* by value: its second computation, or itself */
};

static bool op_allowed(const struct node *n, enum repeat what)
{
	int flags = op_rows[n->op].flags;
	if (flags & (COMM | UPDATES))
		return false;
	return what == REPEAT_LAYERS || flags & CHEAP;
}

/* Marks outputs of allowed nodes; under full recomputation a value that another layer reads is a layer's
 * input and is kept. */
static void mark_repeatable(struct again *a, enum repeat what, int32_t layers)
{
	for (size_t i = 0; i < a->n_old; i++) {
		const struct node *n = &a->old[i];
		bool in_range = n->layer >= 0 && (layers < 0 || n->layer < layers);
		if (n->segment != SEG_FWD || !in_range || !op_allowed(n, what))
			continue;
		for (int k = 0; k < op_rows[n->op].n_out; k++)
			a->repeat[n->out[k]] = true;
	}
	for (size_t i = 0; i < a->n_old; i++) {
		const struct node *n = &a->old[i];
		for (int k = 0; k < op_rows[n->op].n_in; k++) {
			if (n->segment != SEG_FWD || n->in[k] == NONE)
				continue;
			int32_t def = a->p->value[n->in[k]].def;
			if (def != NONE && a->old[def].layer != n->layer)
				a->repeat[n->in[k]] = false;
		}
	}
	/* A node is repeated whole: one kept output keeps them all. */
	for (size_t i = 0; i < a->n_old; i++) {
		const struct node *n = &a->old[i];
		bool all = true;
		for (int k = 0; k < op_rows[n->op].n_out; k++)
			all &= a->repeat[n->out[k]];
		for (int k = 0; k < op_rows[n->op].n_out; k++)
			a->repeat[n->out[k]] &= all;
	}
}

static void append(struct prog *p, const struct node *n)
{
	p->node = mem_grow(p->node, p->n_node, &p->cap_node, sizeof *p->node);
	p->node[p->n_node++] = *n;
}

static int32_t compute_again(struct again *a, int32_t v)
{
	if (v == NONE || a->twin[v] != v || !a->repeat[v])
		return v == NONE ? NONE : a->twin[v];
	struct node n = a->old[a->p->value[v].def];
	for (int k = 0; k < op_rows[n.op].n_in; k++)
		n.in[k] = compute_again(a, n.in[k]);
	n.segment = SEG_BWD;
	for (int k = 0; k < op_rows[n.op].n_out; k++) {
		struct value copy = a->p->value[n.out[k]];
		int32_t w = prog_value(a->p, copy.name, R_TEMP, copy.dtype, copy.nd, copy.dim);
		memcpy(a->p->value[w].place, copy.place, sizeof copy.place);
		a->twin[n.out[k]] = w;
		n.out[k] = w;
	}
	append(a->p, &n);
	return a->twin[v];
}

int prog_recompute(struct prog *p, enum repeat what, int32_t layers)
{
	if (p->e.code || what == REPEAT_NOTHING)
		return p->e.code;
	prog_refresh(p);
	size_t n_value = p->n_value;
	struct node *old = p->node;
	struct again a = {.p = p,
	                  .old = old,
	                  .n_old = p->n_node,
	                  .repeat = mem_array(n_value, sizeof *a.repeat),
	                  .twin = mem_array(n_value, sizeof *a.twin)};
	for (size_t v = 0; v < n_value; v++)
		a.twin[v] = (int32_t)v;
	mark_repeatable(&a, what, layers);
	p->node = NULL;
	p->n_node = p->cap_node = 0;
	for (size_t i = 0; i < a.n_old; i++) {
		struct node n = old[i];
		for (int k = 0; k < op_rows[n.op].n_in && n.segment == SEG_BWD; k++)
			n.in[k] = compute_again(&a, n.in[k]);
		append(p, &n);
	}
	free(old);
	free(a.repeat);
	free(a.twin);
	prog_refresh(p);
	return 0;
}
