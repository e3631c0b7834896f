#include "graph/prog.h"
#include "graph/rule.h"

#include <stdlib.h>
#include <string.h>

enum { FLAT_COLUMNS = 32 };

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

int32_t prog_flat(struct prog *p, const char *name, enum region region, enum dtype dtype, int64_t count)
{
	bool rows = count > 0 && count % FLAT_COLUMNS == 0;
	int64_t n = rows ? count / FLAT_COLUMNS : count;
	ASSERT(n >= 0 && n <= INT32_MAX);
	return prog_value(p, name, region, dtype, rows ? 2 : 1, (int32_t[]){(int32_t)n, FLAT_COLUMNS});
}

static struct value *part_of(struct prog *p, const char *name, int32_t of, enum region region,
                             enum dtype dtype, int64_t count)
{
	int32_t id = prog_flat(p, name, region, dtype, count);
	p->value[id].of = of;
	return &p->value[id];
}

int32_t prog_view(struct prog *p, const char *name, int32_t of, int64_t first, int64_t count)
{
	struct value parent = p->value[of];
	ASSERT(first >= 0 && first + count <= value_count(&parent));
	struct value *v = part_of(p, name, of, (enum region)parent.region, (enum dtype)parent.dtype, count);
	v->at_bytes = first * dtype_rows[parent.dtype].bytes;
	v->grid = parent.grid;
	memcpy(v->place, parent.place, sizeof v->place);
	return (int32_t)(v - p->value);
}

static int64_t round_up(int64_t n, int64_t to)
{
	return (n + to - 1) / to * to;
}

int32_t prog_pack(struct prog *p, const char *name, const int32_t *member, size_t n, int64_t align,
                  int64_t multiple)
{
	struct value first = p->value[member[0]];
	int64_t size = dtype_rows[first.dtype].bytes, end = 0;
	int32_t pack = (int32_t)p->n_value;
	for (size_t i = 0; i < n; i++) {
		struct value *v = &p->value[member[i]];
		ASSERT(v->dtype == first.dtype && v->region == first.region && v->of == NONE);
		v->of = pack;
		v->at_bytes = end * size;
		end += round_up(value_count(v), align);
	}
	part_of(p, name, NONE, (enum region)first.region, (enum dtype)first.dtype, round_up(end, multiple))
	        ->grid = first.grid;
	return pack;
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
	int32_t id = (int32_t)p->n_value;
	struct value v = {.name = name,
	                  .nd = (uint8_t)nd,
	                  .dtype = (uint8_t)dtype,
	                  .region = (uint8_t)region,
	                  .want_grad = region == R_PARAM,
	                  .weight = region == R_PARAM,
	                  .sums = region == R_STAT,
	                  .grid = GRID_DENSE,
	                  .def = NONE,
	                  .last = NONE,
	                  .grad = NONE,
	                  .of = NONE,
	                  .home = id};
	for (int k = 0; k < TENSOR_MAX_DIM; k++) /* dim may be another value's, which growing moves */
		v.dim[k] = k < nd ? dim[k] : 1;
	p->value = mem_grow(p->value, p->n_value, &p->cap_value, sizeof *p->value);
	p->value[p->n_value++] = v;
	return id;
}

void prog_place(struct prog *p, int32_t value, enum mesh_axis axis, enum place place)
{
	struct value *v = &p->value[value];
	v->grid = AXES_EXPERT & ~AXES_DENSE & 1u << axis ? GRID_EXPERT : GRID_DENSE;
	if (p->axis_size[axis] > 1)
		v->place[axis] = (uint8_t)place;
}

void prog_place_sum(struct prog *p, int32_t value)
{
	for (int a = 0; a < AXIS_COUNT; a++)
		if (a != AXIS_pp && p->axis_size[a] > 1)
			p->value[value].place[a] = PLACE_PARTIAL;
}

bool prog_lies_along(const struct value *v, int axis)
{
	uint32_t axes = v->grid == GRID_EXPERT ? AXES_EXPERT : AXES_DENSE;
	return axis != AXIS_pp && axes >> axis & 1;
}

bool prog_is_everywhere(const struct prog *p, const struct value *v)
{
	bool all = true;
	for (int a = 0; a < AXIS_COUNT; a++)
		all &= !prog_lies_along(v, a) || p->axis_size[a] == 1 || v->place[a] == PLACE_REPLICATED;
	return all;
}

