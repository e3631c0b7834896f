/* Communication beside computation. A collective is begun where its operand is ready and waited for where its
 * result is needed; between the two stands work that needs neither: in backward the weight gradients (the
 * all-reduce of the input gradient beside them, Shoeybi et al. 2019), for reductions of gradients the rest of
 * backward. */
#include "graph/rule.h"

#include <stdlib.h>
#include <string.h>

/* A collective whose result is another value, not a renaming. */
static bool is_collective(const struct node *n)
{
	return op_rows[n->op].flags & COMM && !(op_rows[n->op].flags & (ALIAS | UPDATES));
}

static bool gives_sums_alone(const struct prog *p, const struct node *n)
{
	bool all = op_rows[n->op].n_out > 0;
	for (int k = 0; k < op_rows[n->op].n_out; k++)
		all &= p->value[n->out[k]].sums;
	return all;
}

static void append(struct prog *p, const struct node *n)
{
	p->node = mem_grow(p->node, p->n_node, &p->cap_node, sizeof *p->node);
	p->node[p->n_node++] = *n;
}

static void flush(struct prog *p, const struct node *held, size_t *n_held)
{
	for (size_t i = 0; i < *n_held; i++)
		append(p, &held[i]);
	*n_held = 0;
}

/* Does n read what a held node writes, or the pack that it is a part of? */
static bool needs(const struct prog *p, const struct node *n, const struct node *held, size_t n_held)
{
	for (size_t i = 0; i < n_held; i++)
		for (int o = 0; o < op_rows[held[i].op].n_out; o++)
			for (int k = 0; k < op_rows[n->op].n_in; k++)
				if (n->in[k] != NONE &&
				    (n->in[k] == held[i].out[o] || n->in[k] == p->value[held[i].out[o]].of))
					return true;
	return false;
}

/* Weight gradients between one collective of backward and the next move behind the latter. */
static void put_weights_behind(struct prog *p)
{
	struct node *old = p->node, *held = mem_array(p->n_node + 1, sizeof *held);
	size_t n_old = p->n_node, n_held = 0;
	p->node = NULL;
	p->n_node = p->cap_node = 0;
	for (size_t i = 0; i < n_old; i++) {
		const struct node *n = &old[i];
		if (n_held &&
		    (n->segment != SEG_BWD || n->chunk != held[0].chunk || needs(p, n, held, n_held)))
			flush(p, held, &n_held);
		if (n->segment == SEG_BWD && gives_sums_alone(p, n)) {
			held[n_held++] = *n;
			continue;
		}
		append(p, n);
		if (n->segment == SEG_BWD && is_collective(n))
			flush(p, held, &n_held);
	}
	flush(p, held, &n_held);
	free(old);
	free(held);
	prog_refresh(p);
}

static bool reads(const struct node *n, int32_t v)
{
	for (int k = 0; k < op_rows[n->op].n_in; k++)
		if (n->in[k] == v)
			return true;
	return false;
}

static size_t first_reader(const struct node *node, size_t n, size_t from, int32_t v)
{
	while (from < n && !reads(&node[from], v))
		from++;
	return from;
}

/* Exchanges that their builder wants to run beside others stand, in backward, right in front of what reads
 * them (computed again) or right behind what they carry (its gradient's way home): one piece of work is put
 * between. */

static bool is_work(const struct prog *p, const struct node *n)
{
	return rules[n->op]->cost(p, n).flop > 0 && !(op_rows[n->op].flags & COMM) && n->op != OP_add;
}

static bool writes_for(const struct node *n, const struct node *reader)
{
	for (int k = 0; k < op_rows[n->op].n_out; k++)
		if (reads(reader, n->out[k]))
			return true;
	return false;
}

static bool same_turn(const struct node *a, const struct node *b)
{
	return a->segment == b->segment && a->chunk == b->chunk;
}

/* Moves node i up past one piece of work. */
static void begin_sooner(struct prog *p, size_t i)
{
	size_t at = i;
	for (bool passed = false; at > 0 && !passed; at--) {
		const struct node *above = &p->node[at - 1];
		if (!same_turn(above, &p->node[i]) || writes_for(above, &p->node[i]))
			break;
		passed = is_work(p, above);
	}
	struct node moved = p->node[i];
	memmove(&p->node[at + 1], &p->node[at], (i - at) * sizeof *p->node);
	p->node[at] = moved;
}

