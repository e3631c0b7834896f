/* pentad plan --search: the layouts that are likely fastest, side by side. */
#include "apps/plan.h"
#include "base/err.h"
#include "base/text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SHOWN = 10 };

struct search {
	const struct plan_request *q;
	struct config given, open; /* as it is read; the same with an open layout */
	struct auto_machine machine;
	struct auto_search found;
	struct auto_candidate now; /* the layout that the files give */
	bool has_now;
	uint32_t axes; /* over which any of the layouts shown sends */
};

/* Finding */

/* The files' own layout may be impossible for so many ranks: here that is no error. */
static void price_given(struct search *s)
{
	struct estimate x = {0};
	struct err ignored = {0};
	if (s->given.parallel.layout == PARALLEL_AUTO || config_check(&s->given, s->machine.world, &ignored))
		return;
	s->now.layout = auto_layout_of(&s->given);
	s->has_now = !estimate_layout(&x, &s->given, s->machine.ranks_per_node, &ignored) &&
	             !auto_price(&s->now.cost, &s->machine, &s->given, &x, &ignored);
	estimate_free(&x);
}

static int find(struct search *s, struct err *e)
{
	int rc = auto_open(&s->open, e);
	if (!rc)
		rc = config_check(&s->open, s->machine.world, e);
	if (!rc && !config_layout_is_open(&s->open))
		rc = err_set(
		        e, EXIT_CONFIG,
		        "plan --search: every size of the layout is given; leave out what may be chosen");
	if (!rc)
		rc = plan_measure(&s->open, &s->machine, e);
	if (rc)
		return rc;
	price_given(s);
	return auto_search(&s->found, &s->open, &s->machine, e);
}

static size_t n_shown(const struct search *s)
{
	return s->found.n < SHOWN ? s->found.n : SHOWN;
}

static bool is_given(const struct search *s, const struct auto_candidate *k)
{
	return s->has_now && !memcmp(&s->now.layout, &k->layout, sizeof k->layout);
}

static bool shows_given(const struct search *s)
{
	bool shown = !s->has_now;
	for (size_t i = 0; i < n_shown(s); i++)
		shown |= is_given(s, &s->found.examined[i]);
	return shown;
}

/* For people */

static void note_axes(struct search *s, const struct auto_cost *cost)
{
	for (int a = 0; a < AXIS_COUNT; a++)
		s->axes |= cost->wire_bytes[a] > 0 ? 1u << a : 0;
}

static void print_head(const struct search *s)
{
	printf("  %4s %-12s %4s %-17s %4s %4s %5s %9s %10s %-4s %7s", "tp", "cp", "pp", "schedule", "ep",
	       "etp", "dp", "time", "a rank", "fits", "bubble");
	for (int a = 0; a < AXIS_COUNT; a++)
		if (s->axes >> a & 1) {
			char name[16];
			snprintf(name, sizeof name, "sent, %s", mesh_axis_name((enum mesh_axis)a));
			printf(" %9s", name);
		}
	printf("\n");
}

static const char *schedule_word(const struct auto_layout *l, char out[32])
{
	const char *word = l->pp > 1 ? parallel_schedule_choices[l->schedule].name : "-";
	snprintf(out, 32, l->chunks > 1 ? "%s, %lld" : "%s", word, (long long)l->chunks);
	return out;
}

static void print_row(const struct search *s, const struct auto_candidate *k)
{
	const struct auto_layout *l = &k->layout;
	char text[32], cp[32];
	snprintf(cp, sizeof cp, l->cp > 1 ? "%lld %s" : "%lld", (long long)l->cp,
	         parallel_cp_comm_choices[l->exchange].name);
	printf("%c %4lld %-12s %4lld %-17s %4lld %4lld %5lld", is_given(s, k) ? '*' : ' ', (long long)l->tp,
	       cp, (long long)l->pp, schedule_word(l, text), (long long)l->ep, (long long)l->etp,
	       s->machine.world / (long long)(l->tp * l->cp * l->pp));
	printf(" %9s", text_seconds(text, sizeof text, k->cost.step_s));
	printf(" %10s %-4s %5.1f %%", text_bytes(text, sizeof text, (double)k->cost.rank_bytes),
	       k->cost.fits ? "yes" : "NO", 100 * k->cost.bubble);
	for (int a = 0; a < AXIS_COUNT; a++)
		if (s->axes >> a & 1)
			printf(" %9s", text_bytes(text, sizeof text, k->cost.wire_bytes[a]));
	printf("\n");
}

