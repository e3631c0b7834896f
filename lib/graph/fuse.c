/* A residual branch leaves `add(gradient so far, norm_bwd(…))` behind: the norm's kernel can add while it
 * writes, which saves one pass over the activations. */
#include "graph/prog.h"

#include <stdlib.h>

static const struct {
	enum op op;
	int addend;
} takes_addend[] = {{OP_layernorm_bwd, 5}, {OP_rmsnorm_bwd, 4}};

static int addend_slot(const struct node *n)
{
	for (size_t i = 0; i < sizeof takes_addend / sizeof *takes_addend; i++)
		if (n->op == takes_addend[i].op && n->in[takes_addend[i].addend] == NONE)
			return takes_addend[i].addend;
	return -1;
}

static void count_readers(const struct prog *p, int32_t *readers)
{
	for (size_t i = 0; i < p->n_node; i++)
		for (int k = 0; k < op_rows[p->node[i].op].n_in; k++)
			if (p->node[i].in[k] != NONE)
				readers[p->node[i].in[k]]++;
}

/* Folds node `at`, an addition, into the norm gradient behind its input `side`; false where it does not fit.
 */
static bool fold(struct prog *p, struct node *at, int side, const int32_t *readers)
{
	int32_t from = at->in[side], other = at->in[!side], def = p->value[from].def;
	if (def == NONE || readers[from] != 1 || p->value[other].def >= def)
		return false;
	struct node *norm = &p->node[def];
	int slot = addend_slot(norm);
	if (slot < 0 || norm->out[0] != from)
		return false;
	norm->in[slot] = other;
	norm->out[0] = at->out[0];
	return true;
}

int prog_fuse(struct prog *p)
{
	if (p->e.code)
		return p->e.code;
	int32_t *readers = mem_array(p->n_value, sizeof *readers);
	prog_refresh(p);
	count_readers(p, readers);
	size_t kept = 0;
	bool *gone = mem_array(p->n_node, sizeof *gone);
	for (size_t i = 0; i < p->n_node; i++) {
		struct node *n = &p->node[i];
		gone[i] = n->op == OP_add && n->segment == SEG_BWD &&
		          (fold(p, n, 1, readers) || fold(p, n, 0, readers));
	}
	for (size_t i = 0; i < p->n_node; i++)
		if (!gone[i])
			p->node[kept++] = p->node[i];
	p->n_node = kept;
	free(gone);
	free(readers);
	prog_refresh(p);
	return 0;
}
