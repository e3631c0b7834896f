/* One rule block per operation: shape, placement, gradient, cost. A missing block does not link.
 * Local. Floor: graph. */
#ifndef PENTAD_GRAPH_RULE_H
#define PENTAD_GRAPH_RULE_H

#include "graph/prog.h"

struct rule {
	/* Checks input shapes and sets the outputs' with rule_out; NULL or why not. */
	const char *(*shape)(struct prog *p, struct node *n);
	/* The same for the placement along one axis with rule_place; called for axes of more than one rank in
	 * the grid of the first input. Inputs of the other grid are the same everywhere. */
	const char *(*place)(struct prog *p, struct node *n, int axis);
	/* Appends the adjoint nodes of node i; NULL where an operation has no gradient. */
	void (*grad)(struct prog *p, struct node n);
	struct cost (*cost)(const struct prog *p, const struct node *n);
};
#define OP(name, n_in, n_out, flags, doc) extern const struct rule rule_##name;
#include "op/ops.def"
#undef OP
extern const struct rule *const rules[OP_COUNT];

#define IN(k) (&p->value[n->in[k]])
#define OUT(k) (&p->value[n->out[k]])
#define HAS(k) (n->in[k] != NONE)

/* Sets output k's shape, or checks it where the output exists already. */
const char *rule_out(struct prog *p, struct node *n, int k, enum dtype dtype, int nd, const int32_t *dim);
const char *rule_out_like(struct prog *p, struct node *n, int k, int32_t value);
const char *rule_out_vector(struct prog *p, struct node *n, int k, enum dtype dtype, int32_t length);
/* Sets output k's placement along the axis, or checks it. */
const char *rule_place(struct prog *p, struct node *n, int k, int axis, enum place place);
static inline enum place rule_at(const struct prog *p, int32_t value, int axis)
{
	const struct value *v = &p->value[value];
	return prog_lies_along(v, axis) ? (enum place)v->place[axis] : PLACE_REPLICATED;
}
bool rule_is_vector(const struct prog *p, int32_t value, int32_t length);
bool rule_same_shape(const struct prog *p, int32_t a, int32_t b);

/* Adds g to the adjoint of v (nothing where v wants none). */
void grad_add(struct prog *p, int32_t v, int32_t g);
/* The adjoint of an output, NONE where nothing depends on it. */
int32_t grad_of(const struct prog *p, int32_t v);
/* The accumulator of a parameter: its f32 value in GRAD, made on first use. */
int32_t grad_accumulator(struct prog *p, int32_t parameter);

/* Placement rules that many operations share: elementwise on equal placements; rows of whole vectors. */
const char *place_elementwise(struct prog *p, struct node *n, int axis);
const char *place_linear_elementwise(struct prog *p, struct node *n, int axis); /* partial sums may pass */
/* Input 0 holds rows, whole or (heads) cut between heads; inputs of as many rows and those from the host,
 * which are per row or sample, go along; others are weights, which must be replicated. NULL or why not. */
const char *rule_check_rows(const struct prog *p, const struct node *n, int axis, bool heads);
const char *place_rows(struct prog *p, struct node *n, int axis);     /* other inputs replicated */
const char *place_rows_bwd(struct prog *p, struct node *n, int axis); /* weight gradients partial */
const char *place_heads(struct prog *p, struct node *n, int axis);    /* rows or heads sharded */

/* flop per element of output 0, and the bytes of all inputs and outputs once. */
struct cost cost_elementwise(const struct prog *p, const struct node *n, double flop_per_element);
struct cost cost_light(const struct prog *p, const struct node *n); /* 8 flop an element */

#endif
