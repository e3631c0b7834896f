/* Memory: who shares with whom, what is saved for backward, and where everything lies. */
#include "graph/prog.h"

#include <stdlib.h>
#include <string.h>

struct hole {
	int64_t at, length;
};

struct heap { /* memory that is given and taken in the order of the nodes */
	struct hole *hole;
	size_t n_hole, cap_hole;
	int64_t end; /* highest byte ever taken */
};

struct planner {
	struct prog *p;
	int32_t *parent; /* by value: towards the value whose memory it uses */
	int32_t *first;  /* by home: first writer of any value that lives there, */
	int32_t *until;  /* last reader or writer */
	struct heap temp, saved[PROG_MAX_CHUNKS];
};

static int32_t home_of(const struct planner *l, int32_t v)
{
	while (l->parent[v] != v)
		v = l->parent[v];
	return v;
}

/* Parts live in their packs, aliases in what they rename. offset_bytes counts from the home's start until the
 * end of the planning. */
static void set_homes(struct planner *l)
{
	struct prog *p = l->p;
	for (size_t v = 0; v < p->n_value; v++) {
		l->parent[v] = (int32_t)v;
		l->first[v] = l->until[v] = NONE;
		p->value[v].offset_bytes = 0;
		for (int32_t w = (int32_t)v; p->value[w].of != NONE; w = p->value[w].of) {
			p->value[v].offset_bytes += p->value[w].at_bytes;
			l->parent[v] = p->value[w].of;
		}
	}
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		if (!(op_rows[n->op].flags & ALIAS))
			continue;
		l->parent[n->out[0]] = home_of(l, n->in[0]);
		p->value[n->out[0]].offset_bytes = p->value[n->in[0]].offset_bytes;
	}
	for (size_t v = 0; v < p->n_value; v++) {
		const struct value *x = &p->value[v];
		int32_t home = home_of(l, (int32_t)v), end = x->last > x->def ? x->last : x->def;
		if (end > l->until[home])
			l->until[home] = end;
		if (x->def != NONE && (l->first[home] == NONE || x->def < l->first[home]))
			l->first[home] = x->def;
	}
}

/* May output 0 of node i be written on top of its input k? */
static bool may_share(const struct planner *l, const struct node *n, int32_t i, int k)
{
	static const uint8_t flag[] = {IN_PLACE_0, IN_PLACE_1};
	const struct prog *p = l->p;
	if (!(op_rows[n->op].flags & flag[k]) || n->in[k] == NONE || n->in[k] == n->in[!k])
		return false;
	int32_t from = home_of(l, n->in[k]);
	const struct value *in = &p->value[from], *out = &p->value[n->out[0]];
	bool own = in->region >= R_SAVED ||
	           (op_rows[n->op].flags & COMM && (in->region == R_GRAD || in->region == R_STAT));
	bool fresh = out->region == R_TEMP && l->parent[n->out[0]] == n->out[0] && out->def == i;
	return own && fresh && l->until[from] == i && value_bytes(in) == value_bytes(out);
}

static void share_memory(struct planner *l)
{
	struct prog *p = l->p;
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		for (int k = 0; k < 2; k++) {
			if (!may_share(l, n, (int32_t)i, k))
				continue;
			int32_t home = home_of(l, n->in[k]);
			l->parent[n->out[0]] = home;
			l->until[home] = l->until[n->out[0]];
			break;
		}
	}
}

/* What one segment of a micro-batch writes and a later one reads is saved; what shares its memory goes along.
 */
static void choose_regions(struct planner *l)
{
	struct prog *p = l->p;
	for (size_t v = 0; v < p->n_value; v++) {
		struct value *x = &p->value[v];
		if (l->parent[v] != (int32_t)v || x->region != R_TEMP || l->first[v] == NONE)
			continue;
		int from = p->node[l->first[v]].segment, to = p->node[l->until[v]].segment;
		if (from != to && to <= SEG_WGRAD)
			x->region = R_SAVED;
	}
	for (size_t v = 0; v < p->n_value; v++) {
		p->value[v].home = home_of(l, (int32_t)v);
		p->value[v].region = p->value[p->value[v].home].region;
	}
}

static void bump_regions(struct planner *l)
{
	struct prog *p = l->p;
	for (size_t v = 0; v < p->n_value; v++) {
		struct value *x = &p->value[v];
		if (x->region >= R_SAVED || x->home != (int32_t)v)
			continue;
		x->offset_bytes = p->bytes[x->region];
		p->bytes[x->region] += prog_aligned(value_bytes(x));
	}
}

/* Best fit among the holes; the last hole is endless. */
static int64_t take(struct heap *l, int64_t need)
{
	size_t best = l->n_hole - 1;
	for (size_t i = 0; i + 1 < l->n_hole; i++)
		if (l->hole[i].length >= need &&
		    (best == l->n_hole - 1 || l->hole[i].length < l->hole[best].length))
			best = i;
	int64_t at = l->hole[best].at;
	l->hole[best].at += need;
	l->hole[best].length -= need;
	if (!l->hole[best].length) {
		memmove(l->hole + best, l->hole + best + 1, (l->n_hole - best - 1) * sizeof *l->hole);
		l->n_hole--;
	}
	return at;
}

