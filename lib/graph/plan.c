/* Memory: who shares with whom, what is saved for backward, and where everything lies. */
#include "graph/prog.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGN_BYTES = 64 };

struct hole {
	int64_t at, length;
};

struct planner {
	struct prog *p;
	int32_t *last; /* by home: last reader of any value that lives there */
	struct hole *hole;
	size_t n_hole, cap_hole;
};

static int64_t aligned(int64_t bytes)
{
	return (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
}

/* May output 0 of node i be written on top of its input k? */
static bool may_share(const struct prog *p, const struct node *n, int32_t i, int k)
{
	static const uint8_t flag[] = {IN_PLACE_0, IN_PLACE_1};
	if (!(op_rows[n->op].flags & flag[k]) || n->in[k] == NONE || n->in[k] == n->in[!k])
		return false;
	const struct value *in = &p->value[n->in[k]], *out = &p->value[n->out[0]];
	bool own = in->region >= R_SAVED ||
	           (op_rows[n->op].flags & COMM && (in->region == R_GRAD || in->region == R_STAT));
	return own && in->last == i && value_bytes(in) == value_bytes(out) && out->home == n->out[0];
}

static void share_memory(struct planner *l)
{
	struct prog *p = l->p;
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		for (int k = 0; k < 2; k++) {
			if (!may_share(p, n, (int32_t)i, k))
				continue;
			struct value *out = &p->value[n->out[0]];
			out->home = p->value[n->in[k]].home;
			out->region = p->value[out->home].region;
			break;
		}
	}
	for (size_t v = 0; v < p->n_value; v++) {
		int32_t home = p->value[v].home;
		int32_t end = p->value[v].last == NONE ? p->value[v].def : p->value[v].last;
		if (end > l->last[home])
			l->last[home] = end;
	}
}

/* What forward writes and backward reads is saved; what shares its memory goes along. */
static void choose_regions(struct planner *l)
{
	struct prog *p = l->p;
	for (size_t v = 0; v < p->n_value; v++) {
		struct value *x = &p->value[v];
		if (x->home != (int32_t)v || x->region != R_TEMP || x->def == NONE || l->last[v] == NONE)
			continue;
		if (p->node[x->def].segment == SEG_FWD && p->node[l->last[v]].segment != SEG_FWD)
			x->region = R_SAVED;
	}
	for (size_t v = 0; v < p->n_value; v++)
		p->value[v].region = p->value[p->value[v].home].region;
}

static void bump_regions(struct planner *l)
{
	struct prog *p = l->p;
	for (size_t v = 0; v < p->n_value; v++) {
		struct value *x = &p->value[v];
		if (x->region == R_TEMP || x->home != (int32_t)v)
			continue;
		x->offset_bytes = p->bytes[x->region];
		p->bytes[x->region] += aligned(value_bytes(x));
	}
}

/* Best fit among the holes; the last hole is endless. */
static int64_t take(struct planner *l, int64_t need)
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

static void give(struct planner *l, int64_t at, int64_t length)
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

/* Values that die at node i, through any value that shares their memory; each home is given back once. */
static void release(struct planner *l, int32_t v, int32_t i)
{
	if (v == NONE)
		return;
	int32_t home = l->p->value[v].home;
	if (l->p->value[home].region != R_TEMP || l->last[home] != i)
		return;
	l->last[home] = NONE;
	give(l, l->p->value[home].offset_bytes, aligned(value_bytes(&l->p->value[home])));
}

static void place_temporaries(struct planner *l)
{
	struct prog *p = l->p;
	l->hole = mem_grow(NULL, 0, &l->cap_hole, sizeof *l->hole);
	l->hole[l->n_hole++] = (struct hole){0, INT64_MAX / 2};
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		for (int k = 0; k < op_rows[n->op].n_out; k++) {
			struct value *v = &p->value[n->out[k]];
			if (v->region != R_TEMP || v->home != n->out[k] || v->def != (int32_t)i)
				continue;
			v->offset_bytes = take(l, aligned(value_bytes(v)));
			int64_t end = v->offset_bytes + aligned(value_bytes(v));
			if (end > p->bytes[R_TEMP])
				p->bytes[R_TEMP] = end;
		}
		for (int k = 0; k < op_rows[n->op].n_in; k++)
			release(l, n->in[k], (int32_t)i);
		for (int k = 0; k < op_rows[n->op].n_out; k++)
			release(l, n->out[k], (int32_t)i);
	}
	for (size_t v = 0; v < p->n_value; v++)
		p->value[v].offset_bytes = p->value[p->value[v].home].offset_bytes;
}

int prog_plan(struct prog *p)
{
	if (p->e.code)
		return p->e.code;
	struct planner l = {.p = p, .last = mem_array(p->n_value, sizeof *l.last)};
	prog_refresh(p);
	memset(p->bytes, 0, sizeof p->bytes);
	for (size_t v = 0; v < p->n_value; v++) {
		l.last[v] = NONE;
		p->value[v].home = (int32_t)v;
	}
	share_memory(&l);
	choose_regions(&l);
	bump_regions(&l);
	place_temporaries(&l);
	free(l.last);
	free(l.hole);
	return 0;
}
