#include "graph/prog.h"
#include "graph/rule.h"

#include <stdlib.h>
#include <string.h>

#define WORD(name, word) word,
#define REGION_WORD(name, word, doc) word,
const char *const place_names[PLACE_COUNT] = {PLACES(WORD)};
const char *const region_names[R_COUNT] = {REGIONS(REGION_WORD)};
const char *const segment_names[SEG_COUNT] = {SEGMENTS(WORD)};

const struct rule *const rules[OP_COUNT] = {
#define OP(name, n_in, n_out, flags, doc) &rule_##name,
#include "op/ops.def"
#undef OP
};

void prog_init(struct prog *p)
{
	*p = (struct prog){.layer = -1};
	for (int a = 0; a < AXIS_COUNT; a++)
		p->axis_size[a] = 1;
}

void prog_free(struct prog *p)
{
	arena_free(&p->arena);
	free(p->node);
	free(p->value);
	*p = (struct prog){0};
}

int64_t value_count(const struct value *v)
{
	int64_t n = 1;
	for (int k = 0; k < v->nd; k++)
		n *= v->dim[k];
	return n;
}

int64_t value_bytes(const struct value *v)
{
	return value_count(v) * dtype_rows[v->dtype].bytes;
}

int32_t prog_value(struct prog *p, const char *name, enum region region, enum dtype dtype, int nd,
                   const int32_t *dim)
{
	p->value = mem_grow(p->value, p->n_value, &p->cap_value, sizeof *p->value);
	int32_t id = (int32_t)p->n_value++;
	struct value *v = &p->value[id];
	*v = (struct value){.name = name,
	                    .nd = (uint8_t)nd,
	                    .dtype = (uint8_t)dtype,
	                    .region = (uint8_t)region,
	                    .want_grad = region == R_PARAM,
	                    .def = NONE,
	                    .last = NONE,
	                    .grad = NONE,
	                    .home = id};
	for (int k = 0; k < TENSOR_MAX_DIM; k++)
		v->dim[k] = k < nd ? dim[k] : 1;
	return id;
}

void prog_place(struct prog *p, int32_t value, enum mesh_axis axis, enum place place)
{
	if (p->axis_size[axis] > 1)
		p->value[value].place[axis] = (uint8_t)place;
}

void prog_refuse(struct prog *p, const struct node *n, const char *why)
{
	if (p->e.code)
		return;
	const char *slash = strrchr(n->where, '/');
	err_set(&p->e, EXIT_INTERNAL, "program, layer %d: %s (%s): %s", n->layer, op_rows[n->op].name,
	        slash ? slash + 1 : n->where, why);
}

/* Runs both rules; on a node whose outputs exist they become checks. */
static const char *apply_rules(struct prog *p, struct node *n)
{
	const char *why = rules[n->op]->shape(p, n);
	for (int a = 0; !why && a < AXIS_COUNT; a++)
		if (p->axis_size[a] > 1)
			why = rules[n->op]->place(p, n, a);
	return why;
}

static const char *missing_input(const struct prog *p, const struct node *n)
{
	const struct op_row *row = &op_rows[n->op];
	/* Optional inputs are marked with ? in the row's text; the rule of the operation knows which. */
	for (int k = 0; k < row->n_in; k++)
		if (n->in[k] != NONE && (size_t)n->in[k] >= p->n_value)
			return "an input that does not exist";
	return n->in[0] == NONE ? "its first input is missing" : NULL;
}

