/* Recomputation: a value of the forward pass that may be computed again is not kept; its node is repeated
 * just before the first backward node that reads it (Chen et al. 2016, "Training deep nets with sublinear
 * memory cost"; selective: Korthikanti et al. 2022). */
#include "graph/prog.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

struct again {
	struct prog *p;
	const struct node *old; /* the nodes as they were */
	size_t n_old;
	bool *repeat;  /* by value: may be computed again */
	int32_t *twin; /* by value: its second computation, or itself */
	int32_t first_layer[PROG_MAX_CHUNKS];
};

__extension__ typedef unsigned __int128 op_set;
static_assert(OP_COUNT <= 128, "sets of operations are bit sets");
#define SET_ONE ((op_set)1)
#define BIT(name) (SET_ONE << OP_##name)

/* Which nodes each choice takes: by operation, by block, or all of a layer. */
static const struct {
	op_set ops;
	enum block block;
	bool whole_layers;
} choices[REPEAT_COUNT] = {
        [REPEAT_GATHERS] = {BIT(all_gather) | BIT(shift), BLOCK_NONE, false},
        [REPEAT_CORE] = {BIT(attention) | BIT(attention_part) | BIT(rope) | BIT(qk_norm) | BIT(mla_pack) |
                                 BIT(split_columns) | BIT(split_heads),
                         BLOCK_NONE, false},
        [REPEAT_NORM] = {BIT(layernorm) | BIT(rmsnorm) | BIT(dropout) | BIT(bias_add) | BIT(fan_out),
                         BLOCK_NONE, false},
        [REPEAT_ACTIVATION] = {BIT(activation) | BIT(glu) | BIT(expert_activation) | BIT(cast), BLOCK_NONE,
                               false},
        [REPEAT_MLP] = {0, BLOCK_MLP, false},
        [REPEAT_EXPERTS] = {0, BLOCK_EXPERTS, false},
        [REPEAT_LAYERS] = {~(op_set)0, BLOCK_NONE, true},
};

static bool is_chosen(const struct again *a, const struct node *n, uint32_t repeats, int32_t layers)
{
	/* A sum of the step has gone on since. */
	bool reads_sums = n->in[0] != NONE && a->p->value[n->in[0]].region == R_STAT;
	if (op_rows[n->op].flags & UPDATES || reads_sums)
		return false;
	for (int r = 0; r < REPEAT_COUNT; r++) {
		bool here = n->layer >= 0 && (layers < 0 || n->layer < a->first_layer[n->chunk] + layers);
		bool takes =
		        choices[r].ops >> n->op & 1 || (choices[r].block && choices[r].block == n->block);
		if (repeats >> r & 1 && takes && (here || !choices[r].whole_layers))
			return true;
	}
	return false;
}

static void find_first_layers(struct again *a)
{
	for (int c = 0; c < PROG_MAX_CHUNKS; c++)
		a->first_layer[c] = INT32_MAX / 2;
	for (size_t i = 0; i < a->n_old; i++) {
		const struct node *n = &a->old[i];
		if (n->layer >= 0 && n->layer < a->first_layer[n->chunk])
			a->first_layer[n->chunk] = n->layer;
	}
}

/* What another layer reads is a layer's input and is kept. */
static void keep_layer_inputs(struct again *a)
{
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
}

static void mark_repeatable(struct again *a, uint32_t repeats, int32_t layers)
{
	find_first_layers(a);
	for (size_t i = 0; i < a->n_old; i++) {
		const struct node *n = &a->old[i];
		for (int k = 0; k < op_rows[n->op].n_out && n->segment == SEG_FWD; k++)
			a->repeat[n->out[k]] = is_chosen(a, n, repeats, layers);
	}
	keep_layer_inputs(a);
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
		a->p->value[w].grid = copy.grid;
		memcpy(a->p->value[w].place, copy.place, sizeof copy.place);
		a->twin[n.out[k]] = w;
		n.out[k] = w;
	}
	append(a->p, &n);
	return a->twin[v];
}

int prog_recompute(struct prog *p, uint32_t repeats, int32_t layers)
{
	if (p->e.code || !repeats)
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
	mark_repeatable(&a, repeats, layers);
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
