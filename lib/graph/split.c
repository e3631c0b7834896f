/* Backward in two parts: input gradients, which the stage before waits for, and weight gradients, which
 * nobody waits for and which fill a pipeline's bubbles (Qi et al. 2023, "Zero Bubble Pipeline Parallelism").
 */
#include "graph/prog.h"

#include <stdlib.h>

static bool gives_sums_alone(const struct prog *p, const struct node *n)
{
	bool all = op_rows[n->op].n_out > 0;
	for (int k = 0; k < op_rows[n->op].n_out; k++)
		all &= p->value[n->out[k]].sums && p->value[n->out[k]].region == R_GRAD;
	return all;
}

/* Nothing that stays in BWD reads it, nor does another stage: it was computed (again) for weight gradients.
 */
static bool serves_weights_alone(const struct prog *p, const struct node *n, const bool *wanted)
{
	if (op_rows[n->op].flags & COMM)
		return false;
	for (int k = 0; k < op_rows[n->op].n_out; k++) {
		const struct value *v = &p->value[n->out[k]];
		if (wanted[n->out[k]] || v->sums || v->region != R_TEMP)
			return false;
	}
	return true;
}

int prog_split_backward(struct prog *p)
{
	if (p->e.code)
		return p->e.code;
	bool *wanted = mem_array(p->n_value, sizeof *wanted);
	struct node *late = mem_array(p->n_node, sizeof *late);
	size_t n_late = 0, kept = 0;
	for (size_t i = p->n_node; i-- > 0;) {
		struct node *n = &p->node[i];
		if (n->segment != SEG_BWD)
			continue;
		if (gives_sums_alone(p, n) || serves_weights_alone(p, n, wanted)) {
			n->segment = SEG_WGRAD;
			continue;
		}
		for (int k = 0; k < op_rows[n->op].n_in; k++)
			if (n->in[k] != NONE)
				wanted[n->in[k]] = true;
	}
	for (size_t i = 0; i < p->n_node; i++)
		if (p->node[i].segment == SEG_WGRAD)
			late[n_late++] = p->node[i];
		else
			p->node[kept++] = p->node[i];
	for (size_t i = 0; i < n_late; i++)
		p->node[kept++] = late[i];
	free(late);
	free(wanted);
	prog_refresh(p);
	return 0;
}