int32_t prog_emit(struct prog *p, enum op op, const union op_arg *arg, const char *where, const int32_t *in,
                  size_t n_in, const int32_t *out)
{
	if (p->e.code)
		return 0;
	struct node n = {.op = (uint8_t)op, .segment = p->segment, .layer = p->layer, .where = where};
	ASSERT(n_in <= op_rows[op].n_in);
	if (arg)
		n.arg = *arg;
	bool want = false;
	for (size_t k = 0; k < OP_MAX_IN; k++) {
		n.in[k] = k < n_in ? in[k] : NONE;
		want |= n.in[k] != NONE && p->value[n.in[k]].want_grad;
	}
	for (int k = 0; k < OP_MAX_OUT; k++)
		n.out[k] = out && k < op_rows[op].n_out ? out[k] : NONE;
	const char *why = missing_input(p, &n);
	if (!why)
		why = apply_rules(p, &n);
	if (why) {
		prog_refuse(p, &n, why);
		return 0;
	}
	int32_t at = (int32_t)p->n_node;
	for (int k = 0; k < op_rows[op].n_out; k++) {
		struct value *v = &p->value[n.out[k]];
		v->want_grad = want && p->segment == SEG_FWD;
		if (v->def == NONE)
			v->def = at;
	}
	for (size_t k = 0; k < n_in; k++)
		if (in[k] != NONE)
			p->value[in[k]].last = at;
	p->node = mem_grow(p->node, p->n_node, &p->cap_node, sizeof *p->node);
	p->node[p->n_node++] = n;
	return n.out[0];
}

int32_t prog_out(const struct prog *p, int k)
{
	return p->e.code ? 0 : p->node[p->n_node - 1].out[k];
}

void prog_refresh(struct prog *p)
{
	for (size_t v = 0; v < p->n_value; v++)
		p->value[v].def = p->value[v].last = NONE;
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		for (int k = 0; k < op_rows[n->op].n_in; k++)
			if (HAS(k))
				IN(k)->last = (int32_t)i;
		for (int k = 0; k < op_rows[n->op].n_out; k++)
			if (OUT(k)->def == NONE)
				OUT(k)->def = (int32_t)i;
	}
}

static const char *check_order(const struct prog *p, const struct node *n, int32_t at)
{
	for (int k = 0; k < op_rows[n->op].n_in; k++) {
		if (!HAS(k))
			continue;
		bool outside = IN(k)->region <= R_STATE && IN(k)->def == NONE;
		if (!outside && (IN(k)->def == NONE || IN(k)->def >= at))
			return "reads a value before it is written";
	}
	return NULL;
}

static bool overlap(const struct value *a, const struct value *b)
{
	return a->offset_bytes < b->offset_bytes + value_bytes(b) &&
	       b->offset_bytes < a->offset_bytes + value_bytes(a);
}

/* Walks the nodes with the set of live values of one region; a new one must not lie on a live one,
 * unless both have the same home. */
static const char *check_memory(const struct prog *p, const struct node *n, int32_t at, int32_t *live,
                                size_t *n_live)
{
	size_t kept = 0;
	for (size_t i = 0; i < *n_live; i++)
		if (p->value[live[i]].last >= at)
			live[kept++] = live[i];
	*n_live = kept;
	for (int k = 0; k < op_rows[n->op].n_out; k++) {
		const struct value *v = OUT(k);
		if (v->region != R_TEMP && v->region != R_SAVED)
			continue;
		if (v->offset_bytes < 0 || v->offset_bytes + value_bytes(v) > p->bytes[v->region])
			return "an output lies outside its region";
		for (size_t i = 0; i < *n_live; i++) {
			const struct value *w = &p->value[live[i]];
			if (w->region == v->region && w->home != v->home && overlap(v, w))
				return "an output lies on a value that is still read";
		}
		live[(*n_live)++] = n->out[k];
	}
	return NULL;
}

int prog_check(struct prog *p)
{
	int32_t *live = mem_array(p->n_value + OP_MAX_OUT, sizeof *live);
	size_t n_live = 0;
	bool planned = p->bytes[R_PARAM] || p->bytes[R_TEMP];
	for (size_t i = 0; i < p->n_node && !p->e.code; i++) {
		struct node *n = &p->node[i];
		const char *why = check_order(p, n, (int32_t)i);
		if (!why)
			why = apply_rules(p, n);
		if (!why && planned)
			why = check_memory(p, n, (int32_t)i, live, &n_live);
		if (why)
			prog_refuse(p, n, why);
	}
	free(live);
	return p->e.code;
}