static void print_table(struct search *s)
{
	for (size_t i = 0; i < n_shown(s); i++)
		note_axes(s, &s->found.examined[i].cost);
	if (!shows_given(s))
		note_axes(s, &s->now.cost);
	print_head(s);
	for (size_t i = 0; i < n_shown(s); i++)
		print_row(s, &s->found.examined[i]);
	if (!shows_given(s))
		print_row(s, &s->now);
	printf("  a rank: memory of the fullest; sent: by a rank, a step%s\n",
	       s->has_now ? "; * as configured" : "");
}

static void print_judgement(const struct search *s)
{
	const struct auto_search *f = &s->found;
	const struct auto_machine *m = &s->machine;
	char node[32];
	printf("%zu legal layouts of %d ranks, %d on a node of %s; %zu do not fit by weights, gradients and "
	       "optimizer "
	       "state alone\n",
	       f->legal, m->world, m->ranks_per_node, text_bytes(node, sizeof node, (double)m->node_bytes),
	       f->too_large);
	printf("of the rest the %zu most promising were built: %zu fit, %zu do not by their activations\n",
	       f->n, f->fitting, f->n - f->fitting);
	printf("times: %.3g Tflop/s a rank (%s), %.3g GB/s a rank within a node, %.3g between nodes, %.3g µs "
	       "a "
	       "collective (dist.link_*)\n",
	       m->rate / 1e12,
	       s->q->tflops > 0 ? "--tflops" : "matrix products of this machine, now; --tflops",
	       m->within_node / 1e9, m->between_nodes / 1e9, 1e6 * m->latency_s);
}

static void print_people(struct search *s)
{
	struct buf b = {0};
	print_table(s);
	print_judgement(s);
	(s->found.fitting ? auto_put_reason : auto_put_remedies)(&b, &s->found, &s->open);
	puts(b.data);
	buf_free(&b);
}

/* For programs */

static void put_candidate(struct buf *b, const struct search *s, const struct auto_candidate *k)
{
	buf_puts(b, "{");
	plan_put_layout(b, &k->layout, s->machine.world);
	plan_put_number(b, "seconds_per_step", k->cost.step_s);
	plan_put_number(b, "bubble", k->cost.bubble);
	buf_printf(b,
	           ", \"memory_bytes\": %lld, \"node_bytes\": %lld, \"fits\": %s, \"wire_bytes_per_step\": ",
	           (long long)k->cost.rank_bytes, (long long)k->cost.node_bytes,
	           k->cost.fits ? "true" : "false");
	plan_put_wire(b, k->cost.wire_bytes);
	buf_puts(b, "}");
}

static void print_json(struct search *s)
{
	const struct auto_search *f = &s->found;
	const struct auto_machine *m = &s->machine;
	struct buf b = {0};
	buf_printf(&b,
	           "{\"world_size\": %d, \"ranks_per_node\": %d, \"node_limit_bytes\": %lld, \"legal\": %zu, "
	           "\"too_large\": %zu, \"built\": %zu, \"fitting\": %zu",
	           m->world, m->ranks_per_node, (long long)m->node_bytes, f->legal, f->too_large, f->n,
	           f->fitting);
	plan_put_number(&b, "tflops_per_rank", m->rate / 1e12);
	plan_put_number(&b, "gbs_within_node", m->within_node / 1e9);
	plan_put_number(&b, "gbs_between_nodes", m->between_nodes / 1e9);
	plan_put_number(&b, "latency_us", 1e6 * m->latency_s);
	buf_puts(&b, ", \"layouts\": [");
	for (size_t i = 0; i < n_shown(s); i++) {
		buf_puts(&b, i ? ", " : "");
		put_candidate(&b, s, &f->examined[i]);
	}
	buf_puts(&b, "], \"configured\": ");
	if (s->has_now)
		put_candidate(&b, s, &s->now);
	buf_puts(&b, s->has_now ? "}" : "null}");
	puts(b.data);
	buf_free(&b);
}

int plan_search(const struct plan_request *q, struct err *e)
{
	struct search *s = mem_array(1, sizeof *s);
	s->q = q;
	int rc = plan_read(q, &s->given, &s->machine, e);
	if (!rc) {
		config_copy(&s->open, &s->given);
		rc = find(s, e);
	}
	if (!rc) {
		(q->json ? print_json : print_people)(s);
		rc = !s->found.fitting;
	}
	auto_free(&s->found);
	config_free(&s->open);
	config_free(&s->given);
	free(s);
	return rc;
}