static void give(struct heap *l, int64_t at, int64_t length)
{
	size_t i = 0;
	while (l->hole[i].at < at)
		i++;
	bool joins_next = at + length == l->hole[i].at;
	bool joins_previous = i > 0 && l->hole[i - 1].at + l->hole[i - 1].length == at;
	if (joins_next) {
		l->hole[i].at = at;
		l->hole[i].length += length;
	}
	if (joins_previous && joins_next) {
		l->hole[i - 1].length += l->hole[i].length;
		memmove(l->hole + i, l->hole + i + 1, (l->n_hole - i - 1) * sizeof *l->hole);
		l->n_hole--;
	} else if (joins_previous) {
		l->hole[i - 1].length += length;
	} else if (!joins_next) {
		l->hole = mem_grow(l->hole, l->n_hole, &l->cap_hole, sizeof *l->hole);
		memmove(l->hole + i + 1, l->hole + i, (l->n_hole - i) * sizeof *l->hole);
		l->hole[i] = (struct hole){at, length};
		l->n_hole++;
	}
}

static struct heap *heap_of(struct planner *l, const struct value *v, int chunk)
{
	return v->region == R_TEMP ? &l->temp : v->region == R_SAVED ? &l->saved[chunk] : NULL;
}

static void settle(struct heap *h, struct value *v)
{
	int64_t length = prog_aligned(value_bytes(v));
	v->offset_bytes = take(h, length);
	if (v->offset_bytes + length > h->end)
		h->end = v->offset_bytes + length;
}

/* Homes that die at node i, through any value that lives there; each is given back once. */
static void release(struct planner *l, int32_t v, int32_t i)
{
	if (v == NONE)
		return;
	int32_t home = l->p->value[v].home;
	const struct value *x = &l->p->value[home];
	struct heap *h = heap_of(l, x, l->p->node[i].chunk);
	if (!h || l->until[home] != i)
		return;
	l->until[home] = NONE;
	give(h, x->offset_bytes, prog_aligned(value_bytes(x)));
}

static void place_by_lifetime(struct planner *l)
{
	struct prog *p = l->p;
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		for (int k = 0; k < op_rows[n->op].n_out; k++) {
			int32_t home = p->value[n->out[k]].home;
			struct heap *h = heap_of(l, &p->value[home], n->chunk);
			if (h && l->first[home] == (int32_t)i && !p->value[home].given) {
				settle(h, &p->value[home]);
				l->first[home] = NONE;
			}
		}
		for (int k = 0; k < op_rows[n->op].n_in; k++)
			release(l, n->in[k], (int32_t)i);
		for (int k = 0; k < op_rows[n->op].n_out; k++)
			release(l, n->out[k], (int32_t)i);
	}
}

/* What another stage sends is there from the beginning of its chunk. */
static void place_given(struct planner *l)
{
	for (size_t v = 0; v < l->p->n_value; v++) {
		struct value *x = &l->p->value[v];
		if (!x->given || x->region != R_SAVED || x->home != (int32_t)v)
			continue;
		ASSERT(l->until[v] != NONE);
		settle(&l->saved[l->p->node[l->until[v]].chunk], x);
	}
}

static int64_t at_least_one(int32_t slots)
{
	return slots > 1 ? slots : 1;
}

static void multiply_slots(struct planner *l)
{
	struct prog *p = l->p;
	p->bytes[R_TEMP] = l->temp.end;
	p->batch_stride = p->bytes[R_BATCH];
	p->bytes[R_BATCH] *= at_least_one(p->batch_slots);
	p->edge_stride = p->bytes[R_EDGE];
	p->bytes[R_EDGE] *= at_least_one(p->edge_slots);
	for (int c = 0; c < PROG_MAX_CHUNKS; c++) {
		p->saved_base[c] = p->bytes[R_SAVED];
		p->saved_stride[c] = l->saved[c].end;
		p->bytes[R_SAVED] += l->saved[c].end * at_least_one(p->saved_slots[c]);
	}
}

/* From offsets within homes, and within chunks, to offsets within regions. */
static void finish_offsets(struct planner *l, const int64_t *inside)
{
	struct prog *p = l->p;
	for (size_t v = 0; v < p->n_value; v++) {
		struct value *x = &p->value[v];
		int32_t writer = l->p->value[x->home].given ? x->last : x->def;
		if (x->home == (int32_t)v && x->region == R_SAVED && writer != NONE)
			x->offset_bytes += p->saved_base[p->node[writer].chunk];
	}
	for (size_t v = 0; v < p->n_value; v++)
		if (p->value[v].home != (int32_t)v)
			p->value[v].offset_bytes = p->value[p->value[v].home].offset_bytes + inside[v];
}

static void heap_open(struct heap *h)
{
	*h = (struct heap){.n_hole = 1};
	h->hole = mem_grow(NULL, 0, &h->cap_hole, sizeof *h->hole);
	h->hole[0] = (struct hole){0, INT64_MAX / 2};
}

static void plan_memory(struct planner *l)
{
	struct prog *p = l->p;
	set_homes(l);
	share_memory(l);
	choose_regions(l);
	int64_t *inside = mem_array(p->n_value, sizeof *inside);
	for (size_t v = 0; v < p->n_value; v++)
		inside[v] = p->value[v].offset_bytes;
	bump_regions(l);
	place_given(l);
	place_by_lifetime(l);
	multiply_slots(l);
	finish_offsets(l, inside);
	free(inside);
}

int prog_plan(struct prog *p)
{
	if (p->e.code)
		return p->e.code;
	struct planner l = {.p = p,
	                    .parent = mem_array(p->n_value, sizeof *l.parent),
	                    .first = mem_array(p->n_value, sizeof *l.first),
	                    .until = mem_array(p->n_value, sizeof *l.until)};
	prog_refresh(p);
	memset(p->bytes, 0, sizeof p->bytes);
	heap_open(&l.temp);
	for (int c = 0; c < PROG_MAX_CHUNKS; c++)
		heap_open(&l.saved[c]);
	plan_memory(&l);
	free(l.temp.hole);
	for (int c = 0; c < PROG_MAX_CHUNKS; c++)
		free(l.saved[c].hole);
	free(l.parent);
	free(l.first);
	free(l.until);
	return 0;
}
