/* What one kernel can do in one pass: each saves reading and writing activations, or a gradient, once.
 *
 * The residual branch leaves `add(gradient so far, norm_bwd(…))` behind: the norm's kernel adds while it
 * writes. A product's activation, the slope that its gradient is multiplied by, and the column sums of a
 * gradient whose product is formed anyway are done by the product's kernel. */
#include "graph/prog.h"

#include <stdlib.h>

struct fuser {
	struct prog *p;
	int32_t *readers; /* by value: how many nodes read it */
	bool *gone;       /* by node: another does its work */
};

/* Additions */

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

/* Folds node `at`, an addition, into the norm gradient behind its input `side`; false where it does not fit.
 */
static bool fold(struct fuser *f, struct node *at, int side)
{
	struct prog *p = f->p;
	int32_t from = at->in[side], other = at->in[!side], def = p->value[from].def;
	if (def == NONE || f->readers[from] != 1 || p->value[other].def >= def)
		return false;
	struct node *norm = &p->node[def];
	int slot = addend_slot(norm);
	if (slot < 0 || norm->out[0] != from)
		return false;
	norm->in[slot] = other;
	norm->out[0] = at->out[0];
	return true;
}

static bool fold_addition(struct fuser *f, size_t i)
{
	struct node *n = &f->p->node[i];
	return n->segment == SEG_BWD && (fold(f, n, 1) || fold(f, n, 0));
}

/* Products */

static bool same_turn(const struct node *a, const struct node *b)
{
	return a->segment == b->segment && a->chunk == b->chunk && a->layer == b->layer;
}

/* activation(linear(…)): the product's kernel writes both, what backward reads and what goes on. */
static bool fold_activation(struct fuser *f, size_t i)
{
	struct prog *p = f->p;
	struct node *n = &p->node[i];
	int32_t h = n->in[0], def = p->value[h].def;
	if (def == NONE || p->node[def].op != OP_linear || !same_turn(n, &p->node[def]))
		return false;
	struct node *product = &p->node[def];
	product->op = OP_linear_act;
	product->arg.linear.kind = n->arg.activation.kind;
	product->out[0] = n->out[0];
	product->out[1] = h;
	return true;
}

/* activation_bwd(linear_dx(…), h), where nothing else reads the product. */
static bool fold_slope(struct fuser *f, size_t i)
{
	struct prog *p = f->p;
	struct node *n = &p->node[i];
	int32_t dx = n->in[0], def = p->value[dx].def;
	if (def == NONE || p->node[def].op != OP_linear_dx || f->readers[dx] != 1 ||
	    !same_turn(n, &p->node[def]))
		return false;
	const struct node *product = &p->node[def];
	union op_arg arg = {.linear = {product->arg.linear.fp8, n->arg.activation.kind}};
	n->op = OP_linear_dx_act;
	n->arg = arg;
	n->in[2] = n->in[1];
	n->in[0] = product->in[0];
	n->in[1] = product->in[1];
	f->gone[def] = true;
	return false;
}

/* Column sums of a gradient that stands right behind the product of the same. */
static bool fold_bias_grad(struct fuser *f, size_t i)
{
	struct node *n = &f->p->node[i], *product = i ? n - 1 : n;
	if (product->op != OP_linear_dw || product->in[0] != n->in[0] || !same_turn(n, product))
		return false;
	product->op = OP_linear_dw_bias;
	product->out[1] = n->out[0];
	return true;
}

/* Which fold an operation may be gone by: true where it is. */
static bool (*const folds[OP_COUNT])(struct fuser *f, size_t i) = {
        [OP_add] = fold_addition,
        [OP_activation] = fold_activation,
        [OP_activation_bwd] = fold_slope,
        [OP_bias_grad] = fold_bias_grad,
};

static void count_readers(const struct prog *p, int32_t *readers)
{
	for (size_t i = 0; i < p->n_node; i++)
		for (int k = 0; k < op_rows[p->node[i].op].n_in; k++)
			if (p->node[i].in[k] != NONE)
				readers[p->node[i].in[k]]++;
}

int prog_fuse(struct prog *p, bool repeats_activations)
{
	if (p->e.code)
		return p->e.code;
	struct fuser f = {p, mem_array(p->n_value, sizeof *f.readers), mem_array(p->n_node, sizeof *f.gone)};
	prog_refresh(p);
	count_readers(p, f.readers);
	size_t kept = 0;
	for (size_t i = 0; i < p->n_node; i++) {
		bool apart = p->node[i].op == OP_activation && repeats_activations;
		if (folds[p->node[i].op] && !apart && folds[p->node[i].op](&f, i))
			f.gone[i] = true;
	}
	for (size_t i = 0; i < p->n_node; i++)
		if (!f.gone[i])
			p->node[kept++] = p->node[i];
	p->n_node = kept;
	free(f.gone);
	free(f.readers);
	prog_refresh(p);
	return 0;
}