void prog_refuse(struct prog *p, const struct node *n, const char *why)
{
	if (p->e.code)
		return;
	const char *slash = strrchr(n->where, '/');
	err_set(&p->e, EXIT_INTERNAL, "program, layer %d: %s (%s): %s", n->layer, op_rows[n->op].name,
	        slash ? slash + 1 : n->where, why);
}

uint32_t prog_axes(const struct prog *p, uint32_t axes)
{
	uint32_t sized = 0;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (axes >> a & 1 && p->axis_size[a] > 1)
			sized |= 1u << a;
	return sized;
}

int32_t prog_ranks(const struct prog *p, uint32_t axes)
{
	int32_t ranks = 1;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (axes >> a & 1)
			ranks *= p->axis_size[a];
	return ranks;
}

int32_t prog_place_among(const struct prog *p, uint32_t axes)
{
	int32_t place = 0, stride = 1;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (axes >> a & 1) {
			place += stride * p->axis_rank[a];
			stride *= p->axis_size[a];
		}
	return place;
}

/* The value whose grid decides: the first input, or what is written where nothing is read. */
static const struct value *leader(const struct prog *p, const struct node *n)
{
	return &p->value[op_rows[n->op].n_in ? n->in[0] : n->out[0]];
}

/* What the other grid shares out means nothing in this one. */
static const char *check_grids(const struct prog *p, const struct node *n)
{
	for (int k = 1; k < op_rows[n->op].n_in; k++)
		if (n->in[k] != NONE && p->value[n->in[k]].grid != leader(p, n)->grid &&
		    !prog_is_everywhere(p, &p->value[n->in[k]]))
			return "operands of two grids: a regrid is missing";
	return NULL;
}

/* A collective among the ranks of the other grid would mean nothing to the placement in this one. */
static const char *check_ranks(const struct prog *p, const struct node *n)
{
	for (int a = 0; a < AXIS_COUNT && op_rows[n->op].flags & COMM; a++)
		if (n->arg.comm.axes >> a & 1 && a != AXIS_pp && p->axis_size[a] > 1 &&
		    !prog_lies_along(leader(p, n), a))
			return "it goes over ranks of the other grid";
	return NULL;
}

/* A part of attention, before the keys of all ranks were seen. A pass that puts nodes to new places may not
 * have said yet where values come from. */
static bool is_unfinished(const struct prog *p, int32_t v)
{
	int32_t def = v == NONE ? NONE : p->value[v].def;
	if (def < 0 || (size_t)def >= p->n_node)
		return false;
	const struct node *from = &p->node[def];
	return from->op == OP_attention_part && (from->out[0] == v || from->out[1] == v) &&
	       from->arg.attention.covered < from->arg.attention.rows.ranks;
}

/* It is no summand of anything: the next part alone knows what to do with it. */
static const char *check_parts(const struct prog *p, const struct node *n)
{
	for (int k = 0; k < op_rows[n->op].n_in && n->op != OP_attention_part; k++)
		if (is_unfinished(p, n->in[k]))
			return "attention of which the keys of some ranks are still missing";
	return NULL;
}

/* A sum that is there already may be of the other grid where that makes no difference: every rank adds what
 * is its own, or all add the same. */
static const char *check_sum(const struct prog *p, const struct node *n, int k)
{
	int ranks = 0, count[PLACE_COUNT] = {0};
	for (int a = 0; a < AXIS_COUNT; a++)
		if (a != AXIS_pp && p->axis_size[a] > 1) {
			ranks++;
			count[OUT(k)->place[a]]++;
		}
	return count[PLACE_REPLICATED] == ranks || count[PLACE_PARTIAL] == ranks
	               ? NULL
	               : "the sum is of the other grid";
}

/* Runs both rules; on a node whose outputs exist they become checks. An output that is new joins the grid of
 * the inputs, but for regrid's, which has placed it. */