/* Moves the sum that takes the result of node i down to what reads the sum. */
static void add_later(struct prog *p, size_t i)
{
	size_t at = i + 1;
	if (at >= p->n_node || p->node[at].op != OP_add || !writes_for(&p->node[i], &p->node[at]))
		return;
	struct node sum = p->node[at];
	size_t to = at;
	while (to + 1 < p->n_node && same_turn(&p->node[to + 1], &sum) &&
	       !reads(&p->node[to + 1], sum.out[0]))
		to++;
	memmove(&p->node[at], &p->node[at + 1], (to - at) * sizeof *p->node);
	p->node[to] = sum;
}

static void make_room(struct prog *p)
{
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		if (!is_collective(n) || !n->arg.comm.begins || n->segment != SEG_BWD)
			continue;
		if (i + 1 < p->n_node && writes_for(n, &p->node[i + 1]) && p->node[i + 1].op != OP_add)
			begin_sooner(p, i);
		else
			add_later(p, i);
	}
	prog_refresh(p);
}

struct waits { /* by node: the collectives to wait for before it, as a list of node numbers + 1 */
	int32_t *head, *next;
};

/* Those of the segments, and those that their builder wants to run beside others. One whose result is needed
 * at once stays as it is. One that the next collective of a chain reads
 * needs no wait of its own, since they go through one queue; its operands must then be memory that nobody
 * else takes. */
static void choose(struct prog *p, uint32_t segments, struct waits *w)
{
	for (size_t i = 0; i < p->n_node; i++) {
		struct node *n = &p->node[i];
		bool wanted = is_collective(n) && (n->arg.comm.begins || segments >> n->segment & 1);
		if (!wanted)
			continue;
		n->arg.comm.begins = 0;
		size_t reader = first_reader(p->node, p->n_node, i + 1, n->out[0]);
		if (reader == p->n_node)
			continue;
		bool chain = is_collective(&p->node[reader]);
		bool lasting = p->value[n->in[0]].region == R_GRAD && p->value[n->out[0]].region == R_GRAD;
		if (chain ? !lasting : reader == i + 1)
			continue;
		n->arg.comm.begins = 1;
		if (!chain) {
			w->next[i] = w->head[reader];
			w->head[reader] = (int32_t)i + 1;
		}
	}
}

/* Emits the wait for a collective in front of node `at` of the old order; that and later nodes read what it
 * gives. */
static void wait_for(struct prog *p, const struct node *from, struct node *old, size_t at, size_t n_old)
{
	p->segment = old[at].segment;
	p->chunk = old[at].chunk;
	p->layer = old[at].layer;
	int32_t ready = EMIT(p, wait, NO_ARG, from->out[0], from->in[0], from->in[1]);
	for (size_t j = at; j < n_old; j++)
		for (int k = 0; k < op_rows[old[j].op].n_in; k++)
			if (old[j].in[k] == from->out[0])
				old[j].in[k] = ready;
}

static void insert_waits(struct prog *p, uint32_t segments)
{
	size_t n_old = p->n_node;
	struct waits w = {mem_array(n_old + 1, sizeof *w.head), mem_array(n_old + 1, sizeof *w.next)};
	choose(p, segments, &w);
	struct node *old = p->node;
	p->node = NULL;
	p->n_node = p->cap_node = 0;
	for (size_t i = 0; i < n_old && !p->e.code; i++) {
		for (int32_t k = w.head[i]; k; k = w.next[k - 1])
			wait_for(p, &old[k - 1], old, i, n_old);
		append(p, &old[i]);
	}
	p->chunk = 0;
	p->layer = -1;
	free(old);
	free(w.head);
	free(w.next);
	prog_refresh(p);
}

int prog_overlap(struct prog *p, uint32_t segments)
{
	if (p->e.code)
		return p->e.code;
	if (segments & SEG_BIT(BWD))
		put_weights_behind(p);
	make_room(p);
	insert_waits(p, segments);
	return p->e.code;
}