static const char *apply_rules(struct prog *p, struct node *n)
{
	bool fresh[OP_MAX_OUT];
	for (int k = 0; k < op_rows[n->op].n_out; k++)
		fresh[k] = n->out[k] == NONE;
	const char *why = rules[n->op]->shape(p, n);
	if (!why)
		why = check_grids(p, n);
	if (!why)
		why = check_ranks(p, n);
	if (!why)
		why = check_parts(p, n);
	for (int k = 0; !why && k < op_rows[n->op].n_out; k++)
		if (fresh[k] && n->op != OP_regrid)
			p->value[n->out[k]].grid = leader(p, n)->grid;
	for (int a = 0; !why && a < AXIS_COUNT; a++)
		if (p->axis_size[a] > 1 && prog_lies_along(leader(p, n), a))
			why = rules[n->op]->place(p, n, a);
	for (int k = 0; !why && k < op_rows[n->op].n_out; k++)
		if (!fresh[k] && n->op != OP_regrid && OUT(k)->grid != leader(p, n)->grid)
			why = check_sum(p, n, k);
	return why;
}

static const char *missing_input(const struct prog *p, const struct node *n)
{
	const struct op_row *row = &op_rows[n->op];
	/* Optional inputs are marked with ? in the row's text; the rule of the operation knows which. */
	for (int k = 0; k < row->n_in; k++)
		if (n->in[k] != NONE && (size_t)n->in[k] >= p->n_value)
			return "an input that does not exist";
	return row->n_in && n->in[0] == NONE ? "its first input is missing" : NULL;
}

int32_t prog_emit(struct prog *p, enum op op, const union op_arg *arg, const char *where, const int32_t *in,
                  size_t n_in, const int32_t *out)
{
	if (p->e.code)
		return 0;
	struct node n = {.op = (uint8_t)op,
	                 .segment = p->segment,
	                 .chunk = p->chunk,
	                 .block = p->block,
	                 .layer = p->layer,
	                 .where = p->where ? p->where : where};
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

/* A pack is written where its members are, and a member where its pack is. */
static void refresh_parts(struct prog *p)
{
	for (size_t v = 0; v < p->n_value; v++) {
		struct value *x = &p->value[v];
		if (x->of != NONE && x->def == NONE)
			x->def = p->value[x->of].def;
	}
	for (size_t v = 0; v < p->n_value; v++) {
		const struct value *x = &p->value[v];
		if (x->of == NONE || x->def == NONE)
			continue;
		struct value *pack = &p->value[x->of];
		if (pack->def == NONE || x->def < pack->def)
			pack->def = x->def;
	}
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
	refresh_parts(p);
}

void prog_insert(struct prog *p, size_t first, const int32_t *before)
{
	size_t n_new = p->n_node - first, at = 0;
	struct node *node = mem_array(p->n_node + 1, sizeof *node);
	size_t *begin = mem_array(first + 2, sizeof *begin), *order = mem_array(n_new + 1, sizeof *order);
	for (size_t k = 0; k < n_new; k++)
		begin[before[k] + 1]++;
	for (size_t i = 0; i <= first; i++)
		begin[i + 1] += begin[i];
	for (size_t k = 0; k < n_new; k++)
		order[begin[before[k]]++] = k; /* begin[i] becomes the end of place i */
	for (size_t i = 0, k = 0; i <= first; i++) {
		while (k < begin[i])
			node[at++] = p->node[first + order[k++]];
		if (i < first)
			node[at++] = p->node[i];
	}
	memcpy(p->node, node, p->n_node * sizeof *node);
	free(node);
	free(begin);
	free(order);
	prog_refresh(p);
}

static const char *check_order(const struct prog *p, const struct node *n, int32_t at)
{
	for (int k = 0; k < op_rows[n->op].n_in; k++) {
		if (!HAS(k))
			continue;
		bool outside = (IN(k)->region <= R_BATCH || IN(k)->given) && IN(k)->def == NONE;
		if (!outside && (IN(k)->def == NONE || IN(k)->def >= at))
			return "reads a value before it is written";
	}
	return NULL;
}

/* The last node that adds to each sum, and to a pack of sums. */
static int32_t *last_additions(const struct prog *p)
{
	int32_t *last = mem_array(p->n_value + 1, sizeof *last);
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		for (int k = 0; k < op_rows[n->op].n_out; k++) {
			if (!OUT(k)->sums)
				continue;
			last[n->out[k]] = (int32_t)i;
			if (OUT(k)->of != NONE)
				last[OUT(k)->of] = (int32_t)i;
		}
	}
	return last;
}

static const char *check_sums(const struct node *n, int32_t at, const int32_t *last_addition)
{
	for (int k = 0; k < op_rows[n->op].n_in; k++)
		if (HAS(k) && last_addition[n->in[k]] > at)
			return "reads a sum before it is complete";
	return NULL;
}

/* Segments of different micro-batches take turns: a temporary does not outlive the run of its segment, and no
 * activation goes from chunk to chunk but over an edge. */
static const char *check_turns(const struct prog *p, const struct node *n)
{
	for (int k = 0; k < op_rows[n->op].n_in; k++) {
		if (!HAS(k) || IN(k)->def == NONE)
			continue;
		const struct node *from = &p->node[IN(k)->def];
		if (IN(k)->region == R_TEMP && from->segment != n->segment)
			return "a temporary value outlives its segment";
		if ((IN(k)->region == R_TEMP || IN(k)->region == R_SAVED) && from->chunk != n->chunk)
			return "a value of another chunk";
	}
	return NULL;
}

/* Who lives where until when, for check_memory. */
struct tenants {
	int32_t *until; /* by home: last reader or writer of any value that lives there */
	int32_t *live;
	size_t n_live;
};

static struct tenants tenants_open(const struct prog *p)
{
	struct tenants t = {.until = mem_array(p->n_value + 1, sizeof *t.until),
	                    .live = mem_array(p->n_value + OP_MAX_OUT, sizeof *t.live)};
	for (size_t v = 0; v < p->n_value; v++) {
		const struct value *x = &p->value[v];
		int32_t end = x->last > x->def ? x->last : x->def;
		if (end > t.until[x->home])
			t.until[x->home] = end;
	}
	return t;
}

static bool overlap(const struct value *a, const struct value *b)
{
	return a->offset_bytes < b->offset_bytes + value_bytes(b) &&
	       b->offset_bytes < a->offset_bytes + value_bytes(a);
}

/* Bytes that one slot of the region may use; saved values of a chunk lie in the chunk's own range. */
static int64_t region_end(const struct prog *p, const struct node *n, enum region region)
{
	return region == R_SAVED ? p->saved_base[n->chunk] + p->saved_stride[n->chunk] : p->bytes[region];
}

/* Walks the nodes with the set of live homes of temporary and saved memory; a new one must not lie on a live
 * one. */
static const char *check_memory(const struct prog *p, const struct node *n, int32_t at, struct tenants *t)
{
	size_t kept = 0;
	for (size_t i = 0; i < t->n_live; i++)
		if (t->until[t->live[i]] >= at)
			t->live[kept++] = t->live[i];
	t->n_live = kept;
	for (int k = 0; k < op_rows[n->op].n_out; k++) {
		const struct value *v = OUT(k), *home = &p->value[v->home];
		if (v->region != R_TEMP && v->region != R_SAVED)
			continue;
		if (v->offset_bytes < 0 ||
		    v->offset_bytes + value_bytes(v) > region_end(p, n, (enum region)v->region))
			return "an output lies outside its region";
		bool known = false;
		for (size_t i = 0; i < t->n_live && !known; i++) {
			const struct value *w = &p->value[t->live[i]];
			known = t->live[i] == v->home;
			if (!known && w->region == home->region && overlap(home, w))
				return "an output lies on a value that is still read";
		}
		if (!known)
			t->live[t->n_live++] = v->home;
	}
	return NULL;
}

int prog_check(struct prog *p)
{
	struct tenants t = tenants_open(p);
	int32_t *last_addition = last_additions(p);
	bool planned = p->bytes[R_PARAM] || p->bytes[R_TEMP];
	for (size_t i = 0; i < p->n_node && !p->e.code; i++) {
		struct node *n = &p->node[i];
		const char *why = check_order(p, n, (int32_t)i);
		if (!why)
			why = check_sums(n, (int32_t)i, last_addition);
		if (!why)
			why = apply_rules(p, n);
		if (!why && planned)
			why = check_turns(p, n);
		if (!why && planned)
			why = check_memory(p, n, (int32_t)i, &t);
		if (why)
			prog_refuse(p, n, why);
	}
	free(last_addition);
	free(t.until);
	free(t.live);
	return p->e.code;
}
